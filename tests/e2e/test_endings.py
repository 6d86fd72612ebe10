"""How connections end: in order and out of order, from either side, and what nobody may be left waiting for."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import struct
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import KERNEL, OURS, PROBES, connected, kernel_socket, listen, until
from tests.e2e.peers import LISTENING, nc, said
from tests.needs import require_tool

if TYPE_CHECKING:
    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
PIECE = bytes(range(256)) * 400


async def test_we_may_close_our_direction_first_and_still_hear_the_rest(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    loop = asyncio.get_running_loop()
    with ours, theirs:
        await ours.sendall(b"question")
        ours.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(theirs, 100) == b"question"
        assert await loop.sock_recv(theirs, 100) == b""
        await loop.sock_sendall(theirs, b"a long answer" * 10_000)
        theirs.close()
        answer = b""
        while part := await ours.recv(1 << 16):
            answer += part
        assert answer == b"a long answer" * 10_000
        with pytest.raises(BrokenPipeError):
            await ours.send(b"one more thing")


async def test_the_kernel_may_close_its_direction_first_and_still_hear_the_rest(
    stack_on_tap: StackOnTap, netns: Namespace
) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    loop = asyncio.get_running_loop()
    with ours, theirs:
        theirs.send(b"question")
        theirs.shutdown(socket.SHUT_WR)
        assert await ours.recv(100) == b"question"
        assert await ours.recv(100) == b""
        assert await ours.recv(100) == b"", "the end stays the end"
        sending = asyncio.create_task(ours.sendall(b"a long answer" * 10_000))
        answer = b""
        while len(answer) < 130_000:
            answer += await loop.sock_recv(theirs, 1 << 16)
        await sending
        ours.close()
        assert await loop.sock_recv(theirs, 100) == b""
    assert answer == b"a long answer" * 10_000


async def test_nc_may_be_the_server(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    command = (require_tool("nc"), "-n", "-l", "-v", "-N", KERNEL, "1004")
    server = netns.popen(*command, stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
    await said(server, LISTENING)
    reader, writer = await stack.open_connection(KERNEL, 1004)
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(b"what nc says")
    server.stdin.close()
    with closing(writer):
        async with asyncio.timeout(10):
            assert await reader.read() == b"what nc says"
        writer.write(b"what we say")
    assert (await asyncio.to_thread(server.stdout.read)).endswith(b"what we say")


async def test_a_thousand_short_connections_from_the_kernel(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()

    async def visit(number: int) -> None:
        sock = kernel_socket(netns)
        await asyncio.get_running_loop().sock_connect(sock, (OURS, 80))
        reader, writer = await asyncio.open_connection(sock=sock)
        with closing(writer):
            writer.write(b"visitor %d\n" % number)
            assert await reader.read() == b"VISITOR %d\n" % number

    server = await stack.start_server(serve, None, 80)
    async with asyncio.timeout(60):
        for start in range(0, 1000, 50):
            await asyncio.gather(*(visit(number) for number in range(start, start + 50)))
    server.close()
    assert stack.mib.TcpPassiveOpens == 1000
    assert stack.mib.TcpOutRsts == 0
    assert stack.drops.by_name().keys() <= PROBES


async def test_a_thousand_short_connections_to_the_kernel(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    """Each ends in TIME-WAIT on our side, as we close first: an ephemeral port that is not used again soon."""
    stack = await stack_on_tap()
    listener = netns.open(socket.create_server, (KERNEL, 0), backlog=100)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    async def visit(number: int) -> None:
        reader, writer = await stack.open_connection(*listener.getsockname())
        with closing(writer):
            writer.write(b"visitor %d" % number)
            writer.write_eof()
            assert await reader.read() == b"VISITOR %d" % number

    server = await asyncio.start_server(serve, sock=listener)
    async with asyncio.timeout(60):
        for start in range(0, 1000, 50):
            await asyncio.gather(*(visit(number) for number in range(start, start + 50)))
    server.close()
    await until(lambda: stack.mib.TcpExtTW == 1000)
    assert stack.mib.TcpOutRsts == 0
    assert not any(account.bytes for account in stack.accounts())


async def test_a_port_where_nobody_listens_refuses_both_ways(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with stack.socket() as ours, pytest.raises(ConnectionRefusedError):
        await ours.connect((KERNEL, 9))
    with kernel_socket(netns) as theirs, pytest.raises(ConnectionRefusedError):
        await asyncio.get_running_loop().sock_connect(theirs, (OURS, 9))
    assert stack.mib.TcpOutRsts == 1


async def test_a_reset_from_the_kernel_is_an_error_once_and_then_the_end(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    with ours:
        waiting = asyncio.create_task(ours.recv(100))
        await asyncio.sleep(0)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        theirs.close()
        with pytest.raises(ConnectionResetError):
            await waiting
        assert await ours.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            await ours.send(b"anybody there?")


async def test_what_arrived_before_a_reset_can_no_longer_be_told_from_what_was_lost(
    stack_on_tap: StackOnTap, netns: Namespace
) -> None:
    stack = await stack_on_tap()
    ours, theirs = await connected(stack, netns)
    with ours:
        theirs.send(b"something unread")
        await until(lambda: ours.connection.readable)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        theirs.close()
        await until(lambda: ours.connection.error == errno.ECONNRESET)
    assert stack.tcp.receive_account.bytes == 0


@pytest.mark.parametrize("how", ["linger", "unread"])
async def test_we_reset_what_we_abandon(stack_on_tap: StackOnTap, netns: Namespace, how: str) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    with theirs:
        if how == "linger":
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        else:
            theirs.send(b"nobody will read this")
            await until(lambda: ours.connection.readable)
        ours.close()
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(theirs, 100)


async def test_a_client_killed_in_the_middle_of_sending_is_the_end_of_the_stream(
    stack_on_tap: StackOnTap, netns: Namespace
) -> None:
    """The kernel closes in order for a process that dies: FIN after what was sent, or a reset."""
    stack = await stack_on_tap()
    with listen(stack, 80) as listener:
        client = netns.popen(require_tool("socat"), "-u", "/dev/zero", f"TCP:{OURS}:80")
        ours, _ = await listener.accept()
    with ours:
        received = 0
        async with asyncio.timeout(10):
            while received < 1_000_000:
                received += len(await ours.recv(1 << 16))
            client.kill()
            try:
                while await ours.recv(1 << 16):
                    pass
            except ConnectionResetError:
                pass


async def test_a_reader_killed_in_the_middle_is_an_error_for_who_sends(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with listen(stack, 80) as listener:
        client = netns.popen(require_tool("socat"), "-u", f"TCP:{OURS}:80", "OPEN:/dev/null")
        ours, _ = await listener.accept()
    with ours:
        sent = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            async with asyncio.timeout(10):
                while True:
                    await ours.sendall(PIECE)
                    sent += 1
                    if sent == 10:
                        client.send_signal(signal.SIGKILL)
    assert not stack.tcp.connections


async def test_a_transfer_goes_on_after_the_interface_was_down(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    arrived = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        while part := await reader.read(1 << 16):
            arrived += len(part)
            writer.write(part)
            await writer.drain()
        writer.close()

    server = await stack.start_server(serve, None, 80)
    data = PIECE * 400
    transfer = asyncio.create_task(nc(netns, OURS, 80, data))
    await until(lambda: arrived > 1_000_000)
    await netns.arun("ip", "link", "set", "tap0", "down")
    assert arrived < len(data)
    await netns.arun("ip", "link", "set", "tap0", "up")
    assert await transfer == data
    server.close()


async def test_closing_the_stack_ends_whoever_waits(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    ours, theirs = await connected(stack, netns)
    reader, writer = await stack.open_connection(*(await kernel_server(netns)))
    receiving = asyncio.create_task(ours.recv(100))
    reading = asyncio.create_task(reader.read())
    connecting = asyncio.create_task(stack.socket().connect(("10.77.0.99", 80)))
    datagram = stack.socket(type=socket.SOCK_DGRAM)
    datagram.bind(("", 9))
    listening = asyncio.create_task(datagram.recv(100))
    await asyncio.sleep(0)
    stack.close()
    for waiting in (receiving, reading, connecting, listening):
        with pytest.raises(ConnectionAbortedError):
            await asyncio.wait_for(waiting, 5)
    with theirs, pytest.raises(ConnectionResetError):
        await asyncio.get_running_loop().sock_recv(theirs, 100)
    assert writer.transport.is_closing()


async def kernel_server(netns: Namespace) -> tuple[str, int]:
    """Where a server of the kernel's listens that never answers; it ends with the namespace."""
    server = netns.popen(require_tool("nc"), "-n", "-l", "-k", "-v", KERNEL, "1005", stderr=subprocess.STDOUT)
    await said(server, LISTENING)
    return KERNEL, 1005
