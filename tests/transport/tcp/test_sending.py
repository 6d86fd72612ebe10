"""Which segments the user's writes become: MSS, Nagle, CORK, congestion window (RFC 9293, section 3.7; RFC 5681)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.wire.tcp import ACK, FIN, PSH, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


def test_ten_segments_start(peer: Peer) -> None:
    """RFC 6928."""
    user = peer.connects()
    user.sends(30_000)
    peer.expects_data(1, 14_601)
    peer.expects_nothing()


def test_slow_start_doubles_the_window(peer: Peer) -> None:
    """RFC 5681, section 3.1."""
    user = peer.connects(wscale=3)
    user.sends(65_000)
    assert sum(seen.length for seen in peer.ignores()) == 14_600
    peer.sends(ACK)
    assert sum(seen.length for seen in peer.ignores()) == 29_200


@pytest.mark.parametrize(("mss", "size"), [(1460, 1460), (536, 536), (100, 100), (9000, 1460)])
def test_the_peers_mss_bounds_ours(peer: Peer, mss: int, size: int) -> None:
    user = peer.connects(mss=mss)
    user.sends(size + 1)
    peer.expects(ACK, length=size)


def test_without_the_option_the_mss_is_536(peer: Peer) -> None:
    """RFC 9293, section 3.7.1."""
    user = peer.connects(mss=-1)
    user.sends(600)
    peer.expects(ACK, length=536)


def test_a_ridiculous_mss_does_not_make_ridiculous_segments(peer: Peer) -> None:
    user = peer.connects(mss=1)
    user.sends(100)
    peer.expects(ACK, length=48)


def test_tcp_maxseg_bounds_what_we_send_and_what_we_announce(peer: Peer) -> None:
    """tcp(7), TCP_MAXSEG."""
    user = peer.is_called(maxseg=1000)
    assert peer.expects(SYN).options.mss == 1000
    peer.sends(SYN | ACK, seq=0, mss=1460)
    peer.expects(ACK)
    user.sends(2000)
    peer.expects(ACK, length=1000)


def test_our_mss_is_announced_by_the_mtu(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(mtu=9000)
    peer.is_called()
    assert peer.expects(SYN).options.mss == 8960


def test_super_frames_are_cut_into_segments(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(features=FEATURE_CSUM | FEATURE_TSO)
    user = peer.connects()
    user.sends(14_600)
    peer.expects_data(1, 14_601)


# -- Nagle, NODELAY, CORK --


def test_a_small_segment_waits_while_another_is_out(peer: Peer) -> None:
    """RFC 9293, section 3.7.4."""
    user = peer.connects()
    user.sends(100)
    peer.expects(ACK | PSH, seq=1, length=100)
    user.sends(100)
    user.sends(100)
    peer.expects_nothing()
    peer.sends(ACK)
    peer.expects(ACK | PSH, seq=101, length=200)


def test_a_full_segment_does_not_wait(peer: Peer) -> None:
    user = peer.connects()
    user.sends(100)
    peer.expects(ACK, seq=1, length=100)
    user.sends(1500)
    peer.expects(ACK, seq=101, length=1460)
    peer.expects_nothing()
    peer.sends(ACK)
    peer.expects(ACK, seq=1561, length=40)


def test_the_tail_of_a_large_write_does_not_wait(peer: Peer) -> None:
    """Minshall's variant: only small segments wait for small segments."""
    user = peer.connects()
    user.sends(1500)
    peer.expects(ACK, seq=1, length=1460)
    peer.expects(ACK | PSH, seq=1461, length=40)


def test_nodelay_never_waits(peer: Peer) -> None:
    user = peer.connects(nodelay=True)
    for start in range(1, 500, 100):
        user.sends(100)
        peer.expects(ACK | PSH, seq=start, length=100)


def test_cork_holds_what_is_not_a_full_segment_for_200_ms(peer: Peer) -> None:
    """tcp(7), TCP_CORK."""
    user = peer.connects(cork=True)
    user.sends(100)
    user.sends(1400)
    peer.expects(ACK, seq=1, length=1460)
    peer.sends(ACK)
    peer.expects_nothing()
    peer.expects(ACK, seq=1461, length=40, after=0.2)


def test_more_holds_until_the_rest_is_written(peer: Peer) -> None:
    user = peer.connects()
    user.sends(100, more=True)
    peer.expects_nothing()
    user.sends(100)
    peer.expects(ACK, seq=1, length=200)


def test_more_does_not_hold_for_ever(peer: Peer) -> None:
    """As with TCP_CORK: the program may have died."""
    user = peer.connects()
    user.sends(100, more=True)
    peer.expects(ACK, seq=1, length=100, after=0.2)


def test_a_fin_is_not_held(peer: Peer) -> None:
    user = peer.connects()
    user.sends(100)
    peer.expects(ACK, length=100)
    user.sends(10)
    peer.expects_nothing()
    user.shuts()
    peer.expects(FIN | PSH | ACK, seq=101, length=10)


def test_idling_for_an_rto_shrinks_the_window_again(peer: Peer) -> None:
    """RFC 5681, section 4.1."""
    user = peer.connects(wscale=3)
    for _ in range(4):
        user.sends(29_200)
        while peer.ignores():
            peer.sends(ACK)
    assert user.conn.cc.cwnd > 29_200
    peer.waits(5)
    user.sends(60_000)
    assert sum(seen.length for seen in peer.ignores()) == 14_600
