"""The bytes that have arrived and that the user has not read: in order, and out of order.

Both queues are charged to the socket by truesize. Out-of-order data is kept disjoint and sorted, each arrival cut to what is
new, and is described to the peer by SACK blocks, the latest first (RFC 2018, section 4).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from ustack.link.rxring import RxFrame
    from ustack.mem.socket import SocketMemory
    from ustack.skb import Skb, SkbMemory

SACK_BLOCKS: Final = 4
"""Blocks that fit the option space (three beside timestamps)."""

SMALL: Final = 1024
"""A payload up to this size that the reader does not wait for is put together with its neighbours, so that truesize stays near
size.
"""

SHARED_BUFFER: Final = 4096
"""Bytes of the buffer in which small payloads are put together."""

_seq = attrgetter("seq")
_end = attrgetter("end_seq")


class ReceiveQueue:
    """Data from `copied_seq` (the first byte not read) on. `queue` is in order and ends at RCV.NXT; `ofo` lies to the right of
    it.
    """

    __slots__ = (
        "_recent",
        "account",
        "charges",
        "copied_seq",
        "dsack",
        "duplicate",
        "memory",
        "ofo",
        "ofo_account",
        "ofo_changed",
        "queue",
        "settled_seq",
    )

    def __init__(self, memory: SkbMemory, charges: SocketMemory, start: int) -> None:
        self.memory = memory
        self.charges = charges
        self.account = charges.receive
        self.ofo_account = charges.ofo
        self.copied_seq = start
        self.dsack = False
        self.duplicate: tuple[int, int] | None = None
        self.ofo_changed = False  # since `collapse` has looked at it
        self.settled_seq = start  # what lies before has been collapsed, or is not worth it
        self.queue: deque[Skb] = deque()
        self.ofo: list[Skb] = []
        self._recent: list[int] = []  # sequence numbers inside the ranges that arrived last, the latest first

    @property
    def truesize(self) -> int:
        """Bytes of memory that both queues hold (rmem_alloc)."""
        return self.account.bytes + self.ofo_account.bytes

    # -- in --

    def truesize_of(self, frame: RxFrame, offset: int, length: int) -> int:
        """About the truesize by which `put` would add to the queue."""
        if length <= SMALL and self.queue:
            return 0 if self.queue[-1].tailroom >= length else SHARED_BUFFER + self.memory.pool.head_charge
        return frame.truesize(offset, length)

    def put(self, frame: RxFrame, offset: int, length: int, seq: int, gfp: int) -> bool:
        """Append the frame's bytes `offset .. offset+length`, which start at `seq` = RCV.NXT. False when there is no memory."""
        queue = self.queue
        if length <= SMALL and queue:
            tail = queue[-1]
            if tail.tailroom >= length:
                for view in frame.views(offset, length):
                    tail.put(view)
                tail.end_seq += length
                return True
            skb = self.memory.alloc(SHARED_BUFFER, gfp)
            if skb is not None:
                for view in frame.views(offset, length):
                    skb.put(view)
        else:
            skb = frame.keep(offset, length, gfp)
        if skb is None:
            return False
        skb.seq = seq
        skb.end_seq = seq + length
        skb.charge_to(self.account)
        queue.append(skb)
        return True

    def put_out_of_order(self, frame: RxFrame, offset: int, seq: int, end: int, gfp: int) -> bool | None:
        """Keep what is new of `seq .. end`, which lies right of RCV.NXT. None when nothing is new, False when there is no
        memory.
        """
        ofo = self.ofo
        index = bisect_right(ofo, seq, key=_seq)
        start = seq
        if index and ofo[index - 1].end_seq > seq:
            start = ofo[index - 1].end_seq
            self._found_twice(seq, min(start, end))
            if start >= end:
                self._note(seq)
                return None
        stop = end
        covered = index
        while covered < len(ofo) and ofo[covered].end_seq <= end:
            covered += 1
        if covered < len(ofo) and ofo[covered].seq < stop:
            self._found_twice(ofo[covered].seq, stop)
            stop = ofo[covered].seq
        elif covered > index:
            self._found_twice(ofo[index].seq, ofo[index].end_seq)
        if covered == index and start >= stop:
            self._note(seq)
            return None
        length = stop - start
        joins = index > 0 and length <= SMALL and ofo[index - 1].end_seq == start
        if joins and ofo[index - 1].tailroom >= length:  # tcp_ooo_try_coalesce
            left = ofo[index - 1]
            for view in frame.views(offset + start - seq, length):
                left.put(view)
            left.end_seq = stop
            fresh = []
        else:
            skb = self.memory.alloc(SHARED_BUFFER, gfp) if joins else frame.keep(offset + start - seq, length, gfp)
            if skb is None:
                return False
            if joins:
                for view in frame.views(offset + start - seq, length):
                    skb.put(view)
            skb.seq = start
            skb.end_seq = stop
            skb.charge_to(self.ofo_account)
            fresh = [skb]
        for old in ofo[index:covered]:
            old.free()
        ofo[index:covered] = fresh
        self.ofo_changed = True
        self._note(seq)
        return True

    def _found_twice(self, left: int, right: int) -> None:
        if self.dsack:
            self.duplicate = left, right

    def _note(self, seq: int) -> None:
        left, right = self._range_around(seq)
        self._recent = [seq, *(other for other in self._recent if not left <= other < right)][:SACK_BLOCKS]

    def _range_around(self, seq: int) -> tuple[int, int]:
        """The contiguous out-of-order range that `seq` lies in; empty when there is none."""
        ofo = self.ofo
        index = bisect_right(ofo, seq, key=_seq) - 1
        if index < 0 or ofo[index].end_seq <= seq:
            return seq, seq
        left = ofo[index].seq
        right = ofo[index].end_seq
        before = index - 1
        while before >= 0 and ofo[before].end_seq == left:
            left = ofo[before].seq
            before -= 1
        after = index + 1
        while after < len(ofo) and ofo[after].seq == right:
            right = ofo[after].end_seq
            after += 1
        return left, right

    def sack_blocks(self, limit: int) -> list[tuple[int, int]]:
        """Up to `limit` ranges: what arrived twice if there is any (RFC 2883), then out-of-order data, the one that arrived
        last first.
        """
        blocks = []
        if self.duplicate is not None:
            blocks.append(self.duplicate)
        for seq in self._recent:
            left, right = self._range_around(seq)
            if left < right and (left, right) not in blocks:
                blocks.append((left, right))
        return blocks[:limit]

    def advance(self, rcv_nxt: int) -> int:
        """Move what has become contiguous with `rcv_nxt` to the in-order queue; return the new RCV.NXT."""
        ofo = self.ofo
        done = 0
        for skb in ofo:
            if skb.seq > rcv_nxt:
                break
            done += 1
            if skb.end_seq <= rcv_nxt:
                skb.free()
                continue
            if skb.seq < rcv_nxt:
                skb.pull(rcv_nxt - skb.seq)
                skb.seq = rcv_nxt
                skb.release_front()
            rcv_nxt = skb.end_seq
            self.charges.accept_in_order(skb.truesize)
            skb.account = self.account
            self.queue.append(skb)
        if done:
            del ofo[:done]
            self._recent = [seq for seq in self._recent if seq >= rcv_nxt] if ofo else []
        return rcv_nxt

    def drop_out_of_order(self) -> None:
        """Free all out-of-order data: nothing can follow it any more, or nobody wants it."""
        for skb in self.ofo:
            skb.free()
        self.ofo.clear()
        self._recent.clear()

    def prune_out_of_order(self, seq: int, most: int) -> int:
        """Give up out-of-order data, the highest first, until `most` bytes of truesize are free or only what lies before `seq`
        is left; return how many skbs. What SACK has said of it is taken back with the next acknowledgment: the peer keeps what
        was only reported (RFC 2018, section 8).
        """
        ofo = self.ofo
        count = 0
        while ofo and ofo[-1].seq >= seq and most > 0:
            skb = ofo.pop()
            most -= skb.truesize
            skb.free()
            count += 1
        if count:
            self._recent.clear()
        return count

    # -- out --

    def available(self, rcv_nxt: int) -> int:
        """Bytes that can be read now."""
        return rcv_nxt - self.copied_seq if self.queue else 0

    def read_into(self, target: memoryview, *, peek: bool = False) -> int:
        """Copy bytes to `target` until either ends, and free what has been read unless `peek`; return how many."""
        queue = self.queue
        done = 0
        room = len(target)
        if peek:
            for skb in queue:
                if done == room:
                    break
                done += skb.copy_to(target[done:])
            return done
        while queue and done < room:
            skb = queue[0]
            copied = skb.copy_to(target[done:] if done else target)
            done += copied
            if copied == skb.len:
                queue.popleft()
                skb.free()
            else:
                skb.pull(copied)
                skb.seq += copied
                skb.release_front()  # a slow reader must not pay for what it has read
        self.copied_seq += done
        return done

    def read(self, limit: int, available: int) -> bytes:
        """Take up to `limit` of the `available` bytes as one bytes object."""
        queue = self.queue
        if len(queue) == 1 and available <= limit:
            skb = queue.popleft()
            data = skb.tobytes()
            skb.free()
            self.copied_seq += len(data)
            return data
        target = bytearray(min(limit, available))
        done = self.read_into(memoryview(target))
        return bytes(target[:done])

    def first(self, pages: int) -> list[Skb]:
        """The next skbs to be read: as many as have their data on `pages` pages, but at least one. They stay queued."""
        found: list[Skb] = []
        for skb in self.queue:
            for addr, length in ((skb.data, skb.tail - skb.data), *skb.frags):
                pages -= (addr + length + PAGE_MASK >> PAGE_SHIFT) - (addr >> PAGE_SHIFT)
            if found and pages < 0:
                break
            found.append(skb)
        return found

    def skip(self, count: int) -> None:
        """Free the first `count` skbs, as read."""
        for _ in range(count):
            skb = self.queue.popleft()
            self.copied_seq += skb.len
            skb.free()

    def clear(self) -> None:
        """Free everything."""
        for skb in self.queue:
            skb.free()
        self.queue.clear()
        self.drop_out_of_order()
