"""A path completes what the transport wrote: every header field and checksum is right, by the device or in software."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import dpkt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.net.host import OFFLOADS, BenchHost, ip
from ustack.wire import tcp, udp
from ustack.wire.checksum import finish, fold, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.link.simwire import WireFrame
    from ustack.net.path import Path

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def known_path(host: BenchHost) -> Path:
    """A path whose neighbour has answered."""
    path = host.ipv4.path(host.peer)
    path.send(253, 0, (), 0)
    host.answer_arp()
    host.take_sent()
    return path


def send_udp(path: Path, payload: list[bytes], **options: Any) -> bool:
    length = sum(map(len, payload))
    path.head[path.l4 : path.l4 + 8] = udp.build_header(1111, 2222, length)
    return path.send(17, 8, payload, length, csum_at=udp.OFF_CSUM, **options)


@SHARED
@given(
    st.lists(st.binary(max_size=300), max_size=4),
    st.integers(0, 255),
    st.integers(1, 255),
    st.booleans(),
    st.integers(0, 0xFFFF),
)
def test_dpkt_finds_every_field_and_both_checksums_right(
    make_bench: Callable[..., BenchHost], payload: list[bytes], tos: int, ttl: int, df: bool, ident: int
) -> None:
    host = make_bench(features=0)
    path = known_path(host)
    path._ident = ident
    assert send_udp(path, payload, tos=tos, ttl=ttl, df=df)
    (frame,) = host.take_sent()
    packet = dpkt.ethernet.Ethernet(frame).data
    assert (packet.src, packet.dst, packet.p, packet.tos, packet.ttl, packet.df) == (host.address, host.peer, 17, tos, ttl, df)
    assert packet.len == 28 + sum(map(len, payload))
    assert packet.data.data == b"".join(payload)
    assert finish(ones_sum(frame[14:34])) == 0
    udp_length = packet.len - 20
    assert packet.data.sum != 0, "0 would mean that there is no checksum (RFC 768)"
    assert finish(pseudo_v4(packet.src, packet.dst, 17, udp_length) + ones_sum(frame[34:])) == 0


def test_a_udp_checksum_that_comes_out_as_zero_is_sent_as_all_ones(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(features=0)
    path = known_path(host)
    send_udp(path, [b"\0\0"])
    checksum = int.from_bytes(host.take_sent()[0][40:42], "big")
    send_udp(path, [checksum.to_bytes(2, "big")])
    assert host.take_sent()[0][40:42] == b"\xff\xff"


def test_a_device_with_offload_gets_the_sum_of_the_pseudo_header(host: BenchHost) -> None:
    path = known_path(host)
    frames: list[WireFrame] = []
    host.device.wire = frames.append
    send_udp(path, [b"payload"])
    (frame,) = frames
    assert (frame.csum_start, frame.csum_offset) == (34, 6)
    assert int.from_bytes(frame.data[40:42], "big") == pseudo_v4(host.address, host.peer, 17, 15)
    frame.complete()
    assert finish(pseudo_v4(host.address, host.peer, 17, 15) + ones_sum(frame.data[34:])) == 0


def test_a_super_frame_has_a_correct_ip_header_and_asks_to_be_cut(host: BenchHost) -> None:
    path = known_path(host)
    frames: list[WireFrame] = []
    host.device.wire = frames.append
    path.head[path.l4 : path.l4 + 20] = tcp.build_header(1, 2, 3, 4, tcp.ACK, 5)
    payload = [bytes(30000), bytes(30000)]
    assert path.tso
    assert path.send(6, 20, payload, 60000, csum_at=tcp.OFF_CSUM, gso_size=1460)
    (frame,) = frames
    assert frame.gso_size == 1460
    assert finish(ones_sum(frame.data[14:34])) == 0
    assert int.from_bytes(frame.data[16:18], "big") == 60040
    assert int.from_bytes(frame.data[50:52], "big") == fold(pseudo_v4(host.address, host.peer, 6, 60020))


def test_a_segment_that_fits_is_no_super_frame(host: BenchHost) -> None:
    path = known_path(host)
    frames: list[WireFrame] = []
    host.device.wire = frames.append
    path.head[path.l4 : path.l4 + 20] = tcp.build_header(1, 2, 3, 4, tcp.ACK, 5)
    path.send(6, 20, [bytes(1460)], 1460, csum_at=tcp.OFF_CSUM, gso_size=1460)
    assert frames[0].gso_size == 0


@pytest.mark.parametrize(
    ("length", "gso_size", "fits"), [(1472, 0, True), (1473, 0, False), (65507, 1400, True), (65508, 1400, False)]
)
def test_what_is_longer_than_the_path_takes_is_dropped(host: BenchHost, length: int, gso_size: int, fits: bool) -> None:
    path = known_path(host)
    assert send_udp(path, [bytes(min(length, 65527))], gso_size=gso_size) == fits
    assert host.drops == ({} if fits else {"PKT_TOO_BIG": 1})


def test_a_device_that_refuses_is_counted(host: BenchHost) -> None:
    path = known_path(host)
    host.device.wire = None
    assert not send_udp(path, [b"payload"])
    assert host.drops == {"TX_DEVICE": 1}
    assert host.device.stats.tx_errors == 1


def test_the_paths_of_a_destination_are_shared_until_routes_change(host: BenchHost) -> None:
    path = host.ipv4.path(host.peer)
    assert host.ipv4.path(host.peer) is path
    assert host.ipv4.path(host.peer, host.address) is host.ipv4.path(host.peer, host.address)
    host.ipv4.routes.add(ip("10.1.0.0"), 16, host.interface, host.peer)
    assert path.obsolete
    again = host.ipv4.path(host.peer)
    assert again is not path
    assert not again.obsolete


def test_paths_are_kept_for_a_bounded_number_of_destinations(host: BenchHost) -> None:
    host.ipv4.routes.add(bytes(4), 0, host.interface, host.peer)
    often = host.ipv4.path(ip("192.0.2.1"))
    first = host.ipv4.path(ip("192.0.2.2"))
    for n in range(1500):
        host.ipv4.path(ip(f"198.18.{n >> 8}.{n & 255}"))
        assert host.ipv4.path(ip("192.0.2.1")) is often
    assert first.obsolete
    gateway = host.interface.neighbours.find(host.peer)
    assert gateway is not None
    assert len(gateway.paths) <= 1024


@pytest.mark.parametrize(
    ("dst", "src", "number"),
    [
        ("192.0.2.1", None, errno.ENETUNREACH),
        ("10.0.0.1", None, errno.ENETUNREACH),
        ("127.0.0.1", None, errno.ENETUNREACH),
        ("224.0.0.1", None, errno.ENETUNREACH),
        ("0.0.0.0", None, errno.ENETUNREACH),
        ("10.0.0.2", "10.0.0.3", errno.EADDRNOTAVAIL),
    ],
)
def test_there_is_no_path_without_a_route_or_from_a_strange_address(
    host: BenchHost, dst: str, src: str | None, number: int
) -> None:
    with pytest.raises(OSError) as failed:  # noqa: PT011 (the errno is what matters)
        host.ipv4.path(ip(dst), None if src is None else ip(src))
    assert failed.value.errno == number


@pytest.mark.parametrize("dst", ["255.255.255.255", "10.0.0.255"])
def test_a_broadcast_needs_nobody_to_answer(host: BenchHost, dst: str) -> None:
    path = host.ipv4.path(ip(dst))
    assert path.broadcast
    assert send_udp(path, [b"everybody"])
    (frame,) = host.take_sent()
    assert frame[:6] == b"\xff" * 6
    assert frame[30:34] == ip(dst)


def test_a_path_without_offload_to_a_device_without_it_says_so(make_bench: Callable[..., BenchHost]) -> None:
    assert not make_bench(features=0).ipv4.path(ip("10.0.0.2")).tso
    assert make_bench(features=OFFLOADS).ipv4.path(ip("10.0.0.2")).tso
