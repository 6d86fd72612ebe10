"""What it saves to look for whom a frame is before anything is allocated for it.

A frame in a paged ring lies in memory that was posted once and for all. It is classified there, and costs memory only when a
socket keeps it. Most drivers, and the kernel with them, make a packet of every frame first and find out afterwards whose it
was: with the memory full, every frame of the batch takes from the reserve until it has been looked at. Here the same batches
go through both, for each pool: frames for a socket that nobody reads, and at the end of each batch one for a memalloc socket.
"""

from __future__ import annotations

from collections import deque
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.gfp import ATOMIC, MEMALLOC
from ustack.link.device import ETH_HLEN, FEATURE_CSUM
from ustack.link.rxring import RxFrame, RxRing
from ustack.link.simwire import SimDevice, WireFrame
from ustack.stack import RX_BUDGET, Stack
from ustack.transport.udp import UdpConfig
from ustack.wire import ethernet, ipv4, udp

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.drops import Drops
    from ustack.skb import Skb, SkbMemory
    from ustack.transport.udp import UdpSocket

FRAMES: Final = {"a frame of 1514 bytes": 1514, "a super-frame of 64 KiB": 65535}
"""Bytes of the frames that are received, Ethernet header included."""

MEMORY: Final = 24 << 20
BATCHES: Final = 30
SMALLEST: Final = 32
"""Bytes of the smallest object that pools make."""

DEAF_PORT: Final = 9
DISK_PORT: Final = 10
OURS: Final = bytes((10, 0, 0, 1))
PEER: Final = bytes((10, 0, 0, 2))
_MAC: Final = b"\x02\0\0\0\0\1"
_PEER_MAC: Final = b"\x02\0\0\0\0\2"


class _SkbRing(RxRing):
    """A packet that was made before anybody knew whose it is, in the place of the frame that it was."""

    __slots__ = ("skb",)

    def __init__(self, memory: SkbMemory) -> None:
        super().__init__(memory, 0, None)
        self.skb: Skb | None = None

    def take(self, skb: Skb, received: RxFrame) -> RxFrame:
        """`skb` holds the bytes of `received`: the frame to classify."""
        frame = self.frame
        self.skb = skb
        frame.head = self.memory.mem[skb.data : skb.tail]
        frame.len = skb.len
        frame.csum_ok = received.csum_ok
        frame.gso_size = received.gso_size
        frame.pfmemalloc = skb.pfmemalloc
        return frame

    def ready(self) -> bool:
        return True

    def views(self, offset: int, length: int) -> list[memoryview]:
        assert self.skb is not None
        return self.skb.views(offset, length)

    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        skb = self.skb
        assert skb is not None
        self.skb = None
        skb.pull(offset)
        skb.trim(length)
        return skb

    def truesize(self, offset: int, length: int) -> int:
        assert self.skb is not None
        return self.skb.truesize

    def close(self) -> None:
        pass


class EarlyDevice(SimDevice):
    """A device that makes packets of all frames of a batch, and only then hands them up. `held` is the truesize of those that
    wait, `held_peak` the most that ever did.
    """

    __slots__ = ("_backlog", "_handed", "_up", "held", "held_peak")

    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """See `Device.attach`."""
        self._backlog: deque[Skb] = deque()
        self._handed = _SkbRing(memory)
        self._up = deliver
        self.held = 0
        self.held_peak = 0
        super().attach(memory, drops, self._make_packet)

    def _make_packet(self, frame: RxFrame) -> None:
        skb = frame.keep(0, frame.len, MEMALLOC)
        if skb is None:
            return  # lost, and nobody will ever know whose it was
        self.held += skb.truesize
        self.held_peak = max(self.held_peak, self.held)
        self._backlog.append(skb)

    def poll(self, budget: int) -> int:
        """See `Device.poll`."""
        count = super().poll(budget)
        while self._backlog:
            skb = self._backlog.popleft()
            self.held -= skb.truesize
            self._up(self._handed.take(skb, self.ring.frame))
            if self._handed.skb is not None:
                self._handed.skb = None
                skb.free()
        return count


class Saving(NamedTuple):
    """For one pool and one size of frame, in the ring and after allocation: bytes of packet memory held at once by a batch of
    frames that are all dropped, pages of reserve without which the last frame of a batch is lost, and seconds for a dropped
    frame.
    """

    pool: str
    frame: str
    held_in_ring: int
    held_after: int
    reserve_in_ring: int
    reserve_after: int
    seconds_in_ring: float
    seconds_after: float


class _Full:
    """A stack whose memory is full but for a reserve of `pages`."""

    def __init__(self, pool: str, size: int, pages: int, *, early: bool) -> None:
        kind = EarlyDevice if early else SimDevice
        self.device = kind("sim0", _MAC, size - ETH_HLEN, FEATURE_CSUM)
        limits = UdpConfig(mem_low=2 * MEMORY, mem_pressure=2 * MEMORY, mem_high=2 * MEMORY)
        self.stack = Stack(memory=MEMORY, pool=pool, reserve=pages << PAGE_SHIFT, udp=limits, random=Random(1))
        self.stack.add_interface(self.device, "10.0.0.1/24")
        self.deaf = self._socket(DEAF_PORT)
        self.disk = self._socket(DISK_PORT)
        self.disk.options.memalloc = True
        self._payload = size - ETH_HLEN - ipv4.HEADER_LEN - udp.HEADER_LEN
        self._pages: list[int] = []
        self._objects: list[tuple[int, int]] = []
        self._heads: list[int] = []
        self._fill()

    def _socket(self, port: int) -> UdpSocket:
        socket = self.stack.udp.socket()
        socket.options.rcvbuf = 2 * MEMORY
        socket.bind(bytes(4), port)
        return socket

    def _fill(self) -> None:
        """Somebody else has all pages, and all that the pool still has room for on pages of its own."""
        pages, pool = self.stack.pages, self.stack.pool
        owner = pages.owner_id("memory hog")
        size = pool.max_size
        while size >= SMALLEST:
            while (pfn := pages.alloc(0, ATOMIC, owner)) >= 0:
                self._pages.append(pfn)
            while (addr := pool.alloc(size, ATOMIC)) >= 0:
                self._objects.append((addr, size))
            size //= 2
        while (head := pool.alloc_head(ATOMIC)) >= 0:
            self._heads.append(head)

    def receive(self, port: int, frames: int, last: int = DEAF_PORT) -> None:
        """A batch of frames for `port`, the last of them for `last`."""
        for number in range(frames):
            packet = udp.build_header(2000, last if number == frames - 1 else port, self._payload) + bytes(self._payload)
            packet = ipv4.build_header(PEER, OURS, ipv4.IPPROTO_UDP, len(packet)) + packet
            frame = ethernet.build_header(_MAC, _PEER_MAC, ethernet.ETH_P_IP) + packet
            self.device.receive(WireFrame(frame, 1, 0, 0))
        self.stack.receive(self.device)

    def close(self) -> None:
        """Give everything back."""
        pool = self.stack.pool
        for head in self._heads:
            pool.free_head(head)
        for addr, size in self._objects:
            pool.free(addr, size)
        for pfn in self._pages:
            self.stack.pages.free(pfn, 0)
        self.stack.close()


def last_gets_through(pool: str, size: int, pages: int, *, early: bool) -> bool:
    """Whether with a reserve of `pages` the last frame of a full batch, which is for the memalloc socket, reaches it."""
    full = _Full(pool, size, pages, early=early)
    full.receive(DEAF_PORT, RX_BUDGET, last=DISK_PORT)
    through = full.disk.readable
    full.close()
    return through


def _smallest_reserve(pool: str, size: int, *, early: bool) -> int:
    low, high = 0, MEMORY // 2 // PAGE_SIZE
    while low < high:
        middle = (low + high) // 2
        if last_gets_through(pool, size, middle, early=early):
            high = middle
        else:
            low = middle + 1
    return low


def _drop_batches(pool: str, size: int, *, early: bool, batches: int) -> tuple[int, float]:
    """The most that a batch held at once, in bytes, and the seconds for a frame: the median of so many batches."""
    full = _Full(pool, size, MEMORY // 4 // PAGE_SIZE, early=early)
    device, stats = full.device, full.stack.pool.stats
    stats.charged_peak = stats.charged
    times = []
    for _ in range(batches):
        began = perf_counter()
        full.receive(DEAF_PORT, RX_BUDGET)
        times.append(perf_counter() - began)
    held = device.held_peak if isinstance(device, EarlyDevice) else stats.charged_peak - stats.charged
    full.close()
    return held, sorted(times)[batches // 2] / RX_BUDGET


def measure(pool: str, frame: str, batches: int = BATCHES) -> Saving:
    """Both ways for one pool and one size of frame, a key of `FRAMES`."""
    size = FRAMES[frame]
    in_ring = _drop_batches(pool, size, early=False, batches=batches)
    after = _drop_batches(pool, size, early=True, batches=batches)
    return Saving(
        pool,
        frame,
        in_ring[0],
        after[0],
        _smallest_reserve(pool, size, early=False),
        _smallest_reserve(pool, size, early=True),
        in_ring[1],
        after[1],
    )
