"""Two stacks on a simulated wire in virtual time, and programs that talk over them."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from tests import leaks
from tests.sim.analyser import Analyser
from ustack.lab.world import World
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import PagedRing
from ustack.link.simwire import Impairments, SimDevice, SimWire
from ustack.stack import Stack
from ustack.transport.events import READABLE, SHUT_WR, WRITABLE
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.link.rxring import RxRing
    from ustack.mem.page_flip import Policy
    from ustack.skb import SkbMemory
    from ustack.transport.tcp.connection import Connection

CLIENT, SERVER = "10.0.0.1", "10.0.0.2"


class Network:
    """A client and a server stack with a wire between them. `close` ends both; nothing may be left then."""

    def __init__(
        self,
        seed: int,
        impairments: Impairments | None = None,
        *,
        features: int = FEATURE_CSUM | FEATURE_TSO,
        mtu: int = 1500,
        ring: Callable[[SkbMemory, int], RxRing] = PagedRing,
        memory: int = 4 << 20,
        reserve: int = 0,
        pool: str = "kmalloc",
        capture: int = 0,
        zero_copy: Policy | None = None,
        tcp: TcpConfig | None = None,
    ) -> None:
        self.world = World(seed)
        self.config = tcp or TcpConfig()
        self.devices = [SimDevice(f"sim{n}", bytes((2, 0, 0, 0, 0, n)), mtu, features, ring) for n in (1, 2)]
        a, b = self.devices
        self.wire = SimWire(self.world, a, b, impairments or Impairments())
        self.stacks = [
            Stack(
                memory=memory,
                reserve=reserve,
                pool=pool,
                capture=capture,
                zero_copy=zero_copy,
                tcp=self.config,
                random=Random(seed * 2 + n),
            )
            for n in (0, 1)
        ]
        self.client, self.server = self.stacks
        for stack, device, address in zip(self.stacks, self.devices, (CLIENT, SERVER), strict=True):
            self.world.add(stack, device)
            stack.add_interface(device, f"{address}/24")
            leaks.watch_pool(stack.pool)
            leaks.watch(partial(left_behind, stack))
        self.analyser = Analyser(self.stacks, self.devices)

    def listen(self, port: int = 80, on_accept: Callable[[Connection], None] | None = None, **options: Any) -> list[Connection]:
        """Listen on the server; accepted connections are given to `on_accept` and listed in what is returned."""
        accepted: list[Connection] = []
        listener = self.server.tcp.listen(None, port, 128, SocketOptions(**options))

        def accept(_: int) -> None:
            while listener.queue:
                conn = listener.accept()
                accepted.append(conn)
                if on_accept is not None:
                    on_accept(conn)

        listener.wake = accept
        return accepted

    def connect(self, port: int = 80, **options: Any) -> Connection:
        """Open a connection from the client to the server."""
        path = self.client.ip.path(bytes((10, 0, 0, 2)))
        return self.client.tcp.connect(path, 0, port, SocketOptions(**options))

    def close(self) -> None:
        """End both stacks."""
        for stack in self.stacks:
            stack.close()


def left_behind(stack: Stack) -> list[str]:
    """What a closed stack still holds: must be nothing."""
    found = [f"{account.name}: {account.bytes} bytes" for account in stack.accounts() if account.bytes]
    found += [
        f"{name}: {mem.allocated} pages, {mem.sockets} sockets"
        for name, mem in (("tcp_mem", stack.tcp.mem), ("udp_mem", stack.udp.mem))
        if mem.allocated or mem.sockets
    ]
    if stack.env.memory.live:
        found.append(f"{stack.env.memory.live} skbs")
    return found


class Talker:
    """Sends `outgoing`, closes its direction, and collects what comes until the peer closes its own."""

    def __init__(self, conn: Connection, outgoing: bytes, chunk: int = 65536) -> None:
        self.conn = conn
        self.outgoing = memoryview(outgoing)
        self.chunk = chunk
        self.incoming = bytearray()
        self.done = False
        self.error = 0
        conn.wake = self.wake
        self.wake(READABLE | WRITABLE)

    def wake(self, _: int) -> None:
        """Do what can be done now."""
        conn = self.conn
        if conn.error:
            self.error = conn.take_error()
            return
        if conn.writable:
            try:
                while self.outgoing:
                    self.outgoing = self.outgoing[conn.send(self.outgoing[: self.chunk]) :]
                if conn.synchronized and not conn.shutdown_mask & SHUT_WR:
                    conn.shutdown(SHUT_WR)
            except BlockingIOError:
                pass
        while not self.done and conn.readable:
            data = conn.recv(self.chunk)
            self.incoming += data
            self.done = not data

    @property
    def finished(self) -> bool:
        """Whether everything was sent and the peer's end was reached."""
        return self.done and not self.outgoing
