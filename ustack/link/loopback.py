"""The loopback device: what the stack sends to itself.

A frame that is sent is copied into an skb, waits, and is delivered at the next `poll` in that skb, which its receiver keeps:
one copy, as between a process and a socket. It never leaves packet memory, so nobody computes a checksum. Frames wait only
until the end of the batch (`Stack.flush`), and no more than `QUEUE_MAX` bytes of them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from pools.gfp import ATOMIC
from ustack.link.device import ETH_HLEN, FEATURE_CSUM, FEATURE_TSO, NO_CSUM, Device
from ustack.link.skbring import SkbRing
from ustack.skb import Account

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.drops import Drops
    from ustack.link.rxring import RxFrame
    from ustack.skb import Buffer, Skb, SkbMemory

MTU: Final = 16384
"""Bytes of a packet. TCP sends super-frames all the same, and so much fits every receive limit."""

QUEUE_MAX: Final = 1 << 20
"""Bytes of truesize that wait; a frame on top is refused."""


class LoopbackDevice(Device):
    """Delivers what it is sent. `account` is charged for what waits; `on_waiting` is called when frames begin to wait."""

    __slots__ = ("_deliver", "_memory", "_queue", "account", "on_waiting", "skb_ring")

    def __init__(self, on_waiting: Callable[[], None]) -> None:
        super().__init__("lo", bytes(6), MTU, FEATURE_CSUM | FEATURE_TSO)
        self.on_waiting = on_waiting
        self.account = Account("loopback")
        self._queue: deque[Skb] = deque()

    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """See `Device.attach`. Nothing is posted: a frame brings its own memory."""
        self._memory = memory
        self._deliver = deliver
        self.ring = self.skb_ring = SkbRing(memory)

    def transmit(
        self, head: Buffer, payload: Sequence[Buffer], csum_start: int = 0, csum_offset: int = NO_CSUM, gso_size: int = 0
    ) -> bool:
        """See `Device.transmit`; False as well when there is no memory for the copy."""
        size = len(head) + sum(len(piece) for piece in payload)
        memory = self._memory
        if self.account.bytes > QUEUE_MAX:
            skb = None
        elif size <= PAGE_SIZE:
            skb = memory.alloc(size, ATOMIC)
        else:
            skb = memory.alloc_paged((size + PAGE_MASK) >> PAGE_SHIFT, ATOMIC)
        if skb is None:
            self.stats.tx_errors += 1
            return False
        skb.append(memoryview(head))
        for piece in payload:
            skb.append(memoryview(piece))
        skb.flags = gso_size
        skb.charge_to(self.account)
        self.stats.tx_packets += 1
        self.stats.tx_bytes += size
        if not self._queue:
            self.on_waiting()
        self._queue.append(skb)
        return True

    def poll(self, budget: int) -> int:
        """See `Device.poll`."""
        queue = self._queue
        ring = self.skb_ring
        count = 0
        while queue and count < budget:
            skb = queue.popleft()
            count += 1
            self.stats.rx_packets += 1
            self.stats.rx_bytes += skb.len
            gso_size = skb.flags
            skb.flags = 0
            ring.load(b"", skb)
            ring.frame.csum_ok = True
            ring.frame.gso_size = gso_size if skb.len > ETH_HLEN + MTU else 0
            self._deliver(ring.frame)
            ring.unload()
        return count

    @property
    def waiting(self) -> bool:
        """Whether frames wait for `poll`."""
        return bool(self._queue)

    def close(self) -> None:
        """Free what waits."""
        while self._queue:
            self._queue.popleft().free()
