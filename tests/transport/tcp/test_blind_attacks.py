"""Who does not see the connection's segments can neither reset nor fill it (RFC 5961), nor keep us busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.drops import DropReason
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


def test_a_reset_in_the_window_but_not_at_its_edge_is_challenged(peer: Peer) -> None:
    """Section 3.2."""
    user = peer.connects()
    peer.sends(RST, seq=2)
    peer.expects(ACK, seq=1, ack=1)
    peer.sends(RST | ACK, seq=60_000)
    peer.expects(ACK, seq=1, ack=1)
    assert user.is_in(State.ESTABLISHED)
    assert peer.stack.mib.TcpExtTCPChallengeACK == 2


def test_a_reset_outside_the_window_is_dropped(peer: Peer) -> None:
    peer.connects()
    for seq in (0, -1000, 70_000, 1 << 30, 1 << 31):
        peer.sends(RST, seq=seq)
    peer.expects_nothing()
    assert peer.stack.drops[DropReason.TCP_RESET] == 5


def test_the_challenge_lets_a_peer_that_really_forgot_reset(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(RST, seq=2)
    challenge = peer.expects(ACK)
    peer.sends(RST, seq=challenge.ack)
    assert user.is_in(State.CLOSE)


def test_a_syn_in_the_window_does_not_end_the_connection(peer: Peer) -> None:
    """Section 4.2."""
    user = peer.connects()
    peer.sends(SYN, seq=100, mss=1460)
    peer.expects(ACK, seq=1, ack=1)
    peer.sends(SYN | ACK, seq=100, mss=1460)
    peer.expects(ACK, seq=1, ack=1)
    assert user.is_in(State.ESTABLISHED)


@pytest.mark.parametrize("ack", [-70_000, 1 << 31, 1461, 5000], ids="{:+}".format)
def test_data_with_an_impossible_ack_is_not_taken(peer: Peer, ack: int) -> None:
    """Section 5.2: older than the largest window before SND.UNA, or of what was never sent."""
    user = peer.connects()
    peer.sends(ACK | PSH, length=10, ack=ack)
    peer.expects(ACK, seq=1, ack=1)
    user.has_nothing_to_read()
    assert peer.stack.drops[DropReason.TCP_INVALID_ACK] == 1


def test_data_with_an_old_ack_is_taken(peer: Peer) -> None:
    user = peer.connects()
    user.sends(1000)
    peer.expects(ACK, length=1000)
    peer.sends(ACK)
    peer.sends(ACK | PSH, length=10, ack=1)
    user.reads(10)


def test_challenges_are_limited(make_peer: Callable[..., Peer]) -> None:
    """Section 7. The limit is not exactly the configured one, or an attacker could count by it (CVE-2016-5696)."""
    peer = make_peer(config=TcpConfig(challenge_ack_limit=20))
    peer.connects()
    counts = set()
    for _ in range(10):
        for _ in range(50):
            peer.sends(RST, seq=100)
        counts.add(len(peer.ignores()))
        peer.waits(1.0)
    assert all(10 <= count <= 30 for count in counts)
    assert len(counts) > 1


def test_two_ends_that_disagree_do_not_answer_each_other_for_ever(peer: Peer) -> None:
    """An ACK from outside the window is answered, but not each one (tcp_invalid_ratelimit of Linux, for ACK loops)."""
    peer.connects()
    for _ in range(100):
        peer.sends(ACK, seq=-5000, ack=1)
    assert 1 <= len(peer.ignores()) <= 2
    peer.waits(0.6)
    peer.sends(ACK, seq=-5000, ack=1)
    peer.expects(ACK, seq=1, ack=1)


def test_old_data_is_always_acknowledged(peer: Peer) -> None:
    """Our acknowledgments were lost: the peer must learn of each."""
    user = peer.connects()
    peer.sends(ACK | PSH, length=100)
    user.reads(100)
    peer.ignores()
    for _ in range(5):
        peer.sends(ACK | PSH, seq=1, length=100)
        peer.expects(ACK, ack=101)


def test_a_fin_out_of_the_window_does_nothing(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(FIN | ACK, seq=80_000)
    peer.expects(ACK, ack=1)
    user.has_nothing_to_read()
    peer.sends(FIN | ACK, seq=-2)
    user.has_nothing_to_read()
