"""The `kmalloc` pool: what the stack would have in the kernel of 2006. General SLAB caches by size, a cache for packet heads,
and one for pairs of them: what the kernel sends is cloned at once, and the clone's head lies next to the packet's own.

The sizes are those of include/linux/kmalloc_sizes.h for 4 KiB pages and 64-byte cache lines: powers of two from 32 bytes to
128 KiB, and 192. A request takes the next larger object, which is the waste that the other side of the dispute complained
of; `charge` is the size of that object. Neither `group` nor the size given on free is needed: the page map leads from an
address to its cache.

In the kernel the sizes are fixed when it is compiled. Here `add_class` adds one while the pool is in use; `pools.adviser` tells
which are worth it.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from pools.arena import PAGE_SHIFT
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.slab import GRANULE, GRANULE_SHIFT, KmemCache, SlabMap, object_size, slabinfo

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pools.buddy import PageAllocator

SIZES: Final = (32, 64, 128, 192, *(256 << shift for shift in range(10)))
"""Bytes of the objects of the general caches."""

FCLONE_SIZE: Final = 2 * SKB_HEAD_SIZE + 4
"""Bytes of two heads and of the reference count behind them (struct sk_buff_fclones)."""

LANES: Final = 4
"""How many lanes a pool knows by default: receive, transmit, and two for workers."""


@mypyc_attr(allow_interpreted_subclasses=True)
class KmallocPool(Pool):
    """General caches `size-32` to `size-131072` and `skbuff_head_cache` on the pages of `pages`, with arrays for `lanes` lanes.

    When there are no pages, the free slabs of all caches are reaped once before the reserve is used or the allocation fails.
    """

    __slots__ = ("_by_granules", "_caches", "_fclones", "_heads", "_slab_map", "_slab_of")

    name = "kmalloc"

    def __init__(self, pages: PageAllocator, *, lanes: int = LANES) -> None:
        super().__init__(pages)
        self._slab_map = slab_map = SlabMap(pages)
        self._slab_of = slab_map.slab
        general: list[KmemCache] = []
        for size in SIZES:
            cache = KmemCache(pages, slab_map, f"size-{size}", size, lanes=lanes, general=tuple(general), shrink=self._shrink)
            if 1 << cache.order > pages.pages:
                break
            general.append(cache)
        self._heads = KmemCache(
            pages, slab_map, "skbuff_head_cache", SKB_HEAD_SIZE, lanes=lanes, general=tuple(general), shrink=self._shrink
        )
        self._fclones = KmemCache(
            pages, slab_map, "skbuff_fclone_cache", FCLONE_SIZE, lanes=lanes, general=tuple(general), shrink=self._shrink
        )
        self._caches = (*general, self._heads, self._fclones)
        self._by_granules: list[KmemCache] = [general[0]]  # by size in granules, rounded up
        for cache in general:
            self._by_granules.extend([cache] * ((cache.size >> GRANULE_SHIFT) + 1 - len(self._by_granules)))
        self.max_size = general[-1].size
        self.head_charge = self._heads.size

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate an object of the smallest cache that fits. `NULL` also for a size under 1 or over `max_size`."""
        stats = self.stats
        if not 0 < size <= self.max_size:
            stats.failures += 1
            return NULL
        cache = self._by_granules[(size + GRANULE - 1) >> GRANULE_SHIFT]
        addr = cache.alloc(gfp, cpu)
        if addr < 0:
            stats.failures += 1
            return NULL
        self.pfmemalloc = cache.pfmemalloc
        stats.allocs += 1
        stats.requested = requested = stats.requested + size
        if requested > stats.requested_peak:
            stats.requested_peak = requested
        stats.charged = charged = stats.charged + cache.size
        if charged > stats.charged_peak:
            stats.charged_peak = charged
        return addr

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """Give data back to the lane `cpu`."""
        slab = self._slab_of[addr >> PAGE_SHIFT]
        if slab is None or slab.cache is self._heads or slab.cache is self._fclones:
            raise DoubleFree(f"no data at {addr:#x} is allocated")
        cache = slab.cache
        cache.free(addr, cpu)
        stats = self.stats
        stats.frees += 1
        stats.requested -= size
        stats.charged -= cache.size

    def charge(self, addr: int, size: int) -> int:
        """The size of the object. Not that of the class for `size`: the object may be older than the class."""
        slab = self._slab_of[addr >> PAGE_SHIFT]
        assert slab is not None
        return slab.cache.size

    def add_class(self, size: int) -> KmemCache:
        """Add a general cache for objects of `size` bytes, in whole cache lines. Returns the cache.

        From now on it serves the requests that fit it and no smaller class; objects that are alive stay where they are. Raises
        `ValueError` for a size that has a class, and for one that is not between the smallest and the largest class.
        """
        *general, heads, fclones = self._caches
        size = object_size(size)
        place = bisect_left(general, size, key=lambda cache: cache.size)
        if not 0 < place < len(general) or general[place].size == size:
            raise ValueError(f"no room for a class of {size} bytes beside {', '.join(str(cache.size) for cache in general)}")
        lanes = len(heads.arrays)
        name = f"size-{size}"
        cache = KmemCache(self.pages, self._slab_map, name, size, lanes=lanes, general=tuple(general), shrink=self._shrink)
        general.insert(place, cache)
        self._caches = (*general, heads, fclones)
        first, last = (general[place - 1].size >> GRANULE_SHIFT) + 1, size >> GRANULE_SHIFT
        self._by_granules[first : last + 1] = [cache] * (last + 1 - first)
        return cache

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate an object of `skbuff_head_cache`."""
        heads = self._heads
        stats = self.stats
        addr = heads.alloc(gfp, cpu)
        if addr < 0:
            stats.failures += 1
            return NULL
        self.pfmemalloc = heads.pfmemalloc
        stats.allocs += 1
        stats.requested = requested = stats.requested + SKB_HEAD_SIZE
        if requested > stats.requested_peak:
            stats.requested_peak = requested
        stats.charged = charged = stats.charged + heads.size
        if charged > stats.charged_peak:
            stats.charged_peak = charged
        return addr

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Give a head back to the lane `cpu`."""
        heads = self._heads
        slab = self._slab_of[addr >> PAGE_SHIFT]
        if slab is None or slab.cache is not heads:
            raise DoubleFree(f"no head at {addr:#x} is allocated")
        heads.free(addr, cpu)
        stats = self.stats
        stats.frees += 1
        stats.requested -= SKB_HEAD_SIZE
        stats.charged -= heads.size

    def alloc_fclone(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate an object of `skbuff_fclone_cache`: two heads, and a count of those in use."""
        fclones = self._fclones
        stats = self.stats
        addr = fclones.alloc(gfp, cpu)
        if addr < 0:
            stats.failures += 1
            return NULL
        self.pfmemalloc = fclones.pfmemalloc
        stats.allocs += 1
        stats.requested += 2 * SKB_HEAD_SIZE
        stats.requested_peak = max(stats.requested_peak, stats.requested)
        stats.charged += fclones.size
        stats.charged_peak = max(stats.charged_peak, stats.charged)
        return addr

    def free_fclone(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Give a pair of heads back to the lane `cpu`."""
        fclones = self._fclones
        slab = self._slab_of[addr >> PAGE_SHIFT]
        if slab is None or slab.cache is not fclones:
            raise DoubleFree(f"no pair of heads at {addr:#x} is allocated")
        fclones.free(addr, cpu)
        stats = self.stats
        stats.frees += 1
        stats.requested -= 2 * SKB_HEAD_SIZE
        stats.charged -= fclones.size

    def reap(self) -> int:
        """Empty the arrays of all caches and give back all free slabs."""
        before = self.pages.free_pages
        self._shrink()
        return self.pages.free_pages - before

    def compact(self, movable: Collection[int], moved: Callable[[int, int], None]) -> int:
        """Empty the emptiest slabs of each cache into its fullest. The kernel of 2006 could not: an address was for ever."""
        before = self.pages.free_pages
        for cache in reversed(self._caches):  # largest first, as in `_shrink`
            cache.compact(movable, moved)
        return self.pages.free_pages - before

    def _shrink(self) -> int:
        """Reap; returns how many caches had anything to reap, which may have been objects and no pages."""
        if not self._slab_map.dirty:
            return 0
        self._slab_map.dirty = False
        reaped = 0
        # Largest objects first: destroying their slabs frees bookkeeping that lives in the caches of small objects.
        for cache in reversed(self._caches):
            if cache.dirty:
                cache.reap()
                reaped += 1
        return reaped

    def reap_tick(self, now: float) -> int:
        """Reap what the kernel's periodic reaper would at `now` (seconds), if it is due; returns the pages given back."""
        before = self.pages.free_pages
        for cache in self._caches:
            cache.reap_tick(now)
        return self.pages.free_pages - before

    def alone_on(self, pfn: int, own: Collection[int]) -> bool:
        """See `Pool.alone_on`. Bookkeeping of a slab that lies there counts as foreign data."""
        slab = self._slab_of[pfn]
        if slab is None or slab.cache is self._heads:
            return False
        start = max(slab.base, (pfn << PAGE_SHIFT) - slab.cache.size + GRANULE)
        live = self._slab_map.live
        end = (pfn + 1) << PAGE_SHIFT >> GRANULE_SHIFT
        granule = live.find(1, start >> GRANULE_SHIFT, end)
        while granule >= 0:
            if granule << GRANULE_SHIFT not in own:
                return False
            granule = live.find(1, granule + 1, end)
        return True

    def held_pages(self) -> int:
        """Pages of all slabs."""
        return sum(cache.held_pages() for cache in self._caches)

    def largest_free_run(self) -> int:
        """The size of the largest free object, be it in a slab or in an array."""
        return max((cache.size for cache in self._caches if cache.has_free()), default=0)

    def caches(self) -> tuple[KmemCache, ...]:
        """All caches: the general ones by ascending size, then those of heads and of pairs of them."""
        return self._caches

    def general_caches(self) -> tuple[KmemCache, ...]:
        """The general caches, by ascending size: the size classes."""
        return self._caches[:-2]

    def slabinfo(self) -> str:
        """The state of all caches in the format of /proc/slabinfo."""
        return slabinfo(self._caches)

    def check(self) -> None:
        """Verify every cache, and that what callers have adds up to `stats.charged`."""
        management = [0] * len(self._caches)
        for cache in self._caches:
            cache.check()
            if cache.management_cache is not None:
                management[self._caches.index(cache.management_cache)] += cache.slabs
        charged = sum(
            (cache.live_objects() - off_slab) * cache.size for cache, off_slab in zip(self._caches, management, strict=True)
        )
        assert charged == self.stats.charged, f"{self.stats.charged} bytes charged, {charged} live"
        assert 0 <= self.stats.requested <= self.stats.charged
