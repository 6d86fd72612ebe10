"""Page fragments: conformance, the way a block is used, and how long it lives."""

from __future__ import annotations

from pools.arena import PAGE_SIZE, Arena
from pools.base import NULL, Pool
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from pools.kmalloc import LANES
from pools.page_frag import PageFragPool
from pools.testing import PoolConformance, machine
from tests import leaks


class TestConformance(PoolConformance):
    lanes = LANES

    def make_pool(self, pages: PageAllocator) -> Pool:
        return PageFragPool(pages)


TestMachine = machine(PageFragPool, lanes=LANES).TestCase


def new_pool(*, pages: int = 64, min_pages: int = 0, lanes: int = 1) -> PageFragPool:
    return leaks.watch_pool(PageFragPool(PageAllocator(Arena(pages), min_pages=min_pages), lanes=lanes))


def test_fragments_are_cut_from_the_top_down_in_cache_lines() -> None:
    pool = new_pool()
    first = pool.alloc(1514 + 320, ATOMIC)
    second = pool.alloc(100, ATOMIC)
    assert first == 8 * PAGE_SIZE - 1856
    assert second == first - 128
    assert pool.held_pages() == 8
    pool.free(first, 1514 + 320)
    pool.free(second, 100)


def test_one_long_lived_fragment_keeps_the_whole_block() -> None:
    pool = new_pool()
    keep = pool.alloc(64, ATOMIC)
    for _ in range(100):
        pool.free(pool.alloc(1024, ATOMIC), 1024)
    pool.reap()
    assert pool.held_pages() == 8
    assert pool.stats.charged == 64
    pool.free(keep, 64)
    assert pool.held_pages() == 0


def test_a_block_without_fragments_is_used_again_from_the_top() -> None:
    pool = new_pool()
    first = pool.alloc(30000, ATOMIC)
    pool.free(first, 30000)
    assert pool.alloc(30000, ATOMIC) == first
    pool.free(first, 30000)
    assert pool.held_pages() == 8


def test_every_lane_has_a_block_of_its_own() -> None:
    pool = new_pool(lanes=2)
    here, there = pool.alloc(64, ATOMIC, 0), pool.alloc(64, ATOMIC, 1)
    assert abs(here - there) >= 8 * PAGE_SIZE
    pool.free(here, 64, 1)
    pool.free(there, 64, 0)


def test_without_blocks_of_32_kib_single_pages_must_do_and_jumbo_frames_fail() -> None:
    pool = new_pool(pages=15)
    owner = pool.pages.owner_id("hog")
    taken = sorted(pool.pages.alloc_bulk(15, ATOMIC, owner))
    pool.pages.free_bulk(taken[::2])
    addr = pool.alloc(4096, ATOMIC)
    assert addr != NULL
    assert pool.held_pages() == 1
    assert pool.alloc(4097, ATOMIC) == NULL
    pool.free(addr, 4096)
    pool.pages.free_bulk(taken[1::2])


def test_a_block_of_the_reserve_is_no_larger_than_needed_and_goes_with_its_last_fragment() -> None:
    pool = new_pool(pages=32, min_pages=16)
    ordinary = []
    while (addr := pool.alloc(2048, ATOMIC)) != NULL:
        ordinary.append(addr)
    urgent = [pool.alloc(1024, MEMALLOC) for _ in range(4)]
    assert pool.pfmemalloc
    assert pool.pages.free_pages == 15
    assert pool.alloc(64, ATOMIC) == NULL
    for addr in urgent:
        pool.free(addr, 1024)
    assert pool.pages.free_pages == 16
    for addr in ordinary:
        pool.free(addr, 2048)
