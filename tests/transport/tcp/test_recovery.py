"""Losses: fast recovery with SACK and without, timeouts and their back-off (RFC 5681, 6298, 6582, 6675, 2018)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.phase import Phase
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer, User

MSS = 1460


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    """A peer of a stack that counts duplicates, as before RACK, with Reno's window. What RACK does is in `test_rack`."""
    return make_peer(config=TcpConfig(congestion="reno", rack=False, early_retrans=False, frto=False))


def ten_out(peer: Peer, **options: bool) -> User:
    """A connection with ten full segments on their way, and nothing more to send. Segment n begins at `nth(n)`."""
    user = peer.connects(**options)
    user.sends(10 * MSS)
    peer.expects_data(1, 10 * MSS + 1)
    return user


def nth(number: int) -> int:
    return 1 + number * MSS


# -- without SACK (RFC 5681, section 3.2; RFC 6582) --


def test_the_third_duplicate_ack_sends_the_lost_segment_again(peer: Peer) -> None:
    ten_out(peer)
    peer.sends(ACK, ack=nth(2))
    peer.expects_nothing()
    peer.sends(ACK, ack=nth(2))
    peer.sends(ACK, ack=nth(2))
    peer.expects_nothing()
    peer.sends(ACK, ack=nth(2))
    peer.expects(ACK, seq=nth(2), length=MSS)
    peer.expects_nothing()


def test_the_very_first_segment_may_be_the_lost_one(peer: Peer) -> None:
    ten_out(peer)
    for _ in range(3):
        peer.sends(ACK, ack=1)
    peer.expects(ACK, seq=1, length=MSS)


def test_a_partial_ack_sends_the_next_hole(peer: Peer) -> None:
    """RFC 6582, section 3.2, step 3."""
    user = ten_out(peer)
    for _ in range(3):
        peer.sends(ACK, ack=1)
    peer.expects(ACK, seq=1)
    peer.sends(ACK, ack=nth(4))
    peer.expects(ACK, seq=nth(4), length=MSS)
    peer.sends(ACK, ack=nth(7))
    peer.expects(ACK, seq=nth(7), length=MSS)
    peer.sends(ACK, ack=nth(10))
    peer.expects_nothing()
    user.sends(100)
    peer.expects(ACK, seq=nth(10), length=100)
    peer.sends(ACK)
    assert user.conn.recovery.phase is Phase.OPEN, "something beyond is acknowledged (section 4)"


def test_recovery_halves_the_window_once(peer: Peer) -> None:
    user = ten_out(peer)
    for _ in range(3):
        peer.sends(ACK, ack=1)
    assert user.conn.cc.ssthresh == 5 * MSS
    peer.sends(ACK, ack=nth(4))
    peer.sends(ACK, ack=nth(10))
    assert user.conn.cc.ssthresh == 5 * MSS
    assert user.conn.cc.cwnd <= 5 * MSS


def test_duplicate_acks_let_new_data_go(peer: Peer) -> None:
    """Limited transmit (RFC 3042) before, and RFC 5681, section 3.2, step 4, during recovery: one has left."""
    user = peer.connects()
    user.sends(30 * MSS)
    peer.expects_data(1, nth(10))
    for number in (10, 11):
        peer.sends(ACK, ack=1)
        peer.expects(ACK, seq=nth(number))
    peer.sends(ACK, ack=1)
    peer.expects(ACK, seq=1)
    peer.expects_nothing()
    for _ in range(8):
        peer.sends(ACK, ack=1)
    assert [seen.seq for seen in peer.ignores()][:1] == [nth(12)]


def test_an_ack_with_data_or_a_new_window_is_no_duplicate(peer: Peer) -> None:
    """RFC 5681, section 2."""
    user = ten_out(peer)
    for count in range(1, 6):
        peer.sends(ACK, ack=1, window=60_000 - count)
    for _ in range(5):
        peer.sends(ACK | PSH, ack=1, length=10)
    assert all(not seen.length for seen in peer.ignores())
    user.reads(50)


def test_a_fin_is_no_duplicate_ack(peer: Peer) -> None:
    """RFC 5681, section 2: the SYN and FIN bits are both off."""
    ten_out(peer)
    peer.sends(ACK, ack=1)
    peer.sends(ACK, ack=1)
    peer.sends(FIN | ACK, ack=1)
    assert all(not seen.length for seen in peer.ignores())


def test_duplicate_acks_after_a_timeout_do_not_mean_another_loss(peer: Peer) -> None:
    """RFC 6582, section 4: what was sent again was not lost, and its copies draw duplicate ACKs."""
    user = ten_out(peer)
    peer.expects(ACK, seq=1, length=MSS, after=0.2)
    peer.sends(ACK, ack=nth(10))
    peer.ignores()
    user.sends(5 * MSS)
    peer.ignores()
    for _ in range(3):
        peer.sends(ACK, ack=nth(10))
    peer.expects_nothing()


# -- with SACK (RFC 2018, RFC 6675) --


def test_only_the_hole_is_sent_again(peer: Peer) -> None:
    ten_out(peer, sack=True)
    peer.sends(ACK, ack=1, sack=[(nth(1), nth(2))])
    peer.sends(ACK, ack=1, sack=[(nth(1), nth(3))])
    peer.expects_nothing()
    peer.sends(ACK, ack=1, sack=[(nth(1), nth(4))])
    peer.expects(ACK, seq=1, length=MSS)
    peer.expects_nothing()
    peer.sends(ACK, ack=nth(10))
    peer.expects_nothing_for(5)


def test_every_hole_is_sent_again_in_one_round_trip(peer: Peer) -> None:
    ten_out(peer, sack=True)
    for last in range(6, 11):
        peer.sends(ACK, ack=1, sack=[(nth(5), nth(last)), (nth(3), nth(4)), (nth(1), nth(2))])
    assert [seen.seq for seen in peer.ignores()] == [1, nth(2), nth(4)]


def test_what_was_sacked_is_never_sent_again_by_a_timeout(peer: Peer) -> None:
    ten_out(peer, sack=True)
    peer.sends(ACK, ack=1, sack=[(nth(1), nth(2))])
    peer.expects(ACK, seq=1, length=MSS, after=0.2)
    peer.sends(ACK, ack=nth(2))
    assert all(seen.seq >= nth(2) for seen in peer.ignores())


def test_a_peer_that_reneges_gets_everything_again(peer: Peer) -> None:
    """RFC 2018, section 8."""
    ten_out(peer, sack=True)
    peer.sends(ACK, ack=1, sack=[(nth(1), nth(10))])
    peer.expects(ACK, seq=1, length=MSS)
    peer.sends(ACK, ack=nth(1))
    peer.ignores()
    got = nth(1)
    while got < nth(10):
        peer.waits(0.5)
        for seen in peer.ignores():
            if seen.seq == got:
                got += seen.length
        peer.sends(ACK, ack=got)
        assert peer.world.now < 60


@pytest.mark.parametrize(
    "block",
    [(nth(10), nth(11)), (nth(5), nth(11)), (nth(4), nth(3)), (nth(3), nth(3)), (-5000, -4000), (-100, nth(1))],
    ids=str,
)
def test_blocks_that_cannot_be_are_ignored(peer: Peer, block: tuple[int, int]) -> None:
    user = ten_out(peer, sack=True)
    for _ in range(5):
        peer.sends(ACK, ack=1, sack=[block])
    peer.expects_nothing()
    assert user.conn.inflight.sacked == 0


def test_sack_is_ignored_unless_it_was_agreed_on(peer: Peer) -> None:
    user = ten_out(peer)
    peer.sends(ACK, ack=1, sack=[(nth(1), nth(5))])
    peer.expects_nothing()
    assert user.conn.inflight.sacked == 0


# -- our SACK blocks (RFC 2018, section 4) --


def test_the_first_block_holds_the_segment_that_arrived_last(peer: Peer) -> None:
    peer.connects(sack=True)
    peer.sends(ACK, seq=101, length=100)
    peer.expects(ACK, ack=1, sack=((101, 201),))
    peer.sends(ACK, seq=301, length=100)
    peer.expects(ACK, ack=1, sack=((301, 401), (101, 201)))
    peer.sends(ACK, seq=501, length=100)
    peer.expects(ACK, ack=1, sack=((501, 601), (301, 401), (101, 201)))
    peer.sends(ACK, seq=201, length=50)
    peer.expects(ACK, ack=1, sack=((101, 251), (501, 601), (301, 401)))


def test_four_blocks_fit_alone_and_three_beside_timestamps(make_peer: Callable[..., Peer]) -> None:
    for ts, most in ((-1, 4), (1000, 3)):
        peer = make_peer()
        peer.connects(sack=True, ts=ts)
        for seq in range(101, 2001, 200):
            peer.sends(ACK, seq=seq, length=100)
        last = peer.ignores()[-1]
        assert len(last.options.sack) == most
        assert last.options.sack[0] == (1901, 2001)


def test_blocks_go_when_the_hole_is_filled(peer: Peer) -> None:
    user = peer.connects(sack=True)
    peer.sends(ACK, seq=101, length=100)
    peer.sends(ACK, seq=301, length=100)
    peer.ignores()
    peer.sends(ACK, seq=1, length=100)
    peer.expects(ACK, ack=201, sack=((301, 401),))
    peer.sends(ACK, seq=201, length=100)
    peer.expects(ACK, ack=401, sack=())
    user.reads(400)


def test_no_blocks_unless_agreed_on(peer: Peer) -> None:
    peer.connects()
    peer.sends(ACK, seq=101, length=100)
    peer.expects(ACK, ack=1, sack=())


@pytest.mark.parametrize("ts", [-1, 1000])
def test_blocks_and_data_share_a_packet_of_the_mtu(peer: Peer, ts: int) -> None:
    """RFC 6691: options are taken off the MSS; the frame must not become longer than the MTU."""
    user = peer.connects(sack=True, ts=ts)
    for seq in range(101, 2001, 200):
        peer.sends(ACK, seq=seq, length=100)
    peer.ignores()
    user.sends(5000)
    sent = peer.ignores()
    assert sum(seen.length for seen in sent) == 5000
    assert all(seen.options.sack for seen in sent)


# -- timeouts (RFC 6298) --


def test_the_timeout_doubles_each_time_up_to_its_maximum(peer: Peer) -> None:
    """Sections 5.4 to 5.6, and R2 of RFC 9293, section 3.8.3."""
    user = peer.connects()
    user.sends(100)
    peer.expects(ACK, seq=1)
    pause = 0.2
    for _ in range(peer.config.retries2):
        peer.expects(ACK | PSH, seq=1, length=100, after=min(pause, 120))
        pause *= 2
    peer.expects_nothing_for(121)
    user.fails_with(errno.ETIMEDOUT)


def test_a_timeout_sends_one_segment_and_starts_slowly(peer: Peer) -> None:
    user = ten_out(peer)
    peer.expects(ACK, seq=1, length=MSS, after=0.2)
    peer.expects_nothing()
    assert user.conn.cc.cwnd == MSS
    assert user.conn.cc.ssthresh == 5 * MSS
    peer.sends(ACK, ack=nth(1))
    peer.expects_data(nth(1), nth(3))
    peer.expects_nothing()


def test_a_second_timeout_does_not_halve_again(peer: Peer) -> None:
    """RFC 5681, section 3.1: ssthresh is held constant."""
    user = ten_out(peer)
    peer.waits(5)
    assert user.conn.cc.ssthresh == 5 * MSS


def test_a_segment_sent_twice_says_nothing_about_the_round_trip(peer: Peer) -> None:
    """Karn (section 3); the timeout stays backed off until a segment that was sent once is acknowledged (section 5.7)."""
    user = peer.connects()
    before = user.conn.rtt.srtt
    user.sends(100)
    peer.expects(ACK)
    peer.expects(ACK, after=0.2)
    peer.expects(ACK, after=0.4)
    peer.sends(ACK)
    assert user.conn.rtt.srtt == before


def test_segments_behind_one_sent_twice_say_nothing_either(peer: Peer) -> None:
    """Their acknowledgment waited for the hole, not for the network."""
    user = ten_out(peer)
    before = user.conn.rtt.srtt
    peer.expects(ACK, seq=1, after=0.2)
    peer.sends(ACK, ack=nth(10))
    assert user.conn.rtt.srtt == before


def test_the_round_trip_is_measured(peer: Peer) -> None:
    user = peer.connects(nodelay=True)
    for _ in range(60):
        user.sends(100)
        peer.expects(ACK)
        peer.waits(0.1)
        peer.sends(ACK)
    assert user.conn.rtt.srtt == pytest.approx(0.1, abs=0.01)


def test_an_ack_of_new_data_starts_the_timer_anew(peer: Peer) -> None:
    """Section 5.3."""
    ten_out(peer)
    peer.waits(0.15)
    peer.sends(ACK, ack=nth(1))
    peer.expects_nothing_for(0.15)


def test_after_a_lost_syn_the_first_timeout_is_three_seconds_and_one_segment_is_sent(peer: Peer) -> None:
    """Section 5.7, and RFC 5681, section 3.1: the initial window is one segment then."""
    user = peer.is_called()
    peer.expects(SYN)
    peer.expects(SYN, after=1)
    peer.sends(SYN | ACK, seq=0, ack=1, mss=1460)
    peer.expects(ACK)
    user.sends(3 * MSS)
    peer.expects(ACK, seq=1, length=MSS)
    peer.expects_nothing()
    peer.expects(ACK, seq=1, length=MSS, after=3)


def test_a_lost_syn_ack_gives_no_sample(peer: Peer) -> None:
    """Karn: nobody knows which of the two is acknowledged."""
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.waits(0.5)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.sends(ACK, seq=1)
    user = peer.user()
    assert user.conn.rtt.srtt == 0
    user.sends(3 * MSS)
    peer.expects(ACK, seq=1, length=MSS)
    peer.expects_nothing()


def test_a_lost_fin_with_data_comes_again_with_its_data(peer: Peer) -> None:
    user = peer.connects(cork=True)
    user.sends(100)
    user.shuts()
    peer.expects(FIN | PSH | ACK, seq=1, length=100)
    peer.expects(FIN | PSH | ACK, seq=1, length=100, after=0.2)
    peer.sends(ACK)
    assert user.is_in(State.FIN_WAIT2)


def test_retries2_bounds_the_attempts(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(retries2=3))
    user = peer.connects()
    user.sends(100)
    peer.waits(10)
    assert len(peer.ignores()) == 4
    user.fails_with(errno.ETIMEDOUT)
