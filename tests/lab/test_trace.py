"""Traces: the replayer against figures worked out by hand, the text format, and traffic that is the same for the same seed."""

from __future__ import annotations

import pytest

from pools.base import names
from tests import leaks
from ustack.lab.trace import Figures, Replay, Step, Trace, loads, make_pool, replay
from ustack.lab.traffic import GRAINS, MTU_FRAME, burst, churn, grains, mtu_and_ack, standing, workloads

TWO_FRAMES = Trace("two", (Step(0, 1834), Step(1, 1834), Step(0, 0)))
"""Two Ethernet frames with their heads come, and the first one goes."""


@pytest.mark.parametrize(
    ("name", "options", "peak", "end"),
    [
        # Two objects of 2048 on one page, two heads of 256 on another, and a page for the bookkeeping of the first (size-64).
        ("kmalloc", {"lanes": 1}, (4132, 2 * 2048 + 2 * 256, 3), (2066, 2048 + 256, 3)),
        # Grains of 64; eight regions of 32 KiB and a page of descriptors are there from the start.
        ("nta", {"lanes": 1}, (4132, 2 * (1856 + 256), 65), (2066, 1856 + 256, 65)),
        ("srog", {}, (4132, 2 * 4096, 2), (2066, 4096, 1)),
        ("page_per_object", {}, (4132, 4 * 4096, 4), (2066, 2 * 4096, 2)),
        # A block of 32 KiB and a page of heads.
        ("page_frag", {"lanes": 1}, (4132, 2 * (1856 + 256), 9), (2066, 1856 + 256, 9)),
    ],
)
def test_two_frames_come_and_one_goes(
    name: str, options: dict[str, int], peak: tuple[int, int, int], end: tuple[int, int, int]
) -> None:
    result = replay(TWO_FRAMES, name, 512, **options)
    assert result.end == Figures(*end)
    assert (result.peak.requested, result.peak.charged, result.peak.pages) == peak
    assert result.failures == 0


def test_means_are_over_the_steps() -> None:
    mean = replay(TWO_FRAMES, "page_per_object", 64).mean
    assert mean == Figures((2066 + 4132 + 2066) / 3, (2 + 4 + 2) * 4096 / 3, (2 + 4 + 2) / 3)


def test_what_is_lost_inside_and_what_between() -> None:
    figures = Figures(requested=3000, charged=4000, pages=2)
    assert figures.internal == 0.25
    assert figures.external == pytest.approx(1 - 4000 / 8192)
    assert 1 - figures.waste == pytest.approx((1 - figures.internal) * (1 - figures.external))
    assert Figures(0, 0, 0).waste == 0


def test_a_packet_that_is_refused_counts_once_and_its_free_is_nobodys() -> None:
    trace = Trace("tight", (Step(0, 4096), Step(1, 4096), Step(2, 4096), Step(2, 0), Step(1, 0)))
    pool = make_pool("page_per_object", 5)
    run = Replay(pool)
    result = run.run(trace.steps)
    assert result.failures == 1, "five pages: the third packet gets its data and no head"
    assert (result.peak.pages, result.end.pages) == (5 - 1, 2)
    assert list(run.live) == [0]


def test_the_largest_free_run_is_that_at_the_end() -> None:
    assert replay(TWO_FRAMES, "kmalloc", 512, lanes=1).largest_free_run == 2048


def test_text_and_back() -> None:
    trace = Trace("odd", (Step(7, 100, 1, 3), Step(8, 5, 0, 0), Step(7, 0, 2)), heads=False)
    assert trace.dumps() == "ustack-trace-1 odd data\n+ 7 100 1 3\n+ 8 5 0 0\n- 7 2\n"
    assert loads(trace.dumps()) == trace


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, ""),
        (1, "something else\n"),
        (1, "ustack-trace-1 name\n"),
        (2, "ustack-trace-1 a data\n- 1 0\n"),
        (2, "ustack-trace-1 a data\n+ 1 0 0 0\n"),
        (3, "ustack-trace-1 a data\n+ 1 5 0 0\n+ 1 5 0 0\n"),
        (3, "ustack-trace-1 a data\n+ 1 5 0 0\n- 1 x\n"),
        (2, "ustack-trace-1 a data\n* 1 5 0 0\n"),
        (3, "ustack-trace-1 a data\n+ 1 5 0 0\n\n"),
    ],
)
def test_a_wrong_line_is_named(line: int, text: str) -> None:
    with pytest.raises(ValueError, match=f"line {line}: "):
        loads(text)


def test_live_sizes_are_averages_over_the_steps() -> None:
    trace = Trace("t", (Step(0, 100), Step(1, 200), Step(0, 0), Step(2, 100)))
    assert trace.live_sizes() == {100: (2 + 1) / 4, 200: 3 / 4}


def test_the_same_seed_gives_the_same_traffic_and_another_one_does_not() -> None:
    assert workloads(1) == workloads(1)
    assert workloads(1) != workloads(2)


def test_traffic_is_what_its_name_says(seed: int) -> None:
    steady = churn("steady", mtu_and_ack, packets=4000, live=300, seed=seed)
    live = sum(steady.live_sizes().values())
    assert 200 < live < 400
    assert {step.size for step in steady.steps} == {0, MTU_FRAME, 386}
    queued = churn("queued", mtu_and_ack, packets=2000, live=20, seed=seed, long_lived=0.1)
    assert len(queued.steps) < len(churn("none", mtu_and_ack, packets=2000, live=20, seed=seed).steps) - 100
    drained = burst("burst", mtu_and_ack, packets=500, left=5, seed=seed)
    assert len(drained.steps) == 500 + 495
    assert len(standing("standing", mtu_and_ack, packets=100, seed=seed).steps) == 100 + 2 * 10
    counts = dict.fromkeys((64 * grain for grain in GRAINS), 0)
    for step in churn("grains", grains, packets=3000, live=50, seed=seed).steps:
        if step.size:
            counts[step.size] += 1
    assert all(850 < count < 1150 for count in counts.values())


@pytest.mark.parametrize("name", names())
def test_every_pool_can_be_named_and_has_everything_back_in_the_end(name: str) -> None:
    for trace in workloads(3, packets=300, live=40).values():
        run = Replay(leaks.watch_pool(make_pool(name, 2048)), trace.heads)
        result = run.run(trace.steps)
        assert result.end == run.now()
        assert result.peak.pages >= result.mean.pages
        assert result.failures < len(trace.steps)
        run.clear()


def test_lanes_reach_the_pool() -> None:
    trace = churn("remote", mtu_and_ack, packets=200, live=20, seed=1, lane=0, free_lane=1)
    pool = make_pool("nta", 1024, lanes=2)
    run = Replay(pool)
    run.run(trace.steps)
    assert pool.parked_bytes() > 0  # type: ignore[attr-defined]
