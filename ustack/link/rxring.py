"""Receive rings: memory posted before a frame comes, and the frame while it lies there.

Both receive modes of the design are here, because the dispute of 2006 was about both.

* `LinearRing`: one contiguous buffer per frame, big enough for the MTU, allocated before it is known whose frame it is: the way
  of the drivers of 2006. A kept frame takes its buffer along, and another one must be found for the ring. When the pool is
  empty the ring starves; buffers from the reserve are posted only while a memalloc socket exists, and the drop rule decides
  about what lands in them.
* `PagedRing`: packet split. One header buffer and as many pages as the largest frame fills. A small frame is copied out of the
  header buffer (copybreak); the pages of a large one leave with it, and only after others were found to take their place. So
  the ring is always full, and a frame that nobody keeps has cost nothing: it can be classified before anything is allocated
  for it.

An `RxFrame` is valid until its delivery returns. Whoever wants to keep bytes calls `keep`, which makes an skb of them.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from pools.arena import PAGE_MASK, PAGE_SHIFT
from pools.base import NULL
from pools.gfp import ATOMIC, MEMALLOC
from ustack.skb import page_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Buffer, Skb, SkbMemory

HEADER_BUFFER: Final = 2048
"""Bytes of the paged ring's header buffer: a frame of 1500 bytes fits it whole, so only larger frames use pages."""

LINEAR_RING_FRAMES: Final = 64
"""Buffers that a linear ring posts: one batch of the pump."""


class Pin:
    """Bytes of a frame that stay as they are while somebody who sniffs reads them, whatever becomes of the frame.

    `runs` are the bytes, as `(address, length)` in the arena; `buffers` pool objects `(address, size)` that nobody else holds,
    `pfns` pages of which one reference is ours, `twin` a clone of an skb. `cost` is what they hold in bytes. The last `put`
    frees them.
    """

    __slots__ = ("buffers", "cost", "memory", "pfns", "refs", "runs", "twin")

    def __init__(self, memory: SkbMemory, runs: list[tuple[int, int]], cost: int) -> None:
        self.memory = memory
        self.runs = runs
        self.cost = cost
        self.refs = 1
        self.buffers: list[tuple[int, int]] = []
        self.pfns: Sequence[int] = ()
        self.twin: Skb | None = None

    def put(self) -> bool:
        """Drop one reference; whether it was the last."""
        self.refs -= 1
        if self.refs:
            return False
        memory = self.memory
        for addr, size in self.buffers:
            memory.pool.free(addr, size, memory.cpu)
        if self.pfns:
            memory.pages.free_bulk(self.pfns)
        if self.twin is not None:
            self.twin.free()
        return True


class RxFrame:
    """A received frame, still in the ring. Offsets count from the first byte of the Ethernet header.

    `head` is a view on the contiguous start of the frame; at least the first `min(len, 2048)` bytes lie in it (what follows
    them in `head` is old memory). `csum_ok` means that the device vouches for the transport checksum; `gso_size` is the
    payload of each segment that was merged into this frame, 0 for a plain one. `pfmemalloc` is set when the buffer it lies in
    came from the reserve.
    """

    __slots__ = ("csum_ok", "gso_size", "head", "len", "pfmemalloc", "ring")

    def __init__(self, ring: RxRing) -> None:
        self.ring = ring
        self.head = memoryview(b"")
        self.len = 0
        self.csum_ok = False
        self.gso_size = 0
        self.pfmemalloc = False

    def views(self, offset: int, length: int) -> list[memoryview]:
        """The bytes `offset .. offset+length` as views on ring memory."""
        return self.ring.views(offset, length)

    def tobytes(self, offset: int, length: int) -> bytes:
        """A copy of the bytes `offset .. offset+length`."""
        return b"".join(self.ring.views(offset, length))

    def copy_to(self, offset: int, length: int, target: memoryview) -> None:
        """Copy the bytes `offset .. offset+length` to the start of `target`, which has room for them."""
        done = 0
        for view in self.ring.views(offset, length):
            size = len(view)
            target[done : done + size] = view
            done += size

    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        """An skb of the bytes `offset .. offset+length`, not charged to anybody yet; None when there is no memory, and then it
        may be tried again. It succeeds at most once for each frame, whose memory is the skb's from then on.
        """
        return self.ring.keep(offset, length, gfp)

    def truesize(self, offset: int, length: int) -> int:
        """About the truesize of what `keep` would make of these bytes, so that it can be decided beforehand."""
        return self.ring.truesize(offset, length)


@mypyc_attr(allow_interpreted_subclasses=True)
class RxRing(ABC):
    """Posted receive memory for frames of up to `max_frame` bytes. A device reads into `iov` and then delivers `frame`.

    `prefix` is a buffer of the device's own that comes first in `iov` (a virtio-net header).
    """

    __slots__ = ("_owner", "_prefixes", "frame", "iov", "max_frame", "memory")

    def __init__(self, memory: SkbMemory, max_frame: int, prefix: bytearray | None) -> None:
        self.memory = memory
        self.max_frame = max_frame
        self.frame = RxFrame(self)
        self.iov: list[bytearray | memoryview] = [] if prefix is None else [prefix]
        self._prefixes = len(self.iov)
        self._owner = memory.pages.owner_id("rx ring")

    @abstractmethod
    def ready(self) -> bool:
        """Whether memory for a whole frame is posted, after trying to post what is missing."""

    @abstractmethod
    def views(self, offset: int, length: int) -> list[memoryview]:
        """Views on the frame's bytes in the ring."""

    @abstractmethod
    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        """See `RxFrame.keep`."""

    @abstractmethod
    def truesize(self, offset: int, length: int) -> int:
        """See `RxFrame.truesize`."""

    def begin_pin(self) -> None:  # noqa: B027 (a ring whose frames cannot be pinned has nothing to prepare)
        """The frame is about to be delivered, and somebody sniffs: what it lies in must outlive it."""

    def end_pin(self) -> Pin | None:
        """It was delivered: the bytes of the whole frame where they lie, and other memory in the ring in their place. None when
        there is no ordinary memory for that (the reserve is never used), or when the ring's frames cannot be pinned at all.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Give all posted memory back."""

    def fill(self, data: Buffer) -> None:
        """Write the frame `data` into the posted memory, as a device with DMA would. It must not be longer than `max_frame`."""
        left = memoryview(data)
        for buffer in self.iov[self._prefixes :]:
            size = min(len(buffer), len(left))
            buffer[:size] = left[:size]
            left = left[size:]
            if not left:
                break
        self.frame.len = len(data)


@mypyc_attr(allow_interpreted_subclasses=True)
class PagedRing(RxRing):
    """Packet split: a header buffer that stays, and pages that leave with large frames. Raises OSError ENOMEM when made
    without memory.
    """

    __slots__ = ("_header", "_kept", "_kept_from", "_pfns", "_pinning", "_size")

    def __init__(self, memory: SkbMemory, max_frame: int, prefix: bytearray | None = None) -> None:
        super().__init__(memory, max_frame, prefix)
        self._size = min(HEADER_BUFFER, max_frame)
        self._header = memory.pool.alloc(self._size, ATOMIC, memory.cpu)
        if self._header == NULL:
            raise OSError(errno.ENOMEM, f"{os.strerror(errno.ENOMEM)}: no memory for the header buffer of a receive ring")
        pages = (max_frame - self._size + PAGE_MASK) >> PAGE_SHIFT
        self._pfns = memory.pages.alloc_bulk(pages, ATOMIC, self._owner) if pages else ()
        self._pinning = False
        self._kept: Sequence[int] = ()  # pages that `keep` has given away while `_pinning`, and the place of the first
        self._kept_from = 0
        if pages and not self._pfns:
            memory.pool.free(self._header, self._size, memory.cpu)
            raise OSError(errno.ENOMEM, f"{os.strerror(errno.ENOMEM)}: no {pages} pages for a receive ring")
        self.frame.head = memory.arena.view(self._header, self._size)
        self.iov.append(self.frame.head)
        self._post_pages()

    def _post_pages(self) -> None:
        mem = self.memory.mem
        runs = page_runs(self._pfns, 0, len(self._pfns) << PAGE_SHIFT)
        self.iov[self._prefixes + 1 :] = [mem[addr : addr + size] for addr, size in runs]

    def ready(self) -> bool:
        """Always: pages leave only after others took their place."""
        return True

    def views(self, offset: int, length: int) -> list[memoryview]:
        """Views on the frame's bytes in the ring."""
        split = self._size - offset
        if length <= split:
            return [self.frame.head[offset : offset + length]]
        out = []
        if split > 0:
            out.append(self.frame.head[offset:])
            length -= split
            offset = self._size
        mem = self.memory.mem
        out += [mem[addr : addr + run] for addr, run in page_runs(self._pfns, offset - self._size, length)]
        return out

    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        """Copy what lies in the header buffer; take the pages of the rest along and post others."""
        memory = self.memory
        split = self._size - offset
        if length <= split:
            skb = memory.alloc(length, gfp)
            if skb is not None:
                skb.put(self.frame.head[offset : offset + length])
            return skb
        end = offset + length - self._size
        first = max(-split, 0) >> PAGE_SHIFT
        last = (end + PAGE_MASK) >> PAGE_SHIFT
        pages = memory.pages
        fresh = pages.alloc_bulk(last - first, gfp, self._owner)
        if not fresh:
            return None
        pfmemalloc = pages.pfmemalloc
        skb = memory.alloc(max(split, 1), gfp)  # a pool has nothing of no bytes
        if skb is None:
            pages.free_bulk(fresh)
            return None
        if split > 0:
            skb.put(self.frame.head[offset:])
        posted = self._pfns
        if last - first == len(posted):
            taken = posted
            self._pfns = fresh
        else:
            taken = posted[first:last]
            self._pfns = [*posted[:first], *fresh, *posted[last:]]
        self._post_pages()
        pages.transfer(taken, memory.frag_owner)
        if self._pinning:
            pages.get_pages(taken)
            self._kept = taken
            self._kept_from = first
        skb.attach_pages(taken, end - (first << PAGE_SHIFT))
        if split < 0:
            skb.pull(-split - (first << PAGE_SHIFT))
        skb.pfmemalloc |= pfmemalloc
        return skb

    def truesize(self, offset: int, length: int) -> int:
        """Pages for what lies in them, a buffer rounded up to a power of two for the rest, and a head."""
        head = self.memory.pool.head_charge
        split = self._size - offset
        if length <= split:
            return (1 << (length - 1).bit_length()) + head
        first = max(-split, 0) >> PAGE_SHIFT
        last = (length - split + PAGE_MASK) >> PAGE_SHIFT
        return ((last - first) << PAGE_SHIFT) + (1 << max(split - 1, 0).bit_length()) + head

    def begin_pin(self) -> None:
        """Should the frame be kept, its pages get one more reference: the skb that has them may free them at any time."""
        self._pinning = True

    def end_pin(self) -> Pin | None:
        """Post another header buffer, and other pages for those that nobody has kept."""
        self._pinning = False
        kept = self._kept
        self._kept = ()
        memory = self.memory
        pages = memory.pages
        length = self.frame.len
        header = memory.pool.alloc(self._size, ATOMIC, memory.cpu)
        if header == NULL:
            if kept:
                pages.free_bulk(kept)
            return None
        # `keep` takes pages up to the last one of the frame, unless somebody cut the end off; the first ones may be left.
        used = max((length - self._size + PAGE_MASK) >> PAGE_SHIFT, 0)
        pinned = kept
        if len(kept) < used:
            pinned = self._replace_pages(used, kept)
            if not pinned:
                memory.pool.free(header, self._size, memory.cpu)
                if kept:
                    pages.free_bulk(kept)
                return None
        runs = [(self._header, min(length, self._size))]
        if pinned:
            runs += page_runs(pinned, 0, length - self._size)
        pin = Pin(memory, runs, memory.pool.charge(self._header, self._size) + (len(pinned) << PAGE_SHIFT))
        pin.buffers.append((self._header, self._size))
        pin.pfns = pinned
        self._header = header
        self.frame.head = self.iov[self._prefixes] = memory.arena.view(header, self._size)
        return pin

    def _replace_pages(self, used: int, kept: Sequence[int]) -> Sequence[int]:
        """All `used` pages of the frame, of which those that are not `kept` leave the ring now; nothing when there are no
        others for it.
        """
        pages = self.memory.pages
        posted = self._pfns
        first = self._kept_from if kept else used
        last = first + len(kept)
        fresh = pages.alloc_bulk(used - len(kept), ATOMIC, self._owner)
        if not fresh:
            return ()
        if used == len(posted) and not kept:
            pinned = posted
            self._pfns = fresh
        else:
            pinned = [*posted[:first], *kept, *posted[last:used]]
            self._pfns = [*fresh[:first], *posted[first:last], *fresh[first:], *posted[used:]]
        self._post_pages()
        pages.transfer([*posted[:first], *posted[last:used]], pages.owner_id("sniffed"))
        return pinned

    def close(self) -> None:
        """Give all posted memory back."""
        memory = self.memory
        memory.pool.free(self._header, self._size, memory.cpu)
        if self._pfns:
            memory.pages.free_bulk(self._pfns)
        self.iov.clear()


@mypyc_attr(allow_interpreted_subclasses=True)
class LinearRing(RxRing):
    """Whole-frame buffers, posted in advance. `emergency`, set by the stack while a memalloc socket exists, lets them come from
    the reserve. Raises OSError ENOMEM when made without memory.
    """

    __slots__ = ("_aimed", "_pinning", "_posted", "_twin", "emergency")

    def __init__(self, memory: SkbMemory, max_frame: int, prefix: bytearray | None = None, *, emergency: bool = False) -> None:
        super().__init__(memory, max_frame, prefix)
        self.emergency = emergency
        self._posted: deque[tuple[int, bool]] = deque()
        self._aimed = NULL  # the buffer that `frame` and `iov` mean
        self._pinning = False
        self._twin: Skb | None = None
        self.iov.append(self.frame.head)
        if not self.ready():
            raise OSError(
                errno.ENOMEM, f"{os.strerror(errno.ENOMEM)}: no memory for a receive ring of {max_frame}-byte buffers"
            )

    def ready(self) -> bool:
        """Post what is missing, and aim at the buffer that is next; whether there is one."""
        posted = self._posted
        pool = self.memory.pool
        while len(posted) < LINEAR_RING_FRAMES:
            addr = pool.alloc(self.max_frame, MEMALLOC if self.emergency else ATOMIC, self.memory.cpu)
            if addr == NULL:
                break
            posted.append((addr, pool.pfmemalloc))
        if not posted:
            return False
        if posted[0][1]:
            self._replace_reserve_buffer()
        self._aim()
        return True

    def _aim(self) -> None:
        addr, self.frame.pfmemalloc = self._posted[0]
        if addr != self._aimed:
            self._aimed = addr
            self.frame.head = self.iov[-1] = self.memory.arena.view(addr, self.max_frame)

    def _replace_reserve_buffer(self) -> None:
        """The next buffer came from the reserve, so that no ordinary socket would get what lands in it: take another if there
        is one.
        """
        pool = self.memory.pool
        addr = pool.alloc(self.max_frame, ATOMIC, self.memory.cpu)
        if addr != NULL:
            old, _ = self._posted.popleft()
            pool.free(old, self.max_frame, self.memory.cpu)
            self._posted.appendleft((addr, False))

    def views(self, offset: int, length: int) -> list[memoryview]:
        """Views on the frame's bytes in the ring."""
        return [self.frame.head[offset : offset + length]]

    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        """Wrap the frame's buffer, which was paid for when it was posted; only the head is new."""
        addr, pfmemalloc = self._posted[0]
        skb = self.memory.adopt(addr, self.max_frame, pfmemalloc, gfp)
        if skb is None:
            return None
        skb.data = addr + offset
        skb.tail = skb.data + length
        skb.len = length
        self._posted.popleft()
        self._aimed = NULL
        if self._pinning:
            self._twin = self.memory.clone(skb, ATOMIC)
        return skb

    def truesize(self, offset: int, length: int) -> int:
        """The whole buffer, however little of it the frame fills, and a head."""
        pool = self.memory.pool
        return pool.charge(self._posted[0][0], self.max_frame) + pool.head_charge

    def begin_pin(self) -> None:
        """Should the frame be kept, its skb gets a clone: what a clone shares is neither freed nor moved."""
        self._pinning = True

    def end_pin(self) -> Pin | None:
        """The clone, if the frame was kept; or else the buffer, which another takes the place of."""
        memory = self.memory
        pool = memory.pool
        twin = self._twin
        aimed = self._aimed
        self._pinning = False
        self._twin = None
        if twin is not None:
            pin = Pin(memory, [(twin.addr, self.frame.len)], twin.truesize)
            pin.twin = twin
            return pin
        if aimed == NULL:
            return None  # kept, and there was no memory for a clone
        addr = pool.alloc(self.max_frame, ATOMIC, memory.cpu)
        if addr == NULL:
            return None
        self._posted.popleft()
        self._posted.append((addr, False))
        self._aimed = NULL
        pin = Pin(memory, [(aimed, self.frame.len)], pool.charge(aimed, self.max_frame))
        pin.buffers.append((aimed, self.max_frame))
        return pin

    def close(self) -> None:
        """Give all posted memory back."""
        for addr, _ in self._posted:
            self.memory.pool.free(addr, self.max_frame, self.memory.cpu)
        self._posted.clear()
        self.iov.clear()
