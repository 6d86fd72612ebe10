"""Flow control: windows that close, probes, slivers, and limits by truesize (RFC 9293, section 3.8.6)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from ustack.drops import DropReason
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer

HOUR = 3600.0

# -- the peer's window --


def test_a_closed_window_is_probed_with_growing_pauses(peer: Peer) -> None:
    """Section 3.8.6.1."""
    user = peer.connects()
    peer.sends(ACK, window=0)
    user.sends(1000)
    peer.expects_nothing()
    for pause in (0.2, 0.4, 0.8, 1.6, 3.2, 6.4):
        peer.expects(ACK, seq=0, length=0, after=pause)
        peer.sends(ACK, window=0)
        peer.mark = peer.world.now


def test_probes_go_on_for_hours_while_they_are_answered(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(ACK, window=0)
    user.sends(1000)
    probes = 0
    while peer.world.now < 12 * HOUR:
        peer.waits(60)
        for seen in peer.ignores():
            assert seen.seq == 0
            probes += 1
            peer.sends(ACK, window=0)
    assert probes > 300
    peer.sends(ACK, window=1000)
    peer.expects(ACK | PSH, seq=1, length=1000)


def test_probes_that_are_not_answered_end_the_connection(peer: Peer) -> None:
    """R2 of section 3.8.3."""
    user = peer.connects()
    peer.sends(ACK, window=0)
    user.sends(1000)
    peer.waits(1 * HOUR)
    assert len(peer.ignores()) == peer.config.retries2
    user.fails_with(errno.ETIMEDOUT)


def test_a_closed_connection_does_not_probe_for_ever_even_when_answered(peer: Peer) -> None:
    """RFC 6429: a peer that keeps its window closed must not keep our memory."""
    user = peer.connects()
    peer.sends(ACK, window=0)
    user.sends(1000)
    user.closes()
    while peer.world.now < 1 * HOUR and peer.stack.tcp.connections:
        peer.waits(10)
        for _ in peer.ignores():
            peer.sends(ACK, window=0)
    assert not peer.stack.tcp.connections


def test_a_window_that_shrinks_to_nothing_over_sent_data_is_not_a_dead_peer(peer: Peer) -> None:
    """Section 3.8.6: a sender must be robust against shrinking; as long as the peer answers it is alive."""
    user = peer.connects()
    user.sends(1000)
    peer.expects(ACK, seq=1, length=1000)
    peer.sends(ACK, ack=1, window=0)
    while peer.world.now < 2 * HOUR:
        peer.waits(30)
        for _ in peer.ignores():
            peer.sends(ACK, ack=1, window=0)
    assert user.is_in(State.ESTABLISHED)
    peer.sends(ACK, ack=1, window=5000)
    peer.waits(130)
    assert any(seen.seq == 1 and seen.length == 1000 for seen in peer.ignores())


def test_an_opening_window_lets_data_go_at_once(peer: Peer) -> None:
    user = peer.connects()
    peer.sends(ACK, window=0)
    user.sends(5000)
    peer.expects(ACK, seq=0, after=0.2)
    peer.sends(ACK, window=3000)
    peer.expects_data(1, 2921)
    peer.expects_nothing()


def test_a_sliver_of_window_is_not_used_at_once(peer: Peer) -> None:
    """Silly window avoidance of the sender (section 3.8.6.2.1), overridden after the persist time."""
    user = peer.connects()
    peer.sends(ACK, window=0)
    user.sends(5000)
    peer.sends(ACK, window=100)
    peer.expects_nothing()
    peer.expects(ACK, seq=1, length=100, after=0.2)


def test_half_the_largest_window_is_worth_a_small_segment(peer: Peer) -> None:
    """Section 3.8.6.2.1, (3): Fs = 1/2."""
    peer.window = 1000
    user = peer.connects()
    user.sends(5000)
    peer.expects(ACK, seq=1, length=1000)
    peer.sends(ACK, window=499)
    peer.expects_nothing()
    peer.sends(ACK, window=500)
    peer.expects(ACK, seq=1001, length=500)


def test_a_segment_older_than_the_last_does_not_change_the_window(peer: Peer) -> None:
    """Section 3.10.7.4, SND.WL1 and SND.WL2."""
    user = peer.connects()
    peer.sends(ACK | PSH, length=10, window=4000)
    peer.sends(ACK | PSH, length=10, window=5000)
    peer.sends(ACK, seq=1, window=100)
    assert user.conn.snd_wnd == 5000
    peer.sends(ACK, window=200)
    assert user.conn.snd_wnd == 200


def test_retransmissions_stay_in_a_window_that_has_shrunk(peer: Peer) -> None:
    user = peer.connects()
    user.sends(14_600)
    peer.ignores()
    peer.sends(ACK, ack=1, window=1460)
    peer.expects(ACK, seq=1, length=1460, after=0.2)
    peer.expects_nothing()


# -- our window --


def test_our_window_closes_never_shrinks_and_opens_again(peer: Peer) -> None:
    """Sections 3.8.6 and 3.8.6.2.2."""
    user = peer.connects(rcvbuf=16384)
    edge = 8193
    total = 0
    while True:
        window = edge - peer.nxt
        if not window:
            break
        peer.sends(ACK, length=min(window, 1460))
        total = peer.nxt - 1
        peer.waits(0.05)
        for seen in peer.ignores():
            assert seen.ack + seen.window >= edge
            edge = seen.ack + seen.window
    peer.sends(ACK, length=1)
    assert peer.expects(ACK, ack=total + 1).window == 0
    assert peer.stack.drops[DropReason.TCP_ZEROWINDOW] == 1
    peer.nxt = total + 1
    user.reads(100)
    peer.expects_nothing_for(1)
    user.reads(total - 100)
    assert peer.expects(ACK, ack=total + 1).window >= 1460
    peer.sends(ACK, length=1)
    user.reads(1)


def test_a_probe_of_our_closed_window_is_answered(peer: Peer) -> None:
    user = peer.connects(rcvbuf=32768)
    peer.fills_the_window(user)
    for probe in (peer.nxt - 1, peer.nxt):
        peer.waits(1)
        peer.sends(ACK, seq=probe, payload=b"?" if probe == peer.nxt else b"")
        peer.nxt = user.expected
        assert peer.expects(ACK, ack=peer.nxt).window == 0


def test_a_closed_window_does_not_keep_acks_and_resets_out(peer: Peer) -> None:
    """Section 3.10.7.4: special allowance for valid ACKs and RSTs."""
    user = peer.connects(rcvbuf=32768)
    user.sends(100)
    peer.ignores()
    peer.ack = 1
    peer.fills_the_window(user)
    assert user.acknowledged == 1
    peer.sends(ACK, ack=101)
    assert user.acknowledged == 101
    peer.sends(RST, seq=peer.nxt)
    assert user.is_in(State.CLOSE)


def test_tiny_segments_are_limited_by_what_they_cost(peer: Peer) -> None:
    """The limit is by truesize: 40,000 segments of one byte must not cost 40,000 buffers."""
    user = peer.connects(rcvbuf=65536)
    for _ in range(20_000):
        peer.sends(ACK, length=1, settle=False)
        if peer.device.waiting == 64:
            peer.settle()
            peer.ignores()
    peer.settle()
    assert user.conn.receive_queue.truesize <= 65536 + 8192
    assert user.expected == 20_001
    user.reads(20_000)


def test_tiny_segments_out_of_order_are_limited_by_what_they_cost(peer: Peer) -> None:
    user = peer.connects(rcvbuf=65536, sack=True)
    for seq in range(3, 20_000, 2):
        peer.sends(ACK, seq=seq, length=1, settle=False)
        if peer.device.waiting == 64:
            peer.settle()
            peer.ignores()
    peer.settle()
    assert user.conn.receive_queue.truesize <= 65536 + 8192
    peer.ignores()
    peer.sends(ACK, seq=1, length=1000)
    peer.ignores()
    user.reads(1000)


def test_a_reader_who_keeps_up_gets_a_larger_window(peer: Peer) -> None:
    """Receive autotuning."""
    user = peer.connects(wscale=7, ts=1)
    first = user.conn.rcvbuf
    for _ in range(60):
        for _ in range(40):
            peer.sends(ACK, length=1448, settle=False)
        peer.settle()
        user.reads(40 * 1448)
        peer.waits(0.01)
        peer.ts = (peer.ts[0] + 10, peer.ignores()[-1].options.ts_val)
    assert user.conn.rcvbuf > first


def test_with_so_rcvbuf_the_limit_stays(peer: Peer) -> None:
    user = peer.connects(wscale=7, rcvbuf=100_000)
    for _ in range(50):
        for _ in range(20):
            peer.sends(ACK, length=1460, settle=False)
        peer.settle()
        user.reads(20 * 1460)
        peer.waits(0.01)
        peer.ignores()
    assert user.conn.rcvbuf == 100_000


# -- the send limit --


def test_a_full_send_queue_blocks_and_is_announced_when_it_drains(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(wmem_max=65536))
    user = peer.connects(sndbuf=32768)
    taken = user.sends(100_000)
    assert taken < 100_000
    assert not user.conn.writable
    with pytest.raises(BlockingIOError):
        user.sends(1)
    woken: list[int] = []
    user.conn.wake = woken.append
    while peer.ack < 1 + taken:
        peer.sends(ACK)
    peer.sends(ACK)
    assert woken
    assert user.conn.writable


def test_a_fin_ends_a_stream_that_filled_the_window(peer: Peer) -> None:
    user = peer.connects(rcvbuf=32768)
    total = peer.fills_the_window(user)
    peer.sends(FIN | ACK)
    peer.ignores()
    user.reads(total)
    user.reads_end()
