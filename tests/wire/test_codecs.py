"""The other headers: what we build we can read, so can dpkt, and no bytes at all make a parser raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ustack.wire import arp, ethernet, icmp, ipv4, udp, vnet
from ustack.wire.checksum import finish, ones_sum

if TYPE_CHECKING:
    from collections.abc import Callable

U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
MAC = st.binary(min_size=6, max_size=6)
IP = st.binary(min_size=4, max_size=4)


@given(MAC, MAC, st.sampled_from([ethernet.ETH_P_IP, ethernet.ETH_P_ARP, ethernet.ETH_P_IPV6, 0x88CC]))
def test_an_ethernet_header_reads_back_here_and_in_dpkt(dst: bytes, src: bytes, ethertype: int) -> None:
    wire = ethernet.build_header(dst, src, ethertype)
    assert ethernet.parse_header(wire, 0, 14) == (dst, src, ethertype)
    fields = dict(zip(("dst", "src", "type"), ethernet.HEADER.unpack(wire), strict=True))
    assert bytes(dpkt.ethernet.Ethernet(**fields))[:14] == wire


@given(st.sampled_from([arp.ARPOP_REQUEST, arp.ARPOP_REPLY]), MAC, IP, MAC, IP)
def test_an_arp_packet_reads_back_here_and_in_dpkt(op: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> None:
    wire = arp.build(op, sha, spa, tha, tpa)
    assert arp.parse(b"x" + wire + b"padding", 1, 36) == (op, sha, spa, tha, tpa)
    theirs = dpkt.arp.ARP(wire)
    assert (theirs.op, theirs.sha, theirs.spa, theirs.tha, theirs.tpa) == (op, sha, spa, tha, tpa)


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_arp_for_other_hardware_or_protocols_is_not_ours(at: int) -> None:
    wire = bytearray(arp.build(arp.ARPOP_REQUEST, bytes(6), bytes(4), bytes(6), bytes(4)))
    wire[at] ^= 0x40
    assert arp.parse(wire, 0, len(wire)) is None


@given(
    src=IP, dst=IP, protocol=st.just(253), payload_len=st.integers(0, 65475), ttl=U8, tos=U8, ident=U16, frag=U16,
    options=st.integers(0, 10).map(lambda words: b"\1\1\1\0" * words),
)  # fmt: skip
def test_an_ipv4_header_reads_back_here_and_in_dpkt(
    src: bytes, dst: bytes, protocol: int, payload_len: int, ttl: int, tos: int, ident: int, frag: int, options: bytes
) -> None:
    wire = ipv4.build_header(src, dst, protocol, payload_len, ttl, tos, ident, frag, options)
    header = ipv4.parse_header(wire, 0, len(wire))
    assert header is not None
    checksum = int.from_bytes(wire[10:12], "big")
    assert header == (len(wire), tos, len(wire) + payload_len, ident, frag, ttl, protocol, checksum, src, dst)
    assert finish(ones_sum(wire)) == 0
    theirs = dpkt.ip.IP(wire + bytes(payload_len))
    assert (theirs.src, theirs.dst, theirs.p, theirs.len, theirs.ttl) == (src, dst, protocol, header.total, ttl)
    theirs.sum = 0
    assert bytes(theirs)[10:12] == wire[10:12]


def test_an_ipv4_header_that_contradicts_itself_is_refused() -> None:
    good = bytearray(ipv4.build_header(bytes(4), bytes(4), 17, 8))
    for at, value in ((0, 0x65), (0, 0x44), (0, 0x46), (3, 19)):
        bad = bytearray(good)
        bad[at] = value
        assert ipv4.parse_header(bad, 0, len(bad)) is None


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        (b"\x83\x07\x04" + bytes(4), True),
        (b"\x01\x01\x89\x03", True),
        (b"\x07\x03\x04\x83", True),
        (b"\x00\x83", False),
        (b"\x07\x00\x83", False),
        (b"\x07", False),
        (b"\x94\x04\x00\x00", False),
    ],
)
def test_source_routes_are_found_among_the_options(options: bytes, routed: bool) -> None:
    assert ipv4.has_source_route(options, 0, len(options)) == routed


@given(U8, U8, U16, U16, st.lists(st.binary(max_size=7), max_size=4))
def test_an_icmp_message_reads_back_and_carries_a_correct_checksum(
    kind: int, code: int, word0: int, word1: int, payload: list[bytes]
) -> None:
    wire = icmp.build_header(kind, code, word0, word1, payload)
    header = icmp.parse_header(wire, 0, len(wire))
    assert header is not None
    assert (header.type, header.code, header.word0, header.word1) == (kind, code, word0, word1)
    message = wire + b"".join(payload)
    assert dpkt.dpkt.in_cksum(message[:2] + b"\0\0" + message[4:]) == header.checksum


def test_dpkt_reads_our_echo_request() -> None:
    theirs = dpkt.icmp.ICMP(icmp.build_header(icmp.ICMP_ECHO, 0, 7, 9, [b"payload"]) + b"payload")
    assert (theirs.type, theirs.data.id, theirs.data.seq, theirs.data.data) == (8, 7, 9, b"payload")


@given(U16, U16, st.binary(max_size=50), U16)
def test_a_udp_header_reads_back_here_and_in_dpkt(sport: int, dport: int, payload: bytes, checksum: int) -> None:
    wire = udp.build_header(sport, dport, len(payload), checksum) + payload
    assert udp.parse_header(wire + b"padding", 0, len(wire) + 7) == (sport, dport, len(wire), checksum)
    theirs = dpkt.udp.UDP(wire)
    assert (theirs.sport, theirs.dport, theirs.ulen, theirs.sum, theirs.data) == (sport, dport, len(wire), checksum, payload)


def test_a_udp_length_that_disagrees_is_refused() -> None:
    wire = udp.build_header(1, 2, 4)
    assert udp.parse_header(wire + b"1234", 0, 12) is not None
    assert udp.parse_header(wire + b"123", 0, 11) is None
    assert udp.parse_header(b"\0\1\0\2\0\7\0\0", 0, 8) is None


@given(U8, U8, U16, U16, U16, U16)
def test_a_virtio_net_header_reads_back(flags: int, kind: int, hdr_len: int, size: int, start: int, offset: int) -> None:
    wire = vnet.build_header(flags, kind, hdr_len, size, start, offset)
    assert len(wire) == vnet.HEADER_LEN
    assert vnet.parse_header(wire, 0, 10) == (flags, kind, hdr_len, size, start, offset)


@pytest.mark.parametrize(
    "parse",
    [ethernet.parse_header, arp.parse, ipv4.parse_header, icmp.parse_header, udp.parse_header, vnet.parse_header],
    ids=["ethernet", "arp", "ipv4", "icmp", "udp", "vnet"],
)
@given(data=st.binary(max_size=64), start=st.integers(0, 70), end=st.integers(0, 70))
def test_no_bytes_make_a_parser_raise(parse: Callable[[bytes, int, int], object], data: bytes, start: int, end: int) -> None:
    parse(data, start, end)
