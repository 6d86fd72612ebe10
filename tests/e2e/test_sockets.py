"""The socket calls against a kernel that knows them: names, options, errors, the nowait twins, and calls that are given up."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import KERNEL, OURS, connected, kernel_socket, listen, until
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.stack import Stack

pytestmark = pytest.mark.e2e

TCP_INFO_STATE_ESTABLISHED = 1
IP_RECVTTL = 12
"""linux/in.h; the socket module has no name for it."""


async def refused(stack: Stack) -> int:
    """The errno of connecting to a port of the kernel's where nobody listens."""
    with stack.socket() as sock:
        try:
            await sock.connect((KERNEL, 9))
        except OSError as error:
            return error.errno or 0
    return 0


async def test_both_ends_agree_on_their_names(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    with ours, theirs:
        assert ours.getsockname() == theirs.getpeername() == (OURS, 80)
        assert ours.getpeername() == theirs.getsockname()
        assert ours.getpeername()[0] == KERNEL


async def test_names_before_and_after_each_step(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with netns.open(socket.create_server, (KERNEL, 0)) as listener, stack.socket() as ours:
        assert ours.getsockname() == ("0.0.0.0", 0)
        with pytest.raises(OSError, match="not connected"):
            ours.getpeername()
        ours.bind((OURS, 4000))
        assert ours.getsockname() == (OURS, 4000)
        await ours.connect(listener.getsockname())
        assert ours.getpeername() == listener.getsockname()
        with pytest.raises(OSError, match="already connected"):
            await ours.connect(listener.getsockname())
        listener.accept()[0].close()


async def test_what_the_kernel_sees_of_our_options(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    """Both ends speak timestamps, selective acknowledgments and window scaling, and the segment size fits the MTU."""
    ours, theirs = await connected(await stack_on_tap(), netns)
    with ours, theirs:
        info = theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert info[0] == TCP_INFO_STATE_ESTABLISHED
        assert info[5] & 0b111 == 0b111, "timestamps, SACK, window scaling"
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == 1448
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == 1448


@pytest.mark.parametrize(
    ("level", "option", "value"),
    [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
        (socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 1),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 1),
        (socket.SOL_SOCKET, socket.SO_TYPE, None),
        (socket.SOL_SOCKET, socket.SO_DOMAIN, None),
        (socket.SOL_SOCKET, socket.SO_PROTOCOL, None),
        (socket.SOL_SOCKET, socket.SO_ACCEPTCONN, None),
        (socket.SOL_SOCKET, socket.SO_ERROR, None),
        (socket.SOL_SOCKET, socket.SO_TYPE, 1),
        (socket.SOL_SOCKET, 9999, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_CORK, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 7),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 0),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 32768),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 7),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 128),
        (socket.IPPROTO_TCP, socket.TCP_SYNCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1500),
        (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 87),
        (socket.IPPROTO_TCP, 9999, 1),
        (socket.IPPROTO_IP, socket.IP_TTL, 3),
        (socket.IPPROTO_IP, socket.IP_TTL, 0),
        (socket.IPPROTO_IP, socket.IP_TTL, 256),
        (socket.IPPROTO_IP, socket.IP_TOS, 0x10),
    ],
)
async def test_an_option_does_what_the_kernels_does(
    stack_on_tap: StackOnTap, netns: Namespace, level: int, option: int, value: int | None
) -> None:
    def outcome(sock: object) -> object:
        try:
            if value is not None:
                sock.setsockopt(level, option, value)  # type: ignore[attr-defined]
            return sock.getsockopt(level, option)  # type: ignore[attr-defined]
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    stack = await stack_on_tap()
    with stack.socket() as ours, kernel_socket(netns) as theirs:
        assert outcome(ours) == outcome(theirs)


async def test_our_ttl_and_tos_are_on_the_packets(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with stack.socket(type=socket.SOCK_DGRAM) as ours, kernel_socket(netns, socket.SOCK_DGRAM) as theirs:
        theirs.bind((KERNEL, 0))
        theirs.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        theirs.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        ours.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 17)
        ours.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
        await ours.sendto(b"x", theirs.getsockname())
        theirs.settimeout(10)
        data, ancillary, _, _ = await asyncio.to_thread(theirs.recvmsg, 100, 100)
        assert data == b"x"
        found = {kind: value[0] for _, kind, value in ancillary}
        assert found == {socket.IP_TTL: 17, socket.IP_TOS: 0x10}


async def test_the_nowait_twins_never_wait(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with listen(stack) as listener:
        with pytest.raises(BlockingIOError):
            listener.accept_nowait()
        ours, theirs = await connected(stack, netns, listener)
    with ours, theirs:
        with pytest.raises(BlockingIOError):
            ours.recv_nowait(100)
        with pytest.raises(BlockingIOError):
            ours.recv_into_nowait(bytearray(100))
        taken = 0
        with pytest.raises(BlockingIOError):
            while True:
                taken += ours.send_nowait(bytes(100_000))
        arrived = 0
        async with asyncio.timeout(20):
            while arrived < taken:
                arrived += len(await asyncio.get_running_loop().sock_recv(theirs, 1 << 20))


async def test_connect_nowait_reports_progress(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    with netns.open(socket.create_server, (KERNEL, 0)) as listener, stack.socket() as ours:
        with pytest.raises(BlockingIOError) as begun:
            ours.connect_nowait(listener.getsockname())
        assert begun.value.errno == errno.EINPROGRESS
        with pytest.raises(BlockingIOError) as going_on:
            ours.connect_nowait(listener.getsockname())
        assert going_on.value.errno == errno.EALREADY
        await until(lambda: ours.connection.synchronized)
        ours.connect_nowait(listener.getsockname())
        with pytest.raises(OSError, match="already connected"):
            ours.connect_nowait(listener.getsockname())
        listener.accept()[0].close()


async def test_a_recv_that_is_given_up_takes_nothing_with_it(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    with ours, theirs:
        for _ in range(10):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await ours.recv(100)
        theirs.send(b"still here")
        assert await ours.recv(100) == b"still here"


async def test_an_accept_that_is_given_up_leaves_the_connection_for_the_next(
    stack_on_tap: StackOnTap, netns: Namespace
) -> None:
    stack = await stack_on_tap()
    with listen(stack) as listener:
        waiting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        ours, theirs = await connected(stack, netns, listener)
        ours.close()
        theirs.close()


async def test_a_send_that_is_given_up_has_sent_a_part(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    with theirs:
        sending = asyncio.create_task(ours.sendall(bytes(20_000_000)))
        await until(lambda: ours.connection.write_blocked)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        ours.close()
        arrived = 0
        async with asyncio.timeout(20):
            while part := await asyncio.get_running_loop().sock_recv(theirs, 1 << 20):
                arrived += len(part)
        assert 0 < arrived < 20_000_000


async def test_a_connect_that_is_given_up_can_be_closed_and_made_anew(stack_on_tap: StackOnTap) -> None:
    stack = await stack_on_tap()
    with stack.socket() as ours:
        connecting = asyncio.create_task(ours.connect(("10.77.0.99", 80)))
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
    assert not stack.tcp.connections
    assert await refused(stack) == errno.ECONNREFUSED


async def test_closing_a_socket_ends_whoever_waits_on_it(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    listener = listen(stack)
    ours, theirs = await connected(stack, netns, listener)
    waiting = [asyncio.create_task(listener.accept()), asyncio.create_task(ours.recv(100))]
    await asyncio.sleep(0)
    listener.close()
    ours.close()
    for task in waiting:
        with pytest.raises(OSError, match="Bad file descriptor"):
            await task
    with theirs:
        assert await asyncio.get_running_loop().sock_recv(theirs, 100) == b""
    for call in (ours.getsockname, ours.getpeername, lambda: ours.recv_nowait(1), lambda: ours.send_nowait(b"x")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    ours.close()


async def test_a_waiting_call_may_be_cancelled_while_its_socket_is_closed(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ours, theirs = await connected(await stack_on_tap(), netns)
    waiting = asyncio.create_task(ours.recv(100))
    await asyncio.sleep(0)
    waiting.cancel()
    ours.close()
    with theirs, pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_full_backlog_keeps_others_out_until_there_is_room(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    loop = asyncio.get_running_loop()
    with stack.socket() as listener:
        listener.bind(("", 80))
        listener.listen(2)
        visitors = [kernel_socket(netns) for _ in range(4)]
        arriving = [asyncio.create_task(loop.sock_connect(visitor, (OURS, 80))) for visitor in visitors]
        await until(lambda: stack.mib.TcpExtListenOverflows > 0)
        async with asyncio.timeout(20):
            for _ in visitors:
                (await listener.accept())[0].close()
            await asyncio.gather(*arriving)
            for visitor in visitors:
                with visitor:
                    assert await loop.sock_recv(visitor, 1) == b""
    assert stack.mib.TcpOutRsts == 0, "whoever comes too early waits, and is not turned away"


async def test_a_port_can_be_listened_on_again_at_once(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    for _ in range(3):
        ours, theirs = await connected(stack, netns)
        with theirs:
            ours.close()  # first, so that TIME-WAIT is ours
            assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""


async def test_keepalive_finds_out_that_the_kernel_has_gone(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    # The kernel answers no more often than every 0.5 s (tcp_invalid_ratelimit).
    stack = await stack_on_tap(tcp=TcpConfig(keepalive_time=0.6, keepalive_intvl=0.6, keepalive_probes=2))
    ours, theirs = await connected(stack, netns)
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await until(lambda: stack.mib.TcpExtTCPKeepAlive >= 3)
        assert ours.connection.error == 0, "the kernel answers"
        await netns.arun("ip", "link", "set", "tap0", "down")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ours.recv(100), 10)
    assert stack.mib.TcpExtTCPAbortOnTimeout == 1
