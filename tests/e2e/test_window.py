"""Flow control: a reader that does not read stops the sender, and loses nothing for it."""

from __future__ import annotations

import asyncio
import socket
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.e2e.capture import capture
from tests.e2e.conftest import connected, listen, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.socket import Socket

pytestmark = pytest.mark.e2e

DATA = Random(2).randbytes(8_000_000)

ONE_SKB = 65536 + 1024
"""Truesize by which a limit may be exceeded: whether there is room is asked before an skb, as in the kernel."""

modes = pytest.mark.parametrize("mode", ["paged", "linear"])


async def stuck(ours: Socket) -> None:
    """Wait until the kernel has filled our window."""
    conn = ours.connection
    await until(lambda: conn.rcv_adv == conn.rcv_nxt)


@modes
async def test_the_kernel_stops_while_we_do_not_read_and_then_all_of_it_arrives(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str
) -> None:
    stack = await stack_on_tap(mode=mode)
    ours, theirs = await connected(stack, netns)
    with ours, theirs:
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, DATA))
        await stuck(ours)
        assert not sending.done()
        assert stack.tcp.receive_account.bytes <= ours.connection.rcvbuf + ONE_SKB
        received = bytearray()
        async with asyncio.timeout(20):
            while len(received) < len(DATA):
                received += await ours.recv(1 << 20)
        await sending
    assert received == DATA


@modes
async def test_the_kernel_probes_our_closed_window_and_is_answered(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str
) -> None:
    stack = await stack_on_tap(mode=mode)
    ours, theirs = await connected(stack, netns)
    with ours, theirs:
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, DATA[:2_000_000]))
        await stuck(ours)
        before = stack.mib.TcpInSegs
        await until(lambda: stack.mib.TcpInSegs >= before + 2)
        assert ours.connection.rcv_adv == ours.connection.rcv_nxt, "a probe does not open the window"
        received = bytearray()
        async with asyncio.timeout(20):
            while len(received) < 2_000_000:
                received += await ours.recv(1 << 20)
        await sending
    assert received == DATA[:2_000_000]


async def test_we_probe_the_kernels_closed_window_until_it_opens(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    ours, theirs = await connected(stack, netns)
    loop = asyncio.get_running_loop()
    with ours, theirs:
        sending = asyncio.create_task(ours.sendall(DATA))
        await until(lambda: stack.mib.TcpExtTCPWinProbe >= 2)
        assert not sending.done()
        received = bytearray()
        async with asyncio.timeout(20):
            while len(received) < len(DATA):
                received += await loop.sock_recv(theirs, 1 << 20)
            await sending
    assert received == DATA


async def test_a_small_receive_buffer_bounds_what_may_arrive(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with stack.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        listener.bind(("", 80))
        listener.listen()
        ours, theirs = await connected(stack, netns, listener)
    with ours, theirs:
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 40_000
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, DATA))
        await stuck(ours)
        assert ours.connection.receive_queue.truesize <= 40_000 + ONE_SKB
        received = bytearray()
        async with asyncio.timeout(20):
            while len(received) < len(DATA):
                received += await ours.recv(1 << 20)
        await sending
    assert received == DATA


async def test_a_small_send_buffer_makes_the_writer_wait(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        sending = asyncio.create_task(ours.sendall(DATA[:2_000_000]))
        received = bytearray()
        async with asyncio.timeout(20):
            while len(received) < 2_000_000:
                received += await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
                assert ours.connection.send_queue.account.bytes <= 40_000 + ONE_SKB
        await sending
    assert received == DATA[:2_000_000]


async def test_readers_that_never_read_do_not_stop_one_that_does(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(memory=16 << 20)
    loop = asyncio.get_running_loop()
    listener = listen(stack)
    idle = [await connected(stack, netns, listener) for _ in range(8)]
    floods = [asyncio.create_task(loop.sock_sendall(theirs, DATA)) for _, theirs in idle]
    for ours, _ in idle:
        await stuck(ours)
    ours, theirs = await connected(stack, netns, listener)
    with ours, theirs, listener:
        sending = asyncio.create_task(loop.sock_sendall(theirs, DATA[:1_000_000]))
        received = bytearray()
        async with asyncio.timeout(20):
            while len(received) < 1_000_000:
                received += await ours.recv(1 << 20)
        await sending
    assert received == DATA[:1_000_000]
    for flood in floods:
        assert not flood.done()
        flood.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    for ours, theirs in idle:
        ours.close()
        theirs.close()


async def test_a_window_that_closes_and_opens_is_well_formed_on_the_wire(
    stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path
) -> None:
    stack = await stack_on_tap(offload=False)
    async with capture(netns, "tap0", tmp_path / "window.pcap", "tcp") as seen:
        ours, theirs = await connected(stack, netns)
        with ours, theirs:
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, DATA[:1_000_000]))
            await stuck(ours)
            async with asyncio.timeout(20):
                left = 1_000_000
                while left:
                    left -= len(await ours.recv(100_000))
            await sending
    assert seen.complaints() == []
