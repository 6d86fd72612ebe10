"""IPv6 between two stacks on a simulated wire: addresses are found out to be free, then TCP and UDP as over IPv4."""

from __future__ import annotations

import socket as names
from functools import partial
from random import Random

import pytest

from tests import leaks
from tests.sim.network import left_behind
from ustack.lab.world import VirtualLoop, World
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.simwire import Impairments, SimDevice, SimWire
from ustack.net.ipv6 import Ipv6Config
from ustack.stack import Stack

CLIENT, SERVER = "fd00::1", "fd00::2"


class Pair:
    """A client and a server, with IPv4 as well, in virtual time."""

    def __init__(
        self, features: int = FEATURE_CSUM | FEATURE_TSO, impairments: Impairments | None = None, **config: int
    ) -> None:
        self.world = World(1)
        self.loop = VirtualLoop(self.world)
        devices = [SimDevice(f"sim{n}", bytes((2, 0, 0, 0, 0, n)), 1500, features) for n in (1, 2)]
        self.wire = SimWire(self.world, devices[0], devices[1], impairments or Impairments())
        self.stacks = [Stack(memory=8 << 20, random=Random(n), ipv6=Ipv6Config()) for n in (1, 2)]
        self.client, self.server = self.stacks
        for number, stack in enumerate(self.stacks):
            self.world.add(stack, devices[number])
            interface = stack.add_interface(devices[number], f"fd00::{number + 1}/64")
            stack.add_address(interface, f"10.0.0.{number + 1}/24")
            leaks.watch_pool(stack.pool)
            leaks.watch(partial(left_behind, stack))
        self.pass_time(3.0)

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        end = self.world.now + seconds
        while self.world.step(end):
            pass

    def close(self) -> None:
        """End both."""
        for stack in self.stacks:
            stack.close()
        self.loop.close()


async def _transfer(pair: Pair, family: int, listen: tuple[str, int], connect: str, data: bytes) -> tuple[object, ...]:
    with pair.server.socket(names.AF_INET6) as listener, pair.client.socket(family) as client:
        listener.bind(listen)
        listener.listen()
        await client.connect((connect, listener.getsockname()[1]))
        accepted, peer = await listener.accept()
        with accepted:
            sending = pair.loop.create_task(client.sendall(data))
            received = bytearray()
            while len(received) < len(data):
                received += await accepted.recv(65536)
            await sending
            assert received == data
            return accepted.getsockname(), peer, client.getpeername()


@pytest.mark.parametrize("features", [FEATURE_CSUM | FEATURE_TSO, 0])
@pytest.mark.parametrize("loss", [0.0, 0.03])
def test_a_stream_arrives_intact(features: int, loss: float) -> None:
    pair = Pair(features, Impairments(loss=loss, corrupt=loss / 10, delay=0.01))
    local, peer, far = pair.loop.run_until_complete(
        _transfer(pair, names.AF_INET6, ("::", 80), SERVER, Random(3).randbytes(500_000))
    )
    assert (local, far) == ((SERVER, 80, 0, 0), (SERVER, 80, 0, 0))
    assert isinstance(peer, tuple)
    assert (peer[0], peer[2:]) == (CLIENT, (0, 0))
    pair.close()


def test_a_dual_stack_listener_takes_ipv4_as_mapped() -> None:
    pair = Pair()
    local, peer, far = pair.loop.run_until_complete(_transfer(pair, names.AF_INET, ("::", 80), "10.0.0.2", b"x" * 1000))
    assert (local, far) == (("::ffff:10.0.0.2", 80, 0, 0), ("10.0.0.2", 80))
    assert isinstance(peer, tuple)
    assert peer[0] == "::ffff:10.0.0.1"
    pair.close()


def test_a_mapped_address_is_reached_by_ipv4() -> None:
    pair = Pair()
    _, _, far = pair.loop.run_until_complete(_transfer(pair, names.AF_INET6, ("::", 80), "::ffff:10.0.0.2", b"x" * 1000))
    assert far == ("::ffff:10.0.0.2", 80, 0, 0)
    pair.close()


def test_link_local_peers_have_a_scope() -> None:
    pair = Pair()
    inet6 = pair.server.interfaces[0].inet6
    assert inet6 is not None
    server = names.inet_ntop(names.AF_INET6, inet6.link_local())
    _, peer, far = pair.loop.run_until_complete(_transfer(pair, names.AF_INET6, ("::", 80), f"{server}%sim1", b"x" * 1000))
    assert far == (server, 80, 0, 1)
    assert isinstance(peer, tuple)
    assert peer[3] == 1
    pair.close()


def test_datagrams_and_port_unreachable() -> None:
    pair = Pair()

    async def exchange() -> None:
        with (
            pair.server.socket(names.AF_INET6, names.SOCK_DGRAM) as server,
            pair.client.socket(names.AF_INET6, names.SOCK_DGRAM) as client,
        ):
            server.bind(("::", 9))
            client.connect_nowait((SERVER, 9))
            await client.send(b"question")
            data, sender = await server.recvfrom(100)
            assert (data, sender[0]) == (b"question", CLIENT)
            await server.sendto(b"answer", sender)
            assert await client.recv(100) == b"answer"
            client.connect_nowait((SERVER, 10))
            await client.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                await client.recv(100)

    pair.loop.run_until_complete(exchange())
    pair.close()


def test_echo_and_what_is_counted() -> None:
    pair = Pair()
    replies: list[tuple[bytes, int, bytes, int]] = []
    echo = pair.client.ip6.icmp.open_echo(lambda *reply: replies.append(reply), lambda *_: None)
    packed = names.inet_pton(names.AF_INET6, SERVER)
    echo.send(packed, 7, b"abc")
    pair.pass_time(1.0)
    assert replies == [(packed, 7, b"abc", 64)]
    assert pair.server.mib.Icmp6InEchos == 1
    echo.close()
    pair.close()
