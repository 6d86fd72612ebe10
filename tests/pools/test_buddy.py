"""The page allocator: blocks, watermarks, owners, references."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from pools.arena import Arena
from pools.base import NULL, DoubleFree
from pools.buddy import MAX_ORDER, SINGLES_MAX, PageAllocator, default_min_pages
from pools.gfp import ATOMIC, MEMALLOC, NOMEMALLOC
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Callable

    MakePages = Callable[..., PageAllocator]


@pytest.fixture
def make_pages() -> MakePages:
    """A page allocator that must have all pages back, merged into the blocks of the beginning, when the test is over."""

    def make(count: int, min_pages: int | None = 0) -> PageAllocator:
        pages = PageAllocator(Arena(count), min_pages=min_pages)
        whole = pages.buddyinfo()

        def findings() -> list[str]:
            pages.check()
            return [] if pages.buddyinfo() == whole else [f"pages: {pages.pages_by_owner()}, blocks {pages.buddyinfo()}"]

        leaks.watch(findings)
        return pages

    return make


def test_the_first_blocks_are_the_largest_aligned_ones(make_pages: MakePages) -> None:
    assert make_pages(1024 + 512 + 3).buddyinfo() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert make_pages(3 * 1024).buddyinfo() == [0] * MAX_ORDER + [3]


def test_a_block_is_split_in_halves_and_merged_again(make_pages: MakePages) -> None:
    pages = make_pages(16)
    owner = pages.owner_id("test")
    block = pages.alloc(1, ATOMIC, owner)
    assert pages.buddyinfo()[:4] == [0, 1, 1, 1]
    assert pages.free_pages == 14
    pages.free(block, 1)
    assert pages.buddyinfo()[:5] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
def test_blocks_of_every_order_are_aligned_and_fill_the_arena(make_pages: MakePages, order: int) -> None:
    pages = make_pages(2048)
    owner = pages.owner_id("test")
    blocks = [pages.alloc(order, ATOMIC, owner) for _ in range(2048 >> order)]
    assert sorted(blocks) == list(range(0, 2048, 1 << order))
    assert pages.alloc(0, ATOMIC, owner) == NULL
    for block in blocks:
        pages.free(block, order)


def test_single_pages_that_wait_unmerged_are_merged_when_a_block_needs_them(make_pages: MakePages) -> None:
    pages = make_pages(256)
    owner = pages.owner_id("test")
    pages.free_bulk(pages.alloc_bulk(256, ATOMIC, owner))
    block = pages.alloc(8, ATOMIC, owner)
    assert block == 0
    pages.free(block, 8)


def test_more_single_pages_than_may_wait_are_merged_without_being_asked(make_pages: MakePages) -> None:
    pages = make_pages(4 * SINGLES_MAX)
    owner = pages.owner_id("test")
    for pfn in pages.alloc_bulk(4 * SINGLES_MAX, ATOMIC, owner):
        pages.free(pfn, 0)
    pages.check()
    assert pages.free_pages == 4 * SINGLES_MAX


def test_ordinary_allocations_stop_at_min_and_memalloc_goes_on_to_the_last_page(make_pages: MakePages) -> None:
    pages = make_pages(64, min_pages=16)
    owner = pages.owner_id("test")
    taken = []
    while (pfn := pages.alloc(0, ATOMIC, owner)) != NULL:
        assert not pages.pfmemalloc
        taken.append(pfn)
    assert pages.free_pages == 16
    assert pages.alloc(0, MEMALLOC | NOMEMALLOC, owner) == NULL
    while (pfn := pages.alloc(0, MEMALLOC, owner)) != NULL:
        assert pages.pfmemalloc
        taken.append(pfn)
    assert pages.free_pages == 0
    assert pages.reserve_allocs == 16
    assert pages.failures[0] == 3
    assert pages.peak_used == 64
    pages.free_bulk(taken)


def test_memalloc_above_min_is_not_pfmemalloc(make_pages: MakePages) -> None:
    pages = make_pages(64, min_pages=16)
    owner = pages.owner_id("test")
    block = pages.alloc(3, MEMALLOC, owner)
    assert not pages.pfmemalloc
    pages.free(block, 3)


def test_bulk_is_all_or_nothing(make_pages: MakePages) -> None:
    pages = make_pages(64, min_pages=16)
    owner = pages.owner_id("test")
    assert pages.alloc_bulk(49, ATOMIC, owner) == ()
    assert pages.free_pages == 64
    ordinary = pages.alloc_bulk(48, ATOMIC, owner)
    assert not pages.pfmemalloc
    assert pages.alloc_bulk(17, MEMALLOC, owner) == ()
    urgent = pages.alloc_bulk(16, MEMALLOC, owner)
    assert pages.pfmemalloc
    assert len({*ordinary, *urgent}) == 64
    pages.free_bulk([*ordinary, *urgent])


def test_half_of_min_must_be_free_beyond_single_pages_for_a_pair(make_pages: MakePages) -> None:
    pages = make_pages(64, min_pages=16)
    owner = pages.owner_id("test")
    taken = sorted(pages.alloc_bulk(64, MEMALLOC, owner))
    for pfn in taken[::2]:
        pages.free(pfn, 0)  # 32 free pages, not two of them together
    pages.free(taken[1], 0)
    pages.free(taken[3], 0)  # but for one block of order 2
    assert pages.free_pages == 34
    assert pages.alloc(1, ATOMIC, owner) == NULL
    pair = pages.alloc(1, MEMALLOC, owner)
    assert pages.pfmemalloc
    pages.free(pair, 1)
    pages.free_bulk([taken[place] for place in range(5, 64, 2)])


def test_pressure_begins_below_low_and_ends_at_high(make_pages: MakePages) -> None:
    pages = make_pages(100, min_pages=16)
    assert (pages.min_pages, pages.low_pages, pages.high_pages) == (16, 20, 24)
    owner = pages.owner_id("test")
    taken = list(pages.alloc_bulk(80, ATOMIC, owner))
    assert not pages.under_pressure
    taken.append(pages.alloc(0, ATOMIC, owner))
    assert pages.under_pressure
    pages.free_bulk(taken[:4])
    assert pages.free_pages == 23
    assert pages.under_pressure
    pages.free(taken[4], 0)
    assert not pages.under_pressure
    pages.free_bulk(taken[5:])


def test_moving_the_watermark_moves_the_pressure_with_it(make_pages: MakePages) -> None:
    pages = make_pages(100, min_pages=16)
    owner = pages.owner_id("test")
    taken = pages.alloc_bulk(60, ATOMIC, owner)
    pages.set_min_pages(40)
    assert pages.under_pressure
    assert pages.alloc(0, ATOMIC, owner) == NULL
    pages.set_min_pages(0)
    assert not pages.under_pressure
    with pytest.raises(ValueError, match="min watermark"):
        pages.set_min_pages(101)
    pages.free_bulk(taken)


@pytest.mark.parametrize(("mib", "kib"), [(192, 1773), (1024, 4096), (2048, 5792), (1, 128), (65536 << 8, 65536)])
def test_the_default_of_min_is_the_kernels(mib: int, kib: int) -> None:
    assert default_min_pages(mib << 8) == kib // 4


def test_a_small_arena_reserves_no_more_than_an_eighth(make_pages: MakePages) -> None:
    assert make_pages(64, min_pages=None).min_pages == 8


def test_every_page_has_an_owner(make_pages: MakePages) -> None:
    pages = make_pages(64)
    ring, socket = pages.owner_id("ring"), pages.owner_id("socket")
    assert pages.owner_id("ring") == ring
    posted = pages.alloc_bulk(10, ATOMIC, ring)
    block = pages.alloc(2, ATOMIC, socket)
    pages.transfer(posted[:3], socket)
    assert pages.pages_by_owner() == {"ring": 7, "socket": 7}
    assert pages.owner_of(posted[0]) == socket
    pages.free_bulk(posted)
    pages.free(block, 2)
    assert pages.owner_of(posted[0]) == 0
    with pytest.raises(ValueError, match="not allocated"):
        pages.transfer(posted[:1], ring)


def test_there_are_255_owners(make_pages: MakePages) -> None:
    pages = make_pages(1)
    assert [pages.owner_id(f"owner {number}") for number in range(255)] == list(range(1, 256))
    with pytest.raises(ValueError, match="255 owners"):
        pages.owner_id("one more")


def test_a_page_is_free_when_its_last_reference_is_dropped(make_pages: MakePages) -> None:
    pages = make_pages(4)
    pfn = pages.alloc(0, ATOMIC, pages.owner_id("test"))
    pages.get_page(pfn)
    pages.get_page(pfn)
    with pytest.raises(ValueError, match="other references"):
        pages.free(pfn, 0)
    pages.free_bulk([pfn])
    pages.put_page(pfn)
    assert pages.page_count(pfn) == 1
    assert pages.free_pages == 3
    pages.put_page(pfn)
    assert pages.page_count(pfn) == 0
    assert pages.free_pages == 4
    with pytest.raises(ValueError, match="not allocated"):
        pages.get_page(pfn)


def test_freeing_what_is_free_is_refused(make_pages: MakePages) -> None:
    pages = make_pages(16)
    owner = pages.owner_id("test")
    single, block = pages.alloc(0, ATOMIC, owner), pages.alloc(2, ATOMIC, owner)
    pages.free(single, 0)
    pages.free(block, 2)
    for pfn, order in ((single, 0), (block, 2), (NULL, 0)):
        with pytest.raises(DoubleFree):
            pages.free(pfn, order)
    good = pages.alloc(0, ATOMIC, owner)
    with pytest.raises(DoubleFree):
        pages.free_bulk([good, good])
    assert pages.free_pages == 16


def test_the_largest_free_block_is_known(make_pages: MakePages) -> None:
    pages = make_pages(16)
    owner = pages.owner_id("test")
    assert pages.largest_free_order() == 4
    taken = sorted(pages.alloc_bulk(16, ATOMIC, owner))
    assert pages.largest_free_order() == -1
    pages.free_bulk(taken[::2])
    assert pages.largest_free_order() == 0
    pages.free_bulk(taken[1::2])


def test_random_blocks_never_overlap_and_all_merge_back(make_pages: MakePages, seed: int) -> None:
    random = Random(seed)
    pages = make_pages(1000, min_pages=50)
    owner = pages.owner_id("test")
    live: list[tuple[int, int]] = []
    covered: set[int] = set()
    for _ in range(2000):
        if live and random.random() < 0.5:
            pfn, order = live.pop(random.randrange(len(live)))
            pages.free(pfn, order)
            covered.difference_update(range(pfn, pfn + (1 << order)))
        else:
            order = min(int(random.expovariate(1)), 8)
            pfn = pages.alloc(order, ATOMIC, owner)
            if pfn != NULL:
                block = range(pfn, pfn + (1 << order))
                assert covered.isdisjoint(block)
                covered.update(block)
                live.append((pfn, order))
        assert pages.free_pages == 1000 - len(covered) >= 50
    pages.check()
    for pfn, order in live:
        pages.free(pfn, order)
