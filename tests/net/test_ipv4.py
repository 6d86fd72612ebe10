"""IPv4 input: what is delivered, what is dropped, and the reason for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.net.host import BenchHost, Host, ip
from ustack.link.simwire import SimDevice
from ustack.net.interface import Interface
from ustack.wire import ethernet, icmp, ipv4

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.net.layer import IpPacket

PROTO = 253


class Delivered(NamedTuple):
    src: bytes
    dst: bytes
    ttl: int
    tos: int
    broadcast: bool
    payload: bytes


def listen(host: Host, proto: int = PROTO) -> list[Delivered]:
    """Collect what is delivered to a protocol."""
    delivered: list[Delivered] = []

    def handler(packet: IpPacket) -> None:
        payload = packet.frame.tobytes(packet.l4, packet.l4_len)
        delivered.append(Delivered(packet.src, packet.dst, packet.ttl, packet.tos, packet.broadcast, payload))

    host.ipv4.register(proto, handler)
    return delivered


def test_a_packet_for_us_reaches_its_protocol(host: BenchHost) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", ttl=7, tos=0x28)
    assert delivered == [(host.peer, host.address, 7, 0x28, False, b"payload")]
    assert (host.env.mib.IpInReceives, host.env.mib.IpInDelivers) == (1, 1)
    assert host.drops == {}


def test_padding_of_a_short_frame_is_cut_off(host: BenchHost) -> None:
    delivered = listen(host)
    packet = ipv4.build_header(host.peer, host.address, PROTO, 3) + b"abc"
    host.arrive(ethernet.build_header(host.device.mac, host.peer_mac, ethernet.ETH_P_IP) + packet.ljust(46, b"\xee"))
    assert delivered[0].payload == b"abc"


def test_options_are_accepted_and_ignored(host: BenchHost) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", options=b"\x94\x04\0\0")
    assert delivered[0].payload == b"payload"


def test_a_packet_that_has_no_hops_left_is_still_ours(host: BenchHost) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", ttl=0)
    assert delivered


@pytest.mark.parametrize("options", [b"\x83\x07\x04\x0a\x00\x00\x03\x00", b"\x89\x07\x04\x0a\x00\x00\x03\x00"])
def test_source_routes_are_refused(host: BenchHost, options: bytes) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", options=options)
    assert delivered == []
    assert host.drops == {"IP_INHDR": 1}


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, 0x65, "IP_INHDR"),
        (0, 0x44, "IP_INHDR"),
        (0, 0x4F, "IP_INHDR"),
        (2, 0x10, "IP_INHDR"),
        (3, 19, "IP_INHDR"),
        (8, 0x55, "IP_CSUM"),
        (15, 0x55, "IP_CSUM"),
    ],
)
def test_a_header_that_contradicts_itself_is_dropped(host: BenchHost, at: int, value: int, reason: str) -> None:
    delivered = listen(host)
    packet = bytearray(ipv4.build_header(host.peer, host.address, PROTO, 4) + b"data")
    packet[at] = value
    host.arrive(ethernet.build_header(host.device.mac, host.peer_mac, ethernet.ETH_P_IP) + packet)
    assert delivered == []
    assert host.drops == {reason: 1}


@pytest.mark.parametrize(
    "src", ["0.0.0.0", "0.0.0.9", "127.0.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "10.0.0.255", "10.0.0.1"]
)
def test_nobody_can_send_from_such_an_address(host: BenchHost, src: str) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", src=ip(src))
    assert delivered == []
    assert host.drops == {"IP_INADDRERRORS": 1}


@pytest.mark.parametrize("dst", ["10.0.0.3", "192.0.2.1", "224.0.0.1"])
def test_we_are_no_router(host: BenchHost, dst: str) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", dst=ip(dst))
    assert delivered == []
    assert host.drops == {"IP_INADDRERRORS": 1}


@pytest.mark.parametrize("dst", ["255.255.255.255", "10.0.0.255"])
def test_broadcasts_reach_udp_and_not_tcp(host: BenchHost, dst: str) -> None:
    to_udp = listen(host, 17)
    to_tcp = listen(host, 6)
    host.arrive_ip(17, b"payload", dst=ip(dst), dst_mac=ethernet.BROADCAST)
    host.arrive_ip(6, b"payload", dst=ip(dst), dst_mac=ethernet.BROADCAST)
    assert [packet.broadcast for packet in to_udp] == [True]
    assert to_tcp == []
    assert host.drops == {"IP_INADDRERRORS": 1}


def test_a_unicast_packet_in_a_broadcast_frame_is_refused(host: BenchHost) -> None:
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", dst_mac=ethernet.BROADCAST)
    assert delivered == []
    assert host.drops == {"IP_INADDRERRORS": 1}


def test_an_address_of_another_interface_is_ours_as_well(host: BenchHost) -> None:
    second = Interface(host.env, SimDevice("sim1", b"\x02\0\0\0\0\1"), ip("10.9.0.1"), 24)
    host.ipv4.add_interface(second)
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload", dst=ip("10.9.0.1"))
    assert delivered[0].dst == ip("10.9.0.1")
    assert host.ipv4.path(ip("10.9.0.7")).src == ip("10.9.0.1")
    host.ipv4.remove_interface(second)
    host.arrive_ip(PROTO, b"payload", dst=ip("10.9.0.1"))
    assert len(delivered) == 1
    with pytest.raises(OSError, match="Network is unreachable"):
        host.ipv4.path(ip("10.9.0.7"))


def test_an_address_is_used_once(host: BenchHost) -> None:
    with pytest.raises(ValueError, match="in use on another interface"):
        host.ipv4.add_interface(Interface(host.env, host.device, host.address, 24))


def test_an_interface_that_was_removed_takes_nothing_in(host: BenchHost) -> None:
    delivered = listen(host)
    host.ipv4.remove_interface(host.interface)
    host.arrive_ip(PROTO, b"payload")
    host.arrive_arp(1, host.peer, host.address)
    assert delivered == []
    assert host.take_sent() == []
    assert host.drops == {"UNHANDLED_PROTO": 2}


def test_a_protocol_that_nobody_handles_is_reported_to_the_sender(host: BenchHost) -> None:
    host.arrive_ip(PROTO, b"payload")
    host.answer_arp()
    assert host.drops == {"IP_NOPROTO": 1}
    frame = host.take_sent()[-1]
    header = icmp.parse_header(frame, 34, len(frame))
    assert header is not None
    assert (header.type, header.code) == (icmp.ICMP_DEST_UNREACH, icmp.ICMP_PROT_UNREACH)
    assert frame[42:].endswith(b"payload")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "PKT_TOO_SMALL"),
        (bytes(13), "PKT_TOO_SMALL"),
        (b"\x02\0\0\0\0\x07" + bytes(8) + bytes(40), "OTHERHOST"),
        (b"\xff" * 12 + b"\x88\xcc" + bytes(40), "UNHANDLED_PROTO"),
        (b"\xff" * 12 + b"\x08\x00" + b"\x45" + bytes(18), "PKT_TOO_SMALL"),
    ],
)
def test_the_interface_drops_what_is_not_for_the_stack(host: BenchHost, frame: bytes, reason: str) -> None:
    host.arrive(frame)
    assert host.drops == {reason: 1}


@pytest.mark.parametrize(
    ("address", "prefix_len", "reason"),
    [
        ("10.0.0.1", 0, "a prefix length of 0 is not between 1 and 32"),
        ("10.0.0.1", 33, "a prefix length of 33 is not between 1 and 32"),
        ("10.0.0.0", 24, "10.0.0.0/24 names the network or everybody in it, not a host"),
        ("10.0.0.255", 24, "10.0.0.255/24 names the network or everybody in it, not a host"),
        ("127.0.0.1", 8, "127.0.0.1 cannot be the IPv4 address of an interface"),
        ("224.0.0.1", 8, "224.0.0.1 cannot be the IPv4 address of an interface"),
        ("0.0.0.1", 8, "0.0.0.1 cannot be the IPv4 address of an interface"),
    ],
)
def test_an_interface_refuses_what_cannot_be_its_address(host: BenchHost, address: str, prefix_len: int, reason: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (compared whole)
        Interface(host.env, host.device, ip(address), prefix_len)
    assert str(refused.value) == reason


def test_a_point_to_point_network_has_no_broadcast(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench("10.0.0.2/31", peer="10.0.0.3")
    assert host.interface.broadcast is None
    delivered = listen(host)
    host.arrive_ip(PROTO, b"payload")
    assert delivered


def report_frag_needed(host: BenchHost, mtu: int, total: int = 1500, dst: str = "10.0.0.2", **quoted: Any) -> None:
    """A router says that a packet of `total` bytes from us to `dst` was too long."""
    header = ipv4.build_header(host.address, ip(dst), PROTO, total - 20, **quoted) + b"12345678"
    message = icmp.build_header(icmp.ICMP_DEST_UNREACH, icmp.ICMP_FRAG_NEEDED, 0, mtu, [header])
    host.arrive_ip(1, message + header)


def believe(host: BenchHost, whether: bool = True) -> list[int]:
    """Let the transport believe ICMP errors, or not; returns the MTUs it is told."""
    told: list[int] = []

    def on_error(_kind: int, _code: int, mtu: int, *_: bytes) -> bool:
        told.append(mtu)
        return whether

    host.ipv4.icmp.error_handlers[PROTO] = on_error
    return told


def test_a_path_gets_narrower_when_a_router_says_so_and_wide_again_after_ten_minutes(host: BenchHost) -> None:
    told = believe(host)
    path = host.ipv4.path(host.peer)
    report_frag_needed(host, 1400)
    assert told == [1400]
    assert path.mtu == 1400
    assert host.ipv4.path(host.peer, host.address).mtu == 1400, "what is known holds for new paths as well"
    host.wait(599.0)
    assert path.mtu == 1400
    host.wait(1.0)
    assert path.mtu == 1500


def test_a_path_never_gets_wider_by_a_report(host: BenchHost) -> None:
    believe(host)
    path = host.ipv4.path(host.peer)
    report_frag_needed(host, 1300)
    report_frag_needed(host, 1400)
    assert path.mtu == 1300


def test_a_report_that_the_transport_does_not_believe_changes_nothing(host: BenchHost) -> None:
    believe(host, False)
    path = host.ipv4.path(host.peer)
    report_frag_needed(host, 1400)
    assert path.mtu == 1500
    assert host.drops == {"ICMP_MALFORMED": 1}


@pytest.mark.parametrize(("mtu", "total"), [(67, 1500), (1, 1500), (1500, 1500), (1501, 1500), (1000, 999)])
def test_a_report_that_cannot_be_true_is_dropped(host: BenchHost, mtu: int, total: int) -> None:
    told = believe(host)
    path = host.ipv4.path(host.peer)
    report_frag_needed(host, mtu, total)
    assert told == []
    assert path.mtu == 1500
    assert host.drops == {"ICMP_MALFORMED": 1}


@pytest.mark.parametrize("mtu", [0, 68, 296, 551])
def test_a_very_narrow_path_gets_packets_of_552_bytes_that_may_be_fragmented(host: BenchHost, mtu: int) -> None:
    told = believe(host)
    path = host.ipv4.path(host.peer)
    path.send(PROTO, 0, (), 0)
    host.answer_arp()
    report_frag_needed(host, mtu)
    assert told == [552]
    assert path.mtu == 552
    host.take_sent()
    path.send(PROTO, 0, (), 0)
    assert host.take_sent()[0][20] & 0x40 == 0, "no DF"
    host.wait(600.0)
    host.take_sent()
    path.send(PROTO, 0, (), 0)
    assert host.take_sent()[0][20] & 0x40 == 0x40


def test_a_path_that_starts_on_a_narrow_link_is_not_widened_by_a_report(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(mtu=400)
    believe(host)
    path = host.ipv4.path(host.peer)
    report_frag_needed(host, 300)
    assert path.mtu == 400


def test_the_path_mtu_of_a_bounded_number_of_destinations_is_remembered(host: BenchHost) -> None:
    host.ipv4.routes.add(bytes(4), 0, host.interface, host.peer)
    for n in range(1024):
        host.ipv4.learn_pmtu(ip(f"198.18.{n >> 8}.{n & 255}"), 1400)
    oldest = host.ipv4.path(ip("198.18.0.0"))
    assert oldest.mtu == 1400
    host.ipv4.learn_pmtu(ip("192.0.2.1"), 1400)
    assert oldest.mtu == 1500
    assert host.ipv4.path(ip("198.18.0.1")).mtu == 1400
