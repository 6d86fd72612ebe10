"""A TAP device behind a bad wire, in real time: what `simwire` does to frames between simulated devices, between us and the
kernel.

sch_netem does the like in kernels that have it. Here the wire is ours, so it can be cut, and repeats itself from a seed as far
as real time lets it.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Final

from pools.arena import Arena
from pools.buddy import PageAllocator
from pools.page_per_object import PagePerObjectPool
from ustack.drops import Drops
from ustack.link.device import NO_CSUM
from ustack.link.rxring import PagedRing
from ustack.link.simwire import Direction, Impairments, SimDevice, WireFrame
from ustack.skb import SkbMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.link.device import Device
    from ustack.link.rxring import RxFrame, RxRing
    from ustack.link.tap import TapDevice
    from ustack.stack import Stack

RING_PAGES: Final = 256
"""Pages of the memory in which the TAP's own ring lies: frames are only passing through."""

BUDGET: Final = 64


class RealTime:
    """The clock of the event loop as what a wire needs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seed: int) -> None:
        self.random = Random(seed)
        self._loop = loop

    @property
    def now(self) -> float:
        """Seconds."""
        return self._loop.time()

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call `callback` at `when`."""
        self._loop.call_at(when, callback)


class _FarEnd(SimDevice):
    """What the frames of our stack arrive at: the TAP."""

    __slots__ = ("_tap",)

    def __init__(self, tap: TapDevice) -> None:
        super().__init__(tap.name, tap.mac, tap.mtu, 0)
        self._tap: TapDevice | None = tap

    def receive(self, frame: WireFrame) -> None:
        """A frame arrives: send it on."""
        if self._tap is not None:
            self._tap.transmit(frame.data, [])

    def close(self) -> None:
        """What arrives from now on is lost."""
        self._tap = None


class ImpairedTap(SimDevice):
    """`tap`, which must have been opened without offloads, behind a wire with the impairments `there` (to the kernel) and
    `back`.

    To be added to a stack like any device, and then to be started with `start(stack)` in the running event loop. `there` and
    `back` are the two directions: their `impairments` may be changed at any time, and loss 1.0 is a cut.
    """

    __slots__ = ("_loop", "_ring_memory", "_tap", "back", "there")

    def __init__(
        self,
        tap: TapDevice,
        there: Impairments | None = None,
        back: Impairments | None = None,
        *,
        seed: int = 0,
        ring: Callable[[SkbMemory, int], RxRing] = PagedRing,
    ) -> None:
        if tap.features:
            raise ValueError("a TAP behind a bad wire is opened without offloads: its frames must be complete")
        super().__init__(tap.name, tap.mac, tap.mtu, 0, ring)
        self._tap = tap
        self._loop = loop = asyncio.get_running_loop()
        clock = RealTime(loop, seed)
        self.there = Direction(clock, _FarEnd(tap), there or Impairments())
        self.back = Direction(clock, self, back or there or Impairments())
        self.wire = self.there.send
        self._ring_memory = PagePerObjectPool(PageAllocator(Arena(RING_PAGES), min_pages=0))

    def start(self, stack: Stack, polled: Device | None = None) -> None:
        """Let frames come in, and wake `stack` when some have arrived; `polled` is a device around this one, if any."""
        device = self if polled is None else polled

        def receive() -> None:
            stack.tick()
            while self.waiting:
                stack.receive(device)

        def receive_soon() -> None:
            self._loop.call_soon(receive)

        self.on_receivable = receive_soon
        self._tap.attach(SkbMemory(self._ring_memory), Drops(), self._from_kernel)
        self._loop.add_reader(self._tap.fileno(), self._tap.poll, BUDGET)

    def _from_kernel(self, frame: RxFrame) -> None:
        self.back.send(WireFrame(b"".join(frame.views(0, frame.len)), 0, NO_CSUM, 0))

    def close(self) -> None:
        """See `Device.close`. What is on its way is lost."""
        self._loop.remove_reader(self._tap.fileno())
        super().close()
        self.there.receiver.close()
        self._tap.close()
