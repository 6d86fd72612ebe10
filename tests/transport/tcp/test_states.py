"""Every state and every way through them (RFC 9293, sections 3.3.2, 3.5, 3.6 and 3.10)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from ustack.transport.events import SHUT_RD
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import FIN_ACKED, FOLLOWERS, RECEIVES_FIN, SENDS_FIN, State
from ustack.wire.tcp import ACK, FIN, PSH, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer, User


def test_every_transition_that_is_made_is_one_that_may_be_made() -> None:
    for table in (SENDS_FIN, RECEIVES_FIN, FIN_ACKED):
        for state, follower in table.items():
            assert follower in FOLLOWERS[state]
    assert set(FOLLOWERS) == set(State)
    for state in set(State) - {State.CLOSE}:
        assert State.CLOSE in FOLLOWERS[state]


# -- opening (section 3.5) --


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


# -- closing (section 3.6): who says FIN first, and what crosses it --


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
    reset = peer.expects(RST | ACK, seq=2)
    assert reset.ack == 1
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


# -- resets --


def in_syn_received(peer: Peer) -> User | None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    return None


def in_established(peer: Peer) -> User:
    return peer.connects()


def in_fin_wait1(peer: Peer) -> User:
    user = peer.connects()
    user.shuts()
    peer.expects(FIN | ACK)
    peer.ack = 1
    return user


def in_fin_wait2(peer: Peer) -> User:
    user = in_fin_wait1(peer)
    peer.sends(ACK, ack=2)
    peer.ack = 2
    return user


def in_closing(peer: Peer) -> User:
    user = in_fin_wait1(peer)
    peer.sends(FIN | ACK, ack=1)
    peer.expects(ACK, ack=2)
    return user


def in_close_wait(peer: Peer) -> User:
    user = peer.connects()
    peer.sends(FIN | ACK)
    peer.expects(ACK)
    return user


def in_last_ack(peer: Peer) -> User:
    user = in_close_wait(peer)
    user.shuts()
    peer.expects(FIN | ACK)
    peer.ack = 1
    return user


EVERY_STATE = {
    State.SYN_RECV: in_syn_received,
    State.ESTABLISHED: in_established,
    State.FIN_WAIT1: in_fin_wait1,
    State.FIN_WAIT2: in_fin_wait2,
    State.CLOSING: in_closing,
    State.CLOSE_WAIT: in_close_wait,
    State.LAST_ACK: in_last_ack,
}


@pytest.mark.parametrize("state", EVERY_STATE, ids=lambda state: state.name)
def test_a_reset_ends_the_connection_in_every_state(peer: Peer, state: State) -> None:
    """Section 3.10.7.4, second."""
    user = EVERY_STATE[state](peer)
    if user is not None:
        assert user.is_in(state)
    peer.sends(RST, seq=peer.nxt)
    peer.expects_nothing()
    assert not peer.stack.tcp.connections
    if user is not None:
        user.fails_with(errno.EPIPE if state is State.CLOSE_WAIT else errno.ECONNRESET)
    peer.expects_nothing_for(300)


@pytest.mark.parametrize("state", EVERY_STATE, ids=lambda state: state.name)
def test_a_reset_that_is_not_exact_is_challenged_in_every_state(peer: Peer, state: State) -> None:
    """RFC 5961, section 3.2."""
    EVERY_STATE[state](peer)
    peer.sends(RST, seq=peer.nxt + 1)
    peer.expects(ACK, ack=peer.nxt)
    peer.sends(RST, seq=peer.nxt + 100_000)
    peer.expects_nothing()
    peer.sends(RST, seq=peer.nxt - 100)
    peer.expects_nothing()
    assert peer.stack.tcp.connections


@pytest.mark.parametrize("state", EVERY_STATE, ids=lambda state: state.name)
def test_a_syn_is_challenged_in_every_synchronized_state(peer: Peer, state: State) -> None:
    """RFC 5961, section 4.2, wherever it lies."""
    EVERY_STATE[state](peer)
    for seq in (peer.nxt, peer.nxt + 10, peer.nxt + 1_000_000, peer.nxt - 1_000_000):
        after = peer.nxt
        peer.sends(SYN, seq=seq, mss=1460)
        peer.nxt = after
        peer.expects(ACK, ack=after)
        peer.expects_nothing()
    assert peer.stack.tcp.connections


@pytest.mark.parametrize("state", EVERY_STATE, ids=lambda state: state.name)
def test_a_segment_without_ack_does_nothing_in_every_state(peer: Peer, state: State) -> None:
    """Section 3.10.7.4, fifth: if the ACK bit is off, drop the segment."""
    user = EVERY_STATE[state](peer)
    peer.sends(PSH, seq=peer.nxt, length=10)
    peer.sends(FIN, seq=peer.nxt)
    peer.expects_nothing()
    if user is not None:
        assert user.is_in(state)


def test_our_own_abort_resets_in_every_state(make_peer: Callable[..., Peer]) -> None:
    for state, arrive in EVERY_STATE.items():
        peer = make_peer()
        user = arrive(peer)
        if user is None:
            continue
        user.conn.options.linger = 0
        user.closes()
        peer.expects(RST | ACK, ack=peer.nxt)
        assert not peer.stack.tcp.connections, state


# -- TIME-WAIT (section 3.6.1) --


def in_time_wait(peer: Peer, **options: Any) -> None:
    user = peer.connects(**options)
    user.closes()
    peer.expects(FIN | ACK, seq=1)
    peer.sends(FIN | ACK)
    peer.expects(ACK, seq=2, ack=2)


def test_time_wait_answers_the_last_fin_again_and_starts_anew(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(time_wait=60.0))
    in_time_wait(peer)
    peer.expects_nothing_for(50)
    peer.sends(FIN | ACK, seq=1, ack=2)
    peer.expects(ACK, seq=2, ack=2)
    peer.expects_nothing_for(59)
    assert peer.stack.tcp.connections
    peer.expects_nothing_for(2)
    assert not peer.stack.tcp.connections


def test_time_wait_survives_resets(peer: Peer) -> None:
    """RFC 1337."""
    in_time_wait(peer)
    peer.sends(RST, seq=2)
    peer.sends(RST | ACK, seq=2)
    assert peer.stack.tcp.connections
    peer.expects_nothing()


def test_time_wait_ignores_the_ack_that_ended_it_and_answers_old_data(peer: Peer) -> None:
    in_time_wait(peer)
    peer.sends(ACK, seq=2)
    peer.expects_nothing()
    peer.sends(ACK, seq=1, length=1)
    peer.expects(ACK, seq=2, ack=2)


def test_a_new_syn_ends_time_wait_when_its_number_is_higher(peer: Peer) -> None:
    in_time_wait(peer)
    old_iss = peer.stack_iss
    peer.returns()
    peer.sends(SYN, seq=100_000, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=100_001)
    assert 2 < (peer.stack_iss - old_iss) % (1 << 32) < 1 << 31
    peer.sends(ACK)
    assert peer.user().is_in(State.ESTABLISHED)


def test_our_number_in_a_connection_that_ends_time_wait_lies_beyond_all_that_was_sent(peer: Peer) -> None:
    """Section 3.6.1: its ISN is larger than the largest number of the previous incarnation, however much that has sent."""
    peer.window = 65535
    user = peer.connects(wscale=7)
    total = 0
    while total < 2_000_000:
        total += user.sends(65536) if user.conn.writable else 0
        peer.ignores()
        peer.sends(ACK)
    user.closes()
    while not user.is_in(State.FIN_WAIT2):
        peer.sends(ACK)
    peer.sends(FIN | ACK)
    peer.ignores()
    old_iss, old_end = peer.stack_iss, peer.ack
    peer.returns()
    peer.sends(SYN, seq=100_000, mss=1460)
    peer.expects(SYN | ACK, seq=0)
    assert old_end < (peer.stack_iss - old_iss) % (1 << 32) < 1 << 31


def test_an_old_syn_does_not_end_time_wait(peer: Peer) -> None:
    in_time_wait(peer)
    peer.sends(SYN, seq=-50_000, mss=1460)
    peer.expects(ACK, seq=2, ack=2)


def test_a_syn_with_a_newer_timestamp_ends_time_wait_whatever_its_number(peer: Peer) -> None:
    """RFC 6191, section 2."""
    in_time_wait(peer, ts=1000)
    peer.returns()
    peer.ts = (1001, 0)
    peer.sends(SYN, seq=-50_000, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=-49_999)


def test_a_syn_with_an_older_timestamp_does_not_end_time_wait_whatever_its_number(peer: Peer) -> None:
    """RFC 6191, section 2."""
    in_time_wait(peer, ts=1000)
    peer.ts = (999, 0)
    peer.sends(SYN, seq=100_000, mss=1460)
    peer.expects(ACK, seq=2, ack=2)


def test_a_syn_does_not_end_time_wait_when_nobody_listens(peer: Peer) -> None:
    in_time_wait(peer)
    assert peer.listener is not None
    peer.listener.close()
    peer.sends(SYN, seq=100_000, mss=1460)
    peer.expects(ACK, seq=2, ack=2)


def test_there_are_never_more_than_so_many_in_time_wait(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(max_tw_buckets=4))
    for port in range(40000, 40010):
        peer.own_port = port
        peer.returns()
        in_time_wait(peer)
    assert len(peer.stack.tcp.connections) == 4
