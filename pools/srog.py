"""SROG, the Small Related Object Group allocator that Peter Zijlstra posted to linux-kernel on 12 August 2006.

All objects of one packet, its data, its head and the heads of its clones, are a group on pages of their own; when the last
object of a page is freed, the page goes back at once. A group is a ring of blocks (one page, or more in one piece). A block
begins with a header of 48 bytes; an object has one of 8, with its size. Free pieces are listed by address; an allocation
takes the low part of the first that is large enough, anywhere in the ring, or else adds a block; a free merges the piece
with both neighbours. Any live object names its group. Nothing is counted: a block is empty when one free piece covers it.

In the role `main` everything is allocated so. In the role `fallback`, which is the one it was made for, the pool is
`kmalloc`, until that fails for a caller who may use the reserve: then the packet becomes a group on pages from the reserve,
at most `payloads` at a time.

Corrected by default. With `faithful=True` a group does what was posted, the faults included:

* The sorted insertion always inserts in front. The order is lost, most merges do not happen, and the page is not given back.
* An address in the second or a later page of a block is not recognised.
* A group that cannot get another block is dereferenced all the same.
* Linking a ring of several blocks loses one of them.
* A remainder too small for its own description is described nevertheless, over the header of the next object.
* On a 64-bit machine the header takes eight bytes, of which the size calculation knows four.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from mypy_extensions import mypyc_attr

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.buddy import MAX_ORDER
from pools.gfp import ATOMIC, MEMALLOC, may_use_reserve
from pools.kmalloc import LANES, KmallocPool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from pools.buddy import PageAllocator

Role = Literal["main", "fallback"]

PAYLOADS: Final = 128
"""MAX_CONCURRENT_SKBS of the patch: payloads that may be in groups from the reserve at once."""


class Layout(NamedTuple):
    """Sizes in bytes. `word`: a machine word; `block_header`: the header of a block; `offset`: where the object begins in its
    piece; `counted`: what the size calculation adds for that; `smallest`: the smallest object; `smallest_rest`: the smallest
    piece that may be left over.
    """

    word: int
    block_header: int
    offset: int
    counted: int
    smallest: int
    smallest_rest: int


LAYOUT: Final = Layout(8, 48, 8, 8, 8, 16)
"""A 64-bit machine, with a header that is counted as it is."""

POSTED_32: Final = Layout(4, 28, 4, 4, 8, 4)
"""The patch on a 32-bit machine, where it had been tried."""

POSTED_64: Final = Layout(8, 48, 8, 4, 16, 8)
"""The patch on a 64-bit machine."""


class Oops(Exception):
    """Here the posted code would have stopped the kernel: BUG(), or a pointer that points nowhere. Only with `faithful`."""


class Block:
    """Pages in one piece. `free` are the free pieces, as (address, bytes), by address; `previous` and `next` make the ring."""

    __slots__ = ("base", "free", "gfp", "next", "order", "pfmemalloc", "previous", "room")

    def __init__(self, base: int, order: int, header: int, gfp: int, pfmemalloc: bool) -> None:
        self.base = base
        self.order = order
        self.gfp = gfp
        self.pfmemalloc = pfmemalloc
        self.room = (PAGE_SIZE << order) - header
        self.free = [(base + header, self.room)]
        self.previous = self
        self.next = self

    def ring(self) -> Iterator[Block]:
        """The blocks of the group, this one first."""
        block = self
        while True:
            yield block
            block = block.next
            if block is self:
                return


@mypyc_attr(allow_interpreted_subclasses=True)
class SrogPool(Pool):
    """Groups on pages of their own: for all packets, or (`role="fallback"`) for those that need the reserve.

    `charge`: the object that opens a block is charged all of it, less the place of one head if it has one: for as long as
    it lives nobody else can use the page, and limits that did not know that would be no limits. An object that found room in a
    block of its group is charged its piece.
    """

    __slots__ = (
        "_block_of",
        "_data",
        "_heads",
        "_held",
        "_kmalloc",
        "_offset",
        "_opened",
        "_owner",
        "_payloads",
        "_round_up",
        "_smallest",
        "_word_mask",
        "faithful",
        "layout",
        "payloads",
    )

    name = "srog"

    def __init__(
        self,
        pages: PageAllocator,
        *,
        role: Role = "main",
        payloads: int = PAYLOADS,
        lanes: int = LANES,
        faithful: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__(pages)
        self.faithful = faithful
        self.layout = layout = layout or (POSTED_32 if faithful else LAYOUT)
        self._offset = layout.offset
        self._smallest = layout.smallest
        self._round_up = layout.counted + layout.word - 1
        self._word_mask = -layout.word
        self.payloads = payloads
        self._kmalloc = KmallocPool(pages, lanes=lanes) if role == "fallback" else None
        self._owner = pages.owner_id("srog")
        self._block_of: list[Block | None] = [None] * pages.pages
        self._held = 0
        self._data: dict[int, int] = {}  # live objects in groups: address -> bytes of the piece
        self._heads: dict[int, int] = {}
        self._opened: dict[int, int] = {}  # those of them that opened a block -> charge
        self._payloads: set[int] = set()  # data that began a group in the role fallback
        largest = PAGE_SIZE << min(MAX_ORDER, pages.pages.bit_length() - 1)
        self.max_size = (largest - self.layout.block_header & -self.layout.word) - self.layout.counted
        self.head_charge = self._need(SKB_HEAD_SIZE)
        if self._kmalloc is not None:
            self.max_size = self._kmalloc.max_size
            self.head_charge = self._kmalloc.head_charge

    # The contract

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate data in the group of the live object `group`, or as the first object of a new group."""
        if not 0 < size <= self.max_size:
            self.stats.failures += 1
            return NULL
        block = self._block_of[group >> PAGE_SHIFT] if group >= 0 else None
        kmalloc = self._kmalloc
        if kmalloc is not None and (block is None or (block.pfmemalloc and not may_use_reserve(gfp))):
            addr = kmalloc.alloc(size, ATOMIC, cpu)
            if addr >= 0:
                self.pfmemalloc = False
                self._account(size, kmalloc.charge(addr, size))
                return addr
            if not may_use_reserve(gfp) or len(self._payloads) >= self.payloads:
                self.stats.failures += 1
                return NULL
        addr = self._alloc(size, gfp, group if block is not None else NULL, self._data)
        if addr >= 0 and kmalloc is not None and block is None:
            self._payloads.add(addr)
        return addr

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate a head, in the group of its packet if `group` names it."""
        block = self._block_of[group >> PAGE_SHIFT] if group >= 0 else None
        kmalloc = self._kmalloc
        if kmalloc is not None and (block is None or (block.pfmemalloc and not may_use_reserve(gfp))):
            addr = kmalloc.alloc_head(ATOMIC, cpu)
            if addr >= 0:
                self.pfmemalloc = False
                self._account(SKB_HEAD_SIZE, self.head_charge)
                return addr
            if not may_use_reserve(gfp):
                self.stats.failures += 1
                return NULL
        return self._alloc(SKB_HEAD_SIZE, gfp, group if block is not None else NULL, self._heads)

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """Free data."""
        if addr in self._data:
            charge = self._opened.get(addr) or self._data[addr]
            self._free(addr, self._data, group)
            if self._payloads:
                self._payloads.discard(addr)
        elif self._kmalloc is not None:
            charge = self._kmalloc.stats.charged
            self._kmalloc.free(addr, size, cpu)
            charge -= self._kmalloc.stats.charged
        else:
            raise DoubleFree(f"no data at {addr:#x} is allocated")
        self._settle(size, charge)

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Free a head."""
        if addr in self._heads:
            self._free(addr, self._heads, group)
        elif self._kmalloc is not None:
            self._kmalloc.free_head(addr, cpu)
        else:
            raise DoubleFree(f"no head at {addr:#x} is allocated")
        self._settle(SKB_HEAD_SIZE, self.head_charge)

    def charge(self, addr: int, size: int) -> int:
        """The block that the object opened, or its piece; the class says why."""
        if addr in self._data:
            return self._opened.get(addr) or self._data[addr]
        assert self._kmalloc is not None
        return self._kmalloc.charge(addr, size)

    def link(self, group: int, other: int) -> None:
        """Join two rings (srog_link), for data that replaces the data of a packet with clones."""
        one, two = self._block_of[group >> PAGE_SHIFT], self._block_of[other >> PAGE_SHIFT]
        if one is None or two is None:
            return
        if self.faithful:
            # list_splice() takes its first argument for a list head, and leaves that behind.
            first, last, at = two.next, two.previous, one.next
        elif any(block is two for block in one.ring()):
            return
        else:
            first, last, at = two, two.previous, one.next
        first.previous, one.next = one, first
        last.next, at.previous = at, last

    def reap(self) -> int:
        """Groups hold no page longer than needed; in the role `fallback`, kmalloc is reaped."""
        return self._kmalloc.reap() if self._kmalloc is not None else 0

    def alone_on(self, pfn: int, own: Collection[int]) -> bool:
        """See `Pool.alone_on`: a block holds the objects of one group, and a group is a packet. As posted, the headers of the
        objects lie on the page and must stay with it: then it cannot tell.
        """
        block = self._block_of[pfn]
        if block is None:
            return self._kmalloc is not None and self._kmalloc.alone_on(pfn, own)
        if self.faithful:
            return False
        data = self._data
        return all(
            addr in own for addr in range(block.base, block.base + (PAGE_SIZE << block.order), self.layout.word) if addr in data
        )

    def held_pages(self) -> int:
        """Pages of all blocks, and those of kmalloc in the role `fallback`."""
        return self._held + (self._kmalloc.held_pages() if self._kmalloc is not None else 0)

    def largest_free_run(self) -> int:
        """The largest free piece in the block of any group; in the role `fallback`, also the largest free object of kmalloc."""
        pieces = max((size for block in self._block_of if block is not None for _, size in block.free), default=0)
        return pieces if self._kmalloc is None else max(pieces, self._kmalloc.largest_free_run())

    def group_pages(self, addr: int) -> int:
        """Pages of the group of a live object."""
        block = self._block_of[addr >> PAGE_SHIFT]
        return sum(1 << member.order for member in block.ring()) if block is not None else 0

    # Groups

    def _need(self, size: int) -> int:
        """Bytes of the piece for an object of `size` bytes."""
        return ((size if size > self._smallest else self._smallest) + self._round_up) & self._word_mask

    def _alloc(self, size: int, gfp: int, group: int, kind: dict[int, int]) -> int:
        need = self._need(size)
        piece: tuple[int, int] | None = None
        block: Block | None = None
        if group >= 0:
            first = self._posted_block(group) if self.faithful else self._block_of[group >> PAGE_SHIFT]
            assert first is not None
            reserve = self.faithful or may_use_reserve(gfp)
            for block in first.ring():
                if reserve or not block.pfmemalloc:
                    piece = self._carve(block, need)
                    if piece is not None:
                        break
            else:
                block = self._new_block(need, first.gfp if self.faithful else gfp)
                if block is not None:
                    block.previous, block.next = first, first.next
                    first.next.previous = block
                    first.next = block
                elif self.faithful:
                    raise Oops("no memory for another block of the group, and nobody asked")
        else:
            block = self._new_block(need, gfp)
        if block is None:
            self.stats.failures += 1
            return NULL
        self.pfmemalloc = block.pfmemalloc
        if piece is not None:
            start, charge = piece
            addr = start + self._offset
            kind[addr] = charge
            if self.faithful:
                self._posted_rest(block, start + charge)
        else:
            start, room = block.free.pop()
            addr = start + self._offset
            if room - need >= self.layout.smallest_rest:
                block.free.append((start + need, room - need))
                room = need
            kind[addr] = room
            charge = PAGE_SIZE << block.order
            if charge - self.head_charge >= need:
                charge -= self.head_charge
            if kind is self._data:
                self._opened[addr] = charge
        self._account(size, charge if kind is self._data else self.head_charge)
        return addr

    def _carve(self, block: Block, need: int) -> tuple[int, int] | None:
        """Take the low part of the first free piece with `need` bytes; all of it, if the rest is too small to be described."""
        free = block.free
        for place, (start, size) in enumerate(free):
            if size >= need:
                if size - need >= self.layout.smallest_rest:
                    free[place] = (start + need, size - need)
                    return start, need
                del free[place]
                return start, size
        return None

    def _free(self, addr: int, kind: dict[int, int], group: int) -> None:
        if self.faithful:
            self._posted_free(addr, kind, group)
            return
        start = addr - self._offset
        size = kind.pop(addr)
        self._opened.pop(addr, None)
        block = self._block_of[addr >> PAGE_SHIFT]
        assert block is not None
        free = block.free
        place = bisect_left(free, (start, 0))
        if place < len(free) and free[place][0] == start + size:
            size += free.pop(place)[1]
        if place and free[place - 1][0] + free[place - 1][1] == start:
            place -= 1
            start, before = free.pop(place)
            size += before
        if size == block.room:
            self._give_back(block)
        else:
            free.insert(place, (start, size))

    def _new_block(self, need: int, gfp: int) -> Block | None:
        header = self.layout.block_header
        order = (need + header - 1 >> PAGE_SHIFT).bit_length()
        pages = self.pages
        pfn = pages.alloc(order, ATOMIC, self._owner)
        if pfn < 0:
            pfn = pages.alloc(order, MEMALLOC, self._owner) if may_use_reserve(gfp) else NULL
            if pfn < 0:
                return None
        block = Block(pfn << PAGE_SHIFT, order, header, gfp, pages.pfmemalloc)
        self._held += 1 << order
        if order:
            self._block_of[pfn : pfn + (1 << order)] = [block] * (1 << order)
        else:
            self._block_of[pfn] = block
        return block

    def _give_back(self, block: Block) -> None:
        block.previous.next = block.next
        block.next.previous = block.previous
        pfn = block.base >> PAGE_SHIFT
        self._held -= 1 << block.order
        if block.order:
            self._block_of[pfn : pfn + (1 << block.order)] = [None] * (1 << block.order)
        else:
            self._block_of[pfn] = None
        self.pages.free(pfn, block.order)

    # What was posted

    def _posted_block(self, addr: int) -> Block:
        """PTR_TO_SROG: the block header is looked for at the start of the page."""
        block = self._block_of[addr >> PAGE_SHIFT]
        if block is None or block.base != addr & -PAGE_SIZE:
            raise Oops(f"no magic number at the start of the page of {addr:#x}")
        return block

    def _posted_rest(self, block: Block, start: int) -> None:
        """Describe the rest of a piece where it lies, whether it has the room or not."""
        for place, (rest, size) in enumerate(block.free):
            if rest == start and size < 2 * self.layout.word:
                following = block.free[place + 1][0] if place + 1 < len(block.free) else 0
                victim = rest + size + self.layout.offset
                for kind in (self._data, self._heads):
                    if victim in kind:
                        kind[victim] = following  # the size of the next object is now a pointer

    def _posted_free(self, addr: int, kind: dict[int, int], group: int) -> None:
        block = self._posted_block(group if group >= 0 else addr)
        for member in block.ring():
            if member.base <= addr <= member.base + (PAGE_SIZE << member.order):
                block = member
                break
        else:
            raise Oops(f"{addr:#x} is not of that group")
        start, size = addr - self.layout.offset, kind.pop(addr)
        if self.layout.offset != self.layout.counted:
            # The size was stored at the start of the piece, and is looked for just before the object: that is padding.
            start = addr - self.layout.counted
            size = int.from_bytes(self.pages.arena.mem[start:addr], "little")
        self._opened.pop(addr, None)
        free = block.free
        if free and free[0][0] == start + size:
            size += free.pop(0)[1]
        free.insert(0, (start, size))
        if size == block.room:
            self._give_back(block)

    # Accounts

    def _account(self, size: int, charge: int) -> None:
        stats = self.stats
        stats.allocs += 1
        stats.requested = requested = stats.requested + size
        if requested > stats.requested_peak:
            stats.requested_peak = requested
        stats.charged = charged = stats.charged + charge
        if charged > stats.charged_peak:
            stats.charged_peak = charged

    def _settle(self, size: int, charge: int) -> None:
        stats = self.stats
        stats.frees += 1
        stats.requested -= size
        stats.charged -= charge

    def check(self) -> None:
        """Verify that pieces and free pieces fill every block, that neighbours are merged, and that rings are closed."""
        if self._kmalloc is not None:
            self._kmalloc.check()
        offset = self.layout.offset
        used: dict[Block, list[tuple[int, int]]] = {}
        for addr, size in (*self._data.items(), *self._heads.items()):
            block = self._block_of[addr >> PAGE_SHIFT]
            assert block is not None, f"live object {addr:#x} on a page that was given back"
            used.setdefault(block, []).append((addr - offset, size))
        blocks = {block for block in self._block_of if block is not None}
        assert blocks == set(used), "a block without a live object"
        assert self._held == sum(1 << block.order for block in blocks)
        for block in blocks:
            assert block.next.previous is block
            assert block.previous.next is block
            place = block.base + self.layout.block_header
            was_free = False
            for start, size in sorted(used[block] + block.free):
                assert start == place, f"block {block.base:#x}: piece at {start:#x}, expected at {place:#x}"
                is_free = (start, size) in block.free
                assert not (is_free and was_free), f"block {block.base:#x}: neighbours at {start:#x} are not merged"
                was_free = is_free
                place += size
            assert place == block.base + (PAGE_SIZE << block.order)
