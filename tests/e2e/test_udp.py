"""UDP between our sockets and the kernel's."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.capture import capture
from tests.e2e.conftest import KERNEL, OURS, kernel_socket, until
from tests.e2e.peers import nc_udp
from ustack.net.path import PMTUDISC_DO
from ustack.socket_options import IP_MTU_DISCOVER

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.socket import Socket
    from ustack.stack import Stack

pytestmark = pytest.mark.e2e

MOST: Final = 1472
"""Bytes of payload in a packet of 1500."""

PATTERN: Final = bytes(range(256)) * 6

modes = pytest.mark.parametrize("mode", ["paged", "linear"])
offloads = pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])


def bound(stack: Stack, port: int = 7) -> Socket:
    """A datagram socket of ours."""
    sock = stack.socket(type=socket.SOCK_DGRAM)
    sock.bind(("", port))
    return sock


def kernel_bound(netns: Namespace) -> socket.socket:
    """A datagram socket of the kernel's."""
    sock = kernel_socket(netns, socket.SOCK_DGRAM)
    sock.bind((KERNEL, 0))
    return sock


async def echo(sock: Socket) -> None:
    """Send back every datagram."""
    while True:
        data, sender = await sock.recvfrom(65535)
        await sock.sendto(data, sender)


@modes
@offloads
async def test_we_echo_datagrams_of_every_size(
    stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path, mode: str, offload: bool
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload)
    loop = asyncio.get_running_loop()
    with bound(stack) as ours, kernel_bound(netns) as theirs:
        echoing = asyncio.create_task(echo(ours))
        async with capture(netns, "tap0", tmp_path / "udp.pcap", "udp") as seen, asyncio.timeout(30):
            for size in range(MOST + 1):
                await loop.sock_sendto(theirs, PATTERN[:size], (OURS, 7))
                assert await loop.sock_recvfrom(theirs, 65535) == (PATTERN[:size], (OURS, 7))
        echoing.cancel()
    assert len(seen.frames()) == 2 * (MOST + 1)
    assert seen.complaints(offload) == []
    assert stack.drops.by_name() == {}


async def test_nc_talks_to_us(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    with bound(await stack_on_tap()) as ours:
        echoing = asyncio.create_task(echo(ours))
        assert await nc_udp(netns, OURS, 7, b"datagram") == b"datagram"
        echoing.cancel()


async def test_large_datagrams_need_a_large_mtu(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(mtu=65521)
    data = PATTERN * 42
    with bound(stack) as ours, kernel_bound(netns) as theirs:
        echoing = asyncio.create_task(echo(ours))
        for size in (1473, 4096, 9000, 64_000):
            theirs.sendto(data[:size], (OURS, 7))
            async with asyncio.timeout(10):
                assert await asyncio.get_running_loop().sock_recv(theirs, 65535) == data[:size]
        echoing.cancel()


async def test_what_does_not_fit_and_must_not_be_cut_is_refused_before_it_is_sent(stack_on_tap: StackOnTap) -> None:
    stack = await stack_on_tap()
    with bound(stack) as ours:
        ours.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        with pytest.raises(OSError, match="Message too long") as refused:
            await ours.sendto(PATTERN[: MOST + 1], (KERNEL, 9))
        assert refused.value.errno == errno.EMSGSIZE


async def test_the_kernel_says_that_nobody_listens_and_a_connected_socket_hears_it(stack_on_tap: StackOnTap) -> None:
    stack = await stack_on_tap()
    with stack.socket(type=socket.SOCK_DGRAM) as ours:
        await ours.connect((KERNEL, 9))
        await ours.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            async with asyncio.timeout(10):
                await ours.recv(100)
        await ours.send(b"again, after the error was told")
        await until(lambda: ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED)


async def test_we_say_that_nobody_listens_and_the_kernel_hears_it(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with kernel_bound(netns) as theirs:
        theirs.connect((OURS, 9))
        theirs.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().sock_recv(theirs, 100)
    assert stack.mib.UdpNoPorts == 1
    assert stack.mib.IcmpOutDestUnreachs == 1


async def test_a_connected_socket_hears_its_peer_alone(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with bound(stack) as ours, kernel_bound(netns) as friend, kernel_bound(netns) as stranger:
        await ours.connect(friend.getsockname())
        assert ours.getpeername() == friend.getsockname()
        assert ours.getsockname() == (OURS, 7)
        stranger.sendto(b"from a stranger", (OURS, 7))
        friend.sendto(b"from a friend", (OURS, 7))
        assert await ours.recv(100) == b"from a friend"
        with pytest.raises(BlockingIOError):
            ours.recv_nowait(100)


async def test_a_datagram_is_cut_to_what_was_asked_for(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    with bound(await stack_on_tap()) as ours, kernel_bound(netns) as theirs:
        theirs.sendto(b"abcdef", (OURS, 7))
        theirs.sendto(b"ghi", (OURS, 7))
        theirs.sendto(b"", (OURS, 7))
        buffer = bytearray(4)
        assert await ours.recv_into(buffer) == 4
        assert buffer == b"abcd"
        assert await ours.recv(100) == b"ghi"
        assert await ours.recvfrom(100) == (b"", theirs.getsockname())


async def test_a_reader_that_does_not_read_loses_what_is_over_its_limit(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with bound(stack) as ours, kernel_bound(netns) as theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        theirs.sendto(b"find me first: what waits for ARP may be lost", (OURS, 7))
        await ours.recv(100)
        for number in range(100):
            await asyncio.get_running_loop().sock_sendto(theirs, b"%04d" % number + PATTERN[:1000], (OURS, 7))
        await until(lambda: stack.mib.UdpRcvbufErrors > 0 and stack.interfaces[0].device.stats.rx_packets >= 100)
        kept = 0
        while True:
            try:
                data = ours.recv_nowait(2000)
            except BlockingIOError:
                break
            assert data == b"%04d" % kept + PATTERN[:1000], "the first are kept, in order"
            kept += 1
        assert stack.drops.by_name() == {"SOCKET_RCVBUFF": stack.mib.UdpRcvbufErrors}
        assert kept + stack.mib.UdpRcvbufErrors == 100


async def test_a_broadcast_reaches_everybody_and_needs_permission_to_send(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with bound(stack) as ours, kernel_bound(netns) as theirs, kernel_socket(netns, socket.SOCK_DGRAM) as hearing:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        theirs.sendto(b"to all", ("10.77.0.255", 7))
        assert await ours.recvfrom(100) == (b"to all", theirs.getsockname())
        hearing.bind(("", 7))
        with pytest.raises(PermissionError):
            await ours.sendto(b"to all", ("10.77.0.255", 7))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        await ours.sendto(b"to all", ("10.77.0.255", 7))
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recvfrom(hearing, 100) == (b"to all", (OURS, 7))


async def test_several_readers_of_one_socket_get_one_datagram_each(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    with bound(await stack_on_tap()) as ours, kernel_bound(netns) as theirs:
        readers = [asyncio.create_task(ours.recv(100)) for _ in range(5)]
        await asyncio.sleep(0)
        for number in range(5):
            theirs.sendto(b"%d" % number, (OURS, 7))
        async with asyncio.timeout(10):
            assert sorted(await asyncio.gather(*readers)) == [b"0", b"1", b"2", b"3", b"4"]
