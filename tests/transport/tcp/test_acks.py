"""When data is acknowledged (RFC 9293, section 3.8.6.3; RFC 5681, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.transport.tcp.output import QUICK_ACKS
from ustack.wire.tcp import ACK, PSH, SYN, URG

if TYPE_CHECKING:
    from tests.transport.tcp.peer import Peer, User


@pytest.fixture
def user(peer: Peer) -> User:
    """The user of a connection that is past its quick start."""
    user = peer.connects()
    user.conn.quick_acks = 0
    user.conn.ato = peer.config.delack
    return user


def test_the_first_segments_are_acknowledged_at_once(peer: Peer) -> None:
    peer.connects()
    for count in range(1, QUICK_ACKS + 1):
        peer.sends(ACK | PSH, length=100)
        peer.expects(ACK, ack=1 + 100 * count)
    peer.sends(ACK | PSH, length=100)
    peer.expects_nothing()


def test_an_ack_waits_forty_milliseconds(peer: Peer, user: User) -> None:
    peer.sends(ACK | PSH, length=100)
    peer.expects(ACK, ack=101, after=0.04)
    user.reads(100)
    peer.expects_nothing_for(1)


def test_an_ack_rides_on_the_answer(peer: Peer, user: User) -> None:
    user.conn.pingpong = True
    peer.sends(ACK | PSH, length=100)
    peer.waits(0.01)
    user.reads(100)
    user.sends(50)
    peer.expects(ACK, seq=1, ack=101, length=50)
    peer.sends(ACK)
    peer.expects_nothing_for(1)


def test_who_has_read_everything_acknowledges_the_end_of_a_message(peer: Peer, user: User) -> None:
    """Nothing is likely to follow, and there was no answer so far (tcp_cleanup_rbuf)."""
    peer.sends(ACK | PSH, length=100)
    peer.waits(0.01)
    user.reads(60)
    peer.expects_nothing()
    user.reads(40)
    peer.expects(ACK, ack=101)


def test_more_than_a_full_segment_is_acknowledged_at_once(peer: Peer, user: User) -> None:
    peer.sends(ACK, length=1460)
    peer.expects_nothing()
    peer.sends(ACK, length=1)
    peer.expects(ACK, ack=1462)
    user.reads(1461)


def test_after_a_long_pause_acks_come_at_once_again(peer: Peer, user: User) -> None:
    """The sender has perhaps started from its initial window again (tcp_event_data_recv)."""
    peer.waits(2.0)
    peer.sends(ACK, length=100)
    peer.expects(ACK, ack=101)
    user.reads(100)


def test_a_delayed_ack_that_nothing_carried_waits_longer_next_time_but_no_longer_than_a_round_trip(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.waits(0.1)
    peer.sends(ACK)
    user = peer.user()
    user.conn.quick_acks = 0
    user.conn.ato = peer.config.delack
    for pause in (0.04, 0.08, 0.1):
        peer.sends(ACK, length=100)
        peer.expects(ACK, after=pause)
    user.reads(300)


@pytest.mark.parametrize("size", [1460, 1000, 536])
def test_every_second_full_segment_is_acknowledged(peer: Peer, user: User, size: int) -> None:
    """Full is what the peer sends, which may be smaller than what we take."""
    for count in range(1, 10):
        peer.sends(ACK, length=size)
        peer.expects_nothing()
        peer.sends(ACK, length=size)
        peer.expects(ACK, ack=1 + 2 * size * count)
    user.reads(18 * size)


def test_segments_of_one_batch_share_an_ack(peer: Peer, user: User) -> None:
    for _ in range(5):
        peer.sends(ACK, length=1460, settle=False)
    peer.settle()
    peer.expects(ACK, ack=7301)
    peer.expects_nothing()
    user.reads(7300)


def test_out_of_order_data_is_acknowledged_at_once_each_time(peer: Peer, user: User) -> None:
    for count in range(3):
        peer.sends(ACK, seq=1461 + 1460 * count, length=1460)
        peer.expects(ACK, ack=1)
    user.has_nothing_to_read()


def test_a_segment_that_fills_a_hole_is_acknowledged_at_once(peer: Peer, user: User) -> None:
    peer.sends(ACK, seq=101, length=100)
    peer.expects(ACK, ack=1)
    peer.sends(ACK, seq=1, length=50)
    peer.expects(ACK, ack=51)
    peer.sends(ACK, seq=51, length=50)
    peer.expects(ACK, ack=201)
    user.reads(200)


def test_a_segment_that_fills_part_of_a_hole_is_acknowledged_at_once(peer: Peer, user: User) -> None:
    """RFC 5681, section 4.2: a segment that fills in all or part of a gap."""
    peer.sends(ACK, seq=101, length=100)
    peer.expects(ACK, ack=1)
    peer.sends(ACK, seq=1, length=50)
    peer.expects(ACK, ack=51)
    user.reads(50)


def test_duplicate_data_is_acknowledged_at_once(peer: Peer, user: User) -> None:
    peer.sends(ACK, length=100)
    peer.expects(ACK, ack=101, after=0.04)
    peer.sends(ACK, seq=1, length=100)
    peer.expects(ACK, ack=101)
    user.reads(100)


def test_overlapping_data_is_taken_where_it_is_new(peer: Peer, user: User) -> None:
    peer.sends(ACK, seq=1, length=100)
    peer.sends(ACK, seq=51, length=100)
    user.reads(150)
    peer.sends(ACK, seq=201, length=100)
    peer.sends(ACK, seq=101, length=150)
    user.reads(150)


def test_an_ack_is_not_acknowledged(peer: Peer, user: User) -> None:
    for _ in range(5):
        peer.sends(ACK)
    peer.expects_nothing_for(1)
    user.has_nothing_to_read()


def test_urgent_data_is_data(peer: Peer, user: User) -> None:
    """RFC 6093, section 6: delivered in line."""
    peer.sends(ACK | URG, length=10)
    user.reads(10)
