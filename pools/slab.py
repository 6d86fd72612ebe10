"""SLAB: caches of equal objects, as Linux had them in 2006 (mm/slab.c, after Bonwick 1994), with the pfmemalloc slabs of 2012.

A cache gets blocks of pages from the page allocator and cuts each into objects: a slab. A slab is on the list of the full,
the partial or the free ones. In front of the slabs stands an array of free objects for each lane (the kernel: CPU), last in
first out, and behind these one array shared by all lanes; most allocations and frees touch nothing else. Objects go between
an array and the slabs in batches.

The bookkeeping of a slab (48 bytes, and 4 bytes for each object) takes room in the arena as in the kernel: on the slab
itself, or in an object of a general cache if the objects are large. Its contents are kept in `Slab`, where Python reaches
them faster.

A slab whose pages come from the reserve is pfmemalloc. Its objects are for callers that may use the reserve, and for no one
else: they never enter an array, go straight back to their slab, and the empty slab goes back to the page allocator at once.
(The kernel marks each such object in the arrays by a pointer bit and keeps looking for others; the effect is the same.)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, DoubleFree
from pools.gfp import ATOMIC, MEMALLOC, may_use_reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from pools.buddy import PageAllocator

LINE: Final = 64
"""Bytes of a cache line, L1_CACHE_BYTES on x86-64: the alignment of objects and the step of colouring."""

GRANULE_SHIFT: Final = 5
GRANULE: Final = 1 << GRANULE_SHIFT
"""Objects start on multiples of 32 bytes, the smallest general cache."""

SLAB_BYTES: Final = 48
OBJECT_BYTES: Final = 4
"""Bookkeeping: sizeof(struct slab) and sizeof(kmem_bufctl_t) on a 64-bit kernel."""

OFF_SLAB_SIZE: Final = PAGE_SIZE >> 3
"""From this object size on, in bytes, the bookkeeping is kept off the slab."""

MAX_SLAB_ORDER: Final = 5
BREAK_ORDER: Final = 1
"""The order of a slab is the smallest that wastes at most 1/8 of it; that rule ends at `BREAK_ORDER`."""

SHARED_FACTOR: Final = 8
"""The shared array holds this many batches."""

COLD_BATCH: Final = 16
"""What a lane that has been idle since the last reaping gets at most in its first refill."""

ARRAY_PERIOD: Final = 2.0
SLAB_PERIOD: Final = 4.0
"""Seconds between two reapings of the lanes' arrays, and of the shared array and the free slabs."""


def tunables(size: int) -> int:
    """The limit of a lane's array, in objects, for objects of `size` bytes (enable_cpucache)."""
    if size > 131072:
        return 1
    if size > PAGE_SIZE:
        return 8
    if size > 1024:
        return 24
    if size > 256:
        return 54
    return 120


class Layout(NamedTuple):
    """A slab: `num` objects on 2**`order` pages, and `leftover` bytes that nobody uses. `management` are the bytes of its
    bookkeeping, which lies in an object of another cache if `off_slab`.
    """

    order: int
    num: int
    leftover: int
    management: int
    off_slab: bool


def object_size(size: int) -> int:
    """Bytes of an object for requests of up to `size` bytes: whole cache lines, or 32."""
    return GRANULE if size <= GRANULE else size + LINE - 1 & -LINE


def slab_layout(size: int, *, off_slab: bool = True) -> Layout:
    """The slab for objects of `size` bytes, which `object_size` has rounded (calculate_slab_order, cache_estimate).

    Large objects have their bookkeeping elsewhere, unless what is left over has room for it, or `off_slab` forbids it. Raises
    `ValueError` if no slab is large enough.
    """
    align = GRANULE if size <= GRANULE else LINE
    off_slab = off_slab and size >= OFF_SLAB_SIZE
    num = leftover = order = 0
    for order in range(MAX_SLAB_ORDER + 1):
        slab_size = PAGE_SIZE << order
        if off_slab:
            num = slab_size // size
            leftover = slab_size - num * size
        else:
            num = (slab_size - SLAB_BYTES) // (size + OBJECT_BYTES)
            if num and _management_size(num, align) + num * size > slab_size:
                num -= 1
            leftover = slab_size - _management_size(num, align) - num * size
        if num and (order >= BREAK_ORDER or leftover * 8 <= slab_size):
            break
    if not num:
        raise ValueError(f"no slab holds objects of {size} bytes")
    management = _management_size(num, align)
    if not off_slab:
        return Layout(order, num, leftover, management, off_slab=False)
    if leftover >= management:
        return Layout(order, num, leftover - management, management, off_slab=False)
    return Layout(order, num, leftover, SLAB_BYTES + OBJECT_BYTES * num, off_slab=True)


class ArrayCache:
    """A stack of free objects: of one lane, or shared. `touched`: used since the reaper came by last."""

    __slots__ = ("batchcount", "entry", "limit", "touched")

    def __init__(self, limit: int, batchcount: int) -> None:
        self.limit = limit
        self.batchcount = batchcount
        self.touched = False
        self.entry: list[int] = []


class Slab:
    """Some pages cut into objects of one cache. `free` are the addresses of those that neither a caller nor an array has."""

    __slots__ = ("base", "cache", "free", "management", "pfmemalloc")

    def __init__(self, cache: KmemCache, base: int, management: int, free: list[int], pfmemalloc: bool) -> None:
        self.cache = cache
        self.base = base
        self.management = management
        self.free = free
        self.pfmemalloc = pfmemalloc


class SlabMap:
    """What all caches on one arena share: `slab[pfn]`, the slab on each page, and `live`, a byte per granule: an object
    starts here. `dirty` is false while all caches are clean for certain.

    `live` is not in the kernel (its debugging build has the like). It makes every double free an exception for a byte per 32.
    """

    __slots__ = ("dirty", "live", "slab")

    def __init__(self, pages: PageAllocator) -> None:
        self.dirty = False
        self.slab: list[Slab | None] = [None] * pages.pages
        self.live = bytearray(pages.pages << (PAGE_SHIFT - GRANULE_SHIFT))


class KmemCache:
    """A cache of objects of `size` bytes, rounded up to the alignment: a cache line, or 32 bytes for objects that small.

    `lanes` is the number of lanes. `general` are the caches that off-slab bookkeeping may come from, smallest first.
    `shrink` is called when there are no pages, before the reserve is used or the allocation fails; it returns 0 if it found
    nothing to set free. `dirty` is false while arrays and free slabs are empty for certain: reaping would do nothing.
    """

    __slots__ = (
        "_colour_next",
        "_free",
        "_full",
        "_live",
        "_next_array_reap",
        "_next_slab_reap",
        "_objects_offset",
        "_owner",
        "_partial",
        "_reserve_full",
        "_reserve_partial",
        "_shrink",
        "_slab_map",
        "_slab_of",
        "arrays",
        "batchcount",
        "colour",
        "dirty",
        "free_limit",
        "free_objects",
        "free_touched",
        "limit",
        "management_cache",
        "name",
        "num",
        "order",
        "pages",
        "pfmemalloc",
        "shared",
        "size",
    )

    def __init__(
        self,
        pages: PageAllocator,
        slab_map: SlabMap,
        name: str,
        size: int,
        *,
        lanes: int = 1,
        general: Sequence[KmemCache] = (),
        shrink: Callable[[], int] | None = None,
    ) -> None:
        self.pages = pages
        self.name = name
        self.size = object_size(size)
        self.pfmemalloc = False
        self._live = slab_map.live
        self._slab_map = slab_map
        self._slab_of = slab_map.slab
        self._shrink = shrink
        self._owner = pages.owner_id(name)
        self._lay_out(general)
        self._colour_next = 0
        self.limit = tunables(self.size)
        self.batchcount = (self.limit + 1) // 2
        self.arrays = [ArrayCache(self.limit, self.batchcount) for _ in range(lanes)]
        shared_limit = SHARED_FACTOR * self.batchcount if lanes > 1 and self.size <= PAGE_SIZE else 0
        self.shared = ArrayCache(shared_limit, self.batchcount)
        self.free_limit = (1 + lanes) * self.batchcount + self.num
        self.free_objects = 0
        self.free_touched = False
        self.dirty = False
        self._next_array_reap = ARRAY_PERIOD
        self._next_slab_reap = SLAB_PERIOD
        # OrderedDict is the doubly linked list here: constant time at both ends and for removal from the middle.
        self._full: OrderedDict[Slab, None] = OrderedDict()
        self._partial: OrderedDict[Slab, None] = OrderedDict()
        self._free: OrderedDict[Slab, None] = OrderedDict()
        self._reserve_full: OrderedDict[Slab, None] = OrderedDict()
        self._reserve_partial: OrderedDict[Slab, None] = OrderedDict()

    def _lay_out(self, general: Sequence[KmemCache]) -> None:
        """Choose order, objects per slab, place of the bookkeeping and colours."""
        layout = slab_layout(self.size, off_slab=bool(general))
        self.order = layout.order
        self.num = layout.num
        self._objects_offset = 0 if layout.off_slab else layout.management
        self.colour = layout.leftover // LINE
        self.management_cache: KmemCache | None = None
        if layout.off_slab:
            self.management_cache = next(cache for cache in general if cache.size >= layout.management)

    # Objects

    def alloc(self, gfp: int, cpu: int = 0) -> int:
        """Allocate one object for the lane `cpu` and return its address, or `NULL`. `pfmemalloc`: it is from the reserve."""
        array = self.arrays[cpu]
        entry = array.entry
        if entry:
            array.touched = True
            self.pfmemalloc = False
            addr = entry.pop()
        else:
            addr = self._alloc_slow(gfp, array)
            if addr < 0:
                return NULL
        self._live[addr >> GRANULE_SHIFT] = 1
        return addr

    def free(self, addr: int, cpu: int = 0) -> None:
        """Free an object of this cache. Raises `DoubleFree` if it is not allocated."""
        granule = addr >> GRANULE_SHIFT
        live = self._live
        if addr & (GRANULE - 1) or not live[granule]:
            raise DoubleFree(f"{self.name}: no object at {addr:#x} is allocated")
        live[granule] = 0
        if self._reserve_full or self._reserve_partial:
            slab = self._slab_of[addr >> PAGE_SHIFT]
            if slab is not None and slab.pfmemalloc:
                self._free_to_reserve(slab, addr)
                return
        array = self.arrays[cpu]
        entry = array.entry
        if len(entry) >= array.limit:
            self._flush(array)
        if not self.dirty:
            self.dirty = self._slab_map.dirty = True
        entry.append(addr)

    def _alloc_slow(self, gfp: int, array: ArrayCache) -> int:
        pages = self.pages
        if pages.free_pages <= pages.min_pages and not (self.shared.entry or self._partial or self._free):
            # No object and no page above `min`: when memory is out this happens for every object, and must not cost much. Who
            # may use the reserve does so before anything is reaped, as in Linux (__alloc_pages_slowpath).
            pages.refuse(self.order)
            addr = self._alloc_from_reserve(array) if may_use_reserve(gfp) else NULL
            if addr >= 0 or self._shrink is None or not self._shrink():
                return addr
        found = self._refill(array)
        if not found and self._shrink is not None and self._shrink():
            found = self._refill(array)
        if found:
            self.pfmemalloc = False
            return array.entry.pop()
        return self._alloc_from_reserve(array) if may_use_reserve(gfp) else NULL

    def _refill(self, array: ArrayCache) -> bool:
        """Fill a lane's empty array with up to a batch (cache_alloc_refill). False if there are no objects and no pages."""
        batch = array.batchcount
        if not array.touched and batch > COLD_BATCH:
            batch = COLD_BATCH
        array.touched = True
        entry = array.entry
        shared = self.shared.entry
        if shared:
            self.shared.touched = True
            entry.extend(shared[-batch:])
            del shared[-batch:]
            return True
        while len(entry) < batch:
            if self._partial:
                slab, _ = self._partial.popitem(last=False)
            elif self._free:
                self.free_touched = True
                slab, _ = self._free.popitem(last=False)
            else:
                break
            self._move(slab, entry, batch - len(entry))
        if not entry:
            grown = self._grow(ATOMIC)
            if grown is None:
                return False
            self._move(grown, entry, batch)
        return True

    def _move(self, slab: Slab, entry: list[int], count: int) -> None:
        """Move up to `count` free objects of an unlisted slab to an array, and list the slab again."""
        free = slab.free
        taken = free[-count:]
        taken.reverse()
        del free[-count:]
        entry.extend(taken)
        self.dirty = self._slab_map.dirty = True
        self.free_objects -= len(taken)
        if free:
            self._partial[slab] = None
            self._partial.move_to_end(slab, last=False)
        else:
            self._full[slab] = None

    def _flush(self, array: ArrayCache) -> None:
        """Make room in a full array: its oldest batch goes to the shared array or back to the slabs (cache_flusharray)."""
        entry = array.entry
        batch = array.batchcount
        shared = self.shared
        room = shared.limit - len(shared.entry)
        if room > 0:
            batch = min(batch, room)
            shared.entry.extend(entry[:batch])
        else:
            self._free_block(entry[:batch])
        del entry[:batch]

    def _free_block(self, objects: Iterable[int]) -> None:
        """Give objects back to their slabs; free slabs beyond the limit go back to the page allocator (free_block)."""
        partial = self._partial
        for addr in objects:
            slab = self._slab_of[addr >> PAGE_SHIFT]
            assert slab is not None
            free = slab.free
            if not free:
                del self._full[slab]
                partial[slab] = None
            else:
                partial.move_to_end(slab)  # to the end, to give its other objects the longest time to come back too
            free.append(addr)
            self.free_objects += 1
            if len(free) == self.num:
                del partial[slab]
                if self.free_objects > self.free_limit:
                    self._destroy(slab)
                else:
                    self._free[slab] = None
                    self._free.move_to_end(slab, last=False)

    # Slabs

    def _grow(self, gfp: int) -> Slab | None:
        """Get pages and cut them into objects. The new slab is on no list."""
        pages = self.pages
        pfn = pages.alloc(self.order, gfp, self._owner)
        if pfn < 0:
            return None
        pfmemalloc = pages.pfmemalloc
        management = NULL
        if self.management_cache is not None:
            management = self.management_cache.alloc(gfp)
            if management < 0:
                pages.free(pfn, self.order)
                return None
            pfmemalloc = pfmemalloc or self.management_cache.pfmemalloc
            self._live[management >> GRANULE_SHIFT] = 0  # alive, but not a caller's to free
        base = pfn << PAGE_SHIFT
        first = base + self._colour_next * LINE + self._objects_offset
        self._colour_next = self._colour_next + 1 if self._colour_next < self.colour else 0
        size = self.size
        slab = Slab(self, base, management, list(range(first + (self.num - 1) * size, first - 1, -size)), pfmemalloc)
        for page in range(pfn, pfn + (1 << self.order)):
            self._slab_of[page] = slab
        if not pfmemalloc:
            self.free_objects += self.num
        return slab

    def _destroy(self, slab: Slab) -> None:
        """Give the pages of an unlisted, empty slab back."""
        pfn = slab.base >> PAGE_SHIFT
        for page in range(pfn, pfn + (1 << self.order)):
            self._slab_of[page] = None
        if not slab.pfmemalloc:
            self.free_objects -= self.num
        self.pages.free(pfn, self.order)
        if self.management_cache is not None:
            self._live[slab.management >> GRANULE_SHIFT] = 1
            self.management_cache.free(slab.management)

    def _alloc_from_reserve(self, array: ArrayCache) -> int:
        """An object of a pfmemalloc slab, of a new one if need be."""
        if self._reserve_partial:
            slab = next(iter(self._reserve_partial))
        else:
            grown = self._grow(MEMALLOC)
            if grown is None:
                return NULL
            if not grown.pfmemalloc:
                self._move(grown, array.entry, array.batchcount)
                self.pfmemalloc = False
                return array.entry.pop()
            slab = grown
            self._reserve_partial[slab] = None
        self.pfmemalloc = True
        addr = slab.free.pop()
        if not slab.free:
            del self._reserve_partial[slab]
            self._reserve_full[slab] = None
        return addr

    def _free_to_reserve(self, slab: Slab, addr: int) -> None:
        free = slab.free
        if not free:
            del self._reserve_full[slab]
            self._reserve_partial[slab] = None
        free.append(addr)
        if len(free) == self.num:
            del self._reserve_partial[slab]
            self._destroy(slab)

    # Reaping

    def reap(self) -> int:
        """Empty all arrays and give back every free slab. Returns the pages given back."""
        if not self.dirty:
            return 0
        self.dirty = False
        for array in self.arrays:
            if array.entry:
                self._drain(array, len(array.entry))
        if self.shared.entry:
            self._drain(self.shared, len(self.shared.entry))
        return self._destroy_free(len(self._free)) if self._free else 0

    def compact(self, movable: Collection[int], moved: Callable[[int, int], None]) -> int:
        """Empty the emptiest slabs into the fullest; see `Pool.compact`. A slab with an object that is not movable stays.

        Slabs in the reserve are left alone: they go back by themselves, and nothing may move into them.
        """
        self.reap()
        slabs = sorted(self._partial, key=lambda slab: len(slab.free))
        room = sum(len(slab.free) for slab in slabs)
        mem = self.pages.arena.mem
        target = 0
        before = self.pages.free_pages
        while len(slabs) > target + 1:
            source = slabs.pop()
            room -= len(source.free)
            objects = self._objects(source)
            if room < len(objects):
                break
            if not all(addr in movable for addr in objects):
                continue
            room -= len(objects)
            for old in objects:
                while not slabs[target].free:
                    target += 1
                new = slabs[target].free.pop()
                mem[new : new + self.size] = mem[old : old + self.size]
                self._live[new >> GRANULE_SHIFT] = 1
                self._live[old >> GRANULE_SHIFT] = 0
                if not slabs[target].free:
                    del self._partial[slabs[target]]
                    self._full[slabs[target]] = None
                moved(old, new)
            del self._partial[source]
            self._destroy(source)
        return self.pages.free_pages - before

    def _objects(self, slab: Slab) -> list[int]:
        """The objects of a partial slab that are not free in it."""
        first = slab.base + self._objects_offset
        first += (slab.free[0] - first) % self.size  # the colour is less than an object
        free = set(slab.free)
        return [addr for addr in range(first, first + self.num * self.size, self.size) if addr not in free]

    def reap_tick(self, now: float) -> int:
        """What the kernel's reaper does, when it is due at `now` (seconds on the clock of the stack). Returns pages given back.

        Every 2 s it takes a fifth of each array that was not used since; every 4 s the same of the shared array, and a
        fifth of the free slabs that the cache may keep, unless one of them was needed since.
        """
        if now < self._next_array_reap:
            return 0
        self._next_array_reap = now + ARRAY_PERIOD
        for array in self.arrays:
            self._drain_idle(array)
        if now < self._next_slab_reap:
            return 0
        self._next_slab_reap = now + SLAB_PERIOD
        self._drain_idle(self.shared)
        if self.free_touched:
            self.free_touched = False
            return 0
        return self._destroy_free((self.free_limit + 5 * self.num - 1) // (5 * self.num))

    def _drain_idle(self, array: ArrayCache) -> None:
        if array.touched:
            array.touched = False
        elif array.entry:
            count = (array.limit + 4) // 5
            self._drain(array, count if count <= len(array.entry) else (len(array.entry) + 1) // 2)

    def _drain(self, array: ArrayCache, count: int) -> None:
        """Give the `count` oldest objects of an array back to the slabs."""
        objects = array.entry[:count]
        del array.entry[:count]
        self._free_block(objects)

    def _destroy_free(self, count: int) -> int:
        pages = 0
        while self._free and count:
            slab, _ = self._free.popitem()
            self._destroy(slab)
            pages += 1 << self.order
            count -= 1
        return pages

    # State

    @property
    def slabs(self) -> int:
        """Slabs held now, pfmemalloc ones included."""
        return len(self._full) + len(self._partial) + len(self._free) + len(self._reserve_full) + len(self._reserve_partial)

    def held_pages(self) -> int:
        """Pages held now."""
        return self.slabs << self.order

    def has_free(self) -> bool:
        """Whether there is a free object, in a slab or in an array."""
        return bool(
            self._partial or self._free or self._reserve_partial or self.shared.entry or any(a.entry for a in self.arrays)
        )

    def live_objects(self) -> int:
        """Objects that callers have. The kernel cannot tell these from the objects in the arrays; slabinfo counts both."""
        parked = len(self.shared.entry) + sum(len(array.entry) for array in self.arrays)
        reserve_free = sum(len(slab.free) for slab in self._reserve_partial)
        return self.slabs * self.num - self.free_objects - reserve_free - parked

    def slabinfo_line(self) -> str:
        """The line of this cache in /proc/slabinfo (s_show)."""
        active_slabs = self.slabs - len(self._free)
        active = active_slabs * self.num - sum(len(slab.free) for slab in (*self._partial, *self._reserve_partial))
        shared_factor = SHARED_FACTOR if self.shared.limit else 0
        return (
            f"{self.name:<17} {active:6} {self.slabs * self.num:6} {self.size:6} {self.num:4} {1 << self.order:4}"
            f" : tunables {self.limit:4} {self.batchcount:4} {shared_factor:4}"
            f" : slabdata {active_slabs:6} {self.slabs:6} {len(self.shared.entry):6}"
        )

    def check(self) -> None:
        """Verify lists, counts and the live map; raises `AssertionError`. Slow: for tests."""
        free_count = 0
        parked = [addr for array in (*self.arrays, self.shared) for addr in array.entry]
        for slabs, low, high in (
            (self._full, 0, 0),
            (self._partial, 1, self.num - 1),
            (self._free, self.num, self.num),
            (self._reserve_full, 0, 0),
            (self._reserve_partial, 1, self.num - 1),
        ):
            reserve = slabs is self._reserve_full or slabs is self._reserve_partial
            for slab in slabs:
                assert slab.pfmemalloc == reserve, f"{self.name}: slab {slab.base:#x} is on the wrong list"
                assert low <= len(slab.free) <= high, f"{self.name}: {len(slab.free)} free objects in slab {slab.base:#x}"
                assert len(set(slab.free)) == len(slab.free), f"{self.name}: object listed twice in slab {slab.base:#x}"
                for page in range(slab.base >> PAGE_SHIFT, (slab.base >> PAGE_SHIFT) + (1 << self.order)):
                    assert self._slab_of[page] is slab
                    assert self.pages.owner_of(page) == self._owner
                assert not any(self._live[addr >> GRANULE_SHIFT] for addr in slab.free), f"{self.name}: free object is live"
                free_count += 0 if reserve else len(slab.free)
        assert free_count == self.free_objects, f"{self.name}: {self.free_objects} free objects counted, {free_count} listed"
        assert len(set(parked)) == len(parked), f"{self.name}: object parked twice"
        for addr in parked:
            owner = self._slab_of[addr >> PAGE_SHIFT]
            assert owner is not None
            assert owner.cache is self
            assert not owner.pfmemalloc
            assert addr not in owner.free
            assert not self._live[addr >> GRANULE_SHIFT]
        for array in self.arrays:
            assert len(array.entry) <= array.limit
        assert self.dirty or not (parked or self._free), f"{self.name}: reaping would miss something"
        assert self._slab_map.dirty or not self.dirty, f"{self.name}: shrinking would miss it"


def _management_size(num: int, align: int) -> int:
    return (SLAB_BYTES + OBJECT_BYTES * num + align - 1) & -align


def slabinfo(caches: Iterable[KmemCache]) -> str:
    """The caches in the format of /proc/slabinfo, version 2.1, header lines included."""
    lines = [
        "slabinfo - version: 2.1",
        (
            "# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>"
            " : tunables <limit> <batchcount> <sharedfactor>"
            " : slabdata <active_slabs> <num_slabs> <sharedavail>"
        ),
    ]
    lines.extend(cache.slabinfo_line() for cache in caches)
    return "\n".join(lines) + "\n"
