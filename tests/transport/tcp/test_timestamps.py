"""Timestamps, protection against wrapped sequence numbers, and window scaling (RFC 7323)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.drops import DropReason
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, PSH, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer

DAY = 86400.0


def test_timestamps_are_used_when_both_sides_offer_them(peer: Peer) -> None:
    """Section 3.2: and then in every segment."""
    user = peer.connects(ts=1000)
    user.sends(100)
    assert peer.expects(ACK, length=100).options.ts_ecr == 1000
    peer.ts = (1001, peer.ts[1])
    peer.sends(ACK | PSH, length=100)
    assert peer.expects(ACK).options.ts_ecr == 1001


def test_no_timestamps_when_the_peer_offers_none(peer: Peer) -> None:
    user = peer.connects()
    user.sends(100)
    assert peer.expects(ACK).options.ts_val == -1


def test_no_timestamps_when_they_are_off(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(timestamps=False))
    peer.listens()
    peer.ts = (5, 0)
    peer.sends(SYN, seq=0, mss=1460)
    assert peer.expects(SYN | ACK).options.ts_val == -1


def test_the_clock_ticks_in_milliseconds(peer: Peer) -> None:
    user = peer.connects(ts=1000)
    user.sends(1)
    first = peer.expects(ACK).options.ts_val
    peer.sends(ACK)
    peer.waits(2.0)
    user.sends(1)
    assert (peer.expects(ACK).options.ts_val - first) % (1 << 32) == pytest.approx(2000, abs=2)


def test_an_old_timestamp_is_answered_and_dropped(peer: Peer) -> None:
    """Section 5.3, R1."""
    user = peer.connects(ts=1000)
    peer.ts = (999, 0)
    peer.sends(ACK | PSH, length=10)
    peer.expects(ACK, ack=1)
    user.has_nothing_to_read()
    assert peer.stack.drops[DropReason.TCP_RFC7323_PAWS] == 1


def test_timestamps_wrap(peer: Peer) -> None:
    user = peer.connects(ts=0xFFFFFFFF)
    peer.ts = (3, peer.ts[1])
    peer.sends(ACK | PSH, length=10)
    user.reads(10)
    peer.ts = (0xFFFFFFF0, peer.ts[1])
    peer.sends(ACK | PSH, length=10)
    user.has_nothing_to_read()


def test_a_reset_is_not_subject_to_paws(peer: Peer) -> None:
    """Section 5.3, R1."""
    user = peer.connects(ts=1000)
    peer.ts = (1, 0)
    peer.sends(RST, seq=1)
    assert user.is_in(State.CLOSE)


def test_what_arrives_out_of_order_does_not_change_the_timestamp_that_is_echoed(peer: Peer) -> None:
    """Section 4.3: only a segment that covers Last.ACK.sent does."""
    peer.connects(ts=1000)
    peer.ts = (1010, peer.ts[1])
    peer.sends(ACK, seq=101, length=100)
    assert peer.expects(ACK, ack=1).options.ts_ecr == 1000
    peer.ts = (1005, peer.ts[1])
    peer.sends(ACK, seq=1, length=100)
    assert peer.expects(ACK, ack=201).options.ts_ecr == 1005


def test_a_delayed_ack_echoes_the_earliest_segment_that_it_acknowledges(peer: Peer) -> None:
    """Section 4.3 (A)."""
    user = peer.connects(ts=1000)
    user.conn.quick_acks = 0
    user.conn.ato = peer.config.delack
    peer.ts = (1001, peer.ts[1])
    peer.sends(ACK | PSH, length=100)
    peer.ts = (1002, peer.ts[1])
    peer.sends(ACK | PSH, length=100)
    assert peer.expects(ACK, ack=201, after=0.04).options.ts_ecr == 1001


def test_after_24_days_of_silence_the_old_timestamp_proves_nothing_and_is_replaced(peer: Peer) -> None:
    """Section 5.5."""
    user = peer.connects(ts=1 << 31)
    peer.waits(25 * DAY)
    peer.ts = (5, peer.ts[1])
    peer.sends(ACK | PSH, length=10)
    assert peer.expects(ACK, ack=11).options.ts_ecr == 5
    user.reads(10)
    peer.ts = (4, peer.ts[1])
    peer.sends(ACK | PSH, length=10)
    user.has_nothing_to_read()


def test_the_mss_leaves_room_for_the_timestamps(peer: Peer) -> None:
    """Section 3.2; RFC 6691, section 2."""
    user = peer.connects(ts=1000)
    user.sends(3000)
    peer.expects(ACK, length=1448)


# -- window scaling (section 2) --


def test_windows_are_scaled_when_both_sides_offer_it(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1000, wscale=3, window=8000)
    answer = peer.expects(SYN | ACK)
    assert answer.options.wscale == 7
    assert answer.window == 65535
    peer.sends(ACK, window=1000)
    user = peer.user()
    assert user.conn.snd_wnd == 8000
    user.sends(20_000)
    assert sum(seen.length for seen in peer.ignores()) == 8000


def test_no_scaling_when_the_peer_offers_none(peer: Peer) -> None:
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460)
    assert peer.expects(SYN | ACK).options.wscale == -1
    peer.sends(ACK, window=5000)
    user = peer.user()
    assert user.conn.snd_wnd == 5000


def test_a_shift_beyond_14_counts_as_14(peer: Peer) -> None:
    """Section 2.3."""
    peer.listens()
    peer.sends(SYN, seq=0, raw_options=b"\x02\x04\x05\xb4\x03\x03\x20\x00")
    peer.expects(SYN | ACK)
    peer.sends(ACK, window=2)
    assert peer.user().conn.snd_wnd == 2 << 14


def test_the_right_edge_of_a_scaled_window_never_moves_left(peer: Peer) -> None:
    """Section 2.4: what rounding cuts off would be a window that shrinks."""
    user = peer.connects(wscale=2, rcvbuf=65536)
    scale = user.conn.rcv_wscale
    assert scale == 1
    edge = 0
    for length in (1, 3, 1, 7, 100, 1001, 1459, 1, 5):
        peer.sends(ACK | PSH, length=length)
        peer.waits(0.05)
        for seen in peer.ignores():
            assert seen.ack + (seen.window << scale) >= edge
            edge = seen.ack + (seen.window << scale)
