"""The size-class adviser against all sets of classes that there are, and what it advises in a pool that is in use."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from pools.adviser import advise, cost_of, page_share
from pools.arena import PAGE_SIZE, Arena
from pools.base import NULL
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from pools.kmalloc import SIZES, KmallocPool
from pools.slab import object_size
from pools.srog import SrogPool
from pools.testing import Chunk, Ledger, PoolConformance
from tests import leaks


def new_pool(pages: int = 512, lanes: int = 1) -> KmallocPool:
    return leaks.watch_pool(KmallocPool(PageAllocator(Arena(pages), min_pages=0), lanes=lanes))


@pytest.mark.parametrize("cost", [page_share, float])
def test_advice_is_the_best_of_all_possible_sets(cost: type[float], seed: int) -> None:
    random = Random(seed)
    live = {random.randrange(1, 9000): float(random.randrange(1, 50)) for _ in range(9)}
    candidates = sorted({object_size(size) for size in live} - set(SIZES))
    for count in range(4):
        advice = advise(live, count, cost=cost)
        every = [extra for size in range(count + 1) for extra in combinations(candidates, size)]
        least = min(cost_of(live, sorted((*SIZES, *extra)), cost) for extra in every)
        assert advice.after == pytest.approx(least)
        assert cost_of(live, sorted((*SIZES, *advice.classes)), cost) == pytest.approx(least)
        assert advice.before == pytest.approx(cost_of(live, SIZES, cost))


def test_a_class_for_ethernet_frames_is_charged_less_and_takes_the_same_pages() -> None:
    live = {1834: 1000.0}
    assert advise(live, 1, cost=float) == ((1856,), 2048.0 * 1000, 1856.0 * 1000)
    # Two on a page, either way. The bookkeeping moves from an object of 64 bytes to what is left over, and that is all.
    assert page_share(1856) == 2048
    assert page_share(2048) == 2048 + PAGE_SIZE / 59 / 2


def test_requests_that_no_class_serves_are_left_out() -> None:
    assert advise({200_000: 5.0, 100: 1.0}, 3) == advise({100: 1.0}, 3)


def test_a_share_is_what_a_full_page_says() -> None:
    assert page_share(64) == PAGE_SIZE / 59
    assert page_share(192) == PAGE_SIZE / 20


# Classes in a pool


def test_an_added_class_serves_what_fits_it_and_nothing_smaller() -> None:
    pool = new_pool()
    pool.add_class(1850)
    charges = {}
    for size in (1024, 1025, 1856, 1857, 2048):
        addr = pool.alloc(size, ATOMIC)
        charges[size] = pool.charge(addr, size)
        pool.free(addr, size)
    assert charges == {1024: 1024, 1025: 1856, 1856: 1856, 1857: 2048, 2048: 2048}
    assert [cache.size for cache in pool.general_caches()] == sorted((*SIZES, 1856))
    assert "size-1856" in pool.slabinfo()


def test_objects_older_than_the_class_are_charged_and_freed_as_what_they_are() -> None:
    pool = new_pool()
    old = pool.alloc(1834, ATOMIC)
    pool.add_class(1856)
    new = pool.alloc(1834, ATOMIC)
    assert (pool.charge(old, 1834), pool.charge(new, 1834)) == (2048, 1856)
    assert pool.stats.charged == 2048 + 1856
    pool.check()
    pool.free(old, 1834)
    assert pool.stats.charged == 1856
    pool.free(new, 1834)


def test_three_objects_share_a_page_where_two_did() -> None:
    pool = new_pool()
    pool.add_class(1344)
    live = [pool.alloc(1300, ATOMIC) for _ in range(30)]
    pages = sum(cache.held_pages() for cache in pool.caches() if cache.name == "size-1344")
    assert NULL not in live
    assert pages == 10
    for addr in live:
        pool.free(addr, 1300)


@pytest.mark.parametrize("size", [0, 32, 64, 1999, 2048, 131072, 131073])
def test_a_class_that_exists_or_lies_outside_is_refused(size: int) -> None:
    pool = new_pool()
    with pytest.raises(ValueError, match="no room for a class"):
        pool.add_class(size)
    assert pool.max_size == 131072


def test_the_fallback_of_srog_settles_what_its_kmalloc_charged() -> None:
    pool = leaks.watch_pool(SrogPool(PageAllocator(Arena(64), min_pages=0), role="fallback"))
    live = [pool.alloc(4000, ATOMIC) for _ in range(20)]
    assert pool.stats.charged == 20 * 4096
    for addr in live:
        pool.free(addr, 4000)
    assert pool.stats.charged == 0


def test_classes_may_come_at_any_time() -> None:
    random = Random(26)
    ledger = Ledger(lambda pages: KmallocPool(pages, lanes=2))
    live: list[Chunk] = []
    pool = ledger.pool
    assert isinstance(pool, KmallocPool)
    for step in range(4000):
        if step % 400 == 200:
            pool.add_class(advise({chunk.size: 1.0 for chunk in live}, 1, classes=sizes_of(pool), cost=float).classes[0])
        if live and random.random() < 0.48:
            ledger.free(live.pop(random.randrange(len(live))), random.randrange(2))
        elif (chunk := ledger.alloc(random.randrange(1, 5000), ATOMIC, random.randrange(2))) is not None:
            live.append(chunk)
        if step % 100 == 0:
            ledger.check_deeply()
    assert len(sizes_of(pool)) == len(SIZES) + 10 - sum(size > pool.max_size for size in SIZES)
    ledger.close()


def sizes_of(pool: KmallocPool) -> list[int]:
    return [cache.size for cache in pool.general_caches()]


class TestConformanceWithAddedClasses(PoolConformance):
    lanes = 4

    def make_pool(self, pages: PageAllocator) -> KmallocPool:
        pool = KmallocPool(pages)
        for size in (320, 1344, 1856, 9344):
            if size < pool.max_size:
                pool.add_class(size)
        return pool
