"""What an allocation costs. The limits are those that the project set itself: medians, in seconds, in pure Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pools.arena import Arena
from pools.base import NULL, by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark_only

CALLS = 100


def median(benchmark: BenchmarkFixture, call: Callable[[], None]) -> float:
    """Seconds of one call: the median over rounds of `CALLS` calls."""
    benchmark.pedantic(call, iterations=CALLS, rounds=500, warmup_rounds=10)  # type: ignore[no-untyped-call]
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.median)


def test_one_page(benchmark: BenchmarkFixture) -> None:
    pages = PageAllocator(Arena(4096))
    owner = pages.owner_id("bench")
    assert median(benchmark, lambda: pages.free(pages.alloc(0, ATOMIC, owner), 0)) < 1.0e-6


def test_sixteen_pages(benchmark: BenchmarkFixture) -> None:
    pages = PageAllocator(Arena(4096))
    owner = pages.owner_id("bench")
    assert median(benchmark, lambda: pages.free_bulk(pages.alloc_bulk(16, ATOMIC, owner))) < 4.0e-6


LIMITS = {"kmalloc": 2.0e-6, "nta": 6.0e-6, "page_frag": 6.0e-6, "page_per_object": 6.0e-6, "srog": 6.0e-6}


@pytest.mark.parametrize("live", [100, 10_000, 100_000])
@pytest.mark.parametrize("name", LIMITS)
def test_alloc_and_free(benchmark: BenchmarkFixture, name: str, live: int) -> None:
    pool = by_name(name)(PageAllocator(Arena(32768)))
    if name == "page_per_object" and live > pool.pages.pages // 2:
        pytest.skip("a page for each of these objects is more memory than a benchmark should take")
    packet = NULL
    for count in range(live):  # eight objects a packet
        packet = pool.alloc(200, ATOMIC, 0, packet if count % 8 else NULL)
    assert median(benchmark, lambda: pool.free(pool.alloc(1536, ATOMIC), 1536)) < LIMITS[name]
