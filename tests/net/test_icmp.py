"""ICMP: echo from ring memory at any size, errors that may be sent and those that may not, and errors that are believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dpkt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.net.host import BenchHost, Host, ip
from ustack.lab.world import World
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import SimWire
from ustack.wire import ethernet, icmp, ipv4

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.link.rxring import RxRing

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def echo_request(payload: bytes, ident: int = 7, seq: int = 1) -> bytes:
    return icmp.build_header(icmp.ICMP_ECHO, 0, ident, seq, [payload]) + payload


def acquainted(host: BenchHost) -> BenchHost:
    """The host knows its neighbour already."""
    host.arrive_arp(1, host.peer, host.address)
    host.take_sent()
    return host


@SHARED
@given(st.binary(max_size=1472), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_an_echo_comes_back_as_it_was(host: BenchHost, payload: bytes, ident: int, seq: int) -> None:
    acquainted(host).arrive_ip(ipv4.IPPROTO_ICMP, echo_request(payload, ident, seq), tos=0x28)
    (frame,) = host.take_sent()
    packet = dpkt.ethernet.Ethernet(frame).data
    message = bytes(packet.data)
    assert (packet.src, packet.dst, packet.tos, packet.data.type) == (host.address, host.peer, 0x28, 0)
    assert (packet.data.data.id, packet.data.data.seq, packet.data.data.data) == (ident, seq, payload)
    assert dpkt.dpkt.in_cksum(message) == 0


@pytest.mark.parametrize("ring", [PagedRing, LinearRing])
@pytest.mark.parametrize("size", [0, 1, 1965, 1966, 1967, 6061, 6062, 65492, 65493])
def test_an_echo_of_any_size_takes_no_memory(
    make_bench: Callable[..., BenchHost], ring: Callable[..., RxRing], size: int
) -> None:
    host = acquainted(make_bench(mtu=65521, ring=ring, pages=2048))
    payload = bytes(n * 7 & 0xFF for n in range(size))
    allocations = host.env.memory.pool.stats.allocs
    host.arrive_ip(ipv4.IPPROTO_ICMP, echo_request(payload))
    (frame,) = host.take_sent()
    assert frame[42:] == payload
    assert dpkt.dpkt.in_cksum(frame[34:]) == 0
    assert host.env.memory.pool.stats.allocs == allocations


def test_a_wrong_checksum_is_dropped_unless_the_device_vouches_for_it(host: BenchHost) -> None:
    damaged = echo_request(b"payload")[:-1] + b"!"
    acquainted(host).arrive_ip(ipv4.IPPROTO_ICMP, damaged)
    assert host.drops == {"ICMP_CSUM": 1}
    assert host.take_sent() == []
    host.arrive_ip(ipv4.IPPROTO_ICMP, damaged, csum_ok=True)
    assert len(host.take_sent()) == 1


@pytest.mark.parametrize("dst", ["255.255.255.255", "10.0.0.255"])
def test_an_echo_to_everybody_is_not_answered(host: BenchHost, dst: str) -> None:
    acquainted(host).arrive_ip(ipv4.IPPROTO_ICMP, echo_request(b"all?"), dst=ip(dst), dst_mac=ethernet.BROADCAST)
    assert host.take_sent() == []
    assert host.drops == {"INVALID_PROTO": 1}


@pytest.mark.parametrize(
    ("message", "reason"), [(b"\x08\0\0", "ICMP_MALFORMED"), (icmp.build_header(13, 0, 1, 1), "INVALID_PROTO")]
)
def test_what_we_do_not_speak_is_dropped(host: BenchHost, message: bytes, reason: str) -> None:
    host.arrive_ip(ipv4.IPPROTO_ICMP, message)
    assert host.drops == {reason: 1}


def test_ping_measures_over_a_wire(make_host: Callable[..., Host]) -> None:
    world = World(1)
    a, b = make_host("10.0.0.1/24"), make_host("10.0.0.2/24")
    SimWire(world, a.device, b.device)
    a.live_in(world)
    b.live_in(world)
    replies: list[tuple[float, bytes, int, bytes, int]] = []
    echo = a.ipv4.icmp.open_echo(lambda *reply: replies.append((world.now, *reply)), lambda *_: None)
    world.run(1.0)
    assert echo.send(b.address, 5, b"payload", ttl=9)
    world.run(1.0)
    (reply,) = replies
    assert reply[0] == pytest.approx(1.0002), "two ways for ARP, two for the echo"
    assert reply[1:] == (b.address, 5, b"payload", 64)
    echo.close()
    echo.close()
    echo.send(b.address, 6)
    world.run(1.0)
    assert len(replies) == 1
    assert a.env.drops.by_name() == {"NO_SOCKET": 1}


def test_ping_learns_that_nobody_is_there(host: BenchHost) -> None:
    errors: list[tuple[int, int, bytes, int, bytes]] = []
    echo = host.ipv4.icmp.open_echo(lambda *_: None, lambda *error: errors.append(error))
    echo.send(host.peer, 3, b"payload")
    for _ in range(3):
        host.wait(1.0)
    assert errors == [(icmp.ICMP_DEST_UNREACH, icmp.ICMP_HOST_UNREACH, host.peer, 3, host.address)]


def test_ping_is_told_when_its_packets_ran_out_of_hops(host: BenchHost) -> None:
    errors: list[tuple[int, int, bytes, int, bytes]] = []
    echo = host.ipv4.icmp.open_echo(lambda *_: None, lambda *error: errors.append(error))
    request = echo_request(b"payload", echo.ident, 4)
    quoted = ipv4.build_header(host.address, ip("10.0.0.9"), ipv4.IPPROTO_ICMP, len(request)) + request
    host.arrive_ip(ipv4.IPPROTO_ICMP, icmp.build_header(icmp.ICMP_TIME_EXCEEDED, 0, 0, 0, [quoted]) + quoted)
    assert errors == [(icmp.ICMP_TIME_EXCEEDED, 0, ip("10.0.0.9"), 4, host.peer)]


def believe(host: BenchHost) -> list[tuple[Any, ...]]:
    """Let protocol 253 believe every error; returns what it is told."""
    told: list[tuple[Any, ...]] = []

    def on_error(*error: Any) -> bool:
        told.append(error)
        return True

    host.ipv4.icmp.error_handlers[253] = on_error
    return told


def quote(host: BenchHost, l4: bytes = b"12345678", proto: int = 253, **fields: Any) -> bytes:
    """What a router quotes of a packet of ours."""
    return ipv4.build_header(host.address, host.peer, proto, len(l4), **fields) + l4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda host: quote(host)[:27],
        lambda host: quote(host)[:10],
        lambda host: b"\x65" + quote(host)[1:],
        lambda host: quote(host, frag=100),
        lambda host: ipv4.build_header(host.peer, host.address, 253, 8) + b"12345678",
        lambda host: quote(host, proto=252),
        lambda host: quote(host, proto=1),
    ],
    ids=["too little", "no header", "version 6", "later fragment", "not from us", "not our protocol", "an echo nobody sent"],
)
def test_an_error_that_quotes_nothing_of_ours_is_dropped(host: BenchHost, spoil: Callable[[BenchHost], bytes]) -> None:
    told = believe(host)
    quoted = spoil(host)
    host.arrive_ip(ipv4.IPPROTO_ICMP, icmp.build_header(icmp.ICMP_DEST_UNREACH, 1, 0, 0, [quoted]) + quoted)
    assert told == []
    assert host.drops == {"ICMP_MALFORMED": 1}
    assert host.env.mib.IcmpInErrors == 1


def test_an_error_about_our_packet_is_told_to_its_protocol(host: BenchHost) -> None:
    told = believe(host)
    quoted = quote(host, b"transport header and more", options=b"\1\1\1\0")
    host.arrive_ip(ipv4.IPPROTO_ICMP, icmp.build_header(icmp.ICMP_DEST_UNREACH, 3, 0, 1234, [quoted]) + quoted)
    assert told == [(icmp.ICMP_DEST_UNREACH, 3, 0, host.address, host.peer, b"transport header and more")]
    assert host.drops == {}


def test_an_error_quotes_the_packet_and_is_no_longer_than_576_bytes(host: BenchHost) -> None:
    acquainted(host).arrive_ip(253, bytes(range(256)) * 5)
    (frame,) = host.take_sent()
    assert len(frame) == 14 + 576
    assert frame[42:62] == ipv4.build_header(host.peer, host.address, 253, 1280)
    assert frame[62:] == (bytes(range(256)) * 5)[:528]
    assert dpkt.dpkt.in_cksum(frame[34:]) == 0


def test_there_is_no_error_about_an_error_or_a_broadcast(host: BenchHost) -> None:
    del host.ipv4.protocols[ipv4.IPPROTO_ICMP]
    acquainted(host)
    quoted = quote(host)
    host.arrive_ip(ipv4.IPPROTO_ICMP, icmp.build_header(icmp.ICMP_DEST_UNREACH, 1, 0, 0, [quoted]) + quoted)
    del host.ipv4.protocols[17]
    host.arrive_ip(17, bytes(8), dst=host.interface.broadcast, dst_mac=ethernet.BROADCAST)
    assert host.drops == {"IP_NOPROTO": 2}
    assert host.take_sent() == []
    host.arrive_ip(ipv4.IPPROTO_ICMP, echo_request(b"no error"))
    assert len(host.take_sent()) == 1


def test_errors_to_one_host_are_limited_to_a_burst_and_one_a_second(host: BenchHost) -> None:
    acquainted(host)
    for _ in range(10):
        host.arrive_ip(253, b"payload")
    assert len(host.take_sent()) == 6
    assert host.drops == {"IP_NOPROTO": 10, "ICMP_RATELIMIT": 4}
    host.wait(2.01)
    for _ in range(10):
        host.arrive_ip(253, b"payload")
    assert len(host.take_sent()) == 2


def test_errors_to_all_hosts_are_limited_to_a_burst_and_a_rate() -> None:
    host = BenchHost()
    try:
        host.ipv4.routes.add(bytes(4), 0, host.interface, host.peer)
        acquainted(host)
        for n in range(200):
            host.arrive_ip(253, b"payload", src=ip(f"192.0.2.{n}"))
        assert 30 <= len(host.take_sent()) <= 80  # what one costs is random, so that nobody can count the others'
        host.wait(0.0101)
        for n in range(200):
            host.arrive_ip(253, b"payload", src=ip(f"198.51.100.{n}"))
        assert 5 <= len(host.take_sent()) <= 20
    finally:
        host.close()


def test_an_answer_that_finds_no_way_back_is_counted(host: BenchHost) -> None:
    host.arrive_ip(ipv4.IPPROTO_ICMP, echo_request(b"from afar"), src=ip("192.0.2.1"))
    assert host.take_sent() == []
    assert host.drops == {"IP_OUTNOROUTES": 1}
