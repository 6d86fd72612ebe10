"""Looking for the owner in the ring, and after allocation: what the measurement says must be so with every pool."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from pools.arena import PAGE_SHIFT
from pools.base import names
from ustack.cli import main
from ustack.lab.classification import FRAMES, last_gets_through, measure
from ustack.stack import RX_BUDGET

SMALL, LARGE = FRAMES


@pytest.mark.parametrize("pool", names())
def test_in_the_ring_a_frame_for_nobody_costs_no_memory_and_one_frame_of_reserve_is_enough(pool: str) -> None:
    saving = measure(pool, SMALL, batches=3)
    assert saving.held_in_ring == 0
    assert saving.held_after >= RX_BUDGET * FRAMES[SMALL]
    assert saving.reserve_in_ring <= 4, "one datagram: head, buffer, and what describes a slab"
    assert saving.reserve_after >= RX_BUDGET * FRAMES[SMALL] >> PAGE_SHIFT
    assert last_gets_through(pool, FRAMES[SMALL], saving.reserve_in_ring, early=False)
    assert not last_gets_through(pool, FRAMES[SMALL], saving.reserve_after - 1, early=True)


@pytest.mark.parametrize("pool", names())
def test_with_super_frames_it_is_the_difference_between_kilobytes_and_megabytes(pool: str) -> None:
    frame = FRAMES[LARGE] >> PAGE_SHIFT
    assert last_gets_through(pool, FRAMES[LARGE], frame + 5, early=False)
    assert not last_gets_through(pool, FRAMES[LARGE], RX_BUDGET * (frame - 1), early=True)


def test_the_command_prints_what_was_measured() -> None:
    done = CliRunner().invoke(main, ["pressure", "classification", "--pool", "srog", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["frame"] for row in rows] == list(FRAMES)
    assert all(row["reserve_in_ring"] < row["reserve_after"] for row in rows)


def test_a_pool_that_there_is_not_is_a_mistake() -> None:
    done = CliRunner().invoke(main, ["pressure", "classification", "--pool", "slub"])
    assert done.exit_code == 2
    assert "there is no pool 'slub'" in done.output
