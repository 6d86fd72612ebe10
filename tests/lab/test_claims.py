"""The claims of 2006: each experiment comes to the same word whatever the seed, and its figures are those that it says."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from pools.arena import PAGE_SHIFT
from tests import leaks
from ustack.cli import main
from ustack.lab.claims.groups import formula
from ustack.lab.claims.packing import fullness
from ustack.lab.claims.pages import broken_arena, compact
from ustack.lab.claims.registry import SEED, Terms, claims
from ustack.lab.claims.sharing import copied
from ustack.lab.trace import Replay, make_pool
from ustack.lab.traffic import grains

VERDICTS = {
    1: "true",
    2: "partly",
    3: "partly",
    4: "true",
    5: "partly",
    6: "partly",
    7: "true",
    8: "partly",
    9: "partly",
    10: "false",
    11: "partly",
    12: "false",
    13: "true",
    14: "partly",
    15: "true",
    16: "partly",
    17: "true",
    18: "true",
    19: "true",
    20: "false",
    21: "true",
    22: "partly",
    23: "true",
    24: "true",
    25: "partly",
    26: "true",
    27: "partly",
    28: "true",
    29: "partly",
    30: "true",
    31: "true",
    32: "partly",
    33: "partly",
    34: "partly",
    35: "true",
    36: "false",
    37: "partly",
    38: "true",
    39: "partly",
    40: "true",
    41: "false",
    42: "true",
    43: "partly",
    44: "true",
    45: "true",
    46: "true",
}
"""What the experiments say. One that changes its mind is a discovery, in the pool or in the experiment."""

AGAINST_THE_PRIOR = {1, 26, 29, 31, 34, 45}
"""Claims where the measurement is not what was expected beforehand."""


@pytest.mark.parametrize("number", VERDICTS)
@pytest.mark.parametrize("traffic", [1, 2, 3])
def test_the_verdict_does_not_depend_on_the_seed(number: int, traffic: int) -> None:
    (claim,) = claims([number])
    outcome = claim.measure(Terms(traffic))
    assert outcome.verdict == VERDICTS[number], outcome.finding
    assert bool(outcome.contradicts) == (number in AGAINST_THE_PRIOR), outcome.contradicts


def test_every_claim_that_can_be_measured_is_in_this_test() -> None:
    assert [claim.number for claim in claims()] == list(VERDICTS)


@pytest.mark.parametrize("number", [number for number in VERDICTS if number not in (35, 36)])
def test_the_same_seed_gives_the_same_figures(number: int) -> None:
    (claim,) = claims([number])
    assert not claim.timed
    assert claim.measure(Terms(7)) == claim.measure(Terms(7))


def figures(number: int) -> Any:
    (claim,) = claims([number])
    return claim.measure(Terms()).figures


# Figures that can be worked out by hand, or that were quoted in the thread


def test_59_objects_of_64_bytes_fill_a_page() -> None:
    assert figures(17) == {"objects": 59}


def test_the_pages_of_size_64_are_those_of_the_thread() -> None:
    measured = figures(18)
    assert (measured["burst"]["objects"], measured["burst"]["pages"], measured["burst"]["pages needed"]) == (9558, 162, 72)
    assert (measured["hardly changed"]["objects"], measured["hardly changed"]["pages"]) == (4602, 78)


def test_a_jumbo_frame_loses_7046_bytes_6_or_2950() -> None:
    assert figures(21)["bytes lost"]["9338"] == {"powers of two": 7046, "nta": 6, "pages": 2950}


def test_copies_of_alternating_sockets() -> None:
    assert copied([0, 1] * 100, 2048) == (0.5, 1.0)
    assert copied([0, 0, 1, 1] * 50, 2048) == (0.0, 0.0)
    assert copied([0, 1, 1, 1] * 50, 1024) == (0.75, 1.0)


@pytest.mark.parametrize(
    ("sizes", "pages"),
    [
        ([1834, 232], 1),
        ([1834, 232, 232, 232], 1),
        ([3800, 232], 1),  # 48 and 3808 leave 240: what a head takes, to the byte
        ([3801, 232], 2),
        ([4096], 2),
        ([9338, 232], 4),
    ],
)
def test_the_formula_against_the_pool(sizes: list[int], pages: int) -> None:
    pool = leaks.watch_pool(make_pool("srog", 64))
    data = pool.alloc(sizes[0], 0)
    heads = [pool.alloc_head(0, 0, data) for _ in sizes[1:]]
    assert formula(sizes) == pool.held_pages() == pages
    for head in heads:
        pool.free_head(head)
    pool.free(data, sizes[0])


def test_compaction_moves_objects_and_their_handles_find_them() -> None:
    random = Random(5)
    run = Replay(leaks.watch_pool(make_pool("kmalloc", 512, lanes=1)), heads=False)
    for number in range(59 * 20):
        run.alloc(number, 64)
    for number in random.sample(range(59 * 20), 59 * 15):
        run.free(number)
    mem = run.pool.pages.arena.mem
    for number, packet in run.live.items():
        mem[packet.addr : packet.addr + 2] = number.to_bytes(2, "big")
    compact(run)
    assert run.pool.held_pages() == 5
    assert len({packet.addr >> PAGE_SHIFT for packet in run.live.values()}) == 5
    for number, packet in run.live.items():
        assert mem[packet.addr : packet.addr + 2] == number.to_bytes(2, "big")
    run.clear()


def test_a_broken_arena_has_the_share_free_that_was_asked_for() -> None:
    allocator = broken_arena(1000, 0.25, Random(1))
    assert allocator.free_pages == 250
    allocator.check()


def test_fullness_is_a_share_and_its_least_is_below_its_mean() -> None:
    mean, least = fullness(make_pool("nta", 258, lanes=1), grains, failures=50, seed=1)
    assert 0.5 < least <= mean < 1


# The command


def test_json_is_a_list_of_objects_with_the_promised_keys() -> None:
    done = CliRunner().invoke(main, ["pressure", "claims", "--only", "19,17", "--json"])
    assert done.exit_code == 0
    first, second = json.loads(done.stdout)
    assert list(first) == ["number", "who", "claim", "measured", "verdict", "repeat"]
    assert (first["number"], second["number"]) == (17, 19)
    assert first["verdict"] == "true"


def test_the_command_that_repeats_a_measurement_repeats_it() -> None:
    args = ["pressure", "claims", "--json", "--seed", "5", "--only", "22"]
    (told,) = json.loads(CliRunner().invoke(main, args).stdout)
    assert told["repeat"] == "ustack pressure claims --only 22 --seed 5"
    (again,) = json.loads(CliRunner().invoke(main, [*told["repeat"].split()[1:], "--json"]).stdout)
    assert again == told
    (other,) = json.loads(CliRunner().invoke(main, [*args[:3], "--seed", str(SEED), "--only", "22"]).stdout)
    assert other["measured"] != told["measured"]


def test_the_table_has_a_line_for_each_claim() -> None:
    done = CliRunner().invoke(main, ["pressure", "claims", "--only", "17,20"])
    assert done.exit_code == 0
    assert "59 objects of 64 bytes" in " ".join(done.stdout.split())
    assert "false" in done.stdout


@pytest.mark.parametrize("only", ["47", "17,999", "x", ""])
def test_a_claim_that_cannot_be_measured_is_a_usage_error(only: str) -> None:
    assert CliRunner().invoke(main, ["pressure", "claims", "--only", only]).exit_code == 2
