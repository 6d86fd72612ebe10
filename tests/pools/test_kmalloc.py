"""The kmalloc pool: conformance, its size classes, and what it does when pages are scarce."""

from __future__ import annotations

import pytest

from pools.arena import PAGE_SIZE, Arena
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool, by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from pools.kmalloc import LANES, KmallocPool
from pools.testing import PoolConformance, machine
from tests import leaks


class TestConformance(PoolConformance):
    lanes = LANES

    def make_pool(self, pages: PageAllocator) -> Pool:
        return KmallocPool(pages)


TestMachine = machine(KmallocPool, lanes=LANES).TestCase


def new_pool(pages: int = 512, min_pages: int = 0, lanes: int = LANES) -> KmallocPool:
    return leaks.watch_pool(KmallocPool(PageAllocator(Arena(pages), min_pages=min_pages), lanes=lanes))


def test_general_caches_are_those_of_a_kernel_with_64_byte_lines() -> None:
    names = [cache.name for cache in new_pool().caches()]
    sizes = (32, 64, 128, 192, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    assert names == [*(f"size-{size}" for size in sizes), "skbuff_head_cache", "skbuff_fclone_cache"]


@pytest.mark.parametrize(
    ("size", "charge"),
    [(1, 32), (32, 32), (33, 64), (65, 128), (129, 192), (193, 256), (1514 + 320, 2048), (4416, 8192), (9018 + 320, 16384)],
)
def test_a_request_is_charged_the_object_it_got(size: int, charge: int) -> None:
    pool = new_pool()
    addr = pool.alloc(size, ATOMIC)
    assert pool.charge(addr, size) == charge
    assert (pool.stats.requested, pool.stats.charged) == (size, charge)
    pool.free(addr, size)
    assert (pool.stats.requested_peak, pool.stats.charged_peak) == (size, charge)


def test_a_page_holds_59_objects_of_size_64() -> None:
    pool = new_pool(lanes=1)
    live = [pool.alloc(64, ATOMIC) for _ in range(59)]
    assert pool.held_pages() == 1
    live.append(pool.alloc(64, ATOMIC))
    assert pool.held_pages() == 2
    for addr in live:
        pool.free(addr, 64)


def test_a_head_takes_four_cache_lines_and_15_fill_a_page() -> None:
    pool = new_pool(lanes=1)
    heads = [pool.alloc_head(ATOMIC) for _ in range(15)]
    assert pool.held_pages() == 1
    assert pool.head_charge == 256
    assert (pool.stats.requested, pool.stats.charged) == (15 * SKB_HEAD_SIZE, 15 * 256)
    for addr in heads:
        pool.free_head(addr)


def test_an_arena_too_small_for_the_largest_objects_says_so_in_max_size() -> None:
    pool = new_pool(pages=8)
    assert pool.max_size == 8 * PAGE_SIZE
    assert pool.alloc(pool.max_size + 1, ATOMIC) == NULL


def test_free_slabs_of_other_caches_are_reaped_before_an_allocation_fails() -> None:
    pool = new_pool(pages=16)
    small = [pool.alloc(64, ATOMIC) for _ in range(16 * 59)]
    assert pool.pages.free_pages == 0
    for addr in small:
        pool.free(addr, 64)
    large = [pool.alloc(4096, ATOMIC) for _ in range(15)]  # the 16th page is for the bookkeeping of their slabs
    assert NULL not in large
    for addr in large:
        pool.free(addr, 4096)


def test_objects_parked_in_another_lane_are_fetched_before_an_allocation_fails() -> None:
    pool = new_pool(pages=2)
    parked = [pool.alloc(2048, ATOMIC, cpu=0) for _ in range(2)]
    for addr in parked:
        pool.free(addr, 2048, cpu=1)
    again = [pool.alloc(2048, ATOMIC, cpu=0) for _ in range(2)]
    assert NULL not in again
    for addr in again:
        pool.free(addr, 2048, cpu=0)


def test_free_objects_of_a_reserve_slab_are_not_for_ordinary_callers() -> None:
    pool = new_pool(pages=20, min_pages=4)
    ordinary = []
    for size in (2048, 64):
        while (addr := pool.alloc(size, ATOMIC)) != NULL:
            ordinary.append((addr, size))
    first, second = (pool.alloc(64, MEMALLOC) for _ in range(2))
    assert pool.pfmemalloc
    assert pool.alloc(64, ATOMIC) == NULL  # 57 objects of the page are free
    pool.free(first, 64)
    assert pool.alloc(64, ATOMIC) == NULL
    assert pool.alloc(64, MEMALLOC) == first  # back from the slab, not by way of an array
    pool.free(first, 64)
    pool.free(second, 64)
    assert pool.pages.free_pages == 4
    for addr, size in ordinary:
        pool.free(addr, size)


def test_who_may_use_the_reserve_still_takes_ordinary_objects_first() -> None:
    pool = new_pool(pages=20, min_pages=4)
    ordinary = []
    while (addr := pool.alloc(2048, ATOMIC)) != NULL:
        ordinary.append(addr)
    pool.free(ordinary.pop(), 2048)
    ordinary.append(pool.alloc(2048, MEMALLOC))
    assert not pool.pfmemalloc
    assert pool.pages.free_pages == 4
    for addr in ordinary:
        pool.free(addr, 2048)


def test_a_slab_with_its_bookkeeping_in_the_reserve_is_of_the_reserve_too() -> None:
    pool = new_pool(pages=20, min_pages=4)
    hog = pool.pages.owner_id("hog")
    taken = pool.pages.alloc_bulk(15, ATOMIC, hog)
    addr = pool.alloc(512, MEMALLOC)  # an ordinary page is left for the objects, none for their bookkeeping
    assert pool.pfmemalloc
    assert pool.alloc(512, ATOMIC) == NULL
    pool.free(addr, 512)
    assert pool.held_pages() == 0
    pool.pages.free_bulk(taken)


def test_data_is_no_head_and_a_head_no_data() -> None:
    pool = new_pool()
    data = pool.alloc(200, ATOMIC)
    head = pool.alloc_head(ATOMIC)
    with pytest.raises(DoubleFree):
        pool.free(head, SKB_HEAD_SIZE)
    with pytest.raises(DoubleFree):
        pool.free_head(data)
    with pytest.raises(DoubleFree):
        pool.free(data + 64, 136)
    pool.free(data, 200)
    pool.free_head(head)


def test_slabinfo_prints_the_columns_of_proc_slabinfo() -> None:
    pool = new_pool(lanes=2)
    addr = pool.alloc(64, ATOMIC)
    header, titles, _, line, *_ = pool.slabinfo().splitlines()
    assert header == "slabinfo - version: 2.1"
    assert titles == (
        "# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>"
        " : tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>"
    )
    # 16 objects left the slab with the first refill of an idle lane: one is ours, 15 are parked in the array.
    assert line == "size-64               16     59     64   59    1 : tunables  120   60    8 : slabdata      1      1      0"
    pool.free(addr, 64)


def drained_burst(pool: KmallocPool, size: int, packets: int, every: int) -> dict[int, int]:
    """Allocate packets and free all but one in `every`; what is left, by address: its number, which it holds as well."""
    mem = pool.pages.arena.mem
    live = {}
    for number in range(packets):
        addr = pool.alloc(size, ATOMIC)
        mem[addr : addr + 4] = number.to_bytes(4)
        if number % every:
            live[addr] = -1
        else:
            live[addr] = number
    for addr in [addr for addr, number in live.items() if number < 0]:
        pool.free(addr, size)
        del live[addr]
    return live


def test_compaction_needs_hardly_more_pages_than_the_objects_do() -> None:
    pool = KmallocPool(PageAllocator(Arena(1024)), lanes=1)
    live = drained_burst(pool, 1500, 400, 8)
    pool.reap()
    held = pool.held_pages()
    moves: list[tuple[int, int]] = []
    given_back = pool.compact(frozenset(live), lambda old, new: moves.append((old, new)))
    assert given_back == held - pool.held_pages()
    assert pool.held_pages() <= 50 // 2 + 3 < held
    mem = pool.pages.arena.mem
    for old, new in moves:
        live[new] = live.pop(old)
    assert all(int.from_bytes(mem[addr : addr + 4]) == number for addr, number in live.items())
    pool.check()
    for addr in live:
        pool.free(addr, 1500)


def test_compaction_leaves_what_may_not_move() -> None:
    pool = KmallocPool(PageAllocator(Arena(1024)), lanes=1)
    live = drained_burst(pool, 1500, 400, 8)
    assert pool.compact(frozenset(), lambda old, new: pytest.fail(f"{old:#x} was moved")) >= 0
    for addr in live:
        pool.free(addr, 1500)


def test_a_pair_of_heads_comes_in_one_piece_from_a_cache_of_its_own() -> None:
    pool = KmallocPool(PageAllocator(Arena(64)), lanes=1)
    pairs = [pool.alloc_fclone(ATOMIC) for _ in range(10)]
    assert len({pair >> 9 for pair in pairs}) == 10  # 468 bytes each, in whole cache lines
    assert any(line.startswith("skbuff_fclone_cache") and " 512 " in line for line in pool.slabinfo().splitlines())
    assert pool.stats.charged == 10 * 512
    with pytest.raises(DoubleFree):
        pool.free_head(pairs[0])
    with pytest.raises(DoubleFree):
        pool.free(pairs[0], 468)
    for pair in pairs:
        pool.free_fclone(pair)
    with pytest.raises(DoubleFree):
        pool.free_fclone(pairs[0])
    pool.check()
    pool.reap()
    assert pool.held_pages() == 0
    assert pool.alloc_fclone(ATOMIC) != NULL


def test_a_pool_without_pairs_has_none() -> None:
    pool = by_name("nta")(PageAllocator(Arena(64)))
    assert pool.alloc_fclone(ATOMIC) == NULL
    with pytest.raises(DoubleFree):
        pool.free_fclone(0)
