"""The kernel pings us: ICMP echo in every size, and finding each other by ARP whatever happens to addresses."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.conftest import KERNEL, OURS
from tests.e2e.peers import ping
from tests.needs import require_tool
from ustack.net.neighbour import NUD_REACHABLE

if TYPE_CHECKING:
    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.stack import Stack

pytestmark = pytest.mark.e2e

ICMP_OVERHEAD: Final = 28
"""Bytes of IP and ICMP header."""

MAX_TAP_MTU: Final = 65521
"""What the kernel permits: 65535 less the Ethernet header."""

MODES: Final = ["paged", "linear"]


async def echo_replies(stack: Stack, dst: str, count: int) -> list[int]:
    """Send the kernel `count` echo requests; the sequence numbers of its replies."""
    answered: list[int] = []
    all_answered = asyncio.Event()

    def on_reply(_src: bytes, seq: int, _payload: bytes, _ttl: int) -> None:
        answered.append(seq)
        if len(answered) == count:
            all_answered.set()

    echo = stack.ip.icmp.open_echo(on_reply, lambda *_: None)
    try:
        stack.tick()
        for seq in range(count):
            echo.send(bytes(map(int, dst.split("."))), seq, b"are you there?")
        async with asyncio.timeout(10):
            await all_answered.wait()
    finally:
        echo.close()
    return answered


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
@pytest.mark.parametrize("mtu", [1500, MAX_TAP_MTU])
async def test_an_echo_of_any_size_that_fits_comes_back(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str, offload: bool, mtu: int
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload, mtu=mtu)
    sizes = [0, 1, 7, 8, 56, 99, 1024, 1471, 1472, 2000, 4095, 9001, 65492, 65493]
    for size in (size for size in sizes if size <= mtu - ICMP_OVERHEAD):
        answered = await ping(netns, OURS, count=2, size=size, dont_fragment=True)
        assert answered.received == 2, answered.output
        assert "wrong" not in answered.output
    assert stack.drops.by_name() == {}


async def test_a_flood_is_answered_packet_by_packet(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    flooded = await netns.arun(require_tool("ping"), "-q", "-f", "-c", "2000", OURS)
    assert b"2000 packets transmitted, 2000 received, 0% packet loss" in flooded.stdout
    assert stack.mib.IcmpOutEchoReps == 2000
    assert stack.drops.by_name() == {}


async def test_our_packets_have_sixty_four_hops_to_live(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    await stack_on_tap()
    assert "ttl=64 " in (await ping(netns, OURS, count=1)).output


async def test_a_request_with_one_hop_to_live_is_answered(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    await stack_on_tap()
    last_hop = await netns.arun(require_tool("ping"), "-c", "1", "-t", "1", "-W", "2", OURS)
    assert b"1 received" in last_hop.stdout


async def test_the_kernel_answers_our_pings(stack_on_tap: StackOnTap) -> None:
    stack = await stack_on_tap()
    assert await echo_replies(stack, KERNEL, 20) == list(range(20))


async def test_each_learns_the_others_hardware_address(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    interface = stack.interfaces[0]
    await echo_replies(stack, KERNEL, 1)
    neighbour = interface.neighbours.find(bytes((10, 77, 0, 1)))
    assert neighbour is not None
    assert neighbour.state == NUD_REACHABLE
    assert neighbour.lladdr == bytes.fromhex(netns.mac("tap0").replace(":", ""))
    known = netns.run("ip", "neighbour", "show", "dev", "tap0").stdout.decode()
    assert f"{OURS} lladdr {interface.device.mac.hex(':')}" in known


async def test_the_kernel_finds_us_again_when_it_has_forgotten_us(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    await stack_on_tap()
    for _ in range(3):
        assert (await ping(netns, OURS, count=2)).received == 2
        netns.run("ip", "neighbour", "flush", "dev", "tap0")


async def test_a_connection_follows_the_kernel_to_another_hardware_address(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    """It speaks up with a gratuitous ARP (arp_notify), as a virtual machine does that has moved."""
    stack = await stack_on_tap()
    with netns.open(socket.create_server, (KERNEL, 0)) as listener:
        listener.setblocking(False)
        reader, writer = await stack.open_connection(*listener.getsockname())
        server, _ = await asyncio.get_running_loop().sock_accept(listener)
        netns.sysctl("net.ipv4.conf.tap0.arp_notify", 1)
        netns.run("ip", "link", "set", "tap0", "address", "02:aa:bb:cc:dd:ee")
        with server, closing(writer):
            writer.write(b"have you moved?")
            async with asyncio.timeout(10):
                assert await asyncio.get_running_loop().sock_recv(server, 100) == b"have you moved?"
                server.send(b"yes")
                assert await reader.read(100) == b"yes"
    neighbour = stack.interfaces[0].neighbours.find(bytes((10, 77, 0, 1)))
    assert neighbour is not None
    assert neighbour.lladdr == bytes.fromhex("02aabbccddee")


async def test_whoever_asks_for_us_learns_where_we_are_and_we_learn_where_he_is(
    stack_on_tap: StackOnTap, netns: Namespace
) -> None:
    stack = await stack_on_tap()
    assert (await ping(netns, OURS, count=1)).received == 1
    assert stack.interfaces[0].neighbours.find(bytes((10, 77, 0, 1))) is not None


async def test_a_neighbour_who_is_not_there_is_given_up(stack_on_tap: StackOnTap) -> None:
    stack = await stack_on_tap()
    with stack.socket() as lonely, pytest.raises(OSError, match="No route to host"):
        async with asyncio.timeout(10):
            await lonely.connect(("10.77.0.99", 80))
    assert stack.accounts()[-1].bytes == 0
