"""RST, SYN and segments without ACK in every state (RFC 9293, section 3.10.7.4; RFC 5961)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer, User


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
