"""A scenario in virtual time: two stacks and a wire in a world, and an event loop that lives in it.

The whole of our NBD client and server runs over our own TCP, as it would over a TAP; everything follows from the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as names
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SHIFT, Arena
from pools.buddy import PageAllocator
from pools.kmalloc import KmallocPool
from ustack.lab.pressure.frames import FloodTraffic, FrameSource
from ustack.lab.pressure.run import EXPORT, run
from ustack.lab.pressure.scenario import (
    PeerMac,
    Scenario,
    ServerRestart,
    TcpBlocked,
    parse,
)
from ustack.lab.pressure.subject import ADDRESS, PEER, PREFIX_LEN, Repeat, Subject, tcp_port, udp_port
from ustack.lab.pressure.wire_faults import WireFaults
from ustack.lab.world import VirtualLoop, World
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO, NO_CSUM
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import Impairments, SimDevice, SimWire, WireFrame
from ustack.nbd.export import MemoryExport
from ustack.nbd.server import NbdServer
from ustack.stack import Stack
from ustack.wire import arp, ethernet

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.lab.pressure.result import Job, Result
    from ustack.socket import Socket

PEER_MEMORY: Final = 4 << 20
"""Bytes of packet memory of the peer, beside what its senders need: nobody makes it short."""

SENDER_SNDBUF: Final = 16384
"""Send limit of each sender (SO_SNDBUF) before doubling."""

SENDER_MEMORY: Final = 4 * SENDER_SNDBUF
"""Bytes of packet memory that the peer has for each sender."""

PEER_MAC: Final = bytes((2, 0, 0, 0, 0, 1))
SUBJECT_MAC: Final = bytes((2, 0, 0, 0, 0, 2))
NBD_PORT: Final = 10809

ARP: Final = ethernet.ETH_P_ARP.to_bytes(2, "big")

ZEROES: Final = bytes(65536)


def run_virtual(job: Job) -> Result:
    """Run `job` in virtual time. The same job gives the same result, byte for byte. Raises ConfigError for its text."""
    scenario = scenario_of(job.text, job.name)
    world = World(job.seed)
    random = Random(f"{job.seed} {job.pool}")
    subject = Subject(scenario, job.pool, random)
    network = _Network(world, scenario, subject)
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(world)) as runner:
            result = runner.run(run(job, scenario, "virtual", subject, network.peer, PEER, random))
    finally:
        subject.stack.close()
        network.peer.stack.close()
    result["failed"] += [f"left behind: {what}" for what in subject.left_behind()]
    result["passed"] = not result["failed"]
    return result


@lru_cache(maxsize=32)
def scenario_of(text: str, name: str) -> Scenario:
    """The scenario in `text`, which is read once for all the runs of a campaign. Raises ConfigError."""
    return parse(text, name).scenario


class _Network:
    """The subject and its peer in `world`, with a wire between them."""

    def __init__(self, world: World, scenario: Scenario, subject: Subject) -> None:
        device = scenario.device
        features = FEATURE_CSUM | FEATURE_TSO if device.offload else 0
        ring = LinearRing if device.mode == "linear" else PagedRing
        mine = SimDevice("subject", SUBJECT_MAC, device.mtu, features, ring)
        if device.mode == "linear":
            mine.features &= ~FEATURE_TSO  # its buffers take no super-frame
        theirs = SimDevice("peer", PEER_MAC, device.mtu, features)
        link = Impairments(**scenario.link.model_dump())
        wire = SimWire(world, mine, theirs, link)
        self.peer = VirtualPeer(world, scenario, subject, theirs, wire)
        world.add(subject.stack, subject.attach(mine))  # type: ignore[arg-type]  # the device of a simulation, maybe wrapped
        world.add(self.peer.stack, theirs)
        self.peer.stack.add_interface(theirs, f"{PEER}/{PREFIX_LEN}")


class VirtualPeer:
    """The peer in a world: see `run.Peer`."""

    def __init__(self, world: World, scenario: Scenario, subject: Subject, device: SimDevice, wire: SimWire) -> None:
        self._world = world
        self._scenario = scenario
        self._random = Random(world.random.getrandbits(64))
        senders = sum(each.count for each in scenario.traffic if isinstance(each, TcpBlocked))
        peers = KmallocPool(PageAllocator(Arena((PEER_MEMORY + senders * SENDER_MEMORY) >> PAGE_SHIFT)))
        self.stack = Stack(pool=peers, reserve=0, random=Random(world.random.getrandbits(64)))
        self._wire = wire
        self._mac = device.mac
        self._astray = 0
        self._faults = WireFaults(wire.there, wire.back)
        self._export: MemoryExport
        self._server: NbdServer | None = None
        self._listener: asyncio.AbstractServer | None = None
        self._senders: list[_Sender] = []
        self._repeats: list[Repeat] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()
        wire.a.wire = self._to_peer
        wire.b.wire = self._from_peer

    # -- the wire --

    def _to_peer(self, frame: WireFrame) -> None:
        if self._mac != PEER_MAC and not frame.data[0] & 1:
            if frame.data[:6] != self._mac:
                self._astray += 1
                return
            frame.data = PEER_MAC + frame.data[6:]
        self._wire.there.send(frame)

    def _from_peer(self, frame: WireFrame) -> None:
        if self._mac != PEER_MAC:
            data = frame.data
            frame.data = data.replace(PEER_MAC, self._mac, 2) if data[12:14] == ARP else data[:6] + self._mac + data[12:]
        self._wire.back.send(frame)

    def wire(self) -> Result:
        """See `run.Peer`; `astray` are frames to a station that is gone."""
        return {**self._faults.report(), "astray": self._astray}

    # -- the server --

    async def serve(self, size: int) -> int:
        """See `run.Peer`."""
        self._export = Disk(size, EXPORT)
        await self._start_server()
        return NBD_PORT

    async def _start_server(self) -> None:
        self._server = NbdServer([self._export])
        self._listener = await self.stack.create_server(self._server.protocol, None, NBD_PORT)

    async def _restart_server(self, fault: ServerRestart) -> None:
        if fault.crash:
            self._faults.cut("both")
        assert self._server is not None
        assert self._listener is not None
        self._listener.close()
        await self._server.close()
        await asyncio.sleep(fault.down)
        if fault.crash:
            self._faults.mend("both")
        await self._start_server()

    # -- traffic and faults --

    async def begin(self) -> None:
        """See `run.Peer`."""
        for number, traffic in enumerate(self._scenario.traffic):
            if isinstance(traffic, TcpBlocked):
                self._later(traffic.start, lambda traffic=traffic, number=number: self._send(traffic, number))  # type: ignore[misc]
            elif isinstance(traffic, FloodTraffic):
                self._flood(traffic, number)
        self._faults.begin(self._scenario)
        for fault in self._scenario.fault:
            if isinstance(fault, PeerMac):
                self._later(fault.start, lambda fault=fault: self._change_mac(fault))  # type: ignore[misc]
            elif isinstance(fault, ServerRestart):
                self._later(fault.start, lambda fault=fault: self._spawn(fault))  # type: ignore[misc]

    def _later(self, seconds: float, callback: Callable[[], object]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, callback))

    def _spawn(self, fault: ServerRestart) -> None:
        task = asyncio.get_running_loop().create_task(self._restart_server(fault))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, traffic: TcpBlocked, number: int) -> None:
        for _ in range(traffic.count):
            self._senders.append(_Sender(self.stack, tcp_port(number), traffic, self._random))

    def _flood(self, traffic: FloodTraffic, number: int) -> None:
        source = FrameSource(
            traffic,
            self._random,
            src=_packed(PEER),
            src_mac=PEER_MAC,
            dst=_packed(ADDRESS),
            dst_mac=SUBJECT_MAC,
            mtu=self._scenario.device.mtu,
            first_port=udp_port(self._scenario, number),
        )

        def step(count: int) -> None:
            for _ in range(count):
                for data in source.next():
                    self._from_peer(WireFrame(data, 0, NO_CSUM, 0))

        self._repeats.append(Repeat(traffic.rate, traffic.start, traffic.stop, step))

    def _change_mac(self, fault: PeerMac) -> None:
        last = int.from_bytes(self._mac[-2:], "big") + 0x100
        self._mac = self._mac[:4] + (last & 0xFFFF).to_bytes(2, "big")
        if fault.announce:
            for _ in range(2):
                self._from_peer(WireFrame(announcement(PEER_MAC, _packed(PEER)), 0, NO_CSUM, 0))

    async def end(self) -> None:
        """See `run.Peer`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for repeat in self._repeats:
            repeat.cancel()
        self._faults.end()
        for timer in self._timers:
            timer.cancel()
        for sender in self._senders:
            sender.end()
        if self._listener is not None:
            self._listener.close()
        if self._server is not None:
            await self._server.close()


class Disk(MemoryExport):
    """A disk that outlives its server."""

    def close(self) -> None:
        """Nothing: the next server goes on with it."""


class _Sender:
    """A connection on which the peer sends as long as there is room."""

    def __init__(self, stack: Stack, port: int, traffic: TcpBlocked, random: Random) -> None:
        self._left = traffic.size
        self._write = traffic.write
        self._random = random
        self._sock: Socket | None = stack.socket()
        self._sock.setsockopt(names.SOL_SOCKET, names.SO_SNDBUF, SENDER_SNDBUF)
        with contextlib.suppress(BlockingIOError):
            self._sock.connect_nowait((ADDRESS, port))
        self._sock.watch(self._go_on)

    def _go_on(self, _: int) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            while self._left is None or self._left > 0:
                size = self._random.randint(*self._write) if self._write[0] < self._write[1] else self._write[0]
                size = size if self._left is None else min(size, self._left)
                sent = sock.send_nowait(ZEROES[:size])
                if self._left is not None:
                    self._left -= sent
        except BlockingIOError:
            pass
        except OSError:
            self.end()

    def end(self) -> None:
        """Close it."""
        if self._sock is not None:
            self._sock.abort()
            self._sock.close()
            self._sock = None


def announcement(mac: bytes, address: bytes) -> bytes:
    """A gratuitous ARP request: `address` is at `mac` (RFC 5227, section 3)."""
    request = arp.build(arp.ARPOP_REQUEST, mac, address, bytes(6), address)
    return ethernet.build_header(ethernet.BROADCAST, mac, ethernet.ETH_P_ARP) + request


def _packed(address: str) -> bytes:
    return bytes(int(part) for part in address.split("."))
