"""What happens when nothing arrives: keepalive and user timeouts (RFC 9293, section 3.8; RFC 5482)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST

if TYPE_CHECKING:
    from tests.transport.tcp.peer import Peer


def test_an_idle_connection_is_probed_and_lives_while_the_peer_answers(peer: Peer) -> None:
    """RFC 9293, section 3.8.4."""
    user = peer.connects(keepalive=True)
    for _ in range(5):
        probe = peer.expects(ACK, seq=0, ack=1, length=0, after=7200)
        assert probe.flags == ACK
        peer.sends(ACK)
    assert user.is_in(State.ESTABLISHED)


def test_a_peer_that_does_not_answer_probes_is_given_up(peer: Peer) -> None:
    user = peer.connects(keepalive=True, keepidle=10.0, keepintvl=5.0, keepcnt=3)
    peer.expects(ACK, seq=0, after=10)
    peer.expects(ACK, seq=0, after=5)
    peer.expects(ACK, seq=0, after=5)
    peer.expects(RST | ACK, seq=1, after=5)
    user.fails_with(errno.ETIMEDOUT)


def test_keepalive_is_off_unless_asked_for(peer: Peer) -> None:
    peer.connects()
    peer.expects_nothing_for(50_000)


def test_traffic_puts_the_probes_off(peer: Peer) -> None:
    user = peer.connects(keepalive=True, keepidle=10.0)
    for _ in range(5):
        peer.waits(6)
        peer.sends(ACK | PSH, length=10)
        peer.ignores()
    user.reads(50)
    peer.expects(ACK, seq=0, after=10 - 0.0)


def test_a_peer_that_restarted_answers_a_probe_with_a_reset(peer: Peer) -> None:
    user = peer.connects(keepalive=True, keepidle=10.0)
    probe = peer.expects(ACK, seq=0, after=10)
    peer.sends(RST, seq=probe.ack)
    user.fails_with(errno.ECONNRESET)


def test_unacknowledged_data_ends_the_connection_after_the_user_timeout(peer: Peer) -> None:
    """RFC 5482; tcp(7), TCP_USER_TIMEOUT: exactly then, not at the retransmission after it."""
    user = peer.connects(user_timeout=10.0)
    user.sends(100)
    peer.waits(9.9)
    assert user.is_in(State.ESTABLISHED)
    peer.waits(0.2)
    assert user.is_in(State.CLOSE)
    user.fails_with(errno.ETIMEDOUT)


def test_writing_more_does_not_put_the_user_timeout_off(peer: Peer) -> None:
    user = peer.connects(user_timeout=5.0)
    while peer.world.now < 5.1 and user.is_in(State.ESTABLISHED):
        user.sends(2000)
        peer.waits(0.3)
    user.fails_with(errno.ETIMEDOUT)


def test_an_acknowledgment_puts_the_user_timeout_off(peer: Peer) -> None:
    user = peer.connects(user_timeout=5.0)
    for _ in range(10):
        user.sends(100)
        peer.waits(3)
        peer.sends(ACK)
    assert user.is_in(State.ESTABLISHED)


def test_data_that_a_closed_window_holds_back_is_subject_to_the_user_timeout(peer: Peer) -> None:
    """tcp(7): or buffered data may remain untransmitted due to zero window size."""
    user = peer.connects(user_timeout=20.0)
    peer.sends(ACK, window=0)
    user.sends(100)
    while peer.world.now < 19.5:
        peer.waits(0.5)
        for _ in peer.ignores():
            peer.sends(ACK, window=0)
    assert user.is_in(State.ESTABLISHED)
    peer.waits(1)
    user.fails_with(errno.ETIMEDOUT)


def test_the_user_timeout_replaces_the_number_of_keepalive_probes(peer: Peer) -> None:
    """tcp(7): TCP_USER_TIMEOUT overrides keepalive to determine when to close a connection."""
    user = peer.connects(keepalive=True, keepidle=10.0, keepintvl=1.0, keepcnt=3, user_timeout=15.0)
    peer.waits(14.5)
    assert user.is_in(State.ESTABLISHED)
    peer.waits(1.1)
    user.fails_with(errno.ETIMEDOUT)


@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_nothing_is_left_of_a_connection_that_ended_with_timers_set(peer: Peer, pause: float) -> None:
    user = peer.connects(keepalive=True, keepidle=5.0)
    user.sends(100)
    peer.ignores()
    peer.waits(pause)
    peer.sends(ACK | PSH, ack=1, length=10)
    peer.sends(RST, seq=peer.nxt)
    peer.ignores()
    peer.expects_nothing_for(10_000)
    assert not peer.stack.tcp.connections


def test_fin_wait_2_ends_also_with_keepalive(peer: Peer) -> None:
    user = peer.connects(keepalive=True, keepidle=30.0)
    user.closes()
    peer.expects(FIN | ACK)
    peer.sends(ACK)
    peer.waits(61)
    assert not peer.stack.tcp.connections
