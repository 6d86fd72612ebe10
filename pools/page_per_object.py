"""A page for each object: what replaced SROG in the network reserve patches of 25 August and 12 September 2006 (versions 5
and 6).

Data is a page and a head is a page; so is the head of every clone. What is larger than a page is refused, jumbo frames with
it; the remedy named at the time, a few blocks of order 2, is `max_order=2`. At most `reserve_pages` pages are taken from
the reserve at once (RX_RESERVE_PAGES there). Nothing can fragment, nothing is shared, and nothing is simpler; the waste is
what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.gfp import ATOMIC, MEMALLOC, may_use_reserve

if TYPE_CHECKING:
    from collections.abc import Collection

    from pools.buddy import PageAllocator

RESERVE_PAGES: Final = 128
"""Version 6: 64 packets of two pages."""

_DATA: Final = 1
_HEAD: Final = 2
_FROM_RESERVE: Final = 4


class PagePerObjectPool(Pool):
    """Each object on a page of its own; data up to 2**`max_order` pages on a block of the next power of two."""

    __slots__ = ("_held", "_owner", "_reserve_used", "_state", "reserve_pages")

    name = "page_per_object"

    def __init__(self, pages: PageAllocator, *, max_order: int = 0, reserve_pages: int = RESERVE_PAGES) -> None:
        super().__init__(pages)
        self.max_size = PAGE_SIZE << max_order
        self.head_charge = PAGE_SIZE
        self.reserve_pages = reserve_pages
        self._owner = pages.owner_id("page_per_object")
        self._state = bytearray(pages.pages)  # of the page that an object begins on: _DATA or _HEAD, and _FROM_RESERVE
        self._held = 0
        self._reserve_used = 0

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate a page, or the smallest block that fits. `NULL` also for a size under 1 or over `max_size`."""
        if not 0 < size <= self.max_size:
            self.stats.failures += 1
            return NULL
        return self._alloc(size, (size - 1 >> PAGE_SHIFT).bit_length(), gfp, _DATA)

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """Give the page or the block back."""
        self._free(addr, size, (size - 1 >> PAGE_SHIFT).bit_length(), _DATA)

    def charge(self, addr: int, size: int) -> int:
        """The page or the block."""
        return PAGE_SIZE << (size - 1 >> PAGE_SHIFT).bit_length()

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate a page for a head."""
        return self._alloc(SKB_HEAD_SIZE, 0, gfp, _HEAD)

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Give the page back."""
        self._free(addr, SKB_HEAD_SIZE, 0, _HEAD)

    def reap(self) -> int:
        """Nothing is ever kept."""
        return 0

    def alone_on(self, pfn: int, own: Collection[int]) -> bool:
        """See `Pool.alone_on`. Of a block, only the first page knows whose it is."""
        return self._state[pfn] & _DATA != 0 and pfn << PAGE_SHIFT in own

    def held_pages(self) -> int:
        """Pages of all live objects."""
        return self._held

    def largest_free_run(self) -> int:
        """Nothing is ever kept."""
        return 0

    def _alloc(self, size: int, order: int, gfp: int, kind: int) -> int:
        pages = self.pages
        stats = self.stats
        pfn = pages.alloc(order, ATOMIC, self._owner)
        if pfn < 0 and may_use_reserve(gfp) and self._reserve_used + (1 << order) <= self.reserve_pages:
            pfn = pages.alloc(order, MEMALLOC, self._owner)
        if pfn < 0:
            stats.failures += 1
            return NULL
        self.pfmemalloc = pages.pfmemalloc
        if pages.pfmemalloc:
            self._reserve_used += 1 << order
            kind |= _FROM_RESERVE
        self._state[pfn] = kind
        self._held += 1 << order
        stats.allocs += 1
        stats.requested = requested = stats.requested + size
        if requested > stats.requested_peak:
            stats.requested_peak = requested
        stats.charged = charged = stats.charged + (PAGE_SIZE << order)
        if charged > stats.charged_peak:
            stats.charged_peak = charged
        return pfn << PAGE_SHIFT

    def _free(self, addr: int, size: int, order: int, kind: int) -> None:
        pfn = addr >> PAGE_SHIFT
        if addr & (PAGE_SIZE - 1) or self._state[pfn] & ~_FROM_RESERVE != kind:
            raise DoubleFree(f"no {'data' if kind == _DATA else 'head'} at {addr:#x} is allocated")
        if self._state[pfn] & _FROM_RESERVE:
            self._reserve_used -= 1 << order
        self._state[pfn] = 0
        self.pages.free(pfn, order)
        self._held -= 1 << order
        stats = self.stats
        stats.frees += 1
        stats.requested -= size
        stats.charged -= PAGE_SIZE << order

    def check(self) -> None:
        """Verify that what is held is what is charged, and that the count of reserve pages is not below the objects on them."""
        assert self._held << PAGE_SHIFT == self.stats.charged
        assert self._reserve_used >= sum(1 for state in bytes(self._state) if state & _FROM_RESERVE)
        assert 0 <= self._reserve_used <= self._held
