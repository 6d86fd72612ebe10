"""Socket options of tcp(7) and socket(7) that change what goes over the wire, or when the user is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, RST, SYN

if TYPE_CHECKING:
    from tests.transport.tcp.peer import Peer


def test_so_rcvlowat_makes_a_socket_readable_only_with_so_much(peer: Peer) -> None:
    user = peer.connects(rcvlowat=1000)
    peer.sends(ACK, length=999)
    peer.expects(ACK, ack=1000)
    assert not user.conn.readable
    peer.sends(ACK, length=1)
    assert user.conn.readable
    user.reads(1000)


def test_so_rcvlowat_does_not_hold_back_the_end(peer: Peer) -> None:
    user = peer.connects(rcvlowat=1000)
    peer.sends(ACK | FIN, length=10)
    assert user.conn.readable


def test_tcp_notsent_lowat_takes_one_transmission_beyond_the_mark(peer: Peer) -> None:
    peer.window = 1000
    user = peer.connects(notsent_lowat=5000)
    goal = user.conn.send_queue.goal
    assert user.sends(200_000) == goal * -(-5000 // goal)
    peer.expects(ACK, length=1000)
    assert not user.conn.writable
    with pytest.raises(BlockingIOError):
        user.sends(1)


def test_tcp_notsent_lowat_wakes_the_writer_when_little_is_unsent(peer: Peer) -> None:
    peer.window = 1460
    user = peer.connects(notsent_lowat=4000)
    user.sends(3000)
    peer.expects_data(1, 1461)
    assert user.conn.writable
    user.sends(1500)
    assert not user.conn.writable  # 3040 unsent: more than half of the mark
    peer.sends(ACK, ack=1461)
    peer.expects_data(1461, 2921)
    assert user.conn.writable


def test_tcp_window_clamp_bounds_what_is_advertised(peer: Peer) -> None:
    peer.listens(window_clamp=5000)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, window=5000)
    peer.sends(ACK)
    peer.sends(ACK, length=1000)
    assert peer.expects(ACK).window <= 5000


def test_tcp_linger2_waits_so_long_for_the_last_fin(peer: Peer) -> None:
    user = peer.connects(linger2=5.0)
    user.closes()
    peer.expects(ACK | FIN)
    peer.sends(ACK)
    peer.waits(4.9)
    assert user.is_in(State.FIN_WAIT2)
    peer.waits(0.2)
    assert user.is_in(State.CLOSE)


def test_tcp_linger2_below_zero_resets_instead_of_waiting(peer: Peer) -> None:
    user = peer.connects(linger2=-1.0)
    user.closes()
    peer.expects(ACK | FIN)
    peer.sends(ACK)
    peer.expects(ACK | RST)
    assert user.is_in(State.CLOSE)


def test_tcp_defer_accept_waits_for_data(peer: Peer) -> None:
    listener = peer.listens(defer_accept=3)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(ACK)
    peer.expects_nothing()
    assert not listener.queue
    assert peer.stack.mib.TcpExtTCPDeferAcceptDrop == 1
    peer.sends(ACK, length=100)
    peer.expects(ACK, ack=101)
    peer.user().reads(100)


def test_tcp_defer_accept_reminds_a_silent_peer_at_the_end_and_takes_its_ack(peer: Peer) -> None:
    listener = peer.listens(defer_accept=3)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(ACK)
    peer.expects(SYN | ACK, after=1 + 2 + 4)  # the first two times nothing is sent
    assert not listener.queue
    peer.sends(ACK)
    assert len(listener.queue) == 1
