"""Passive opening: the queues of a listener and what happens when they are full."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.drops import DropReason
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, PSH, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


def opens(peer: Peer, port: int) -> None:
    """The peer opens a connection from `port` and nobody accepts it yet."""
    peer.own_port = port
    peer.returns()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(ACK)


def test_connections_wait_to_be_accepted_in_their_order(peer: Peer) -> None:
    listener = peer.listens()
    for port in (1001, 1002, 1003):
        opens(peer, port)
    assert [listener.accept().remote[1] for _ in range(3)] == [1001, 1002, 1003]
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_the_listener_is_woken_when_there_is_something_to_accept(peer: Peer) -> None:
    listener = peer.listens()
    woken: list[int] = []
    listener.wake = woken.append
    peer.sends(SYN, seq=0, mss=1460)
    assert not woken
    peer.expects(SYN | ACK)
    peer.sends(ACK)
    assert woken
    assert listener.readable


def test_a_full_backlog_lets_no_syn_in(peer: Peer) -> None:
    """It is full when one more than it says waits, as on Linux (sk_acceptq_is_full)."""
    peer.listens(backlog=1)
    opens(peer, 1001)
    opens(peer, 1002)
    peer.own_port = 1003
    peer.returns()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects_nothing()
    assert peer.stack.drops[DropReason.LISTEN_OVERFLOW] == 1
    assert peer.stack.mib.TcpExtListenOverflows == 1
    peer.user()
    peer.returns()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)


def test_who_completes_the_handshake_when_the_backlog_is_full_waits_and_is_let_in_later(peer: Peer) -> None:
    """As Linux without tcp_abort_on_overflow: the ACK is dropped, and our SYN-ACK asks for it again."""
    listener = peer.listens(backlog=1)
    numbers = {}
    for port in (1001, 1002, 1003):
        peer.own_port = port
        peer.returns()
        peer.sends(SYN, seq=0, mss=1460)
        peer.expects(SYN | ACK)
        numbers[port] = peer.stack_iss
    for port in (1003, 1002, 1001):
        peer.own_port, peer.stack_iss = port, numbers[port]
        peer.sends(ACK, seq=1, ack=1)
    peer.expects_nothing()
    assert peer.stack.drops[DropReason.LISTEN_OVERFLOW] == 1
    assert [listener.accept().remote[1] for _ in range(2)] == [1003, 1002]
    peer.sends(ACK | PSH, seq=1, ack=1, length=10)
    peer.ignores()
    user = peer.user()
    assert user.conn.remote[1] == 1001
    user.reads(10)


def test_half_open_connections_are_limited(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(max_syn_backlog=3, syncookies=0))
    listener = peer.listens()
    for port in range(1001, 1010):
        peer.own_port = port
        peer.sends(SYN, seq=0, mss=1460)
        peer.nxt = 0
    assert len(listener.half_open) == 3
    assert peer.stack.mib.TcpExtListenDrops == 6


def test_closing_the_listener_resets_who_was_not_accepted(peer: Peer) -> None:
    """RFC 9293, section 3.10.4."""
    listener = peer.listens()
    opens(peer, 1001)
    peer.own_port = 1002
    peer.returns()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    listener.close()
    assert {(seen.flags, seen.port) for seen in peer.ignores()} == {(RST | ACK, 1001), (RST | ACK, 1002)}
    assert not peer.stack.tcp.connections
    with pytest.raises(OSError, match="Invalid"):
        listener.accept()


def test_a_connection_that_died_in_the_queue_can_still_be_accepted(peer: Peer) -> None:
    listener = peer.listens()
    opens(peer, 1001)
    peer.sends(ACK | PSH, length=10)
    peer.sends(RST, seq=11)
    peer.ignores()
    assert listener.readable
    user = peer.user()
    assert user.is_in(State.CLOSE)
    user.fails_with(errno.ECONNRESET)


def test_an_accepted_connection_inherits_the_options(peer: Peer) -> None:
    user = peer.connects(nodelay=True, rcvbuf=50_000)
    assert user.conn.options.nodelay
    assert user.conn.rcvbuf == 50_000


def test_two_listeners_cannot_share_a_port(peer: Peer) -> None:
    peer.listens()
    with pytest.raises(OSError, match="in use") as failed:
        peer.stack.tcp.listen(None, peer.port, 1, SocketOptions())
    assert failed.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="in use"):
        peer.stack.tcp.listen(bytes((10, 0, 0, 1)), peer.port, 1, SocketOptions())
