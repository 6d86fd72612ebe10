"""What a stack sends to itself arrives, by its own addresses of both versions and by the loopback addresses."""

from __future__ import annotations

import errno
import socket as names
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests import leaks
from tests.sim.network import left_behind
from ustack.lab.world import VirtualLoop, World
from ustack.link.loopback import QUEUE_MAX
from ustack.link.simwire import Impairments, SimDevice, SimWire
from ustack.net.ipv6 import Ipv6Config
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS, OURS6 = "10.0.0.1", "fd00::1"
DATA = Random(9).randbytes(2_000_000)


class Alone:
    """One stack in virtual time, on a wire that leads to a device that nobody reads; what came out there is in `seen`."""

    def __init__(self) -> None:
        self.world = World(1)
        self.loop = VirtualLoop(self.world)
        self.device = SimDevice("sim0", bytes((2, 0, 0, 0, 0, 1)))
        self.stack = Stack(memory=8 << 20, random=Random(1), ipv6=Ipv6Config(dad_transmits=0))
        self.world.add(self.stack, self.device)
        SimWire(self.world, self.device, SimDevice("dark", bytes((2, 0, 0, 0, 0, 2))), Impairments(loss=1.0))
        self.interface = self.stack.add_interface(self.device, f"{OURS}/24")
        self.stack.add_address(self.interface, f"{OURS6}/64")
        leaks.watch_pool(self.stack.pool)
        leaks.watch(partial(left_behind, self.stack))

    def run(self, coroutine: Any) -> Any:
        """Run a program."""
        return self.loop.run_until_complete(coroutine)


@pytest.fixture
def alone() -> Iterator[Alone]:
    """A stack with nobody else."""
    alone = Alone()
    yield alone
    alone.stack.close()
    alone.loop.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", OURS, "::1", OURS6, "link-local"])
def test_a_stream_to_ourselves_arrives_intact(alone: Alone, host: str) -> None:
    stack = alone.stack
    if host == "link-local":
        assert alone.interface.inet6 is not None
        host = names.inet_ntop(names.AF_INET6, alone.interface.inet6.link_local())
    family = names.AF_INET6 if ":" in host else names.AF_INET

    async def transfer() -> tuple[Any, Any]:
        with stack.socket(family) as listener, stack.socket(family) as client:
            listener.bind((host, 80))
            listener.listen()
            await client.connect((host, 80))
            accepted, peer = await listener.accept()
            with accepted:
                sending = alone.loop.create_task(client.sendall(DATA))
                received = bytearray()
                while len(received) < len(DATA):
                    received += await accepted.recv(1 << 20)
                await sending
                assert received == DATA
                return peer, client.getsockname()

    before = alone.device.stats.tx_packets
    peer, local = alone.run(transfer())
    assert peer == local
    assert peer[0] == ("127.0.0.1" if host.startswith("127") else host)
    assert alone.device.stats.tx_packets - before <= 4, "nothing of it was on the wire; announcements may be"
    assert stack.mib.TcpRetransSegs == 0


@pytest.mark.parametrize("host", ["127.0.0.1", OURS, "::1", OURS6])
def test_datagrams_echoes_and_refusals(alone: Alone, host: str) -> None:
    stack = alone.stack
    family = names.AF_INET6 if ":" in host else names.AF_INET
    packed = names.inet_pton(family, host)
    icmp = stack.ip6.icmp if ":" in host else stack.ip.icmp
    replies: list[tuple[bytes, int, bytes, int]] = []

    async def talk() -> None:
        with stack.socket(family, names.SOCK_DGRAM) as a, stack.socket(family, names.SOCK_DGRAM) as b:
            a.bind((host, 9))
            for size in (0, 1, 1000, 16_000, 40_000):
                await b.sendto(DATA[:size], (host, 9))
                received, sender = await a.recvfrom(65535)
                assert received == DATA[:size]
                assert sender[0] == host
            b.connect_nowait((host, 10))
            await b.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                await b.recv(1)
        with stack.socket(family) as refused, pytest.raises(ConnectionRefusedError):
            await refused.connect((host, 10))

    echo = icmp.open_echo(lambda *reply: replies.append(reply), lambda *_: None)
    echo.send(packed, 1, DATA[:20_000])
    alone.run(talk())
    echo.close()
    assert replies == [(packed, 1, DATA[:20_000], 64)]


def test_a_program_that_never_reads_holds_nobody_up(alone: Alone) -> None:
    """A flood to ourselves: bounded by the receive limit, and what does not fit is counted."""
    stack = alone.stack
    with stack.socket(type=names.SOCK_DGRAM) as deaf, stack.socket(type=names.SOCK_DGRAM) as loud:
        deaf.bind(("127.0.0.1", 9))
        stack.env.batching = True  # so that all of it waits
        for _ in range(2000):
            loud.sendto_nowait(bytes(1000), ("127.0.0.1", 9))
            assert stack.loopback.account.bytes <= QUEUE_MAX + (1 << 16)
        for _ in range(10):
            stack.flush()
        assert stack.drops.by_name()["TX_DEVICE"] > 0
        assert stack.drops.by_name()["SOCKET_RCVBUFF"] > 0
        assert not stack.loopback.waiting


def test_what_loops_between_two_sockets_leaves_room_for_others(alone: Alone) -> None:
    """A ping-pong without end takes a bounded part of each flush."""
    stack = alone.stack
    sockets = [stack.udp.socket(), stack.udp.socket()]
    for number, each in enumerate(sockets):
        each.bind(bytes((127, 0, 0, 1)), 100 + number)

        def back(_: int, own: Any = each, other: int = 101 - number) -> None:
            own.sendto_nowait(own.recvfrom_nowait(10)[0], (bytes((127, 0, 0, 1)), other))

        each.wake = back
    sockets[0].sendto_nowait(b"ping", (bytes((127, 0, 0, 1)), 101))
    stack.flush()
    assert stack.loopback.waiting
    assert stack.timers.next_deadline() <= stack.timers.now
    for each in sockets:
        each.close()


@pytest.mark.parametrize(("source", "target"), [("127.0.0.1", "10.0.0.2"), ("::1", "fd00::2")])
def test_the_loopback_address_never_leaves(alone: Alone, source: str, target: str) -> None:
    with alone.stack.socket(names.AF_INET6 if ":" in source else names.AF_INET) as sock:
        sock.bind((source, 0))
        with pytest.raises(OSError, match="Invalid argument") as refused:
            alone.run(sock.connect((target, 80)))
        assert refused.value.errno == errno.EINVAL
