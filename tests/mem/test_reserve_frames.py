"""Frames in buffers from the reserve: who may have them (Linux 3.6: skb_pfmemalloc_protocol, sk_filter)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.transport.tcp.peer import PEER_ADDRESS, PEER_MAC, ROUTER_ADDRESS, STACK_ADDRESS, Peer
from ustack.drops import DropReason
from ustack.link.rxring import LinearRing
from ustack.wire import arp, ethernet, icmp, ipv4, udp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4
from ustack.wire.tcp import ACK, SYN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.transport.udp import UdpSocket


class ReserveRing(LinearRing):
    """A ring all of whose buffers came from the reserve."""

    __slots__ = ()

    def _aim(self) -> None:
        super()._aim()
        self.frame.pfmemalloc = True


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A peer of a stack that has nothing but reserve to receive into."""
    peer = Peer(ring=ReserveRing)
    yield peer
    peer.close()


def dropped(peer: Peer) -> int:
    """Frames that were dropped because they lay in the reserve."""
    return peer.stack.drops[DropReason.PFMEMALLOC]


def packet(protocol: int, payload: bytes, source: bytes = PEER_ADDRESS, fragment: int = 0) -> bytes:
    """An IPv4 packet to the stack."""
    header = bytearray(ipv4.build_header(source, STACK_ADDRESS, protocol, len(payload)))
    if fragment:
        header[6:8] = fragment.to_bytes(2)
        header[10:12] = bytes(2)
        header[10:12] = finish(ones_sum(header)).to_bytes(2)
    return bytes(header) + payload


def echo_request() -> bytes:
    """A ping."""
    return icmp.build_header(icmp.ICMP_ECHO, 0, 1, 1, [b"ping"]) + b"ping"


def datagram(port: int) -> bytes:
    """A UDP datagram to `port`."""
    body = (99).to_bytes(2) + port.to_bytes(2) + (12).to_bytes(2) + bytes(2) + b"data"
    checksum = finish(pseudo_v4(PEER_ADDRESS, STACK_ADDRESS, ipv4.IPPROTO_UDP, len(body)) + ones_sum(body)) or 0xFFFF
    return body[: udp.OFF_CSUM] + checksum.to_bytes(2) + body[udp.OFF_CSUM + 2 :]


def listening(peer: Peer, *, memalloc: bool) -> UdpSocket:
    """A UDP socket of ours on port 7."""
    socket = peer.stack.udp.socket()
    socket.options.memalloc = memalloc
    socket.bind(bytes(4), 7)
    return socket


@pytest.mark.parametrize("ethertype", [0x0806, 0x0800, 0x86DD, 0x8100])
def test_what_a_memalloc_peer_may_be_reached_by_is_let_in(peer: Peer, ethertype: int) -> None:
    before = dropped(peer)
    peer._put(ethertype, bytes(46))
    peer.settle()
    assert dropped(peer) == before


@pytest.mark.parametrize("ethertype", [0x88CC, 0x8847, 0x9999])
def test_other_protocols_are_dropped_before_anybody_looks_at_them(peer: Peer, ethertype: int) -> None:
    peer._put(ethertype, bytes(46))
    peer.settle()
    assert dropped(peer) == 1
    assert peer.stack.drops[DropReason.UNHANDLED_PROTO] == 0


def test_arp_is_answered(peer: Peer) -> None:
    peer.settle()
    answered: list[bytes] = []
    peer.device.wire = lambda frame: answered.append(bytes(frame.data))
    peer._put(ethernet.ETH_P_ARP, arp.build(arp.ARPOP_REQUEST, PEER_MAC, PEER_ADDRESS, bytes(6), STACK_ADDRESS))
    peer.settle()
    assert len(answered) == 1


def test_pings_and_fragments_and_igmp_are_dropped(peer: Peer) -> None:
    for protocol, payload, fragment in ((1, echo_request(), 0), (17, bytes(64), 0x2000), (2, bytes(8), 0)):
        before = dropped(peer)
        peer._put(ethernet.ETH_P_IP, packet(protocol, payload, fragment=fragment))
        peer.settle()
        assert dropped(peer) == before + 1
    assert peer.stack.mib.IcmpOutEchoReps == 0


@pytest.mark.parametrize("memalloc", [False, True])
def test_a_datagram_is_for_a_memalloc_socket_or_dropped(peer: Peer, memalloc: bool) -> None:
    socket = listening(peer, memalloc=memalloc)
    peer._put(ethernet.ETH_P_IP, packet(ipv4.IPPROTO_UDP, datagram(7)))
    peer.settle()
    assert socket.readable == memalloc
    assert dropped(peer) == (not memalloc)
    socket.close()


@pytest.mark.parametrize("memalloc", [False, True])
def test_a_syn_is_for_a_memalloc_listener_or_dropped(peer: Peer, memalloc: bool) -> None:
    peer.listens(memalloc=memalloc)
    peer.sends(SYN, seq=0, mss=1460)
    if memalloc:
        peer.expects(SYN | ACK)
    else:
        peer.expects_nothing()
        assert dropped(peer) == 1


@pytest.mark.parametrize("memalloc", [False, True])
def test_an_icmp_error_is_about_a_memalloc_socket_or_dropped(peer: Peer, memalloc: bool) -> None:
    """The path to the NBD server may become narrower while memory is short."""
    peer.listens(memalloc=True)
    user = peer.connects(memalloc=True)
    user.conn.options.memalloc = memalloc
    user.sends(1460)
    peer.expects(ACK, seq=1, length=1460)
    peer.reports(4, mtu=1000, seq=1)
    assert (user.conn.path.mtu == 1000) == memalloc
    assert dropped(peer) == (not memalloc)


def test_an_icmp_error_about_nobody_is_dropped(peer: Peer) -> None:
    quoted = packet(ipv4.IPPROTO_TCP, bytes(20), STACK_ADDRESS)
    message = icmp.build_header(icmp.ICMP_DEST_UNREACH, 3, 0, 0, [quoted]) + quoted
    peer._put(ethernet.ETH_P_IP, packet(ipv4.IPPROTO_ICMP, message, ROUTER_ADDRESS))
    peer.settle()
    assert dropped(peer) + peer.stack.mib.IcmpInErrors == 1
