"""TIME-WAIT: what it answers, and who may end it (RFC 9293, section 3.6.1; RFC 1337; RFC 6191)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


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
