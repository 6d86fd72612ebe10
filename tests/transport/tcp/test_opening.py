"""Opening a connection: from either side, from both, and what goes wrong (RFC 9293, sections 3.5 and 3.10.7)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST, SYN

if TYPE_CHECKING:
    from tests.transport.tcp.peer import Peer


def test_a_peer_connects(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(ACK)
    peer.expects_nothing()
    assert peer.user().is_in(State.ESTABLISHED)


def test_a_user_connects(peer: Peer) -> None:
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    assert user.is_in(State.SYN_SENT)
    peer.sends(SYN | ACK, mss=1460)
    peer.expects(ACK, seq=1, ack=1)
    assert user.is_in(State.ESTABLISHED)
    assert user.conn.writable


def test_both_connect_at_once(peer: Peer) -> None:
    """Figure 7."""
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    assert user.is_in(State.SYN_RECV)
    peer.sends(SYN | ACK, seq=0, ack=1, mss=1460)
    assert user.is_in(State.ESTABLISHED)
    peer.ignores()
    user.sends(100)
    peer.expects(ACK, seq=1, ack=1, length=100)


def test_both_connect_at_once_and_a_bare_ack_completes_it(peer: Peer) -> None:
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(ACK)
    peer.expects_nothing()
    assert user.is_in(State.ESTABLISHED)


def test_the_window_of_a_syn_ack_in_a_simultaneous_open_is_not_scaled(peer: Peer) -> None:
    """RFC 7323, section 2.2: the window field in a segment with the SYN bit is never scaled."""
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN, seq=0, mss=1460, wscale=7, window=1000)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(SYN | ACK, seq=0, ack=1, mss=1460, wscale=7, window=1000)
    assert 1000 - 128 < user.conn.snd_wnd <= 1000


def test_a_user_who_shuts_down_in_a_simultaneous_open_sends_its_fin_once_the_peer_has_our_syn(peer: Peer) -> None:
    """CLOSE in SYN-RECEIVED (section 3.10.4): the FIN must not keep our SYN from being sent again."""
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    user.shuts()
    peer.ignores()
    peer.waits(1.5)
    assert any(seen.flags == SYN | ACK for seen in peer.ignores()), "our SYN-ACK was lost and must come again"
    peer.sends(ACK, ack=1)
    peer.ignores()
    peer.sends(ACK, ack=2)
    assert user.is_in(State.FIN_WAIT2)


def test_data_with_the_syn_ack_is_taken(peer: Peer) -> None:
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN | ACK, seq=0, mss=1460, length=100)
    peer.expects(ACK, seq=1, ack=101)
    user.reads(100)


def test_fin_with_the_syn_ack_is_taken(peer: Peer) -> None:
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN | ACK | FIN, seq=0, mss=1460, length=10)
    peer.expects(ACK, seq=1, ack=12)
    assert user.is_in(State.CLOSE_WAIT)
    user.reads(10)
    user.reads_end()


def test_data_and_fin_with_the_last_ack_of_the_handshake_are_taken(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(ACK | PSH | FIN, length=50)
    peer.expects(ACK, ack=52)
    user = peer.user()
    user.reads(50)
    user.reads_end()
    assert user.is_in(State.CLOSE_WAIT)


def test_data_with_a_syn_is_not_taken_and_comes_again(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460, length=100)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(ACK | PSH, seq=1, length=100)
    peer.ignores()
    peer.user().reads(100)


def test_a_syn_ack_for_another_syn_is_reset_and_forgotten(peer: Peer) -> None:
    """Section 3.10.7.3, first: an acknowledgment of something never sent."""
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(SYN | ACK, seq=0, ack=77, mss=1460)
    peer.expects(RST, seq=77)
    assert user.is_in(State.SYN_SENT)
    peer.nxt = 0
    peer.sends(SYN | ACK, seq=0, ack=1, mss=1460)
    peer.expects(ACK, seq=1, ack=1)


def test_a_reset_refuses_the_connection(peer: Peer) -> None:
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(RST | ACK, seq=0, ack=1)
    user.fails_with(errno.ECONNREFUSED)
    assert user.is_in(State.CLOSE)


@pytest.mark.parametrize(("flags", "ack"), [(RST, 0), (RST | ACK, 0), (RST | ACK, 2), (ACK, 1), (FIN | ACK, 1), (0, 0)])
def test_nothing_but_a_reset_with_the_right_ack_refuses_it(peer: Peer, flags: int, ack: int) -> None:
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    peer.sends(flags, seq=0, ack=ack)
    assert user.is_in(State.SYN_SENT)
    peer.expects_nothing()


def test_a_syn_that_comes_again_is_answered_again(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(ACK, seq=1)
    assert peer.user().is_in(State.ESTABLISHED)


def test_a_syn_ack_that_comes_again_is_acknowledged_again(peer: Peer) -> None:
    """Our last ACK of the handshake was lost."""
    peer.accepts()
    peer.sends(SYN | ACK, seq=0, ack=1, mss=1460)
    peer.expects(ACK, seq=1, ack=1)


def test_a_wrong_ack_in_syn_received_is_reset(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(ACK, seq=1, ack=5)
    peer.expects(RST, seq=5)
    peer.sends(ACK, seq=1, ack=1)
    assert peer.user().is_in(State.ESTABLISHED)


def test_a_reset_in_syn_received_goes_back_to_listen(peer: Peer) -> None:
    listener = peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(RST, seq=1)
    peer.expects_nothing_for(200)
    assert not listener.half_open
    assert not peer.stack.tcp.connections


def test_the_listener_resets_an_ack_and_ignores_a_reset(peer: Peer) -> None:
    """Section 3.10.7.2."""
    peer.listens()
    peer.sends(ACK, seq=1, ack=99)
    peer.expects(RST, seq=99)
    peer.sends(SYN | ACK, seq=1, ack=98)
    peer.expects(RST, seq=98)
    peer.sends(RST, seq=1)
    peer.sends(RST | ACK, seq=1, ack=1)
    peer.sends(0, seq=1)
    peer.sends(FIN, seq=1)
    peer.sends(SYN | FIN, seq=1)
    peer.sends(SYN | RST, seq=1)
    peer.expects_nothing()


def test_a_closed_port_resets(peer: Peer) -> None:
    """Section 3.10.7.1."""
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(RST | ACK, seq=0, ack=1)
    peer.sends(SYN | FIN, seq=10, length=7)
    peer.expects(RST | ACK, seq=0, ack=19)
    peer.sends(ACK, seq=5, ack=123)
    peer.expects(RST, seq=123)
    peer.sends(RST, seq=5)
    peer.sends(RST | ACK, seq=5, ack=5)
    peer.expects_nothing()


def test_a_syn_that_is_not_answered_is_sent_again_for_two_minutes(peer: Peer) -> None:
    """RFC 6298 with an initial RTO of 1 s, tcp_syn_retries of 6."""
    user = peer.is_called()
    peer.expects(SYN, seq=0)
    for delay in (1, 2, 4, 8, 16, 32):
        peer.expects(SYN, seq=0, after=delay)
    peer.expects_nothing_for(63.9)
    peer.waits(0.2)
    user.fails_with(errno.ETIMEDOUT)
    assert user.is_in(State.CLOSE)


def test_tcp_syncnt_bounds_the_attempts(peer: Peer) -> None:
    user = peer.is_called(syncnt=1)
    peer.expects(SYN, seq=0)
    peer.expects(SYN, seq=0, after=1)
    peer.waits(2.1)
    user.fails_with(errno.ETIMEDOUT)


def test_a_syn_ack_that_is_not_answered_is_sent_again_and_then_forgotten(peer: Peer) -> None:
    listener = peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    for delay in (1, 2, 4, 8, 16):
        peer.expects(SYN | ACK, seq=0, ack=1, after=delay)
    peer.expects_nothing_for(100)
    assert not listener.half_open
    assert not peer.stack.tcp.connections
