"""The conformance tests notice what they are there to notice: pools with one fault each, and the rule that catches it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree
from pools.gfp import MEMALLOC
from pools.page_per_object import PagePerObjectPool
from pools.testing import RESERVE_PAGES, Ledger, soak

if TYPE_CHECKING:
    from collections.abc import Callable

    from pools.base import Pool
    from pools.buddy import PageAllocator


class GivesTheReserveAway(PagePerObjectPool):
    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        addr = super().alloc(size, MEMALLOC, cpu, group)
        self.pfmemalloc = False
        return addr


class MarksOrdinaryMemory(PagePerObjectPool):
    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        addr = super().alloc(size, gfp, cpu, group)
        self.pfmemalloc = True
        return addr


class LosesPages(PagePerObjectPool):
    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        super().free(addr, size, cpu, group)
        self.pages.alloc(0, MEMALLOC, self._owner)


class CountsWrongly(PagePerObjectPool):
    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        super().free(addr, size, cpu, group)
        self.stats.requested += 1


class ChargesTooLittle(PagePerObjectPool):
    def charge(self, addr: int, size: int) -> int:
        return size // 2


class HandsOutTheSamePageTwice(PagePerObjectPool):
    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        addr = super().alloc(size, gfp, cpu, group)
        return addr & ~PAGE_SIZE if addr >= 0 else NULL


class ScribblesOnLiveMemory(PagePerObjectPool):
    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        if group >= 0:
            self.pages.arena.mem[group] ^= 0xFF
        return super().alloc_head(gfp, cpu, group)


class FreesTwice(PagePerObjectPool):
    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        if self._state[addr >> PAGE_SHIFT]:
            super().free(addr, size, cpu, group)


class RefusesTooLate(PagePerObjectPool):
    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        if not self._state[addr >> PAGE_SHIFT]:
            self._held += 1
            raise DoubleFree
        super().free(addr, size, cpu, group)


@pytest.mark.parametrize(
    ("fault", "notice"),
    [
        (GivesTheReserveAway, "an ordinary allocation left"),
        (MarksOrdinaryMemory, "marked pfmemalloc"),
        (LosesPages, "pages held by the pool's account"),
        (CountsWrongly, "bytes requested, should be"),
        (ChargesTooLittle, "is charged"),
        (HandsOutTheSamePageTwice, "live chunk"),
        (ScribblesOnLiveMemory, "was overwritten"),
        (FreesTwice, "could be freed twice"),
        (RefusesTooLate, "a refused double free changed the pool"),
    ],
)
def test_a_random_history_finds_the_fault(fault: Callable[[PageAllocator], Pool], notice: str) -> None:
    with pytest.raises(AssertionError, match=notice):
        soak(fault, operations=5000, seed=1, check_every=10)


def test_an_ordinary_object_on_a_page_of_the_reserve_is_noticed_even_if_no_page_was_taken_for_it() -> None:
    class SharesReservePages(PagePerObjectPool):
        """The second object of a page: beside data that came from the reserve."""

        def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
            self.pfmemalloc = False
            return group + PAGE_SIZE - SKB_HEAD_SIZE

    ledger = Ledger(SharesReservePages)
    ledger.hog(ledger.pages.pages)
    assert ledger.pages.free_pages == RESERVE_PAGES
    data = ledger.alloc(100, MEMALLOC)
    with pytest.raises(AssertionError, match="of the reserve"):
        ledger.alloc_head(0, 0, data)


def test_a_good_pool_passes_and_the_same_seed_is_the_same_history() -> None:
    one, two = (soak(PagePerObjectPool, operations=2000, seed=7) for _ in range(2))
    assert one.pool.stats.allocs == two.pool.stats.allocs
    assert one.pool.stats.requested_peak == two.pool.stats.requested_peak
