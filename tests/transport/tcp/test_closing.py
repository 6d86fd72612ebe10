"""Closing a connection: who says FIN first, and what crosses it (RFC 9293, section 3.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.transport.events import SHUT_RD
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST

if TYPE_CHECKING:
    from tests.transport.tcp.peer import Peer


def test_the_user_closes_first(peer: Peer) -> None:
    """Figure 12, seen from A."""
    user = peer.connects()
    user.shuts()
    peer.expects(FIN | ACK, seq=1, ack=1)
    assert user.is_in(State.FIN_WAIT1)
    peer.sends(ACK, ack=2)
    assert user.is_in(State.FIN_WAIT2)
    peer.sends(FIN | ACK)
    peer.expects(ACK, seq=2, ack=2)
    assert user.is_in(State.CLOSE)
    user.reads_end()
    peer.expects_nothing_for(100)
    assert not peer.stack.tcp.connections


def test_the_peer_closes_first(peer: Peer) -> None:
    """Figure 12, seen from B."""
    user = peer.connects()
    peer.sends(FIN | ACK)
    peer.expects(ACK, seq=1, ack=2)
    assert user.is_in(State.CLOSE_WAIT)
    user.reads_end()
    user.closes()
    peer.expects(FIN | ACK, seq=1, ack=2)
    assert user.is_in(State.LAST_ACK)
    peer.sends(ACK, ack=2)
    assert user.is_in(State.CLOSE)
    peer.expects_nothing_for(100)
    assert not peer.stack.tcp.connections


def test_both_close_at_once(peer: Peer) -> None:
    """Figure 13."""
    user = peer.connects()
    user.shuts()
    peer.expects(FIN | ACK, seq=1, ack=1)
    peer.sends(FIN | ACK, ack=1)
    peer.expects(ACK, seq=2, ack=2)
    assert user.is_in(State.CLOSING)
    peer.sends(ACK, ack=2)
    peer.expects_nothing()
    assert user.is_in(State.CLOSE)
    assert peer.stack.mib.TcpExtTW == 1


def test_a_fin_that_acknowledges_ours_goes_straight_to_time_wait(peer: Peer) -> None:
    user = peer.connects()
    user.shuts()
    peer.expects(FIN | ACK, seq=1)
    peer.sends(FIN | ACK, ack=2)
    peer.expects(ACK, seq=2, ack=2)
    assert user.is_in(State.CLOSE)
    assert peer.stack.mib.TcpExtTW == 1


def test_fin_with_the_last_data(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | PSH | ACK, length=100)
    peer.expects(ACK, ack=102)
    user.reads(100)
    user.reads_end()


def test_our_fin_rides_on_the_last_data(peer: Peer) -> None:
    user = peer.connects(cork=True)
    user.sends(100)
    peer.expects_nothing()
    user.shuts()
    peer.expects(FIN | PSH | ACK, seq=1, length=100)


def test_half_closed_by_the_user_the_peer_goes_on_sending(peer: Peer) -> None:
    user = peer.connects()
    user.shuts()
    peer.expects(FIN | ACK, seq=1)
    peer.sends(ACK, ack=2)
    for _ in range(5):
        peer.sends(ACK | PSH, length=1000)
        user.reads(1000)
    peer.ignores()
    with pytest.raises(BrokenPipeError):
        user.sends(1)
    peer.sends(FIN | ACK)
    peer.expects(ACK, seq=2, ack=5002)
    user.reads_end()


def test_half_closed_by_the_peer_the_user_goes_on_sending(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | ACK)
    peer.expects(ACK, ack=2)
    for start in range(1, 5000, 1000):
        user.sends(1000)
        peer.expects(ACK, seq=start, ack=2, length=1000)
        peer.sends(ACK)
    user.shuts()
    peer.expects(FIN | ACK, seq=5001)
    peer.sends(ACK)
    assert user.is_in(State.CLOSE)


def test_a_fin_that_overtakes_data_waits_for_it(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | ACK, seq=101, length=100)
    peer.expects(ACK, ack=1)
    user.has_nothing_to_read()
    peer.sends(ACK, seq=1, length=100)
    peer.expects(ACK, ack=202)
    user.reads(200)
    user.reads_end()
    assert user.is_in(State.CLOSE_WAIT)


def test_a_bare_fin_that_overtakes_data_waits_for_it(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | ACK, seq=101)
    peer.expects(ACK, ack=1)
    peer.sends(ACK, seq=1, length=100)
    peer.expects(ACK, ack=102)
    user.reads(100)
    user.reads_end()


def test_data_beyond_the_fin_is_not_data(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | ACK, seq=101)
    peer.expects(ACK, ack=1)
    peer.sends(ACK, seq=51, length=200)
    peer.ignores()
    peer.sends(ACK, seq=1, length=50)
    peer.expects(ACK, ack=102)
    user.reads(100)
    user.reads_end()


def test_a_fin_from_before_the_window_does_not_end_the_stream(peer: Peer) -> None:
    """Section 3.10.7.4: only what lies in the window is processed, and the byte before it is no FIN."""
    user = peer.connects()
    peer.sends(FIN | ACK, seq=0, length=0)
    user.has_nothing_to_read()
    peer.sends(ACK, seq=1, length=10)
    user.reads(10)
    user.has_nothing_to_read()
    assert user.is_in(State.ESTABLISHED)


def test_a_fin_that_comes_again_is_acknowledged_again(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | ACK)
    peer.expects(ACK, ack=2)
    peer.sends(FIN | ACK, seq=1)
    peer.expects(ACK, ack=2)
    assert user.is_in(State.CLOSE_WAIT)


def test_our_fin_that_is_lost_comes_again(peer: Peer) -> None:
    user = peer.connects()
    user.closes()
    first = peer.expects(FIN | ACK, seq=1)
    again = peer.expects(FIN | ACK, seq=1, after=0.2)
    assert again.at - first.at >= 0.2
    peer.expects(FIN | ACK, seq=1, after=0.4)
    peer.sends(ACK, ack=2)
    assert user.is_in(State.FIN_WAIT2)


def test_a_closed_connection_does_not_wait_for_the_peers_fin_for_ever(peer: Peer) -> None:
    """tcp_fin_timeout."""
    user = peer.connects()
    user.closes()
    peer.expects(FIN | ACK)
    peer.sends(ACK)
    peer.expects_nothing_for(59)
    assert peer.stack.tcp.connections
    peer.expects_nothing_for(2)
    assert not peer.stack.tcp.connections


def test_one_that_is_only_shut_down_waits(peer: Peer) -> None:
    user = peer.connects()
    user.shuts()
    peer.expects(FIN | ACK)
    peer.sends(ACK)
    peer.expects_nothing_for(10_000)
    peer.sends(ACK | PSH, length=5)
    user.reads(5)


def test_a_closed_connection_gives_up_its_fin_in_the_end(peer: Peer) -> None:
    """tcp_orphan_retries."""
    user = peer.connects()
    user.closes()
    peer.waits(200)
    count = len(peer.ignores())
    assert count == 1 + peer.config.orphan_retries
    assert not peer.stack.tcp.connections


def test_closing_with_unread_data_resets(peer: Peer) -> None:
    """RFC 9293, section 3.6.1; RFC 2525, section 2.17."""
    user = peer.connects()
    peer.sends(ACK | PSH, length=100)
    peer.expects(ACK, ack=101)
    user.closes()
    peer.expects(RST | ACK, seq=1, ack=101)
    assert not peer.stack.tcp.connections


def test_data_for_a_closed_connection_is_answered_with_a_reset(peer: Peer) -> None:
    user = peer.connects()
    user.closes()
    peer.expects(FIN | ACK)
    peer.sends(ACK | PSH, ack=2, length=10)
    peer.expects(RST, seq=2)
    assert not peer.stack.tcp.connections


def test_lingering_for_no_time_resets(peer: Peer) -> None:
    user = peer.connects(linger=0)
    user.sends(100)
    peer.expects(ACK, seq=1, length=100)
    user.closes()
    peer.expects(RST | ACK, seq=101)
    assert not peer.stack.tcp.connections


def test_what_was_written_before_the_close_is_delivered(peer: Peer) -> None:
    peer.window = 2920
    user = peer.connects()
    user.sends(5000)
    user.closes()
    peer.expects_data(1, 2921)
    peer.expects_nothing()
    peer.sends(ACK)
    peer.expects(ACK, seq=2921, length=1460)
    peer.expects(FIN | PSH | ACK, seq=4381, length=620)
    peer.sends(ACK)
    assert user.is_in(State.FIN_WAIT2)


def test_a_fin_that_does_not_fit_the_window_waits(peer: Peer) -> None:
    peer.window = 1000
    user = peer.connects()
    user.sends(1000)
    user.closes()
    peer.expects(ACK | PSH, seq=1, length=1000)
    peer.expects_nothing()
    peer.sends(ACK, window=0)
    peer.expects_nothing()
    peer.sends(ACK, window=1)
    peer.expects(FIN | ACK, seq=1001)


def test_a_fin_alone_pushes_nothing(peer: Peer) -> None:
    peer.connects().closes()
    (fin,) = peer.ignores()
    assert fin.flags == FIN | ACK


def test_shutting_down_for_reading_alone_does_not_tell_the_peer(peer: Peer) -> None:
    user = peer.connects()
    user.shuts(SHUT_RD)
    peer.expects_nothing()
    user.reads_end()
    peer.sends(ACK | PSH, length=100)
    peer.expects(ACK, ack=101)
