"""A simulated wire between two simulated devices, in virtual time and with a seed: same seed, same run.

`SimDevice` is a device like any other: it receives through one of the rings of `rxring`, and may or may not have offloads.
`SimWire` joins two of them and does to frames what networks do: delay, a limited rate with a queue before it, loss, reordering,
duplication and bit errors. Between two devices with TSO a super-frame crosses whole, as over a TAP device; for a device without
it, it is cut here.

A checksum that was left to the device is not computed unless somebody will look at it: a peer without checksum offload, or the
receiver of a frame that was damaged on the way, who then must not be told that the checksum is right.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final, Protocol

from ustack.drops import DropReason, Drops
from ustack.link.device import ETH_HLEN, FEATURE_CSUM, FEATURE_TSO, NO_CSUM, VLAN_HLEN, Device
from ustack.link.rxring import PagedRing
from ustack.wire import ethernet, ipv4, ipv6, tcp
from ustack.wire.checksum import finish, ones_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.link.rxring import RxFrame, RxRing
    from ustack.skb import Buffer, SkbMemory

_TAGGED: Final = ethernet.ETH_P_8021Q.to_bytes(2, "big")

SUPER_FRAME: Final = ETH_HLEN + ipv4.TOTAL_MAX
"""Bytes of the longest frame with TSO."""


class Scheduler(Protocol):
    """Virtual time, as `lab.world.World` provides it."""

    random: Random

    @property
    def now(self) -> float:
        """Seconds."""

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call `callback` at `when` (seconds)."""


@dataclass(frozen=True, slots=True)
class Impairments:
    """What one direction of a wire does to frames. Probabilities are per frame."""

    delay: float = 50e-6
    """Seconds that every frame travels."""
    jitter: float = 0.0
    """Seconds that a frame travels longer at most, at random; frames overtake each other."""
    rate: float = 0.0
    """Bits per second; 0 is no limit."""
    queue: int = 0
    """Bytes of frames that wait for the rate; what comes on top is dropped. 0 is no limit."""
    loss: float = 0.0
    """Probability that a frame is lost."""
    duplicate: float = 0.0
    """Probability that a frame arrives twice."""
    corrupt: float = 0.0
    """Probability that one bit of a frame is flipped; of a frame that is not IPv4, that it is lost."""


class WireFrame:
    """A frame on its way. `csum_start` is 0 when its checksum is complete."""

    __slots__ = ("csum_offset", "csum_ok", "csum_start", "data", "gso_size")

    def __init__(self, data: bytes | bytearray, csum_start: int, csum_offset: int, gso_size: int) -> None:
        self.data = data
        self.csum_start = csum_start
        self.csum_offset = csum_offset
        self.gso_size = gso_size
        self.csum_ok = csum_start > 0

    def complete(self) -> None:
        """Compute the checksum that was left to the device, and vouch for it no longer."""
        if self.csum_start:
            data = bytearray(self.data)
            field = self.csum_start + self.csum_offset
            checksum = finish(ones_sum(memoryview(data)[self.csum_start :]))
            data[field : field + 2] = (checksum or 0xFFFF).to_bytes(2, "big")
            self.data = data
            self.csum_start = 0
        self.csum_ok = False


class SimDevice(Device):
    """One end of a `SimWire`. `ring` is the class of its receive ring; `on_receivable` is called when frames begin to wait for
    `poll`.
    """

    __slots__ = ("_attached", "_deliver", "_drops", "_ring_type", "_waiting", "on_receivable", "wire")

    def __init__(
        self,
        name: str,
        mac: bytes,
        mtu: int = 1500,
        features: int = FEATURE_CSUM | FEATURE_TSO,
        ring: Callable[[SkbMemory, int], RxRing] = PagedRing,
    ) -> None:
        super().__init__(name, mac, mtu, features)
        self.wire: Callable[[WireFrame], None] | None = None
        self.on_receivable: Callable[[], None] = _nobody
        self._ring_type = ring
        self._attached = False
        self._drops = Drops()
        self._deliver: Callable[[RxFrame], None] = _nowhere
        self._waiting: deque[WireFrame] = deque()

    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """See `Device.attach`."""
        self.ring = self._ring_type(memory, SUPER_FRAME if self.features & FEATURE_TSO else ETH_HLEN + self.mtu)
        self._drops = drops
        self._deliver = deliver
        self._attached = True

    @property
    def waiting(self) -> int:
        """Frames that wait for `poll`."""
        return len(self._waiting)

    def receive(self, frame: WireFrame) -> None:
        """A frame arrives from the wire; a device that is not attached does not notice."""
        waiting = self._waiting
        if self._attached:
            waiting.append(frame)
            if len(waiting) == 1:
                self.on_receivable()

    def poll(self, budget: int) -> int:
        """See `Device.poll`."""
        waiting = self._waiting
        if not waiting:
            return 0
        ring = self.ring
        count = 0
        while waiting and count < budget:
            arrived = waiting.popleft()
            count += 1
            if not ring.ready():
                self._drops.count(DropReason.RING_EMPTY)
                continue
            size = len(arrived.data)
            if size > ring.max_frame:
                self._drops.count(DropReason.PKT_TOO_BIG)
                continue
            self.stats.rx_packets += 1
            self.stats.rx_bytes += size
            ring.fill(arrived.data)
            frame = ring.frame
            frame.csum_ok = arrived.csum_ok
            frame.gso_size = arrived.gso_size
            self._deliver(frame)
        return count

    def transmit(
        self, head: Buffer, payload: Sequence[Buffer], csum_start: int = 0, csum_offset: int = NO_CSUM, gso_size: int = 0
    ) -> bool:
        """See `Device.transmit`. Refuses everything while no wire is plugged in."""
        if self.wire is None:
            self.stats.tx_errors += 1
            return False
        data = b"".join((head, *payload))
        self.stats.tx_packets += 1
        self.stats.tx_bytes += len(data)
        self.wire(WireFrame(data, csum_start, csum_offset, gso_size))
        return True

    def close(self) -> None:
        """See `Device.close`; frames that wait are lost, as with a real device."""
        self.wire = None
        self._waiting.clear()
        if self._attached:
            self._attached = False
            self.ring.close()


class Direction:
    """One direction of a wire: what it does to frames, and what it has done so far. `drops` counts what it lost."""

    __slots__ = (
        "_busy_until",
        "_random",
        "_scheduler",
        "corrupted",
        "drops",
        "duplicated",
        "frames",
        "impairments",
        "receiver",
        "tap",
    )

    def __init__(self, scheduler: Scheduler, receiver: SimDevice, impairments: Impairments) -> None:
        self.impairments = impairments
        self.receiver = receiver
        self.tap: Callable[[float, bytes], None] | None = None
        self.drops = Drops()
        self.frames = 0
        self.corrupted = 0
        self.duplicated = 0
        self._scheduler = scheduler
        self._random = Random(scheduler.random.getrandbits(64))
        self._busy_until = 0.0

    def send(self, frame: WireFrame) -> None:
        """A device sends `frame`: let it arrive, or not."""
        self.frames += 1
        if self.tap is not None:
            self.tap(self._scheduler.now, bytes(frame.data))
        if frame.gso_size and not self.receiver.features & FEATURE_TSO:
            for segment in segments(frame.data, frame.gso_size):
                self._carry(WireFrame(segment, 0, NO_CSUM, 0))
        else:
            self._carry(frame)

    def _carry(self, frame: WireFrame) -> None:
        impairments = self.impairments
        now = self._scheduler.now
        arrival = now + impairments.delay
        if impairments.rate:
            size = len(frame.data)
            start = max(self._busy_until, now)
            if impairments.queue and (start - now) * impairments.rate / 8 + size > impairments.queue:
                self.drops.count(DropReason.WIRE_QUEUE)
                return
            self._busy_until = start + size * 8 / impairments.rate
            arrival += self._busy_until - now
        chance = self._random.random
        if impairments.loss and chance() < impairments.loss:
            self.drops.count(DropReason.WIRE_LOSS)
            return
        if not self.receiver.features & FEATURE_CSUM:
            frame.complete()
        if impairments.corrupt and chance() < impairments.corrupt:
            if frame.data[12:14] != b"\x08\x00":
                # ARP has no checksum of its own: on a real wire the frame check sequence guards it, and damage is loss.
                self.drops.count(DropReason.WIRE_LOSS)
                return
            self._damage(frame)
        if impairments.duplicate and chance() < impairments.duplicate:
            self.duplicated += 1
            self._arrive(frame, arrival)
        self._arrive(frame, arrival)

    def _arrive(self, frame: WireFrame, arrival: float) -> None:
        if self.impairments.jitter:
            arrival += self._random.random() * self.impairments.jitter
        self._scheduler.at(arrival, partial(self.receiver.receive, frame))

    def _damage(self, frame: WireFrame) -> None:
        self.corrupted += 1
        frame.complete()
        data = bytearray(frame.data)
        bit = self._random.randrange(len(data) * 8)
        data[bit >> 3] ^= 1 << (bit & 7)
        frame.data = data


class SimWire:
    """A wire between the devices `a` and `b`, with the directions `there` (to `b`) and `back`.

    What is given for `there` alone holds for both. The impairments of a direction may be changed at any time.
    """

    __slots__ = ("a", "b", "back", "there")

    def __init__(
        self,
        scheduler: Scheduler,
        a: SimDevice,
        b: SimDevice,
        there: Impairments | None = None,
        back: Impairments | None = None,
    ) -> None:
        there = there or Impairments()
        self.a = a
        self.b = b
        self.there = Direction(scheduler, b, there)
        self.back = Direction(scheduler, a, back or there)
        a.wire = self.there.send
        b.wire = self.back.send

    def impair(self, impairments: Impairments) -> None:
        """From now on do this to frames in both directions."""
        self.there.impairments = impairments
        self.back.impairments = impairments

    def unplug(self) -> None:
        """Refuse what the devices send from now on. What is on its way arrives."""
        self.a.wire = None
        self.b.wire = None


def segments(frame: Buffer, gso_size: int) -> list[bytearray]:
    """Cut the TCP super-frame `frame` into frames with `gso_size` bytes of payload each, checksums complete. It may have a tag.

    As tcp_gso_segment in Linux does it: FIN and PSH only on the last one, CWR only on the first, identification counting up.
    """
    l3 = ETH_HLEN + (VLAN_HLEN if frame[12:14] == _TAGGED else 0)
    v4 = frame[l3] >> 4 == 4
    l4 = l3 + (((frame[l3] & 15) << 2) if v4 else ipv6.HEADER_LEN)
    headers = l4 + (frame[l4 + tcp.OFF_FLAGS] >> 4 << 2)
    ident = int.from_bytes(frame[l3 + ipv4.OFF_ID : l3 + ipv4.OFF_ID + 2], "big")
    seq = int.from_bytes(frame[l4 + tcp.OFF_SEQ : l4 + tcp.OFF_SEQ + 4], "big")
    addresses = ones_sum(bytes(frame[l3 + ipv4.OFF_SRC : l3 + 20] if v4 else frame[l3 + ipv6.OFF_SRC : l4]))
    cut = []
    for index, start in enumerate(range(headers, len(frame), gso_size)):
        segment = bytearray(frame[:headers])
        segment += frame[start : start + gso_size]
        length = len(segment) - l4
        if v4:
            segment[l3 + ipv4.OFF_TOTAL : l3 + ipv4.OFF_TOTAL + 2] = (len(segment) - l3).to_bytes(2, "big")
            segment[l3 + ipv4.OFF_ID : l3 + ipv4.OFF_ID + 2] = ((ident + index) & 0xFFFF).to_bytes(2, "big")
            segment[l3 + ipv4.OFF_CSUM : l3 + ipv4.OFF_CSUM + 2] = bytes(2)
            segment[l3 + ipv4.OFF_CSUM : l3 + ipv4.OFF_CSUM + 2] = finish(ones_sum(segment[l3:l4])).to_bytes(2, "big")
        else:
            segment[l3 + ipv6.OFF_PAYLOAD_LEN : l3 + ipv6.OFF_PAYLOAD_LEN + 2] = length.to_bytes(2, "big")
        segment[l4 + tcp.OFF_SEQ : l4 + tcp.OFF_SEQ + 4] = ((seq + index * gso_size) & 0xFFFFFFFF).to_bytes(4, "big")
        if start + gso_size < len(frame):
            segment[l4 + tcp.OFF_FLAGS + 1] &= ~(tcp.FIN | tcp.PSH) & 0xFF
        if index:
            segment[l4 + tcp.OFF_FLAGS + 1] &= ~tcp.CWR & 0xFF
        segment[l4 + tcp.OFF_CSUM : l4 + tcp.OFF_CSUM + 2] = bytes(2)
        total = addresses + ipv4.IPPROTO_TCP + length + ones_sum(segment[l4:])
        segment[l4 + tcp.OFF_CSUM : l4 + tcp.OFF_CSUM + 2] = finish(total).to_bytes(2, "big")
        cut.append(segment)
    return cut


def _nobody() -> None:
    """What `on_receivable` is until somebody wants to know."""


def _nowhere(_frame: RxFrame) -> None:
    """Where frames go before the device is attached."""
