"""The page allocator: a binary buddy system over the pages of one arena, with watermarks and an owner for every page.

Blocks of 2**order pages, orders 0 to 10, lie on multiples of their own size. A block is split to serve a smaller request
and merged with its buddy (the block whose address differs in the one bit of its size) when both are free: Knuth, The Art of
Computer Programming vol. 1, 2.5; Linux mm/page_alloc.c.

Single pages are by far the most frequent request, so freed single pages wait unmerged on a stack of their own (Linux:
per-CPU pages). So do runs of 16 pages, the size of a super-frame of 64 KiB, as long as they stay together: a run that lies
in one piece is copied in one piece. Both are merged when a larger block is asked for and there is none, and whenever the
exact state is asked for.

Watermarks are those of Linux: `min`, `low` = min * 5/4 and `high` = min * 3/2. The pages under `min` are the reserve: an
allocation that would leave fewer free pages than that succeeds only with `gfp.MEMALLOC`. There is no process to wake at
`low`; instead `under_pressure` is true from the moment that free pages fall below `low` until they are back at `high`. The
rules of Linux by which GFP_ATOMIC may dip into the reserve are left out on purpose: in 2006 they let any received frame eat
most of it.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from pools.arena import PAGE_SHIFT
from pools.base import NULL, DoubleFree
from pools.gfp import MEMALLOC, NOMEMALLOC

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pools.arena import Arena

MAX_ORDER: Final = 10
"""The largest block is 2**10 pages, 4 MiB."""

SINGLES_MAX: Final = 1024
"""Free single pages that may wait unmerged. Bounds the work of one merge, and so the latency of one large request."""

SINGLES_BATCH_ORDER: Final = 6
"""Single pages are taken from the buddy lists 2**6 at a time, and merged that many at a time when there are too many."""

RUN_ORDER: Final = 4
RUN_PAGES: Final = 1 << RUN_ORDER
"""Pages of a bulk request that is served from one block, if there is one, and kept as one when it is freed."""

RUNS_MAX: Final = 64
"""Free runs that may wait unmerged."""

MAX_OWNERS: Final = 255

_RESERVE_BITS: Final = MEMALLOC | NOMEMALLOC
_FREE_RUN: Final = bytes(RUN_PAGES)


def default_min_pages(pages: int) -> int:
    """The `min` watermark for an arena of that many pages: Linux's sqrt(16 * KiB) KiB, between 128 KiB and 64 MiB.

    Linux never manages as little memory as an arena can have, so the lower bound gives way to one eighth of a small arena.
    """
    kib = pages << PAGE_SHIFT >> 10
    return min(max(128, min(65536, isqrt(16 * kib))) << 10 >> PAGE_SHIFT, pages >> 3)


@mypyc_attr(allow_interpreted_subclasses=True)
class PageAllocator:
    """Hands out the pages of `arena`. `min_pages` is the size of the reserve; by default that of `default_min_pages`.

    Attributes to read: `pages` (all there are), `free_pages`, `min_pages`, `low_pages`, `high_pages`, `under_pressure`;
    `pfmemalloc`: the last successful allocation had to go under `min`;
    `failures[order]`: allocations refused, `reserve_allocs`: allocations that went under `min`;
    `reserve_failures`: those that were refused although they might.
    """

    __slots__ = (
        "_areas",
        "_extra",
        "_lowest_free",
        "_owner",
        "_owner_names",
        "_runs",
        "_singles",
        "_watch",
        "arena",
        "failures",
        "free_pages",
        "high_pages",
        "low_pages",
        "min_pages",
        "pages",
        "pfmemalloc",
        "reserve_allocs",
        "reserve_failures",
        "under_pressure",
    )

    def __init__(self, arena: Arena, *, min_pages: int | None = None) -> None:
        self.arena = arena
        self.pages = arena.pages
        self.free_pages = arena.pages
        self.pfmemalloc = False
        self.under_pressure = False
        self.failures = [0] * (MAX_ORDER + 1)
        self.reserve_allocs = 0
        self.reserve_failures = 0
        # _areas[order] holds the first pfn of every free block of that order. A dict, because a merge removes from the
        # middle and because a dict, unlike a set, is taken from in a defined order: runs with the same seed are the same
        # run.
        self._areas: list[dict[int, None]] = [{} for _ in range(MAX_ORDER + 1)]
        self._singles: list[int] = []
        self._runs: list[int] = []  # first pfns
        self._owner = bytearray(arena.pages)  # one byte a page; 0: free
        self._owner_names: list[str] = ["free"]
        self._extra: dict[int, int] = {}  # references beyond the first, of the few pages that have any
        self._lowest_free = arena.pages
        self._watch = arena.pages  # free pages below this are worth a look: a new lowest, or pressure
        self._add_range(0, arena.pages)
        self.min_pages = self.low_pages = self.high_pages = 0
        self.set_min_pages(default_min_pages(arena.pages) if min_pages is None else min_pages)

    # Watermarks

    def set_min_pages(self, min_pages: int) -> None:
        """Move the `min` watermark, and `low` and `high` with it. Raises `ValueError` if the arena has fewer pages."""
        if not 0 <= min_pages <= self.pages:
            raise ValueError(f"min watermark of {min_pages} pages in an arena of {self.pages}")
        self.min_pages = min_pages
        self.low_pages = min_pages + (min_pages >> 2)
        self.high_pages = min_pages + (min_pages >> 1)
        free = self.free_pages
        self.under_pressure = free < self.low_pages or (self.under_pressure and free < self.high_pages)
        self._watch = max(self._lowest_free, self.low_pages)

    @property
    def peak_used(self) -> int:
        """The most pages that were ever in use at once."""
        return self.pages - self._lowest_free

    def _fell_to(self, free: int) -> None:
        if free < self._lowest_free:
            self._lowest_free = free
            self._watch = max(free, self.low_pages)
        if free < self.low_pages:
            self.under_pressure = True

    # Allocation

    def alloc(self, order: int, gfp: int, owner: int) -> int:
        """Allocate 2**order pages for `owner` and return the first pfn, or `NULL`. The block has one reference."""
        if order:
            return self._alloc_block(order, gfp, owner)
        free = self.free_pages
        if free > self.min_pages:
            self.pfmemalloc = False
        elif free and gfp & _RESERVE_BITS == MEMALLOC:
            self.pfmemalloc = True
            self.reserve_allocs += 1
        else:
            self.failures[0] += 1
            self.reserve_failures += gfp & _RESERVE_BITS == MEMALLOC
            return NULL
        singles = self._singles
        if not singles:
            self._refill(1)
        pfn = singles.pop()
        self._owner[pfn] = owner
        self.free_pages = free = free - 1
        if free < self._watch:
            self._fell_to(free)
        return pfn

    def refuse(self, order: int) -> None:
        """Count an ordinary allocation of 2**order pages as failed: there are none above `min`, who asks has seen it."""
        self.failures[order] += 1

    def alloc_bulk(self, count: int, gfp: int, owner: int) -> Sequence[int]:
        """Allocate `count` single pages, in ascending order: all of them, or none and an empty sequence.

        They need not be adjacent, but often are, and ascending order lets neighbours be copied in one go. A `range` says that
        they are one run; hand it back as it is, and it costs least.
        """
        free = self.free_pages - count
        if free >= self.min_pages:
            self.pfmemalloc = False
        elif free >= 0 and gfp & _RESERVE_BITS == MEMALLOC:
            self.pfmemalloc = True
            self.reserve_allocs += 1
        else:
            self.failures[0] += 1
            self.reserve_failures += gfp & _RESERVE_BITS == MEMALLOC
            return ()
        if count < 1:
            return ()
        owners = self._owner
        pfns: Sequence[int]
        run = -1
        if count == RUN_PAGES:
            run = self._runs.pop() if self._runs else self._take_listed(RUN_ORDER)
        if run >= 0:
            pfns = range(run, run + RUN_PAGES)
            owners[run : run + RUN_PAGES] = bytes((owner,)) * RUN_PAGES
        else:
            singles = self._singles
            if len(singles) < count:
                self._refill(count)
            pfns = sorted(singles[-count:])
            del singles[-count:]
            for pfn in pfns:
                owners[pfn] = owner
        self.free_pages = free
        if free < self._watch:
            self._fell_to(free)
        return pfns

    def _alloc_block(self, order: int, gfp: int, owner: int) -> int:
        count = 1 << order
        if self._watermark_ok(order):
            self.pfmemalloc = False
        elif self.free_pages >= count and gfp & _RESERVE_BITS == MEMALLOC:
            self.pfmemalloc = True
        else:
            self.failures[order] += 1
            self.reserve_failures += gfp & _RESERVE_BITS == MEMALLOC
            return NULL
        pfn = self._take(order)
        if pfn < 0:
            self.failures[order] += 1
            self.reserve_failures += gfp & _RESERVE_BITS == MEMALLOC
            return NULL
        if self.pfmemalloc:
            self.reserve_allocs += 1
        self._owner[pfn : pfn + count] = bytes((owner,)) * count
        self.free_pages -= count
        if self.free_pages < self._watch:
            self._fell_to(self.free_pages)
        return pfn

    def _watermark_ok(self, order: int) -> bool:
        """Whether an ordinary allocation of 2**order pages may go on (Linux zone_watermark_ok).

        Beyond leaving `min` pages, half of `min` must be free in blocks of order 1 and more, a quarter in order 2 and more,
        and so on up to the order asked for: small pages alone are no reason to give away the last large block.
        """
        if self._leaves_enough(order):
            return True
        if self.free_pages - (1 << order) < self.min_pages or not (self._singles or self._runs):
            return False
        self._merge_all()  # what waits unmerged counts as what it was freed as, and may really be more
        return self._leaves_enough(order)

    def _leaves_enough(self, order: int) -> bool:
        free = self.free_pages - (1 << order)
        need = self.min_pages
        if free < need:
            return False
        free -= len(self._singles)
        for smaller in range(order):
            free -= len(self._areas[smaller]) << smaller
            if smaller == RUN_ORDER:
                free -= len(self._runs) << RUN_ORDER
            need >>= 1
            if free < need:
                return False
        return True

    # Release

    def free(self, pfn: int, order: int) -> None:
        """Free a block of 2**order pages. Raises `DoubleFree` if a page of it is free, `ValueError` if it is still shared."""
        if self._extra and pfn in self._extra:
            raise ValueError(f"page {pfn} has other references: put_page drops one")
        owners = self._owner
        if order:
            count = 1 << order
            if owners.find(0, pfn, pfn + count) >= 0:
                raise DoubleFree(f"pages {pfn}..{pfn + count - 1} are not all allocated")
            owners[pfn : pfn + count] = bytes(count)
            self._merge(pfn, order)
            self.free_pages += count
        else:
            if pfn < 0 or not owners[pfn]:
                raise DoubleFree(f"page {pfn} is not allocated")
            owners[pfn] = 0
            self._singles.append(pfn)
            self.free_pages += 1
            if len(self._singles) > SINGLES_MAX:
                self._merge_singles(1 << SINGLES_BATCH_ORDER)
        if self.under_pressure and self.free_pages >= self.high_pages:
            self.under_pressure = False

    def free_bulk(self, pfns: Sequence[int]) -> None:
        """Drop one reference of each of these single pages and free those that have no other (Linux release_pages).

        Raises `DoubleFree` for the first page that is not allocated; the pages before it have been freed by then.
        """
        if self._extra:
            pfns = self._put_shared(pfns)
        owners = self._owner
        if len(pfns) == RUN_PAGES and self._free_run(pfns[0], pfns):
            return
        singles = self._singles
        before = len(singles)
        for pfn in pfns:
            if not owners[pfn]:
                break
            owners[pfn] = 0
            singles.append(pfn)
        else:
            pfn = NULL
        self.free_pages += len(singles) - before
        if len(singles) > SINGLES_MAX:
            self._merge_singles(len(singles) - SINGLES_MAX + (1 << SINGLES_BATCH_ORDER))
        if self.under_pressure and self.free_pages >= self.high_pages:
            self.under_pressure = False
        if pfn >= 0:
            raise DoubleFree(f"page {pfn} is not allocated")

    def _free_run(self, first: int, pfns: Sequence[int]) -> bool:
        """Free `pfns` as a run if they are one; whether they were."""
        end = first + RUN_PAGES
        if first & (RUN_PAGES - 1) or self._owner.find(0, first, end) >= 0:
            return False
        if not isinstance(pfns, range) and pfns != list(range(first, end)):
            return False
        self._owner[first:end] = _FREE_RUN
        runs = self._runs
        runs.append(first)
        if len(runs) > RUNS_MAX:
            self._merge(runs.pop(0), RUN_ORDER)
        self.free_pages += RUN_PAGES
        if self.under_pressure and self.free_pages >= self.high_pages:
            self.under_pressure = False
        return True

    def _put_shared(self, pfns: Sequence[int]) -> list[int]:
        """Drop one reference of those that have several, and return the others."""
        single = []
        shared = self._extra
        for pfn in pfns:
            extra = shared.get(pfn, 0)
            if not extra:
                single.append(pfn)
            elif extra == 1:
                del shared[pfn]
            else:
                shared[pfn] = extra - 1
        return single

    # References

    def get_page(self, pfn: int) -> None:
        """Take one more reference to an allocated page, or to the first page of a block."""
        if not self._owner[pfn]:
            raise ValueError(f"page {pfn} is not allocated")
        self._extra[pfn] = self._extra.get(pfn, 0) + 1

    def get_pages(self, pfns: Iterable[int]) -> None:
        """Take one more reference to each of these allocated pages."""
        owners = self._owner
        extra = self._extra
        for pfn in pfns:
            if not owners[pfn]:
                raise ValueError(f"page {pfn} is not allocated")
            extra[pfn] = extra.get(pfn, 0) + 1

    def put_page(self, pfn: int, order: int = 0) -> None:
        """Drop one reference; the last one frees the page, or the block of 2**order pages that starts with it."""
        extra = self._extra.get(pfn, 0)
        if not extra:
            self.free(pfn, order)
        elif extra == 1:
            del self._extra[pfn]
        else:
            self._extra[pfn] = extra - 1

    def page_count(self, pfn: int) -> int:
        """References to a page; 0 if it is free."""
        return self._extra.get(pfn, 0) + 1 if self._owner[pfn] else 0

    # Owners

    def owner_id(self, name: str) -> int:
        """The number by which allocations name the owner `name`; the same name has always the same number."""
        if name in self._owner_names[1:]:
            return self._owner_names.index(name, 1)
        if len(self._owner_names) > MAX_OWNERS:
            raise ValueError(f"more than {MAX_OWNERS} owners of pages")
        self._owner_names.append(name)
        return len(self._owner_names) - 1

    def owner_of(self, pfn: int) -> int:
        """The owner of a page, as `owner_id` numbers them; 0 if it is free."""
        return self._owner[pfn]

    def transfer(self, pfns: Iterable[int], owner: int) -> None:
        """Make `owner` the owner of these allocated pages."""
        owners = self._owner
        for pfn in pfns:
            if not owners[pfn]:
                raise ValueError(f"page {pfn} is not allocated")
            owners[pfn] = owner

    def pages_by_owner(self) -> dict[str, int]:
        """Pages in use by the name of the owner, in the order of registration."""
        return {name: self._owner.count(owner) for owner, name in enumerate(self._owner_names) if owner}

    # State

    def buddyinfo(self) -> list[int]:
        """Free blocks of each order, as in /proc/buddyinfo. Merges what waits unmerged first, so that the figures are exact."""
        self._merge_all()
        return [len(area) for area in self._areas]

    def largest_free_order(self) -> int:
        """The order of the largest free block, or -1 if no page is free."""
        return max((order for order, blocks in enumerate(self.buddyinfo()) if blocks), default=-1)

    # Blocks

    def _add_range(self, start: int, end: int) -> None:
        """Put the pages start..end-1 on the lists, in the largest aligned blocks."""
        while start < end:
            order = min(MAX_ORDER, (end - start).bit_length() - 1)
            if start:
                order = min(order, (start & -start).bit_length() - 1)
            self._areas[order][start] = None
            start += 1 << order

    def _take(self, order: int) -> int:
        """Take a block off the lists, splitting a larger one if need be; `NULL` if there is none. Leaves the accounts alone."""
        pfn = self._take_listed(order)
        if pfn < 0 and (self._singles or self._runs):
            self._merge_all()
            pfn = self._take_listed(order)
        return pfn

    def _take_listed(self, order: int) -> int:
        areas = self._areas
        for found in range(order, MAX_ORDER + 1):
            if areas[found]:
                pfn, _ = areas[found].popitem()
                for smaller in range(found - 1, order - 1, -1):
                    areas[smaller][pfn + (1 << smaller)] = None
                return pfn
        return NULL

    def _merge(self, pfn: int, order: int) -> None:
        """Put a block on the lists, merged with its buddy, and that with its own, as far as they are free."""
        areas = self._areas
        while order < MAX_ORDER:
            buddy = pfn ^ (1 << order)
            if buddy not in areas[order]:
                break
            del areas[order][buddy]
            pfn &= buddy
            order += 1
        areas[order][pfn] = None

    def _refill(self, count: int) -> None:
        """Move free pages from the buddy lists to the singles until these are at least `count`. There must be that many."""
        singles = self._singles
        while len(singles) < count:
            order = next((order for order, area in enumerate(self._areas) if area), -1)
            if order < 0:
                order = RUN_ORDER
                pfn = self._runs.pop(0)
            else:
                order = min(order, SINGLES_BATCH_ORDER)
                pfn = self._take_listed(order)
            singles.extend(range(pfn + (1 << order) - 1, pfn - 1, -1))

    def _merge_singles(self, count: int) -> None:
        """Merge the `count` single pages that have waited longest."""
        for pfn in self._singles[:count]:
            self._merge(pfn, 0)
        del self._singles[:count]

    def _merge_all(self) -> None:
        """Merge everything that waits."""
        self._merge_singles(len(self._singles))
        for pfn in self._runs:
            self._merge(pfn, RUN_ORDER)
        self._runs.clear()

    def check(self) -> None:
        """Verify that the free lists, the owners and the counters agree; raises `AssertionError`. Slow: for tests."""
        free = bytearray(self.pages)
        for order, area in enumerate(self._areas):
            for pfn in area:
                assert pfn & ((1 << order) - 1) == 0, f"block {pfn} of order {order} is not aligned"
                assert not any(free[pfn : pfn + (1 << order)]), f"block {pfn} of order {order} overlaps another"
                free[pfn : pfn + (1 << order)] = b"\1" * (1 << order)
                assert order == MAX_ORDER or pfn ^ (1 << order) not in area, f"buddies at {pfn}, order {order}, are not merged"
        for pfn in self._singles:
            assert not free[pfn], f"single page {pfn} is listed twice"
            free[pfn] = 1
        for pfn in self._runs:
            assert pfn % RUN_PAGES == 0, f"run {pfn} is not aligned"
            assert not any(free[pfn : pfn + RUN_PAGES]), f"run {pfn} is listed twice"
            free[pfn : pfn + RUN_PAGES] = b"\1" * RUN_PAGES
        assert all(bool(owner) != bool(listed) for owner, listed in zip(self._owner, free, strict=True)), "owner of a free page"
        assert self.free_pages == sum(free), f"{self.free_pages} free pages counted, {sum(free)} listed"
        assert all(self._owner[pfn] for pfn in self._extra), "reference to a free page"
        assert self.under_pressure or self.free_pages >= self.low_pages
        assert not self.under_pressure or self.free_pages < self.high_pages
