"""NTA, the Network Tree Allocator that Evgeniy Polyakov posted to linux-kernel on 14 and 16 August 2006.

Memory is cut into grains. A region (some pages in one piece) has a bitmap with a bit for each grain, 1 for free. Free
grains that lie together are one chunk, on a list of chunks of exactly that size; each lane (the patch: CPU) has regions and
lists of its own. An allocation takes the oldest chunk of the smallest size that fits and lists what is left of it. A free
looks at the bits before and after, and merges what is free there: hence "self-defragmenting". A chunk that is freed in
another lane than its own is parked on a list of its owner, who frees it later. There is no header on an allocated chunk:
the caller tells the size again when it frees. (The tree of the name found the region of an address in the first prototype.
The posted code asks the page map.)

Corrected by default. With `faithful=True` the pool does what was posted, the faults included:

* Bits are looked for in the lower half of each 64-bit word only, so that free runs come out too long and merge with live
memory.
* Parked chunks are freed when their owner frees something, but not when it runs out of memory.
* The pool grows by 4 KiB regions only, also for a request that no such region can serve: it keeps the pages and fails.
* Pages are never given back, and pages that came from the reserve serve anybody.
* The first version (14 August) admits requests up to 32736 bytes, of which it can serve 16384.

Corrected means: full-width scans, parked chunks are fetched before an allocation fails, the pool grows by a region that the
request fits, empty regions can be given back, and regions from the reserve are apart, shared by all lanes, and go back as
soon as they are empty.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.gfp import ATOMIC, MEMALLOC, may_use_reserve

if TYPE_CHECKING:
    from collections.abc import Collection

    from pools.buddy import PageAllocator

LANES: Final = 4
"""How many lanes a pool knows by default: receive, transmit, and two for workers."""

ENTRY_REGIONS: Final = 8
"""The patch grows by this many 4 KiB regions and one page for their descriptors."""

WORD_BITS: Final = 64
HALF_WORD: Final = 0xFFFFFFFF

_DATA: Final = 1
_HEAD: Final = 2


class Version(NamedTuple):
    """The constants of a posting.

    `grain`: bytes of a grain; `region_order`: order of a region; `initial_regions`: regions of each lane at the start;
    `grows`: whether it takes more later; `largest`: bytes of the largest request that the posted code lets pass;
    `descriptor`: bytes of the descriptor of a region.
    """

    grain: int
    region_order: int
    initial_regions: int
    grows: bool
    largest: int
    descriptor: int


V1: Final = Version(32, 2, 1021, False, 1023 * 32, 80)
"""14 August 2006: 16 MiB for each CPU, all of it at the start."""

V2: Final = Version(64, 3, 8, True, 32768, 72)
"""16 August 2006: 256 KiB for each CPU to begin with. The grain is a cache line."""


class Region:
    """Pages in one piece, `grains` grains from the address `base`. Bit n of `bitmap` is 1 if grain n is free."""

    __slots__ = ("base", "bitmap", "grains", "lane", "order")

    def __init__(self, lane: Lane, base: int, order: int, grains: int) -> None:
        self.lane = lane
        self.base = base
        self.order = order
        self.grains = grains
        self.bitmap = (1 << grains) - 1


class Lane:
    """The free chunks of one lane: `lists[n]` has those of n grains, oldest first; bit n of `nonempty` tells if there are any.

    `free` and `grains` count the grains that are free and all there are. `parked` are chunks that other lanes freed:
    address, grains.
    """

    __slots__ = ("free", "grains", "lists", "nonempty", "parked")

    def __init__(self, largest: int) -> None:
        self.lists: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(largest + 1)]
        self.nonempty = 0
        self.free = 0
        self.grains = 0
        self.parked: list[tuple[int, int]] = []


def run_up(bitmap: int, start: int) -> int:
    """How many bits from `start` upwards are 1 without a gap."""
    above = bitmap >> start
    return (~above & (above + 1)).bit_length() - 1


def run_down(bitmap: int, end: int) -> int:
    """How many bits below `end` downwards are 1 without a gap."""
    mask = (1 << end) - 1
    return end - ((bitmap & mask) ^ mask).bit_length()


def posted_run_up(bitmap: int, start: int) -> int:
    """`run_up` as posted: ffs() takes an int, so used grains in the upper half of a word are overlooked."""
    run = 0
    while word := bitmap >> (start & -WORD_BITS) & ((1 << WORD_BITS) - 1):
        offset = start % WORD_BITS
        if not word >> offset:
            break
        used = ~word & HALF_WORD & -(1 << offset)
        if used:
            return run + (used & -used).bit_length() - 1 - offset
        run += WORD_BITS - offset
        start += WORD_BITS - offset
    return run


def posted_run_down(bitmap: int, end: int) -> int:
    """`run_down` as posted: fls() takes an int, so used grains in the upper half of a word are overlooked."""
    run = 0
    while end > 0:
        offset = (end - 1) % WORD_BITS
        word = bitmap >> (end - 1 - offset) & ((1 << WORD_BITS) - 1)
        if not word >> offset:
            break
        used = ~word & HALF_WORD & ((1 << offset) - 1)
        if used:
            return run + offset + 1 - used.bit_length()
        run += offset + 1
        end -= offset + 1
    return run


class NtaPool(Pool):
    """Chunks of whole grains in regions of `version.region_order`, for `lanes` lanes.

    `grow_below` is the share of a lane's grains that should stay free: below it, the lane grows in advance, unless there is
    memory pressure. With 0 it grows when an allocation would fail. Heads are chunks like any other. A version that does not
    grow takes back, when it needs them, the initial regions that it gave back.
    """

    __slots__ = (
        "_descriptor_pages",
        "_descriptors_per_page",
        "_empty",
        "_grain_shift",
        "_initial_grains",
        "_lanes",
        "_live",
        "_owner",
        "_region_of",
        "_regions",
        "_reserve",
        "faithful",
        "grow_below",
        "version",
    )

    name = "nta"

    def __init__(
        self,
        pages: PageAllocator,
        *,
        lanes: int = LANES,
        version: Version = V2,
        grow_below: float = 0.0,
        faithful: bool = False,
    ) -> None:
        super().__init__(pages)
        self.version = version
        self.faithful = faithful
        self.grow_below = grow_below
        self._owner = pages.owner_id("nta")
        self._grain_shift = version.grain.bit_length() - 1
        largest = PAGE_SIZE << version.region_order >> self._grain_shift
        self._lanes = [Lane(largest) for _ in range(lanes)]
        self._reserve = Lane(largest)
        self._region_of: list[Region | None] = [None] * pages.pages
        self._regions = 0
        self._empty: OrderedDict[Region, None] = OrderedDict()  # regions that are one free chunk
        self._initial_grains = version.initial_regions * largest
        self._live = bytearray(pages.arena.size >> self._grain_shift)  # a chunk starts at this grain: _DATA, _HEAD or 0
        self._descriptor_pages: list[int] = []
        self._descriptors_per_page = PAGE_SIZE // version.descriptor
        self.max_size = version.largest if faithful else PAGE_SIZE << version.region_order
        self.head_charge = (SKB_HEAD_SIZE + version.grain - 1) & -version.grain
        for _ in range(version.initial_regions):
            for lane in self._lanes:
                # The patch takes all that there is; half of the pages is enough for a pool that can grow.
                if faithful or pages.free_pages > pages.pages >> 1:
                    self._add_region(lane, version.region_order, ATOMIC)
        if faithful:  # an entry has pages of its own for its descriptors
            each = -(-version.initial_regions // self._descriptors_per_page)
            self._take_descriptor_pages(each * lanes, ATOMIC)

    # The contract

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate a chunk of whole grains in the lane `cpu`. `NULL` also for a size under 1 or over `max_size`."""
        return self._alloc(size, gfp, self._lanes[cpu], _DATA)

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate a chunk for a head."""
        return self._alloc(SKB_HEAD_SIZE, gfp, self._lanes[cpu], _HEAD)

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """Free a chunk, or park it if it belongs to another lane than `cpu`. `size` must be the size that was asked for."""
        self._free(addr, size, self._lanes[cpu], _DATA)

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Free the chunk of a head."""
        self._free(addr, SKB_HEAD_SIZE, self._lanes[cpu], _HEAD)

    def charge(self, addr: int, size: int) -> int:
        """The size in whole grains."""
        return (size + self.version.grain - 1) & -self.version.grain

    def reap(self) -> int:
        """Free what is parked and give empty regions back. As posted there is no such thing: it does nothing then."""
        if self.faithful:
            return 0
        before = self.pages.free_pages
        for lane in self._lanes:
            if lane.parked:
                self._drain(lane)
        while self._empty:
            region, _ = self._empty.popitem()
            self._remove_region(region)
        return self.pages.free_pages - before

    def alone_on(self, pfn: int, own: Collection[int]) -> bool:
        """See `Pool.alone_on`."""
        region = self._region_of[pfn]
        if region is None:
            return False
        shift = self._grain_shift
        first = pfn << PAGE_SHIFT >> shift
        end = (pfn + 1) << PAGE_SHIFT >> shift
        before = self._live.rfind(bytes((_DATA,)), region.base >> shift, first)
        if before >= 0 and before << shift not in own:
            # Its size is not known here. If the page begins with a free grain, or with a chunk, it ends before.
            used = not region.bitmap >> (first - (region.base >> shift)) & 1
            if used and not self._live[first]:
                return False
        grain = self._live.find(_DATA, first, end)
        while grain >= 0:
            if grain << shift not in own:
                return False
            grain = self._live.find(_DATA, grain + 1, end)
        return True

    def held_pages(self) -> int:
        """Pages of all regions and of their descriptors."""
        grains = self._reserve.grains + sum(lane.grains for lane in self._lanes)
        return (grains << self._grain_shift >> PAGE_SHIFT) + len(self._descriptor_pages)

    def parked_bytes(self) -> int:
        """Bytes that were freed in another lane than their own, and that their owner has not taken back yet."""
        return sum(grains for lane in self._lanes for _, grains in lane.parked) << self._grain_shift

    def largest_free_run(self) -> int:
        """The size of the largest free chunk of any lane."""
        return max(0, *(lane.nonempty.bit_length() - 1 for lane in (*self._lanes, self._reserve))) << self._grain_shift

    # Chunks

    def _alloc(self, size: int, gfp: int, lane: Lane, kind: int) -> int:
        stats = self.stats
        if not 0 < size <= self.max_size:
            stats.failures += 1
            return NULL
        shift = self._grain_shift
        need = (size + (1 << shift) - 1) >> shift
        self.pfmemalloc = False
        addr = self._take(lane, need)
        if addr < 0:
            addr = self._alloc_slow(lane, need, gfp)
            if addr < 0:
                stats.failures += 1
                return NULL
        if self.grow_below and lane.free < self.grow_below * lane.grains and not self.pages.under_pressure:
            self._grow(lane, 1, ATOMIC)
        self._live[addr >> shift] = kind
        stats.allocs += 1
        stats.requested = requested = stats.requested + size
        if requested > stats.requested_peak:
            stats.requested_peak = requested
        stats.charged = charged = stats.charged + (need << shift)
        if charged > stats.charged_peak:
            stats.charged_peak = charged
        return addr

    def _free(self, addr: int, size: int, freeing: Lane, kind: int) -> None:
        shift = self._grain_shift
        live = self._live
        if addr & ((1 << shift) - 1) or live[addr >> shift] != kind:
            raise DoubleFree(f"no {'data' if kind == _DATA else 'head'} at {addr:#x} is allocated")
        live[addr >> shift] = 0
        need = (size + (1 << shift) - 1) >> shift
        region = self._region_of[addr >> PAGE_SHIFT]
        assert region is not None
        owner = region.lane
        if owner is freeing or owner is self._reserve:
            self._release(region, addr, need)
        else:
            owner.parked.append((addr, need))
        if freeing.parked:
            self._drain(freeing)
        stats = self.stats
        stats.frees += 1
        stats.requested -= size
        stats.charged -= need << shift

    def _take(self, lane: Lane, need: int) -> int:
        """Take the oldest chunk of the smallest size that has `need` grains, and list what is left of it."""
        fits = lane.nonempty >> need
        if not fits:
            return NULL
        found = need + (fits & -fits).bit_length() - 1
        chunks = lane.lists[found]
        addr, _ = chunks.popitem(last=False)
        if not chunks:
            lane.nonempty ^= 1 << found
        region = self._region_of[addr >> PAGE_SHIFT]
        assert region is not None
        if found == region.grains:
            del self._empty[region]
        region.bitmap &= ~(((1 << need) - 1) << ((addr - region.base) >> self._grain_shift))
        lane.free -= need
        if found > need:
            rest = found - need
            lane.lists[rest][addr + (need << self._grain_shift)] = None
            lane.nonempty |= 1 << rest
        return addr

    def _release(self, region: Region, addr: int, count: int) -> None:
        """Mark a chunk free, merge it with what is free on both sides, and list the result as the youngest of its size."""
        lane = region.lane
        shift = self._grain_shift
        first = (addr - region.base) >> shift
        region.bitmap = bitmap = region.bitmap | ((1 << count) - 1) << first
        lane.free += count
        # Most neighbours are in use: one shift tells, and spares the scan.
        after = before = 0
        if bitmap >> (first + count) & 1:
            after = posted_run_up(bitmap, first + count) if self.faithful else run_up(bitmap, first + count)
        if first and bitmap >> (first - 1) & 1:
            before = posted_run_down(bitmap, first) if self.faithful else run_down(bitmap, first)
        if after:
            self._unlist(lane, addr + (count << shift), after)
        if before:
            addr -= before << shift
            self._unlist(lane, addr, before)
        merged = before + count + after
        lane.lists[merged][addr] = None
        lane.nonempty |= 1 << merged
        if merged == region.grains:
            if lane is self._reserve:
                self._remove_region(region)
            else:
                self._empty[region] = None

    def _unlist(self, lane: Lane, addr: int, count: int) -> None:
        chunks = lane.lists[count]
        if self.faithful and addr not in chunks:
            # A miscounted run. The patch unlinks whatever begins there, of any size; if that is live memory, it takes the
            # packet for list pointers and writes through them. We leave it at handing the packet out again.
            count = next((other for other, listed in enumerate(lane.lists) if addr in listed), -1)
            if count < 0:
                return
            chunks = lane.lists[count]
        del chunks[addr]
        if not chunks:
            lane.nonempty ^= 1 << count

    def _drain(self, lane: Lane) -> None:
        """Free what other lanes have parked."""
        while lane.parked:
            addr, count = lane.parked.pop()
            region = self._region_of[addr >> PAGE_SHIFT]
            assert region is not None
            self._release(region, addr, count)

    # Growing and shrinking

    def _alloc_slow(self, lane: Lane, need: int, gfp: int) -> int:
        if self.faithful:
            if self.version.grows:
                for _ in range(ENTRY_REGIONS):
                    self._add_region(lane, 0, gfp)
                self._take_descriptor_pages(1, gfp)
                self.pfmemalloc = self.pages.pfmemalloc
            return self._take(lane, need)
        if lane.parked:
            self._drain(lane)
            addr = self._take(lane, need)
            if addr >= 0:
                return addr
        if self._grow(lane, need, ATOMIC) or (self.reap() and self._grow(lane, need, ATOMIC)):
            return self._take(lane, need)
        if not may_use_reserve(gfp):
            return NULL
        addr = self._take(self._reserve, need)
        if addr < 0 and self._grow(self._reserve, need, MEMALLOC):
            addr = self._take(self._reserve, need)
        self.pfmemalloc = True
        return addr

    def _grow(self, lane: Lane, need: int, gfp: int) -> bool:
        """Add a region that has room for `need` grains: as large as usual if possible, as small as possible in the reserve."""
        smallest = max(0, ((need << self._grain_shift) - 1 >> PAGE_SHIFT).bit_length())
        if lane is self._reserve:
            return self._add_region(lane, smallest, gfp)
        if not self.version.grows and lane.grains >= self._initial_grains:
            return False
        return any(self._add_region(lane, order, gfp) for order in range(self.version.region_order, smallest - 1, -1))

    def _add_region(self, lane: Lane, order: int, gfp: int) -> bool:
        if not self.faithful:
            missing = -(-(self._regions + 1) // self._descriptors_per_page) - len(self._descriptor_pages)
            if missing > 0 and not self._take_descriptor_pages(missing, gfp):
                return False
        pfn = self.pages.alloc(order, gfp, self._owner)
        if pfn < 0:
            self._give_descriptor_pages()
            return False
        grains = PAGE_SIZE << order >> self._grain_shift
        region = Region(lane, pfn << PAGE_SHIFT, order, grains)
        for page in range(pfn, pfn + (1 << order)):
            self._region_of[page] = region
        self._regions += 1
        lane.grains += grains
        lane.free += grains
        lane.lists[grains][region.base] = None
        lane.nonempty |= 1 << grains
        self._empty[region] = None
        return True

    def _remove_region(self, region: Region) -> None:
        """Give back the pages of a region that is one free chunk."""
        lane = region.lane
        self._unlist(lane, region.base, region.grains)
        lane.grains -= region.grains
        lane.free -= region.grains
        pfn = region.base >> PAGE_SHIFT
        for page in range(pfn, pfn + (1 << region.order)):
            self._region_of[page] = None
        self._regions -= 1
        self.pages.free(pfn, region.order)
        self._give_descriptor_pages()

    def _take_descriptor_pages(self, count: int, gfp: int) -> bool:
        pfns = self.pages.alloc_bulk(count, gfp, self._owner)
        self._descriptor_pages.extend(pfns)
        return bool(pfns)

    def _give_descriptor_pages(self) -> None:
        if not self.faithful:
            while (len(self._descriptor_pages) - 1) * self._descriptors_per_page >= self._regions and self._descriptor_pages:
                self.pages.free(self._descriptor_pages.pop(), 0)

    def check(self) -> None:
        """Verify that bitmaps and lists say the same, that neighbours are merged, and that what is live or parked is used."""
        listed: dict[Region, int] = {}
        for lane in (*self._lanes, self._reserve):
            assert lane.nonempty == sum(1 << count for count, chunks in enumerate(lane.lists) if chunks)
            assert lane.free == sum(count * len(chunks) for count, chunks in enumerate(lane.lists))
            for count, chunks in enumerate(lane.lists):
                for addr in chunks:
                    region = self._region_of[addr >> PAGE_SHIFT]
                    assert region is not None
                    assert region.lane is lane
                    first = (addr - region.base) >> self._grain_shift
                    assert (run_up(region.bitmap, first), run_down(region.bitmap, first)) == (count, 0), f"chunk {addr:#x}"
                    listed[region] = listed.get(region, 0) + count
                    assert (count == region.grains) == (region in self._empty)
        regions = {region for region in self._region_of if region is not None}
        assert len(regions) == self._regions
        for region in regions:
            assert listed.get(region, 0) == region.bitmap.bit_count(), f"region {region.base:#x}: {region.bitmap:b}"
        used = sum(lane.grains - lane.free for lane in (*self._lanes, self._reserve)) << self._grain_shift
        assert used == self.stats.charged + self.parked_bytes(), f"{used} bytes are used, {self.stats.charged} charged"
