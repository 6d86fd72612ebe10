"""The frames of floods are what a network would send: other programs can read them, and their checksums are right."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import dpkt
import pytest

from ustack.lab.pressure.frames import CROWD_PORT, NOBODYS_PORT, FloodTraffic, FrameSource, size_between
from ustack.lab.pressure.scenario import ArpFlood, Fragments, IcmpFlood, SynFlood, UdpBlocked
from ustack.wire.checksum import finish, ones_sum

if TYPE_CHECKING:
    from collections.abc import Iterator

SRC, DST = bytes((10, 77, 0, 1)), bytes((10, 77, 0, 2))
SRC_MAC, DST_MAC = bytes((2, 0, 0, 0, 0, 1)), bytes((2, 0, 0, 0, 0, 2))
PORT = 20_005


def frames(traffic: FloodTraffic, count: int = 20, mtu: int = 1500) -> Iterator[dpkt.ethernet.Ethernet]:
    """What comes, as dpkt reads it."""
    source = FrameSource(
        traffic, Random(1), src=SRC, src_mac=SRC_MAC, dst=DST, dst_mac=DST_MAC, mtu=mtu, first_port=PORT
    )  # fmt: skip
    for _ in range(count):
        for data in source.next():
            assert len(data) <= 14 + mtu
            frame = dpkt.ethernet.Ethernet(data)
            if frame.type == dpkt.ethernet.ETH_TYPE_IP:
                assert finish(ones_sum(data[14:34])) == 0, "checksum of the header"
            yield frame


def test_datagrams_go_round_the_sockets_and_are_of_the_sizes_that_were_asked_for() -> None:
    traffic = UdpBlocked(kind="udp_blocked", count=3, size=(64, 1472))
    seen = [frame.data.data for frame in frames(traffic, 300)]
    assert {datagram.dport for datagram in seen} == {PORT, PORT + 1, PORT + 2}
    sizes = sorted(len(datagram.data) for datagram in seen)
    assert 64 <= sizes[0] < 100
    assert 1200 < sizes[-1] <= 1472


@pytest.mark.parametrize("complete", [True, False])
def test_fragments_make_a_datagram_up_to_the_last_one(complete: bool) -> None:
    traffic = Fragments(kind="fragments", size=(5000, 5000), complete=complete)
    pieces = [frame.data for frame in frames(traffic, 1)]
    assert all(piece.mf for piece in pieces[:-1])
    assert len({piece.id for piece in pieces}) == 1
    assert bool(pieces[-1].mf) != complete
    end = pieces[-1].offset * 8 + len(bytes(pieces[-1].data))
    assert (end == 5008) == complete
    assert int.from_bytes(bytes(pieces[0].data)[2:4], "big") == NOBODYS_PORT


def test_a_datagram_that_does_not_fit_comes_in_fragments() -> None:
    pieces = [frame.data for frame in frames(UdpBlocked(kind="udp_blocked", size=(4000, 4000)), 1)]
    assert sum(len(bytes(piece.data)) for piece in pieces) == 4008
    assert len(pieces) == 3


def test_syns_come_from_many_addresses_and_have_right_checksums() -> None:
    seen = [frame.data for frame in frames(SynFlood(kind="syn_flood", sources=50), 100)]
    assert 20 < len({packet.src for packet in seen}) <= 50
    for packet in seen:
        assert packet.data.flags == dpkt.tcp.TH_SYN
        assert packet.data.dport == CROWD_PORT
        written, packet.data.sum, packet.sum = packet.data.sum, 0, 0
        bytes(packet)  # dpkt computes what is 0
        assert packet.data.sum == written


def test_pings_and_arp_requests_are_for_us() -> None:
    for frame in frames(IcmpFlood(kind="icmp_flood", size=(56, 56))):
        assert frame.data.data.type == dpkt.icmp.ICMP_ECHO
        assert finish(ones_sum(bytes(frame.data.data))) == 0
        assert len(frame.data.data.data.data) == 56
    for frame in frames(ArpFlood(kind="arp_flood")):
        assert frame.dst == b"\xff" * 6
        assert frame.data.op == dpkt.arp.ARP_OP_REQUEST
        assert frame.data.tpa == DST
        assert frame.data.sha == frame.src


def test_each_octave_is_as_likely_as_the_next() -> None:
    random = Random(1)
    sizes = [size_between((64, 16384), random) for _ in range(8000)]
    shares = [sum(low <= size < 2 * low for size in sizes) / len(sizes) for low in (64 << n for n in range(8))]
    assert all(0.1 < share < 0.15 for share in shares), shares
    assert min(sizes) == 64
    assert max(sizes) <= 16384
