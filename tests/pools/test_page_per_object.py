"""A page for each object: conformance, and the price."""

from __future__ import annotations

from pools.arena import PAGE_SIZE, Arena
from pools.base import NULL, Pool
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from pools.page_per_object import RESERVE_PAGES, PagePerObjectPool
from pools.testing import PoolConformance, machine
from tests import leaks


class TestConformance(PoolConformance):
    def make_pool(self, pages: PageAllocator) -> Pool:
        return PagePerObjectPool(pages)


class TestConformanceWithJumboBlocks(PoolConformance):
    def make_pool(self, pages: PageAllocator) -> Pool:
        return PagePerObjectPool(pages, max_order=2)


TestMachine = machine(PagePerObjectPool).TestCase


def new_pool(
    *, pages: int = 64, min_pages: int = 0, max_order: int = 0, reserve_pages: int = RESERVE_PAGES
) -> PagePerObjectPool:
    allocator = PageAllocator(Arena(pages), min_pages=min_pages)
    return leaks.watch_pool(PagePerObjectPool(allocator, max_order=max_order, reserve_pages=reserve_pages))


def test_data_head_and_clone_are_a_page_each() -> None:
    pool = new_pool()
    data = pool.alloc(60, ATOMIC)
    head = pool.alloc_head(ATOMIC, 0, data)
    clone = pool.alloc_head(ATOMIC, 0, data)
    assert pool.held_pages() == 3
    assert pool.stats.charged == 3 * PAGE_SIZE
    assert len({addr // PAGE_SIZE for addr in (data, head, clone)}) == 3
    pool.free(data, 60)
    pool.free_head(head)
    pool.free_head(clone)


def test_a_jumbo_frame_is_refused_unless_there_are_blocks_for_it() -> None:
    assert new_pool().alloc(9018 + 320, ATOMIC) == NULL
    pool = new_pool(max_order=2)
    addr = pool.alloc(9018 + 320, ATOMIC)
    assert pool.charge(addr, 9018 + 320) == 4 * PAGE_SIZE
    pool.free(addr, 9018 + 320)


def test_no_more_than_the_agreed_pages_are_taken_from_the_reserve() -> None:
    pool = new_pool(pages=32, min_pages=16, reserve_pages=4)
    live = []
    while (addr := pool.alloc(1500, MEMALLOC)) != NULL:
        live.append(addr)
    assert pool.pages.free_pages == 12
    pool.free(live.pop(), 1500)
    live.append(pool.alloc(1500, MEMALLOC))
    assert pool.pfmemalloc
    for addr in live:
        pool.free(addr, 1500)
