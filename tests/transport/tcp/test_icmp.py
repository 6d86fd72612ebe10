"""Errors from the network: path MTU reduction and unreachables, true and forged (RFC 1191, RFC 5461, RFC 5927)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.transport.tcp.states import State
from ustack.wire.icmp import ICMP_FRAG_NEEDED, ICMP_HOST_UNREACH, ICMP_NET_UNREACH, ICMP_PORT_UNREACH
from ustack.wire.tcp import ACK, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


@pytest.mark.parametrize("features", [0, FEATURE_CSUM | FEATURE_TSO], ids=["plain", "offload"])
def test_a_narrower_path_gets_smaller_segments_at_once(make_peer: Callable[..., Peer], features: int) -> None:
    """RFC 1191, section 6.4: what was lost to the MTU is sent again without waiting for a timeout."""
    peer = make_peer(features=features)
    user = peer.connects()
    user.sends(2920)
    peer.expects_data(1, 2921)
    peer.reports(ICMP_FRAG_NEEDED, mtu=1000, seq=1)
    got = 1
    while got < 2921:
        for seen in peer.ignores():
            assert seen.length <= 960
            assert seen.seq <= got
            got = max(got, seen.seq + seen.length)
        peer.sends(ACK, ack=got)
    assert peer.world.now == 0
    user.sends(2000)
    peer.expects(ACK, seq=2921, length=960)


def test_the_window_is_not_reduced_by_a_narrower_path(peer: Peer) -> None:
    """RFC 9293, section 3.7.2; RFC 1191, section 6.5: it is no congestion."""
    user = peer.connects()
    user.sends(2920)
    peer.ignores()
    before = user.conn.cc.cwnd
    peer.reports(ICMP_FRAG_NEEDED, mtu=1000, seq=1)
    assert user.conn.cc.cwnd >= before - 1460


@pytest.mark.parametrize("seq", [-100, 2921, 100_000, 1 << 31], ids="{:+}".format)
def test_a_report_about_what_is_not_out_is_forged(peer: Peer, seq: int) -> None:
    """RFC 5927, section 4.1."""
    user = peer.connects()
    user.sends(2920)
    peer.ignores()
    peer.reports(ICMP_FRAG_NEEDED, mtu=600, seq=seq)
    peer.expects_nothing()
    peer.sends(ACK)
    user.sends(2000)
    peer.expects(ACK, length=1460)


def test_a_path_is_never_narrower_than_552(peer: Peer) -> None:
    user = peer.connects()
    user.sends(1460)
    peer.ignores()
    peer.reports(ICMP_FRAG_NEEDED, mtu=68, seq=1)
    peer.expects(ACK, seq=1, length=512)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (ICMP_NET_UNREACH, errno.ENETUNREACH),
        (ICMP_HOST_UNREACH, errno.EHOSTUNREACH),
        (ICMP_PORT_UNREACH, errno.ECONNREFUSED),
    ],
)
def test_unreachable_while_opening_fails_at_once(peer: Peer, code: int, error: int) -> None:
    """RFC 5461."""
    user = peer.is_called()
    peer.expects(SYN)
    peer.reports(code, seq=0, length=0)
    user.fails_with(error)
    assert user.is_in(State.CLOSE)


def test_a_forged_unreachable_while_opening_is_ignored(peer: Peer) -> None:
    user = peer.is_called()
    peer.expects(SYN)
    peer.reports(ICMP_PORT_UNREACH, seq=1, length=0)
    peer.reports(ICMP_PORT_UNREACH, seq=-1, length=0)
    assert user.is_in(State.SYN_SENT)


@pytest.mark.parametrize("code", [ICMP_NET_UNREACH, ICMP_HOST_UNREACH, ICMP_PORT_UNREACH])
def test_unreachable_does_not_end_an_established_connection(peer: Peer, code: int) -> None:
    """RFC 1122, section 4.2.3.9; RFC 5927, section 5.2."""
    user = peer.connects()
    user.sends(100)
    peer.ignores()
    peer.reports(code, seq=1, length=100)
    assert user.is_in(State.ESTABLISHED)
    peer.sends(ACK)
    user.sends(100)
    peer.expects(ACK, seq=101)


def test_but_it_is_what_a_timeout_is_reported_as(peer: Peer) -> None:
    user = peer.connects()
    user.sends(100)
    peer.ignores()
    peer.reports(ICMP_HOST_UNREACH, seq=1, length=100)
    peer.waits(2000)
    user.fails_with(errno.EHOSTUNREACH)


def test_an_old_unreachable_is_forgotten_when_the_peer_answers(peer: Peer) -> None:
    user = peer.connects()
    user.sends(100)
    peer.ignores()
    peer.reports(ICMP_HOST_UNREACH, seq=1, length=100)
    peer.sends(ACK)
    user.sends(100)
    peer.waits(2000)
    user.fails_with(errno.ETIMEDOUT)
