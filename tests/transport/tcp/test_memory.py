"""Short of memory: who sends waits and is woken, what arrives in order is dropped and taken later, nothing is lost or kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pools.gfp import ATOMIC
from ustack.drops import DropReason
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, PSH

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


def hoard(peer: Peer) -> list[int]:
    """Somebody else takes all pages; returns what is to be given back."""
    pages = peer.stack.pages
    owner = pages.owner_id("somebody else")
    taken: list[int] = []
    while got := pages.alloc_bulk(1, ATOMIC, owner):
        taken += got
    return taken


def test_a_sender_without_memory_waits_and_is_woken(peer: Peer) -> None:
    user = peer.connects()
    woken: list[int] = []
    taken = hoard(peer)
    with pytest.raises(BlockingIOError):
        while True:
            user.sends(5000)
    user.conn.wake = woken.append
    before = user.sent
    peer.waits(1)
    assert not woken
    peer.stack.pages.free_bulk(taken)
    peer.waits(1)
    assert woken
    peer.ignores()
    user.sends(5000)
    assert user.sent == before + 5000


def test_data_that_finds_no_memory_is_dropped_and_taken_when_it_comes_again(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(memory=1 << 20)
    user = peer.connects()
    taken: list[int] = []
    while user.expected == peer.nxt:
        taken += hoard(peer)
        peer.sends(ACK | PSH, length=1460)
    lost = user.expected
    assert peer.stack.drops[DropReason.NOMEM] + peer.stack.drops[DropReason.RING_EMPTY] > 0
    peer.ignores()
    peer.stack.pages.free_bulk(taken)
    user.reads(lost - 1)
    peer.sends(ACK | PSH, seq=lost, length=1460)
    assert user.expected == lost + 1460
    user.reads(1460)
    assert user.is_in(State.ESTABLISHED)


def test_over_the_limit_of_all_connections_only_the_minimum_is_received(make_peer: Callable[..., Peer]) -> None:
    """tcp_mem and tcp_rmem[0]."""
    peer = make_peer(config=TcpConfig(mem_high=65536))
    user = peer.connects()
    for _ in range(60):
        peer.sends(ACK, length=1460)
    peer.ignores()
    assert peer.stack.drops[DropReason.PROTO_MEM] > 0
    assert user.conn.receive_queue.truesize < 65536 + 8192
    got = user.expected
    user.reads(got - 1)
    peer.sends(ACK, seq=got, length=1460)
    user.reads(1460)


def test_over_the_limit_a_memalloc_socket_goes_on(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(mem_high=16384))
    user = peer.connects(memalloc=True)
    for _ in range(20):
        peer.sends(ACK, length=1460)
    assert user.expected == 20 * 1460 + 1
    user.reads(20 * 1460)


def test_out_of_order_data_is_given_up_for_data_in_order(peer: Peer) -> None:
    """tcp_prune_ofo_queue: the peer keeps what was only reported by SACK."""
    user = peer.connects(sack=True, rcvbuf=16384)
    seq = 1461
    while user.conn.receive_queue.truesize <= 16384 and seq < 8000:
        peer.sends(ACK, seq=seq, length=500)
        seq += 1000
    assert user.conn.receive_queue.ofo
    peer.ignores()
    while user.conn.receive_queue.truesize <= 16384 and peer.nxt < 1461:
        peer.sends(ACK, length=365)
    peer.sends(ACK, length=100)
    peer.ignores()
    user.reads(user.expected - 1)
    assert user.is_in(State.ESTABLISHED)


def test_unread_data_of_a_dead_connection_is_freed_when_it_is_closed(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(ACK | PSH, length=1000)
    peer.stack.tcp.forget(user.conn)
    assert peer.stack.tcp.receive_account.bytes > 0
    user.closes()
    assert peer.stack.tcp.receive_account.bytes == 0
