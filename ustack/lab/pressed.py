"""A disk over NBD while memory is short, in virtual time: the situation of the dispute of 2006, as small as it can be.

Two stacks on a wire. Ours has little memory. Programs on the peer send to sockets of ours that nobody reads, until all memory
that ordinary sockets can have is in their queues. The peer serves a disk, and a program of ours works on it, with every byte
checked.
"""

from __future__ import annotations

import asyncio
from random import Random
from socket import AF_INET, AF_INET6, SO_RCVBUF, SOCK_DGRAM, SOL_SOCKET
from typing import TYPE_CHECKING, Any, Final

from pools.base import NULL
from pools.gfp import ATOMIC
from ustack.lab.world import VirtualLoop, World
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import Impairments, SimDevice, SimWire, WireFrame
from ustack.nbd.client import NbdClient
from ustack.nbd.export import MemoryExport
from ustack.nbd.server import NbdServer
from ustack.net.ipv6 import Ipv6Config
from ustack.stack import Stack
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.udp import UdpConfig
from ustack.wire import ethernet, icmpv6, ipv6
from ustack.wire.checksum import finish, ones_sum, pseudo_v6
from ustack.wire.ethernet import ETH_P_ARP, ETH_P_IPV6

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pools.base import Pool
    from ustack.skb import SkbMemory
    from ustack.socket import Socket

OURS: Final = "10.0.0.1"
PEER: Final = "10.0.0.2"
OURS6: Final = "fd00::1"
PEER6: Final = "fd00::2"
CROWD_PORT: Final = 9
NBD_PORT: Final = 10809

PEER_MEMORY: Final = 64 << 20
"""Bytes of packet memory of the peer, who has plenty."""

ARP_SENDER: Final = slice(22, 28)
"""Where the sender's hardware address lies in a frame with ARP."""

NDP_MESSAGE: Final = ethernet.HEADER_LEN + ipv6.HEADER_LEN
NDP_SENDER: Final = slice(NDP_MESSAGE + 26, NDP_MESSAGE + 32)
"""The same in a frame with a neighbor solicitation or advertisement: in its first option."""

FLOOD: Final = bytes(1 << 16)

DATAGRAM_MAX: Final = 1400
ROUND: Final = 0.005
QUIET_ROUNDS: Final = 60
"""A datagram for each socket every so many virtual seconds. Memory is full when nobody has got another page in so many
rounds.
"""


def without_tcp_mem(memory: int) -> TcpConfig:
    """Settings with limits of all connections together that limit nobody: a machine that is short of memory."""
    return TcpConfig(mem_low=2 * memory, mem_pressure=2 * memory, mem_high=2 * memory)


def without_udp_mem(memory: int) -> UdpConfig:
    """The same for datagrams."""
    return UdpConfig(mem_low=2 * memory, mem_pressure=2 * memory, mem_high=2 * memory)


class TakenRing(LinearRing):
    """A linear ring whose buffers can be gone all at once: what 2006 feared, and what pure chance seldom comes to."""

    __slots__ = ("_taken",)

    def __init__(self, memory: SkbMemory, max_frame: int, prefix: bytearray | None = None) -> None:
        self._taken: list[int] = []
        super().__init__(memory, max_frame, prefix)

    def take_along(self) -> None:
        """Sockets that nobody reads have taken every ordinary buffer along. The next ones come from the reserve."""
        self._taken += [addr for addr, pfmemalloc in self._posted if not pfmemalloc]
        left = [each for each in self._posted if each[1]]
        self._posted.clear()
        self._posted.extend(left)
        self._aimed = NULL
        self.ready()

    def close(self) -> None:
        """Give all memory back."""
        for addr in self._taken:
            self.memory.pool.free(addr, self.max_frame, self.memory.cpu)
        super().close()


class Pressed:
    """Our stack (`stack`), the peer's, and the wire between them. `memory` is ours in bytes; `pool`, `pool_options` and
    `reserve` are those of `Stack`; `linear` chooses the receive ring, `features` the offloads of both devices, `version` that
    of IP for all that they say to each other.
    """

    def __init__(
        self,
        seed: int,
        *,
        memory: int = 4 << 20,
        pool: str | Pool = "kmalloc",
        pool_options: dict[str, Any] | None = None,
        reserve: Any = "auto",
        linear: bool = False,
        features: int = FEATURE_CSUM | FEATURE_TSO,
        mtu: int = 1500,
        wire: Impairments | None = None,
        tcp: TcpConfig | None = None,
        version: int = 4,
    ) -> None:
        self.version = version
        self.ours, self.theirs = (OURS, PEER) if version == 4 else (OURS6, PEER6)
        self.world = World(seed)
        self.loop = VirtualLoop(self.world)
        self.random = Random(seed)
        ring = TakenRing if linear else PagedRing
        self.device = SimDevice("sim1", bytes((2, 0, 0, 0, 0, 1)), mtu, 0 if linear else features, ring)
        self.peer_device = SimDevice("sim2", bytes((2, 0, 0, 0, 0, 2)), mtu, features)
        self.wire = SimWire(self.world, self.device, self.peer_device, wire or Impairments())
        self.stack = Stack(
            memory=memory,
            pool=pool,
            pool_options=pool_options,
            reserve=reserve,
            tcp=tcp or without_tcp_mem(memory),
            udp=without_udp_mem(memory),
            ipv6=Ipv6Config(dad_transmits=0),
            random=Random(seed * 2),
        )
        self.peer = Stack(memory=PEER_MEMORY, reserve=0, ipv6=Ipv6Config(dad_transmits=0), random=Random(seed * 2 + 1))
        for stack, device, address in ((self.stack, self.device, self.ours), (self.peer, self.peer_device, self.theirs)):
            self.world.add(stack, device)
            stack.add_interface(device, f"{address}/{24 if version == 4 else 64}")
        self.server: NbdServer | None = None
        self._hogged: list[int] = []
        self._crowd: list[asyncio.Transport] = []
        self._deaf: list[Socket] = []
        self._flooding: asyncio.Task[None] | None = None
        self._cut_until = 0.0

    @property
    def _family(self) -> int:
        return AF_INET if self.version == 4 else AF_INET6

    def run(self, story: Callable[[], Awaitable[None]], limit: float) -> bool:
        """Run `story` for at most `limit` virtual seconds; whether it came to its end."""

        async def timed() -> bool:
            try:
                async with asyncio.timeout(limit):
                    await story()
            except TimeoutError:
                return False
            return True

        return self.loop.run_until_complete(timed())

    def close(self) -> None:
        """End both stacks, and everything that still goes on."""
        self.loop.run_until_complete(self._end_tasks())
        for pfn in self._hogged:
            self.stack.pages.free(pfn, 0)
        self._hogged.clear()
        self.stack.close()
        self.peer.close()
        self.loop.run_until_complete(self._end_tasks())  # what the end of a connection has begun
        self.loop.close()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def cut(self, seconds: float) -> None:
        """Cut the wire, and mend it after so many seconds."""
        wire = self.wire.there.impairments
        self._cut_until = self.world.now + seconds
        self.wire.impair(Impairments(loss=1.0))
        self.world.at(self._cut_until, lambda: self.wire.impair(wire))

    def change_peer_mac(self, mac: bytes) -> None:
        """From now on the peer is known on the wire by the hardware address `mac` only, and nobody is told: as when another
        machine takes over its IP address.
        """
        old = self.peer_device.mac
        to_peer, from_peer = self.device.wire, self.peer_device.wire
        assert to_peer is not None
        assert from_peer is not None

        def there(frame: WireFrame) -> None:
            if frame.data[:6] == mac:
                frame.data = old + bytes(frame.data[6:])
            elif frame.data[:6] == old:
                return
            to_peer(frame)

        def back(frame: WireFrame) -> None:
            data = bytearray(frame.data)
            data[6:12] = mac
            if data[12:14] == ETH_P_ARP.to_bytes(2):
                data[ARP_SENDER] = mac
            elif data[12:14] == ETH_P_IPV6.to_bytes(2) and data[NDP_MESSAGE : NDP_MESSAGE + 1] in _TELLS_MAC:
                data[NDP_SENDER] = mac
                _correct_checksum(data)
            frame.data = data
            from_peer(frame)

        self.device.wire, self.peer_device.wire = there, back

    # -- the crowd --

    async def crowd(self, connections: int, *, datagrams: bool = True) -> None:
        """Let the peer open `connections` and send into each all that it takes, and, with `datagrams`, datagrams of every size
        to as many sockets, and our side read none of it, until they get no more memory.
        """

        class Unread(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                transport.pause_reading()

        await self.stack.create_server(Unread, None, CROWD_PORT, backlog=connections)
        for number in range(connections):
            # All connect before anybody sends: when memory is short, nobody else gets in.
            self._crowd.append((await self.peer.create_connection(asyncio.Protocol, self.ours, CROWD_PORT))[0])
            deaf = self.stack.socket(self._family, SOCK_DGRAM)
            deaf.setsockopt(SOL_SOCKET, SO_RCVBUF, self.stack.arena.size)
            deaf.bind(("", CROWD_PORT + 1 + number))
            self._deaf.append(deaf)
        for transport in self._crowd:
            _Flood(transport).go_on()
        sender = self.peer.socket(self._family, SOCK_DGRAM)
        self._deaf.append(sender)
        if datagrams:
            self._flooding = self.loop.create_task(self._flood(sender, connections))
        pages = self.stack.pages
        lowest = pages.pages
        quiet = 0
        while quiet < QUIET_ROUNDS:
            quiet = quiet + 1 if pages.free_pages >= lowest else 0
            lowest = min(lowest, pages.free_pages)
            await asyncio.sleep(ROUND)

    async def _flood(self, sender: Socket, sockets: int) -> None:
        """A datagram for each socket in each round, so that whoever frees memory has lost it."""
        while True:
            # What is sent into a cut wire is nothing but work.
            await asyncio.sleep(max(self._cut_until - self.world.now, 0))
            for number in range(sockets):
                datagram = FLOOD[: self.random.randrange(1, DATAGRAM_MAX)]
                sender.sendto_nowait(datagram, (self.ours, CROWD_PORT + 1 + number))
            await asyncio.sleep(ROUND)

    def take_pages(self) -> None:
        """Somebody else takes what the crowd has left of the pages above the reserve."""
        pages = self.stack.pages
        owner = pages.owner_id("memory hog")
        while (pfn := pages.alloc(0, ATOMIC, owner)) != NULL:
            self._hogged.append(pfn)

    def leave(self) -> None:
        """The crowd goes away."""
        if self._flooding is not None:
            self._flooding.cancel()
        for transport in self._crowd:
            transport.abort()
        for deaf in self._deaf:
            deaf.close()
        self._crowd.clear()
        self._deaf.clear()

    # -- the disk --

    async def serve(self, size: int) -> MemoryExport:
        """Let the peer serve a disk of `size` bytes, all zero."""
        export = MemoryExport(size)
        self.server = NbdServer([export])
        await self.peer.create_server(self.server.protocol, None, NBD_PORT)
        return export

    async def attach(self, queue_depth: int, request_size: int) -> NbdClient:
        """Attach the disk over our stack with a memalloc socket."""
        return await NbdClient.open(
            lambda factory: self.stack.create_connection(factory, self.theirs, NBD_PORT, memalloc=True),
            queue_depth=queue_depth,
            request_size=request_size,
            request_timeout=None,
        )


_TELLS_MAC: Final = (bytes((icmpv6.ND_NEIGHBOR_SOLICIT,)), bytes((icmpv6.ND_NEIGHBOR_ADVERT,)))


def _correct_checksum(frame: bytearray) -> None:
    """Make the ICMPv6 checksum of a frame right again."""
    message = frame[NDP_MESSAGE:]
    message[2:4] = bytes(2)
    addresses = ethernet.HEADER_LEN + ipv6.OFF_SRC
    total = pseudo_v6(bytes(frame[addresses : addresses + 16]), bytes(frame[addresses + 16 : addresses + 32]), 58, len(message))
    frame[NDP_MESSAGE + 2 : NDP_MESSAGE + 4] = finish(total + ones_sum(message)).to_bytes(2)


class _Flood(asyncio.Protocol):
    """Sends for ever."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.set_protocol(self)
        transport.set_write_buffer_limits(0)

    def go_on(self) -> None:
        """Send what is taken."""
        self._transport.write(FLOOD)

    def resume_writing(self) -> None:
        self.go_on()


class Work:
    """Requests on a disk whose every byte is known, `depth` at a time. `gap` is the longest time in which none was answered,
    `done` how many were; `most` were in flight at once.
    """

    def __init__(
        self, pressed: Pressed, disk: NbdClient, *, depth: int, request_size: int, size: int, reads: float = 0.5
    ) -> None:
        self.disk = disk
        self.done = 0
        self.gap = 0.0
        self._loop = pressed.loop
        self._random = Random(pressed.world.seed)
        self._image = bytearray(size)
        self._depth = depth
        self._request_size = request_size
        self._reads = reads
        self._left = 0
        self._last = pressed.loop.time()

    async def do(self, requests: int) -> None:
        """Do so many. Raises AssertionError for a byte that is wrong, OSError when a request fails."""
        self._left = requests
        self._last = self._loop.time()
        part = len(self._image) // self._depth
        async with asyncio.TaskGroup() as group:
            for index in range(self._depth):
                group.create_task(self._work(index * part, part))

    def idle(self) -> float:
        """Seconds since the last answer."""
        return self._loop.time() - self._last

    async def _work(self, start: int, size: int) -> None:
        random = self._random
        length = self._request_size
        view = memoryview(self._image)
        while self._left > 0:
            self._left -= 1
            offset = start + random.randrange(size // length) * length
            if random.random() < self._reads:
                data = await self.disk.pread(length, offset)
                assert data == view[offset : offset + length], f"{length} bytes at {offset} are not what was written"
            else:
                view[offset : offset + length] = random.randbytes(16) * (length // 16)
                await self.disk.pwrite(bytes(view[offset : offset + length]), offset)
            self.done += 1
            self.gap = max(self.gap, self.idle())
            self._last = self._loop.time()
