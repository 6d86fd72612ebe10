"""What is worked out for the reserve is enough in the worst moments, and half of it is not: claim 46, in a few runs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ustack.cli import main
from ustack.lab.reserve_bisection import GOOD_WIRE, POOLS, RUNS, Run, bisect, run, worked_out
from ustack.mem.reserve import Demand

pytestmark = pytest.mark.sim

each_pool = pytest.mark.parametrize("pool", POOLS)
each_ring = pytest.mark.parametrize("linear", [False, True], ids=["paged", "linear"])


@each_ring
@each_pool
def test_nothing_waits_for_memory_with_what_is_worked_out_and_something_does_with_half(pool: str, linear: bool) -> None:
    pages = worked_out(pool, linear)
    assert run(1, pool, linear, pages, reads=1.0, wire=GOOD_WIRE, requests=160).served
    assert run(1, pool, linear, pages, reads=0.0, wire=GOOD_WIRE, requests=64).served
    assert not run(1, pool, linear, pages // 2 - 1, reads=0.0, wire=GOOD_WIRE, requests=64).served


@each_pool
def test_nor_does_anything_with_few_and_small_requests(pool: str) -> None:
    demand = Demand(1, 4096)
    pages = worked_out(pool, False, demand)
    assert pages < 16
    assert run(1, pool, False, pages, reads=0.5, wire=GOOD_WIRE, requests=24, demand=demand).served


def test_fragments_that_are_free_beside_others_that_are_not_are_counted() -> None:
    demand = Demand(1, 4096)
    pages = worked_out("page_frag", True, demand)
    for reads, wire in RUNS:
        done = run(2, "page_frag", True, pages, reads=reads, wire=wire, demand=demand)
        assert (done.refused, done.throttled) == (0, 0)


def test_a_demand_of_more_than_the_limits_of_tcp_is_bounded_by_them() -> None:
    assert worked_out("kmalloc", False, Demand(64, 1 << 20)) < 3 * (6 << 20) >> 12


def test_with_a_little_memory_everything_still_gets_done() -> None:
    done = run(1, "kmalloc", False, 24, reads=0.5, wire=GOOD_WIRE, requests=64)
    assert done.done
    assert done.throttled > 0


def test_bisection_finds_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ustack.lab.reserve_bisection.all_runs", lambda seeds, pool, linear, pages, demand: [Run(pages >= 37, 0, 0)]
    )
    assert bisect("any", False, [1], lambda each: each.done, 100) == 37
    assert bisect("any", False, [1], lambda each: each.refused > 0, 100) == 101


def test_the_command_says_which_pools_there_are() -> None:
    done = CliRunner().invoke(main, ["pressure", "reserve", "--pool", "slub"])
    assert done.exit_code == 2
    assert "srog, fallback" in done.output


def test_the_command_prints_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ustack.lab import reserve_bisection

    monkeypatch.setattr(
        reserve_bisection,
        "find",
        lambda pool, linear, seeds, demand: reserve_bisection.Found(pool, linear, 200, demand.queue_depth, len(list(seeds))),
    )
    done = CliRunner().invoke(main, ["pressure", "reserve", "--pool", "srog", "--requests", "110", "--seeds", "3", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["linear"] for row in rows] == [False, True]
    assert rows[0] == {"pool": "srog", "linear": False, "worked_out": 200, "serves": 110, "lives": 3, "ratio": 200 / 110}
