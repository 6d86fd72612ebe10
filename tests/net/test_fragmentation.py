"""Sending what is longer than the path takes: cut as another stack and the test itself put it together again, or not at all."""

from __future__ import annotations

import itertools
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.net.host import BenchHost, Host, ip
from ustack.lab.world import World
from ustack.link.simwire import Impairments, SimWire
from ustack.net.path import PMTUDISC_DO, PMTUDISC_DONT, PMTUDISC_PROBE, PMTUDISC_WANT, take
from ustack.transport.options import SocketOptions
from ustack.wire import icmp, ipv4
from ustack.wire.checksum import finish, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable


def put_together(frames: list[bytes]) -> tuple[ipv4.Ipv4Header, bytes]:
    """The header of the first and the payload of all fragments, each of which must be right."""
    payload = b""
    first = None
    for number, frame in enumerate(frames):
        header = ipv4.parse_header(frame, 14, len(frame))
        assert header is not None
        assert header.total == len(frame) - 14
        assert finish(ones_sum(frame[14:34])) == 0
        first = first or header
        assert (header.ident, header.src, header.dst) == (first.ident, first.src, first.dst)
        assert (header.frag & ipv4.IP_OFFSET) << 3 == len(payload)
        assert bool(header.frag & ipv4.IP_MF) == (number < len(frames) - 1)
        assert not header.frag & ipv4.IP_DF
        payload += frame[34:]
    assert first is not None
    return first, payload


@pytest.mark.parametrize("features", [0, 3], ids=["software", "offload"])
@pytest.mark.parametrize("size", [1473, 1480 * 2 - 8, 1480 * 2 - 7, 9000, 65507])
def test_a_datagram_is_cut_and_its_checksum_is_right(make_bench: Callable[..., BenchHost], features: int, size: int) -> None:
    host = make_bench(features=features)
    host.answer_arp()
    socket = host.udp.socket(SocketOptions(ttl=7, tos=0x28))
    payload = Random(size).randbytes(size)
    assert socket.sendto_nowait(payload, (host.peer, 2000)) == size
    if not host.sent or host.sent[0][12:14] != b"\x08\x00":
        host.answer_arp()
    frames = [frame for frame in host.take_sent() if frame[12:14] == b"\x08\x00"]
    header, packet = put_together(frames)
    assert (header.ttl, header.tos, header.protocol) == (7, 0x28, 17)
    assert packet[8:] == payload
    assert finish(pseudo_v4(host.address, host.peer, 17, len(packet)) + ones_sum(packet)) == 0
    assert all(len(frame) <= 14 + 1500 for frame in frames)
    mib = host.env.mib
    assert (mib.IpFragOKs, mib.IpFragCreates, mib.IpFragFails, mib.IpOutRequests) == (1, len(frames), 0, 1)
    socket.close()


@pytest.mark.parametrize(
    ("pmtudisc", "size", "df"),
    [
        (PMTUDISC_WANT, 1472, True),
        (PMTUDISC_WANT, 1473, False),
        (PMTUDISC_DONT, 1472, False),
        (PMTUDISC_DONT, 1473, False),
        (PMTUDISC_DO, 1472, True),
        (PMTUDISC_DO, 1473, None),
        (PMTUDISC_PROBE, 1472, True),
        (PMTUDISC_PROBE, 1473, None),
    ],
)
def test_ping_has_its_requests_cut_or_not(host: BenchHost, pmtudisc: int, size: int, df: bool | None) -> None:
    echo = host.ipv4.icmp.open_echo(lambda *_: None, lambda *_: None)
    if df is None:
        with pytest.raises(OSError, match="Message too long"):
            echo.send(host.peer, 1, bytes(size), pmtudisc=pmtudisc)
        return
    echo.send(host.peer, 1, bytes(size), pmtudisc=pmtudisc, ttl=3)
    host.take_sent()
    host.answer_arp()
    frames = host.take_sent()
    assert len(frames) == 1 + (size > 1472)
    headers = [ipv4.parse_header(frame, 14, len(frame)) for frame in frames]
    assert all(header is not None and bool(header.frag & ipv4.IP_DF) == df and header.ttl == 3 for header in headers)


def test_identifications_cannot_be_foreseen(host: BenchHost) -> None:
    host.arrive_ip(ipv4.IPPROTO_ICMP, icmp.build_header(icmp.ICMP_ECHO, 0, 1, 1))
    host.answer_arp()
    host.take_sent()
    socket = host.udp.socket()
    idents = []
    for _ in range(20):
        socket.sendto_nowait(bytes(2000), (host.peer, 9))
        idents.append(put_together(host.take_sent())[0].ident)
    steps = {(b - a) & 0xFFFF for a, b in itertools.pairwise(idents)}
    assert len(steps) > 15
    socket.close()


def test_no_neighbour_no_fragment(host: BenchHost) -> None:
    socket = host.udp.socket()
    socket.connect(ip("10.0.0.77"), 9)
    socket.sendto_nowait(bytes(60000))
    for _ in range(4):
        host.wait(1.0)
    assert host.drops == {"NEIGH_FAILED": 41}
    socket.close()


@pytest.mark.parametrize("mtu", [576, 1500, 9000])
def test_datagrams_of_any_size_cross_a_wire_that_reorders_and_doubles(make_host: Callable[..., Host], mtu: int) -> None:
    world = World(mtu)
    a = make_host("10.0.0.1/24", mtu=mtu, pages=4096)
    b = make_host("10.0.0.2/24", mtu=mtu, pages=4096)
    SimWire(world, a.device, b.device, Impairments(jitter=0.001, duplicate=0.2))
    a.live_in(world)
    b.live_in(world)
    sender, receiver = a.udp.socket(), b.udp.socket(SocketOptions(rcvbuf=1 << 20))
    receiver.bind(bytes(4), 1000)
    random = Random(7)
    for size in (0, mtu - 28, mtu - 27, 20000, 65507):
        payload = random.randbytes(size)
        sender.sendto_nowait(payload, (ip("10.0.0.2"), 1000))
        assert world.run_until(lambda: receiver.readable, world.now + 5)
        assert receiver.recvfrom_nowait(70000)[0] == payload
        world.run(1.0)  # doubles of what was whole begin a datagram anew, and come to nothing
        while receiver.readable:
            assert receiver.recvfrom_nowait(70000)[0] == payload
    world.run(31.0)
    assert b.ipv4.fragments.account.bytes == 0
    sender.close()
    receiver.close()


def test_an_echo_of_any_size_is_answered_over_a_narrow_wire(make_host: Callable[..., Host]) -> None:
    world = World(1)
    a, b = make_host("10.0.0.1/24", pages=2048), make_host("10.0.0.2/24", pages=2048)
    SimWire(world, a.device, b.device)
    a.live_in(world)
    b.live_in(world)
    replies: list[bytes] = []
    echo = a.ipv4.icmp.open_echo(lambda _src, _seq, payload, _ttl: replies.append(payload), lambda *_: None)
    payload = Random(3).randbytes(65507)
    echo.send(ip("10.0.0.2"), 1, payload)
    assert world.run_until(lambda: bool(replies), 5.0)
    assert replies == [payload]


def test_views_are_taken_in_order() -> None:
    views = [memoryview(b"fgh"), memoryview(b"de"), memoryview(b"abc")]
    assert [bytes(view) for view in take(views, 4)] == [b"abc", b"d"]
    assert [bytes(view) for view in take(views, 0)] == []
    assert [bytes(view) for view in take(views, 4)] == [b"e", b"fgh"]
