"""Memory pressure on one connection: what it does not do any more, what memalloc sockets go on doing, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.transport.tcp.test_memory import hoard
from ustack.drops import DropReason
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.output import WINDOW_UNCLAMPED, receive_window
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer
    from ustack.link.simwire import WireFrame
    from ustack.transport.tcp.connection import Connection

MEM = TcpConfig(mem_low=16 * 4096, mem_pressure=24 * 4096, mem_high=32 * 4096)


@pytest.fixture
def pressed(make_peer: Callable[..., Peer]) -> Peer:
    """A peer of a stack whose TCP is under pressure as soon as `press` says so."""
    return make_peer(config=MEM, features=FEATURE_CSUM | FEATURE_TSO)


def press(peer: Peer) -> None:
    """Others hold so much that there is pressure."""
    peer.stack.tcp.mem.take_over(25)
    peer.stack.tcp.mem.enter_pressure()


def relieve(peer: Peer) -> None:
    """They give it back."""
    peer.stack.tcp.mem.give(25)


def window_without_promise(conn: Connection) -> int:
    """The window that would be advertised if none had been."""
    promised, conn.rcv_adv = conn.rcv_adv, conn.rcv_nxt
    window = receive_window(conn)
    conn.rcv_adv = promised
    return window


def test_a_syn_is_dropped_and_answered_when_it_is_over(pressed: Peer) -> None:
    pressed.listens()
    press(pressed)
    pressed.sends(SYN, seq=0, mss=1460)
    pressed.expects_nothing()
    assert pressed.stack.drops[DropReason.MEM_PRESSURE] == 1
    assert pressed.stack.mib.TcpExtListenDrops == 1
    relieve(pressed)
    pressed.nxt = 0
    pressed.sends(SYN, seq=0, mss=1460)
    pressed.expects(SYN | ACK, seq=0, ack=1)


def test_a_memalloc_listener_goes_on_accepting(pressed: Peer) -> None:
    pressed.listens(memalloc=True)
    press(pressed)
    user = pressed.connects()
    assert user.is_in(State.ESTABLISHED)
    relieve(pressed)


@pytest.mark.parametrize("memalloc", [False, True])
def test_the_window_comes_down_to_four_segments(pressed: Peer, memalloc: bool) -> None:
    user = pressed.connects(wscale=2, memalloc=memalloc)
    conn = user.conn
    wide = window_without_promise(conn)
    assert wide > 40_000
    press(pressed)
    window = window_without_promise(conn)
    assert window == wide if memalloc else 4 * 1460 - (1 << conn.rcv_wscale) < window <= 4 * 1460
    relieve(pressed)
    pressed.sends(ACK, length=1460)
    user.reads(1460)
    assert conn.rcv_ssthresh == (WINDOW_UNCLAMPED if memalloc else 6 * 1460)
    pressed.ignores()


def test_a_promised_window_is_not_taken_back(pressed: Peer) -> None:
    user = pressed.connects(wscale=2)
    edge = user.edge
    press(pressed)
    pressed.sends(ACK, length=1460)
    user.reads(1460)
    assert edge <= user.edge < edge + (1 << user.conn.rcv_wscale)
    relieve(pressed)
    pressed.ignores()


def test_limits_do_not_grow(pressed: Peer) -> None:
    user = pressed.connects()
    conn = user.conn
    press(pressed)
    sndbuf, rcvbuf = conn.sndbuf, conn.rcvbuf
    for _ in range(30):
        pressed.waits(0.01)
        pressed.sends(ACK, length=1460)
        user.reads(1460)
        user.sends(1460)
        pressed.sends(ACK)
        pressed.ignores()
    conn.rcvq_space = 1
    conn.rcvq_seq -= 100_000
    pressed.waits(1)
    pressed.sends(ACK, length=1460)
    user.reads(1460)
    assert (conn.sndbuf, conn.rcvbuf) == (sndbuf, rcvbuf)
    relieve(pressed)
    pressed.stack.tcp.mem.low = 1000
    conn.rcvq_space = 1
    conn.rcvq_seq -= 100_000
    pressed.waits(1)
    pressed.sends(ACK, length=1460)
    user.reads(1460)
    assert conn.rcvbuf > rcvbuf
    pressed.ignores()


def test_a_transmission_is_no_super_frame(pressed: Peer) -> None:
    user = pressed.connects()
    sizes: list[int] = []
    wire = pressed.device.wire
    assert wire is not None

    def watch(frame: WireFrame) -> None:
        sizes.append(len(frame.data) - 54)
        wire(frame)

    pressed.device.wire = watch
    user.sends(14_600)
    assert max(sizes) == 14_600
    pressed.sends(ACK)
    press(pressed)
    sizes.clear()
    user.sends(14_600)
    assert max(sizes) == 4 * 1460
    pressed.sends(ACK)
    relieve(pressed)
    pressed.ignores()


def test_a_sender_over_the_limit_gets_its_minimum_and_is_woken_later(pressed: Peer) -> None:
    user = pressed.connects()
    conn = user.conn
    woken: list[int] = []
    pressed.sends(ACK, window=0)
    pressed.stack.tcp.mem.take_over(32)
    user.sends(1000)
    with pytest.raises(BlockingIOError):
        while True:
            user.sends(3000)
    assert conn.send_queue.account.bytes >= 4096
    assert conn.sndbuf == max(conn.send_queue.account.bytes >> 1, 4608)
    assert pressed.stack.tcp.mem.over_pressure
    conn.wake = woken.append
    pressed.waits(1)
    assert not woken
    pressed.stack.tcp.mem.give(32)
    pressed.waits(0.1)
    assert woken
    pressed.ignores()


def test_a_send_that_finds_no_page_begins_pressure_only_where_tcp_holds_something(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    user = peer.connects()
    taken = hoard(peer)
    with pytest.raises(BlockingIOError):
        while True:
            user.sends(5000)
    assert not peer.stack.tcp.mem.over_pressure, "others hold the arena: nothing that TCP does would end it"
    peer.stack.pages.free_bulk(taken)
    peer.ignores()


def test_an_orphan_that_nobody_can_afford_is_reset(pressed: Peer) -> None:
    """tcp_check_oom."""
    user = pressed.connects()
    pressed.sends(ACK, window=0)
    user.sends(30_000)
    pressed.ignores()
    pressed.stack.tcp.mem.take_over(32)
    user.closes()
    pressed.expects(RST | ACK)
    assert user.is_in(State.CLOSE)
    assert pressed.stack.mib.TcpExtTCPAbortOnMemory == 1
    pressed.stack.tcp.mem.give(32)


def test_an_orphan_is_reset_by_its_timer_too(pressed: Peer) -> None:
    user = pressed.connects()
    pressed.sends(ACK, window=0)
    user.sends(30_000)
    user.closes()
    assert not user.is_in(State.CLOSE)
    pressed.stack.tcp.mem.take_over(32)
    pressed.waits(60)
    assert user.is_in(State.CLOSE)
    assert pressed.stack.mib.TcpExtTCPAbortOnMemory == 1
    pressed.ignores()
    pressed.stack.tcp.mem.give(32)


def test_with_memory_to_spare_an_orphan_sends_what_it_has(pressed: Peer) -> None:
    user = pressed.connects()
    user.sends(14_600)
    user.closes()
    pressed.expects_data(1, 14_601)
    pressed.expects(ACK | FIN, seq=14_601, length=0)


def test_times_under_pressure_are_counted(pressed: Peer) -> None:
    pressed.connects()
    for _ in range(2):
        press(pressed)
        pressed.waits(1.5)
        relieve(pressed)
        pressed.waits(1)
    assert pressed.stack.mib.TcpExtTCPMemoryPressures == 2
    assert pressed.stack.mib.TcpExtTCPMemoryPressuresChrono == 3000
