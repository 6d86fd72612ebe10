"""No room for a segment: what a receiver does, in the order of tcp_prune_queue, and what is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pools.base import NULL
from pools.gfp import ATOMIC
from tests.transport.tcp.peer import Peer, pattern
from ustack.drops import DropReason
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO, NO_CSUM
from ustack.link.rxring import LinearRing
from ustack.link.simwire import WireFrame
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.output import WINDOW_UNCLAMPED
from ustack.transport.tcp.prune import make_room, prune_ofo_queue
from ustack.wire import ethernet, ipv4
from ustack.wire.tcp import ACK

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import User
    from ustack.link.rxring import RxRing
    from ustack.skb import SkbMemory

SEGMENT = 2304
"""Truesize of a full segment: 2048 for the buffer and 256 for the head."""


def counted(peer: Peer, *names: str) -> dict[str, int]:
    """What was counted under these names, without the zeros."""
    return {name: getattr(peer.stack.mib, name) for name in names if getattr(peer.stack.mib, name)}


RECEIVING = (
    "TcpExtPruneCalled",
    "TcpExtRcvPruned",
    "TcpExtOfoPruned",
    "TcpExtTCPRcvCollapsed",
    "TcpExtTCPRcvQDrop",
    "TcpExtTCPOFODrop",
)


def super_frame(peer: Peer, length: int) -> None:
    """The peer sends `length` bytes in one frame that its device has not cut."""
    segment = peer._build(ACK, peer.nxt, peer.ack, peer.window, b"", pattern(peer.nxt, length))
    packet = ipv4.build_header(bytes((10, 0, 0, 2)), bytes((10, 0, 0, 1)), ipv4.IPPROTO_TCP, len(segment)) + segment
    frame = ethernet.build_header(peer.device.mac, b"\x02\x00\x00\x00\x00\x02", ethernet.ETH_P_IP) + packet
    peer.nxt += length
    peer.device.receive(WireFrame(frame, 0, NO_CSUM, 1460))
    peer.settle()


def fill(peer: Peer, user: User, most: int) -> None:
    """In-order segments until the receive queue holds more than `most` bytes."""
    while user.conn.receive_queue.truesize <= most:
        peer.sends(ACK, length=1460)
        peer.ignores()


def test_over_its_limit_a_queue_that_cannot_be_helped_drops(peer: Peer) -> None:
    user = peer.connects(rcvbuf=10 * SEGMENT)
    user.conn.rcv_adv = user.conn.rcv_nxt + 60_000  # a window that was promised when there was room
    fill(peer, user, 10 * SEGMENT)
    assert not counted(peer, *RECEIVING)
    peer.sends(ACK, length=1460)
    assert counted(peer, *RECEIVING) == {"TcpExtPruneCalled": 1, "TcpExtRcvPruned": 1, "TcpExtTCPRcvQDrop": 1}
    assert peer.stack.drops[DropReason.SOCKET_RCVBUFF] == 1
    assert user.conn.charges.drops == 1
    assert user.conn.rcv_ssthresh == 2 * 1460
    assert user.conn.quick_acks == 0
    peer.nxt -= 1460
    user.reads(user.expected - 1)
    peer.ignores()
    peer.sends(ACK, length=1460)
    user.reads(1460)


def test_short_frames_in_long_buffers_are_collapsed_before_anything_is_dropped(make_peer: Callable[..., Peer]) -> None:
    def ring(memory: SkbMemory, _: int) -> RxRing:
        return LinearRing(memory, 9014)

    peer = make_peer(ring=ring, memory=16 << 20)
    user = peer.connects(rcvbuf=10 * 16640)
    user.conn.rcv_adv = user.conn.rcv_nxt + 60_000
    fill(peer, user, 10 * 16640)
    peer.sends(ACK, length=1460)
    assert peer.stack.drops.total() == 0
    assert counted(peer, *RECEIVING) == {"TcpExtPruneCalled": 1, "TcpExtTCPRcvCollapsed": 7}
    user.reads(12 * 1460)


def test_out_of_order_data_goes_from_the_far_end_an_eighth_at_a_time(peer: Peer) -> None:
    user = peer.connects(sack=True, rcvbuf=16 * SEGMENT)
    user.conn.rcv_adv = user.conn.rcv_nxt + 60_000
    for n in range(6):
        peer.sends(ACK, seq=40_001 + n * 3000, length=1460)
    fill(peer, user, 16 * SEGMENT)
    ofo = user.conn.receive_queue.ofo
    assert len(ofo) == 6
    peer.ignores()
    peer.sends(ACK, length=1460)
    assert [skb.seq - user.conn.irs for skb in ofo] == [40_001, 43_001, 46_001, 49_001], "two segments are an eighth"
    assert counted(peer, *RECEIVING) == {"TcpExtPruneCalled": 1, "TcpExtOfoPruned": 1}
    assert peer.stack.drops[DropReason.TCP_OFO_QUEUE_PRUNE] == 2
    assert user.conn.charges.drops == 2
    assert user.expected == peer.nxt, "what is in order was taken"
    assert all(not seen.options.sack for seen in peer.ignores()), "SACK is reset"


def test_what_lies_before_the_arriving_segment_is_not_pruned_for_it(peer: Peer) -> None:
    user = peer.connects(sack=True, rcvbuf=4 * SEGMENT)
    user.conn.rcv_adv = user.conn.rcv_nxt + 60_000
    for n in range(1, 6):
        peer.sends(ACK, seq=1 + n * 3000, length=1460)
    assert user.conn.receive_queue.truesize == 5 * SEGMENT
    peer.sends(ACK, seq=50_001, length=1460)
    assert len(user.conn.receive_queue.ofo) == 5
    assert counted(peer, *RECEIVING) == {"TcpExtPruneCalled": 1, "TcpExtRcvPruned": 1, "TcpExtTCPOFODrop": 1}
    assert peer.stack.drops[DropReason.SOCKET_RCVBUFF] == 1
    peer.sends(ACK, seq=7001, length=1460)
    assert [skb.seq - user.conn.irs for skb in user.conn.receive_queue.ofo] == [3001, 6001, 7461, 9001, 12_001]
    peer.ignores()


def test_nothing_to_read_and_one_segment_is_taken_whatever_the_limits_say(make_peer: Callable[..., Peer]) -> None:
    """sk_forced_mem_schedule: or both sides would wait for ever."""
    peer = make_peer(config=TcpConfig(mem_low=4096, mem_pressure=4096, mem_high=4096, rmem_min=1))
    user = peer.connects()
    assert user.conn.tcp.mem.sockets == 1
    peer.stack.tcp.mem.take_over(10)  # others hold it all
    peer.sends(ACK, length=1460)
    assert user.expected == 1461
    peer.sends(ACK, length=1460)
    assert user.expected == 1461
    assert peer.stack.drops[DropReason.PROTO_MEM] == 1
    peer.nxt -= 1460
    user.reads(1460)
    peer.ignores()
    peer.sends(ACK, length=1460)
    user.reads(1460)
    peer.stack.tcp.mem.give(10)


def test_with_plenty_of_memory_an_autotuned_limit_follows_what_is_queued(peer: Peer) -> None:
    user = peer.connects()
    conn = user.conn
    conn.rcvbuf = 4 * SEGMENT
    for _ in range(10):
        peer.sends(ACK, length=1460)
    assert peer.stack.drops.total() == 0
    assert conn.rcvbuf == 9 * SEGMENT
    assert conn.rcv_ssthresh == WINDOW_UNCLAMPED
    user.reads(14_600)


def test_a_clamped_window_opens_again_with_what_arrives(peer: Peer) -> None:
    user = peer.connects(wscale=4)
    conn = user.conn
    conn.rcv_ssthresh = 2 * 1460
    for expected in (4, 6, 8):
        peer.sends(ACK, length=1460)
        assert conn.rcv_ssthresh == expected * 1460
        user.reads(1460)
    while conn.rcv_ssthresh != WINDOW_UNCLAMPED:
        peer.sends(ACK, length=1460)
        user.reads(1460)
    peer.ignores()


def test_a_slow_reader_of_super_frames_is_charged_for_what_is_left(make_peer: Callable[..., Peer]) -> None:
    """With a fixed receive limit the pages that were read must not stand in the way of the next super-frame."""
    peer = make_peer(features=FEATURE_CSUM | FEATURE_TSO)
    user = peer.connects(rcvbuf=65536, wscale=0)
    conn = user.conn
    super_frame(peer, 28_000)
    held = conn.charges.rmem_alloc
    user.reads(26_000)
    assert conn.charges.rmem_alloc <= held - 5 * 4096
    for _ in range(20):
        left = user.edge - peer.nxt
        assert left > 15_000, "what was read makes room"
        super_frame(peer, left)
        user.reads(left)
        peer.ignores()
    assert peer.stack.drops.total() == 0


@pytest.mark.parametrize("memalloc", [False, True])
def test_pressure_takes_all_out_of_order_data_of_an_ordinary_socket(make_peer: Callable[..., Peer], memalloc: bool) -> None:
    peer = make_peer(config=TcpConfig(mem_low=4096, mem_pressure=16 * 4096, mem_high=20 * 4096, rmem_min=1))
    user = peer.connects(sack=True, memalloc=memalloc)
    for n in range(1, 9):
        peer.sends(ACK, seq=1 + n * 3000, length=1460)
    peer.stack.tcp.mem.take_over(20)
    peer.sends(ACK, length=1460)
    peer.ignores()
    assert user.expected == 1461
    assert len(user.conn.receive_queue.ofo) == (8 if memalloc else 0)
    assert peer.stack.drops[DropReason.TCP_OFO_QUEUE_PRUNE] == (0 if memalloc else 8)
    peer.stack.tcp.mem.give(20)


def test_with_room_nothing_is_pruned(peer: Peer) -> None:
    user = peer.connects()
    assert not prune_ofo_queue(user.conn, user.conn.rcv_nxt)
    assert make_room(user.conn, user.conn.rcv_nxt, SEGMENT) is None
    user.conn.charges.reclaim()
    assert not counted(peer, *RECEIVING)


def test_who_drops_for_want_of_room_says_a_window_of_zero_until_there_is_some(peer: Peer) -> None:
    user = peer.connects(rcvbuf=10 * SEGMENT)
    promised = user.conn.rcv_adv = user.conn.rcv_nxt + 60_000
    fill(peer, user, 10 * SEGMENT)
    for _ in range(2):  # however often it comes
        peer.sends(ACK, length=1460)
        assert peer.expects(ACK).window == 0
        assert user.conn.rcv_adv == promised, "what was promised is taken when there is room, and never shrinks"
        peer.nxt -= 1460
    user.reads(user.expected - 1)
    assert peer.expects(ACK).window > 0, "the user has read: the peer need not probe to learn of it"
    peer.sends(ACK, length=1460)
    user.reads(1460)


def test_the_window_opens_when_what_had_no_room_comes_again(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    user = peer.connects()
    pages = peer.stack.pages
    peer.sends(ACK, length=1460)
    peer.ignores()
    owner = pages.owner_id("hog")
    hog = list(iter(lambda: pages.alloc(0, ATOMIC, owner), NULL))
    while not peer.stack.mib.TcpExtTCPRcvQDrop:
        peer.sends(ACK, length=1460)
    assert peer.expects(ACK).window == 0
    for pfn in hog:
        pages.free(pfn, 0)
    peer.nxt -= 1460
    peer.sends(ACK, length=1460)
    assert peer.expects(ACK).window > 0
    user.reads(user.expected - 1)
