"""The bytes that the user has sent and the peer has not acknowledged, in skbs.

The queue knows nothing of segments: a segment is cut when it is sent, out of whatever skbs its bytes lie in, and cut anew when
it is sent again. An skb goes when its last byte is acknowledged.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SIZE
from pools.gfp import MEMALLOC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.mem.socket import SocketMemory
    from ustack.skb import Skb, SkbMemory

LINEAR_MAX: Final = 4096 - 512
"""Bytes up to which a write gets a linear buffer; larger ones get pages."""

LINEAR_MIN: Final = 448
"""Room that a small write's buffer has at least, so that a run of small writes shares one."""

PAGES_MAX: Final = 16
"""Pages of one skb: 64 KiB, enough for what one super-frame carries."""

_seq = attrgetter("seq")


class SendQueue:
    """Bytes `start .. end` of the stream by sequence number, charged to `account`.

    `goal` is the number of bytes after which an skb is full: what a full transmission carries, so that in bulk it lies in one
    piece.
    """

    __slots__ = ("_hint", "_skbs", "account", "charges", "end", "goal", "memory", "start")

    def __init__(self, memory: SkbMemory, charges: SocketMemory, start: int) -> None:
        self.memory = memory
        self.charges = charges
        self.account = charges.send
        self.start = start
        self.end = start
        self.goal = PAGES_MAX * PAGE_SIZE
        self._skbs: list[Skb] = []
        self._hint = 0  # index of the skb that the last view came from: the next one most likely does, too

    def append(self, data: memoryview, limit: int, gfp: int) -> int:
        """Copy bytes of `data` to the end until the account holds `limit` bytes, or memory or the protocol's share of it ends;
        return how many.
        """
        account = self.account
        charges = self.charges
        memory = self.memory
        goal = self.goal
        total = len(data)
        done = 0
        tail = self._skbs[-1] if self._skbs else None
        while True:
            if tail is not None:
                room = goal - tail.len
                if room > 0:
                    left = total - done
                    copied = tail.append(data if left == total <= room else data[done : done + min(left, room)])
                    done += copied
                    tail.end_seq += copied
                    if done == total:
                        break
            if account.bytes >= limit:
                break
            left = total - done
            if left <= LINEAR_MAX:
                tail = memory.alloc(max(left, LINEAR_MIN), gfp)
            else:
                tail = memory.alloc_paged(min((left + PAGE_SIZE - 1) // PAGE_SIZE, PAGES_MAX), gfp)
            if tail is None:
                break
            truesize = tail.truesize
            if truesize > charges.forward_alloc and not charges.wmem_schedule(truesize, limit, gfp & MEMALLOC != 0):
                tail.free()
                break
            tail.seq = tail.end_seq = self.end + done
            tail.charge_to(account)
            self._skbs.append(tail)
        self.end += done
        return done

    def views(self, seq: int, length: int) -> list[memoryview]:
        """The bytes `seq .. seq+length` as views on pool memory."""
        skbs = self._skbs
        index = self._hint
        if index >= len(skbs) or not skbs[index].seq <= seq < skbs[index].end_seq:
            index = bisect_right(skbs, seq, key=_seq) - 1
        skb = skbs[index]
        if seq + length <= skb.end_seq:
            self._hint = index
            if len(skb.frags) == 1 and skb.data == skb.tail:
                addr = skb.frags[0][0] + seq - skb.seq
                return [self.memory.mem[addr : addr + length]]
            return skb.views(seq - skb.seq, length)
        out: list[memoryview] = []
        while length:
            skb = skbs[index]
            size = min(skb.end_seq - seq, length)
            out += skb.views(seq - skb.seq, size)
            seq += size
            length -= size
            index += 1
        self._hint = index - 1
        return out

    def skbs(self) -> Sequence[Skb]:
        """The skbs, by sequence number."""
        return self._skbs

    def release(self, una: int) -> None:
        """Everything before `una` is acknowledged: free the skbs that lie before it."""
        self.start = max(self.start, min(una, self.end))
        skbs = self._skbs
        done = 0
        for skb in skbs:
            if skb.end_seq > una:
                break
            skb.free()
            done += 1
        if done:
            del skbs[:done]
            self._hint = max(self._hint - done, 0)

    def clear(self) -> None:
        """Free everything."""
        for skb in self._skbs:
            skb.free()
        self._skbs.clear()
        self.start = self.end
