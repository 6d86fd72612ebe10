"""The packet: a window on pool memory that knows what it costs and who pays for it.

As in the kernel, an skb has a linear part in one buffer of the pool and, after it, page fragments. The linear part has
headroom, so that headers are pushed in front of the payload without a copy. `truesize` is what the packet really took from the
pool: its head, its linear buffer rounded as the pool rounds it, and every page it holds, however little of it is used. An skb
that waits anywhere is charged to an `Account`; freeing it takes the charge back. A clone has a head of its own and shares the
data.

`SkbMemory` is the allocator: pool, pages and a free list of Python objects, so that the hot path makes none.

Source: Linux include/linux/skbuff.h for the vocabulary. Left out: the control block as untyped bytes (ours has typed slots,
owned by whichever layer holds the skb) and header offsets (a header is parsed where it lies, before anything is kept).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, Pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pools.arena import Arena
    from pools.buddy import PageAllocator

Buffer = bytes | bytearray | memoryview
"""What payload may be handed in as."""

FREE_LIST_MAX: Final = 4096
"""Python objects kept for re-use, so that a burst does not pin its objects for ever."""


def page_runs(pfns: Sequence[int], offset: int, length: int) -> list[tuple[int, int]]:
    """The bytes `offset .. offset+length` of the pages `pfns`, laid end to end, as runs `(address, length)`; neighbours are
    joined.
    """
    runs: list[tuple[int, int]] = []
    if not length:
        return runs
    if isinstance(pfns, range):  # the usual case
        return [((pfns[0] << PAGE_SHIFT) + offset, length)]
    first = offset >> PAGE_SHIFT
    base = pfns[first]
    start = (base << PAGE_SHIFT) + (offset & PAGE_MASK)
    stop = (offset + length + PAGE_MASK) >> PAGE_SHIFT
    end = (base + 1) << PAGE_SHIFT
    left = length - (end - start)
    for pfn in pfns[first + 1 : stop]:
        addr = pfn << PAGE_SHIFT
        if addr != end:
            runs.append((start, end - start))
            start = addr
        end = addr + PAGE_SIZE
        left -= PAGE_SIZE
    runs.append((start, end - start + min(left, 0)))
    return runs


class Account:
    """Somebody who pays for skbs: a socket's receive queue, a neighbour's queue. `bytes` is the truesize charged now.

    What is charged to an account is charged to its `parent` as well, so that there is one figure for each kind of owner. A
    parent has no parent of its own.
    """

    __slots__ = ("bytes", "name", "parent", "peak")

    def __init__(self, name: str, parent: Account | None = None) -> None:
        self.name = name
        self.parent = parent
        self.bytes = 0
        self.peak = 0

    def charge(self, truesize: int) -> None:
        """Add `truesize` bytes."""
        self.bytes += truesize
        if self.bytes > self.peak:
            self.peak = self.bytes
        parent = self.parent
        if parent is not None:
            parent.bytes += truesize
            if parent.bytes > parent.peak:
                parent.peak = parent.bytes

    def uncharge(self, truesize: int) -> None:
        """Take `truesize` bytes off again."""
        self.bytes -= truesize
        if self.parent is not None:
            self.parent.bytes -= truesize


class Skb:
    """A packet in pool memory. Made by `SkbMemory`; `free()` ends it.

    `data` and `tail` are arena addresses of the linear part; `frags` are runs `(address, length)` behind it, on the pages
    `pfns`. `len` counts both, in bytes. The rest are typed slots of the layer that holds the packet now: `seq`, `end_seq`,
    `flags` and `sent_at` belong to TCP; `peer` is the sender of a datagram. `absorbed` are skbs whose memory this one uses as
    well (see `absorb`).
    """

    __slots__ = (
        "absorbed",
        "account",
        "addr",
        "data",
        "dataref",
        "end_seq",
        "flags",
        "frags",
        "head",
        "len",
        "memory",
        "peer",
        "pfmemalloc",
        "pfns",
        "sent_at",
        "seq",
        "size",
        "tail",
        "truesize",
    )

    def __init__(self, memory: SkbMemory) -> None:
        self.memory = memory
        self.head = NULL
        self.addr = NULL
        self.size = 0
        self.data = 0
        self.tail = 0
        self.frags: list[tuple[int, int]] = []
        self.pfns: Sequence[int] = ()
        self.len = 0
        self.truesize = 0
        self.pfmemalloc = False
        self.dataref: list[int] | None = None
        self.absorbed: list[Skb] | None = None
        self.account: Account | None = None
        self.seq = 0
        self.end_seq = 0
        self.flags = 0
        self.sent_at = 0.0
        self.peer: object = None

    # -- the linear part --

    @property
    def headroom(self) -> int:
        """Bytes free in front of the linear data."""
        return self.data - self.addr

    @property
    def tailroom(self) -> int:
        """Bytes free behind the linear data; none when page fragments follow it."""
        return 0 if self.frags else self.addr + self.size - self.tail

    def put(self, payload: Buffer) -> None:
        """Append `payload` to the linear part. Raises ValueError when it does not fit the tailroom."""
        length = len(payload)
        if length > self.tailroom:
            raise ValueError(f"{length} bytes do not fit a tailroom of {self.tailroom}")
        self.memory.mem[self.tail : self.tail + length] = payload
        self.tail += length
        self.len += length

    def append(self, payload: memoryview) -> int:
        """Copy as much of `payload` as there is room for behind the data, in the linear part or in the pages; return how
        much.
        """
        if not self.pfns:
            length = min(len(payload), self.tailroom)
            self.put(payload[:length])
            return length
        filled = self.len - (self.tail - self.data)
        length = min(len(payload), (len(self.pfns) << PAGE_SHIFT) - filled)
        mem = self.memory.mem
        done = 0
        for addr, run in page_runs(self.pfns, filled, length):
            mem[addr : addr + run] = payload[done : done + run]
            done += run
            self._add_frag(addr, run)
        self.len += length
        return length

    def _add_frag(self, addr: int, run: int) -> None:
        frags = self.frags
        if frags:
            last, size = frags[-1]
            if last + size == addr:
                frags[-1] = (last, size + run)
                return
        frags.append((addr, run))

    def attach_pages(self, pfns: Sequence[int], length: int) -> None:
        """Take over the pages `pfns`, which hold `length` bytes from the start of the first on, as fragments behind the
        data.
        """
        self.pfns = pfns
        self.frags = page_runs(pfns, 0, length)
        self.len += length
        self.truesize += len(pfns) << PAGE_SHIFT

    def absorb(self, other: Skb) -> None:
        """Append the data of `other` without copying it: `other` must not be used any more, and is freed with this skb (the
        kernel's frag_list). What it costs is charged to who pays for this one. Neither may have been cloned.
        """
        other.uncharge()
        if self.account is not None:
            self.account.charge(other.truesize)
        if other.tail > other.data:
            self.frags.append((other.data, other.tail - other.data))
        self.frags += other.frags
        self.len += other.len
        self.truesize += other.truesize
        self.pfmemalloc |= other.pfmemalloc
        if self.absorbed is None:
            self.absorbed = []
        self.absorbed.append(other)

    def push(self, header: Buffer) -> None:
        """Put `header` in front of the data. Raises ValueError when it does not fit the headroom."""
        length = len(header)
        if length > self.headroom:
            raise ValueError(f"{length} bytes do not fit a headroom of {self.headroom}")
        self.data -= length
        self.memory.mem[self.data : self.data + length] = header
        self.len += length

    def pull(self, length: int) -> None:
        """Take `length` bytes off the front, linear part first. Pages stay held, and truesize stays, until
        `release_front`. Raises ValueError when there are not so many.
        """
        if not 0 <= length <= self.len:
            raise ValueError(f"cannot pull {length} of {self.len} bytes")
        self.len -= length
        linear = self.tail - self.data
        if length <= linear:
            self.data += length
            return
        self.data = self.tail
        length -= linear
        frags = self.frags
        done = 0
        while length:
            addr, size = frags[done]
            if length < size:
                frags[done] = (addr + length, size - length)
                break
            length -= size
            done += 1
        del frags[:done]

    def release_front(self) -> None:
        """Give back the pages that `pull` has left behind, and their charge; truesize shrinks by them. Does nothing while a
        clone shares them.
        """
        pfns = self.pfns
        if not pfns or self.dataref is not None:
            return
        first = pfns.index(self.frags[0][0] >> PAGE_SHIFT) if self.frags else len(pfns)
        if first:
            self.pfns = pfns[first:]
            self.truesize -= first << PAGE_SHIFT
            if self.account is not None:
                self.account.uncharge(first << PAGE_SHIFT)
            self.memory.pages.free_bulk(pfns[:first])

    def trim(self, length: int) -> None:
        """Keep the first `length` bytes of the data. What the skb holds, and truesize, stay. Raises ValueError when there are
        fewer.
        """
        if not 0 <= length <= self.len:
            raise ValueError(f"cannot trim {self.len} bytes to {length}")
        linear = self.tail - self.data
        self.len = length
        if length <= linear:
            self.tail = self.data + length
            self.frags.clear()
            return
        rest = length - linear
        for index, (addr, size) in enumerate(self.frags):
            if rest <= size:
                self.frags[index] = (addr, rest)
                del self.frags[index + 1 :]
                return
            rest -= size

    # -- reading --

    def views(self, offset: int = 0, length: int = -1) -> list[memoryview]:
        """The bytes `offset .. offset+length` of the data as views on pool memory, in order; to the end when `length` is
        negative.
        """
        mem = self.memory.mem
        left = self.len - offset if length < 0 else length
        out = []
        linear = self.tail - self.data
        if offset < linear:
            size = min(linear - offset, left)
            out.append(mem[self.data + offset : self.data + offset + size])
            left -= size
            offset = 0
        else:
            offset -= linear
        if left:
            for addr, run in self.frags:
                if offset >= run:
                    offset -= run
                    continue
                size = run - offset
                if size >= left:
                    out.append(mem[addr + offset : addr + offset + left])
                    break
                out.append(mem[addr + offset : addr + run])
                left -= size
                offset = 0
        return out

    def copy_to(self, target: memoryview, offset: int = 0) -> int:
        """Copy data from `offset` on into `target` until either ends; return how many bytes."""
        done = 0
        for view in self.views(offset, min(self.len - offset, len(target))):
            size = len(view)
            target[done : done + size] = view
            done += size
        return done

    def tobytes(self) -> bytes:
        """A copy of all the data."""
        return b"".join(self.views())

    # -- who pays, and the end --

    def charge_to(self, account: Account) -> None:
        """Charge the packet to `account`, and no longer to whoever paid before."""
        if self.account is not None:
            self.account.uncharge(self.truesize)
        self.account = account
        account.charge(self.truesize)

    def uncharge(self) -> None:
        """Let nobody pay for the packet, while it goes from one owner to the next."""
        if self.account is not None:
            self.account.uncharge(self.truesize)
            self.account = None

    def free(self) -> None:
        """End the packet: its charge, its head and its share of the data. The object must not be used any more.

        Raises RuntimeError for one that was freed already, and has not been handed out again since.
        """
        self.memory.free(self)


class SkbMemory:
    """Where skbs come from: a pool, its pages, and a free list of Python objects.

    `cpu` is the lane that allocates and frees; `live` counts skbs that have not been freed.
    """

    __slots__ = ("_free", "arena", "cpu", "frag_owner", "live", "mem", "pages", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.pages: PageAllocator = pool.pages
        self.arena: Arena = pool.pages.arena
        self.mem: memoryview = self.arena.mem
        self.frag_owner = self.pages.owner_id("skb frags")
        self.cpu = 0
        self.live = 0
        self._free: list[Skb] = []

    def alloc(self, size: int, gfp: int, headroom: int = 0) -> Skb | None:
        """An empty skb whose linear buffer holds `headroom + size` bytes; None when there is no memory."""
        pool = self.pool
        total = headroom + size
        addr = pool.alloc(total, gfp, self.cpu)
        if addr == NULL:
            return None
        skb = self.adopt(addr, total, pool.pfmemalloc, gfp)
        if skb is None:
            pool.free(addr, total, self.cpu)
            return None
        skb.data = skb.tail = addr + headroom
        return skb

    def adopt(self, addr: int, size: int, pfmemalloc: bool, gfp: int) -> Skb | None:
        """An skb around the buffer at `addr`, allocated from the pool earlier with `size`; None when there is no memory for
        its head.
        """
        skb = self._with_head(gfp, addr)
        if skb is None:
            return None
        skb.addr = skb.data = skb.tail = addr
        skb.size = size
        skb.truesize += self.pool.charge(addr, size)
        skb.pfmemalloc |= pfmemalloc
        return skb

    def alloc_paged(self, pages: int, gfp: int) -> Skb | None:
        """An empty skb without linear part, with `pages` pages to `append` to; None when there is no memory."""
        pfns = self.pages.alloc_bulk(pages, gfp, self.frag_owner)
        if not pfns:
            return None
        pfmemalloc = self.pages.pfmemalloc
        skb = self._with_head(gfp, NULL)
        if skb is None:
            self.pages.free_bulk(pfns)
            return None
        skb.pfns = pfns
        skb.truesize += pages << PAGE_SHIFT
        skb.pfmemalloc |= pfmemalloc
        return skb

    def _with_head(self, gfp: int, group: int) -> Skb | None:
        head = self.pool.alloc_head(gfp, self.cpu, group)
        if head == NULL:
            return None
        skb = self._free.pop() if self._free else Skb(self)
        skb.head = head
        skb.truesize = self.pool.head_charge
        skb.pfmemalloc = self.pool.pfmemalloc
        self.live += 1
        return skb

    def clone(self, skb: Skb, gfp: int) -> Skb | None:
        """A second skb on the same data, with a head of its own, not charged to anybody; None when there is no memory.

        The clone is accounted for the data as well, as in the kernel: either may be the last to hold it.
        """
        twin = self._with_head(gfp, skb.addr)
        if twin is None:
            return None
        if skb.dataref is None:
            skb.dataref = [1]
        skb.dataref[0] += 1
        twin.dataref = skb.dataref
        twin.addr, twin.size, twin.data, twin.tail = skb.addr, skb.size, skb.data, skb.tail
        twin.frags = skb.frags.copy()
        twin.pfns = skb.pfns
        twin.absorbed = skb.absorbed
        twin.len = skb.len
        twin.truesize = skb.truesize
        twin.pfmemalloc |= skb.pfmemalloc
        twin.seq, twin.end_seq, twin.flags, twin.sent_at, twin.peer = skb.seq, skb.end_seq, skb.flags, skb.sent_at, skb.peer
        return twin

    def free(self, skb: Skb) -> None:
        """End `skb`; see `Skb.free`."""
        if skb.head == NULL:
            raise RuntimeError("skb freed twice")
        if skb.account is not None:
            skb.account.uncharge(skb.truesize)
            skb.account = None
        pool = self.pool
        dataref = skb.dataref
        group = skb.addr
        if dataref is not None:
            dataref[0] -= 1
        pool.free_head(skb.head, self.cpu, group)
        skb.head = NULL
        if dataref is None or dataref[0] == 0:
            if skb.addr != NULL:
                pool.free(skb.addr, skb.size, self.cpu)
            if skb.pfns:
                self.pages.free_bulk(skb.pfns)
            if skb.absorbed is not None:
                for each in skb.absorbed:
                    self.free(each)
        self.live -= 1
        if len(self._free) < FREE_LIST_MAX:
            skb.addr = NULL
            skb.size = skb.data = skb.tail = skb.len = skb.flags = 0
            if dataref is not None or skb.pfns:
                skb.dataref = None
                skb.pfns = ()
            if skb.frags:
                skb.frags = []
            skb.absorbed = None
            skb.peer = None
            self._free.append(skb)
