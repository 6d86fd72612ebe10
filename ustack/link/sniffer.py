"""Sniffers: processes that read the frames of a stack where they lie in its memory, and are never waited for.

A frame that a device has received is pinned while it is delivered, and described in the ring of each sniffer afterwards, when
it is known whether it was dropped, and why. It is not copied: its header buffer is left to the sniffers and another one is
posted, its pages get one more reference, and an skb that took the frame's linear buffer along gets a clone. Of a frame that is
sent, the headers (at most `INLINE_MAX` bytes, which are no packet memory but the template of a path) are copied into the
descriptor; payload in pages of a send queue is referenced there. Payload that lies elsewhere must be copied, since it is gone
or overwritten once the frame has been sent: a datagram in its sender's own buffer, a short write that shares a linear buffer,
an echo reply whose data lies in the receive ring. `copied` counts these bytes, `referenced` the others.

Nobody waits for a sniffer. The bytes that all of them pin are at most `limit`, of which each may have an equal part; beyond
that, when its ring is full, while memory is short, or when no ordinary memory is there to post in the place of what is pinned,
the frame is a miss and the sniffer is told how many it missed. Frames in the reserve are never shown (Linux skips packet taps
for them as well: __netif_receive_skb_core). When a sniffer goes, whatever it was doing, all that it pinned is free.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SHIFT
from pools.base import NULL
from pools.gfp import ATOMIC
from ustack.drops import DROPS_OF_OTHERS, DropReason
from ustack.link.descriptor_ring import FRAGS_MAX, INCOMING, INLINE_MAX, NOT_DROPPED, OUTGOING, SLOTS, RingWriter
from ustack.link.rxring import Pin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.drops import Drops
    from ustack.link.device import Device
    from ustack.link.rxring import RxFrame
    from ustack.skb import Buffer, SkbMemory

SNIFFERS_MAX: Final = 8
"""Sniffers of one stack at the same time."""

SNAPLEN_MAX: Final = 1 << 18
"""Bytes that are more than any frame has."""


class Sniffer:
    """One sniffer: its ring, and what it pins until it has released it. `device` is the one that it listens to, None for all.

    `pinned` is in bytes; `missed` counts the frames that it was not shown.
    """

    __slots__ = ("_pins", "device", "pinned", "ring", "snaplen")

    def __init__(self, device: Device | None, snaplen: int, slots: int) -> None:
        self.device = device
        self.snaplen = snaplen
        self.ring = RingWriter(slots)
        self.pinned = 0
        self._pins: deque[Pin | None] = deque()

    @property
    def missed(self) -> int:
        """Frames that it was not shown."""
        return self.ring.missed

    def hold(self, pin: Pin | None) -> None:
        """Keep `pin` until the descriptor that is written now is released."""
        self._pins.append(pin)
        if pin is not None:
            pin.refs += 1
            self.pinned += pin.cost

    def reclaim(self) -> int:
        """Let go of what the sniffer is done with; the bytes that are free now."""
        freed = 0
        for _ in range(self.ring.reclaim()):
            freed += self._let_go()
        return freed

    def _let_go(self) -> int:
        pin = self._pins.popleft()
        if pin is None:
            return 0
        self.pinned -= pin.cost
        return pin.cost if pin.put() else 0

    def close(self) -> int:
        """Let go of everything; the bytes that are free now."""
        freed = 0
        while self._pins:
            freed += self._let_go()
        self.ring.close()
        return freed


class Sniffers:
    """All sniffers of a stack whose packets lie in `memory`. They pin `limit` bytes at most. `clock` gives nanoseconds.

    `pinned` is what they hold now, in bytes; `devices` are those of the stack, in the order of their numbers; `inside` is true
    while a frame is delivered. A device has this object as its `sniffers` only while there is a sniffer.
    """

    __slots__ = (
        "_all",
        "_base",
        "_later",
        "clock",
        "copied",
        "devices",
        "drops",
        "inside",
        "limit",
        "memory",
        "misses",
        "pinned",
        "referenced",
    )

    def __init__(self, memory: SkbMemory, drops: Drops, clock: Callable[[], int], limit: int) -> None:
        self.memory = memory
        self.drops = drops
        self.clock = clock
        self.limit = limit
        self.pinned = 0
        self.copied = 0
        self.referenced = 0
        self.misses = 0
        self.inside = False
        self._all: list[Sniffer] = []
        self.devices: list[Device] = []
        self._later: list[tuple[list[Sniffer], int, int, Device, int, int, bytes, Pin | None]] = []  # sent while inside
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory.mem))

    # -- who sniffs --

    def watch(self, device: Device) -> None:
        """A device of the stack: its place in this order is its number in descriptors."""
        self.devices.append(device)
        self._apply()

    def forget(self, device: Device) -> None:
        """The device that was watched last did not become one of the stack."""
        self.devices.remove(device)
        device.sniffers = None

    def add(self, device: Device | None = None, snaplen: int = SNAPLEN_MAX, slots: int = SLOTS) -> Sniffer:
        """A new sniffer of `device`, or of all of them, that is shown the first `snaplen` bytes of a frame.

        Raises OSError: EOPNOTSUPP when the memory cannot be shared, EBUSY when there are too many sniffers, EMFILE or ENOMEM
        when there can be no ring.
        """
        if self.memory.arena.fd < 0 or not self.limit:
            raise OSError(errno.EOPNOTSUPP, "the packet memory is private: nobody may capture from it")
        if len(self._all) >= SNIFFERS_MAX:
            raise OSError(errno.EBUSY, f"{SNIFFERS_MAX} captures are running already")
        sniffer = Sniffer(device, snaplen, slots)
        self._all.append(sniffer)
        self._apply()
        return sniffer

    def remove(self, sniffer: Sniffer) -> None:
        """End `sniffer` and free what it pinned. One that has been removed already is left alone."""
        if sniffer in self._all:
            self._all.remove(sniffer)
            self.pinned -= sniffer.close()
            self._apply()

    def _apply(self) -> None:
        wanted = [each.device for each in self._all]
        for device in self.devices:
            device.sniffers = self if None in wanted or device in wanted else None

    def __len__(self) -> int:
        return len(self._all)

    def close(self) -> None:
        """End all sniffers."""
        for sniffer in self._all[:]:
            self.remove(sniffer)

    # -- frames --

    def deliver(self, device: Device, frame: RxFrame, deliver: Callable[[RxFrame], None]) -> None:
        """A frame has come: let `deliver` have it, and show it to those who sniff."""
        self.inside = True
        try:
            # A frame in a buffer of the reserve is nobody's but a memalloc socket's.
            takers = [] if frame.pfmemalloc else self._takers(device)
            if not takers:
                deliver(frame)
                return
            stamp = self.clock()
            length = frame.len
            ring = device.ring
            before = self.drops.counts.copy()
            ring.begin_pin()
            try:
                deliver(frame)
            finally:
                pin = ring.end_pin()
            if pin is None:
                self._miss(takers)
                return
            self.referenced += length
            reason = NOT_DROPPED if self.drops.counts == before else self._reason(before)
            self._show(takers, stamp, length, device, INCOMING, reason, b"", pin)
        finally:
            self.inside = False
            if self._later:
                for shown in self._later:
                    self._show(*shown)
                self._later.clear()

    def sent(self, device: Device, head: Buffer, payload: Sequence[Buffer], sent: bool) -> None:
        """The frame `head + payload` went to the device, which took it or refused it."""
        takers = self._takers(device)
        if not takers:
            return
        stamp = self.clock()
        reason = NOT_DROPPED if sent else int(DropReason.TX_DEVICE)
        inline = bytes(head[:INLINE_MAX])
        length = len(head) + sum(map(len, payload))
        pieces: list[Buffer] = [head[INLINE_MAX:], *payload] if len(head) > INLINE_MAX else [*payload]
        if length <= INLINE_MAX:
            inline = b"".join((inline, *payload))
            pieces = []
        self.copied += len(inline)
        pin = None
        if pieces:
            pin = self._pin_pieces(pieces)
            if pin is None:
                self._miss(takers)
                return
        if self.inside:
            self._later.append((takers, stamp, length, device, OUTGOING, reason, inline, pin))
        else:
            self._show(takers, stamp, length, device, OUTGOING, reason, inline, pin)

    def _takers(self, device: Device) -> list[Sniffer]:
        """Those of the sniffers of `device` who can be shown a frame; to the others it is a miss."""
        short = self.memory.pages.under_pressure
        share = self.limit // len(self._all)
        takers = []
        for sniffer in self._all:
            if sniffer.device is None or sniffer.device is device:
                self.pinned -= sniffer.reclaim()
                if short or sniffer.pinned >= share or not sniffer.ring.room():
                    self._miss((sniffer,))
                else:
                    takers.append(sniffer)
        return takers

    def _miss(self, sniffers: Sequence[Sniffer]) -> None:
        for sniffer in sniffers:
            sniffer.ring.miss()
            self.misses += 1

    def _reason(self, before: list[int]) -> int:
        for reason, count in enumerate(self.drops.counts):
            if count != before[reason] and reason not in DROPS_OF_OTHERS:
                return reason
        return NOT_DROPPED

    def _show(
        self,
        takers: list[Sniffer],
        stamp: int,
        length: int,
        device: Device,
        direction: int,
        reason: int,
        inline: bytes,
        pin: Pin | None,
    ) -> None:
        runs = pin.runs if pin is not None else []
        share = self.limit // max(len(self._all), 1)
        if pin is not None:
            self.pinned += pin.cost
        number = self.devices.index(device)
        for sniffer in takers:
            if not sniffer.ring.room() or (pin is not None and sniffer.pinned + pin.cost > share):
                self._miss((sniffer,))
                continue
            sniffer.hold(pin)
            sniffer.ring.write(
                stamp,
                length,
                number,
                direction,
                reason,
                inline[: sniffer.snaplen],
                cut(runs, sniffer.snaplen - len(inline)),
            )
        if pin is not None and pin.put():
            self.pinned -= pin.cost

    # -- what is sent --

    def _pin_pieces(self, pieces: list[Buffer]) -> Pin | None:
        """Reference what lies in pages of send queues, copy the rest; None when there is no ordinary memory to copy to."""
        memory = self.memory
        pages = memory.pages
        runs: list[tuple[int, int]] = []
        lost: list[tuple[int, Buffer]] = []  # what must be copied, and the place of its run
        pfns: list[int] = []
        for piece in pieces:
            size = len(piece)
            if not size:
                continue
            addr = self._address(piece)
            if addr >= 0 and pages.owner_of(addr >> PAGE_SHIFT) == memory.frag_owner:
                pfns += range(addr >> PAGE_SHIFT, (addr + size - 1 >> PAGE_SHIFT) + 1)
            else:
                lost.append((len(runs), piece))
            runs.append((addr, size))
        pin = Pin(memory, runs, len(pfns) << PAGE_SHIFT)
        if lost:
            total = sum(len(piece) for _, piece in lost)
            target = memory.pool.alloc(total, ATOMIC, memory.cpu)
            if target == NULL:
                return None
            pin.buffers.append((target, total))
            pin.cost += memory.pool.charge(target, total)
            for at, piece in lost:
                size = len(piece)
                memory.mem[target : target + size] = piece
                runs[at] = (target, size)
                target += size
            self.copied += total
        pages.get_pages(pfns)
        pin.pfns = pfns
        self.referenced += sum(size for _, size in runs) - sum(len(piece) for _, piece in lost)
        return pin

    def _address(self, piece: Buffer) -> int:
        """Where in the arena `piece` lies; negative when it does not."""
        try:
            addr = ctypes.addressof(ctypes.c_char.from_buffer(piece)) - self._base
        except (TypeError, ValueError):  # memory that cannot be written to is none of ours
            return -1
        return addr if addr < self.memory.arena.size else -1


def cut(runs: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The first `length` bytes of `runs`, as far as a descriptor has room for them."""
    found = []
    for addr, size in runs[:FRAGS_MAX]:
        if length <= 0:
            break
        found.append((addr, min(size, length)))
        length -= size
    return found


def uid_may_sniff(uid: int) -> bool:
    """Whether a process of the user `uid` may see all packets: root, and whoever runs the stack."""
    return uid in (0, os.geteuid())
