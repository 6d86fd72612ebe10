"""UDP sockets: who gets a datagram, what it costs whom, and which error comes when."""

from __future__ import annotations

import errno
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dpkt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.net.host import OFFLOADS, BenchHost, Host, ip
from ustack.lab.world import World
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import SimWire
from ustack.net.path import PMTUDISC_DO, PMTUDISC_PROBE
from ustack.transport.events import READABLE, SHUT_RD, SHUT_WR, WRITABLE
from ustack.transport.options import SocketOptions
from ustack.wire import ethernet, icmp, ipv4, udp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.link.rxring import RxRing
    from ustack.transport.udp import UdpSocket

ANY = bytes(4)


@pytest.fixture
def host() -> Iterator[BenchHost]:
    """The host 10.0.0.1/24 that knows its neighbour 10.0.0.2, which the test plays."""
    host = BenchHost()
    host.arrive_arp(1, host.peer, host.address)
    host.take_sent()
    yield host
    host.close()


@contextmanager
def raises(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as failed:  # noqa: PT011 (the errno is what matters)
        yield
    assert failed.value.errno == number, failed.value


def bound(host: Host, port: int, address: bytes = ANY, **options: Any) -> UdpSocket:
    socket = host.udp.socket(SocketOptions(**options))
    socket.bind(address, port)
    return socket


def datagram(
    host: BenchHost, payload: bytes, sport: int, dport: int, src: bytes | None = None, dst: bytes | None = None
) -> bytes:
    """A datagram from the peer with its checksum."""
    header = udp.build_header(sport, dport, len(payload))
    total = pseudo_v4(src or host.peer, dst or host.address, 17, 8 + len(payload)) + ones_sum(header + payload)
    return udp.build_header(sport, dport, len(payload), finish(total) or 0xFFFF) + payload


def arrive(host: BenchHost, payload: bytes, sport: int = 2000, dport: int = 1000, **fields: Any) -> None:
    host.arrive_ip(17, datagram(host, payload, sport, dport, fields.get("src"), fields.get("dst")), **fields)


@pytest.mark.parametrize("ring", [PagedRing, LinearRing])
@pytest.mark.parametrize("features", [(OFFLOADS, OFFLOADS), (0, OFFLOADS), (OFFLOADS, 0), (0, 0)])
def test_a_datagram_of_any_size_arrives_as_it_was_sent(ring: Callable[..., RxRing], features: tuple[int, int]) -> None:
    world = World(1)
    a, b = (
        Host(f"10.0.0.{n + 1}/24", mtu=65521, features=features[n], ring=ring, pages=4096 if ring is LinearRing else 256)
        for n in (0, 1)
    )
    SimWire(world, a.device, b.device)
    a.live_in(world)
    b.live_in(world)
    receiver = bound(b, 1000)
    sender = bound(a, 2000)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 65493))
    @example(0)
    @example(65493)
    def send(size: int) -> None:
        payload = bytes(n * 7 & 0xFF for n in range(size))
        assert sender.sendto_nowait(payload, (b.address, 1000)) == size
        assert world.run_until(lambda: receiver.readable, world.now + 1.0)
        assert receiver.recvfrom_nowait(65535) == (payload, (a.address, 2000))

    send()
    assert a.env.drops.total() == b.env.drops.total() == 0
    assert b.udp.account.bytes == 0
    a.close()
    b.close()


def test_the_oldest_datagram_comes_first_and_memory_goes_with_it(host: BenchHost) -> None:
    socket = bound(host, 1000)
    for n in range(3):
        arrive(host, bytes([n]), sport=2000 + n)
    charged = socket.account.bytes
    assert charged == host.udp.account.bytes > 0
    assert socket.recvfrom_nowait(10, peek=True) == (b"\0", (host.peer, 2000))
    assert [socket.recvfrom_nowait(10) for _ in range(3)] == [(bytes([n]), (host.peer, 2000 + n)) for n in range(3)]
    assert socket.account.bytes == 0
    with pytest.raises(BlockingIOError):
        socket.recvfrom_nowait(10)
    assert host.env.mib.UdpInDatagrams == 3


def test_what_does_not_fit_the_buffer_is_cut_off_and_the_full_length_told(host: BenchHost) -> None:
    socket = bound(host, 1000)
    arrive(host, b"datagram")
    arrive(host, b"datagram")
    arrive(host, b"next")
    assert socket.recvfrom_nowait(4)[0] == b"data"
    target = bytearray(4)
    assert socket.recvfrom_into_nowait(memoryview(target)) == (8, (host.peer, 2000))
    assert target == b"data"
    assert socket.recvfrom_nowait(100)[0] == b"next"


def test_an_empty_datagram_is_a_datagram(host: BenchHost) -> None:
    socket = bound(host, 1000)
    arrive(host, b"")
    assert socket.recvfrom_nowait(10) == (b"", (host.peer, 2000))
    socket.sendto_nowait(b"", (host.peer, 2000))
    assert dpkt.ethernet.Ethernet(host.take_sent()[0]).data.data.ulen == 8


def test_the_user_is_woken_once_per_batch(host: BenchHost) -> None:
    socket = bound(host, 1000)
    woken: list[int] = []
    socket.wake = woken.append
    arrive(host, b"first")
    assert woken == [READABLE]
    host.flush()
    assert woken == [READABLE]


def test_a_socket_may_close_another_while_both_are_being_woken(host: BenchHost) -> None:
    first, second = bound(host, 1000), bound(host, 1001)
    first.wake = lambda _: second.close()
    first.fail(errno.ECONNREFUSED)
    second.fail(errno.ECONNREFUSED)
    host.flush()
    assert second.closed


def test_connected_before_bound_before_any(host: BenchHost) -> None:
    anybody = bound(host, 1000, reuseaddr=True)
    ours = bound(host, 1000, host.address, reuseaddr=True)
    friend = bound(host, 1000, host.address, reuseaddr=True)
    friend.connect(host.peer, 2000)
    arrive(host, b"friend", sport=2000)
    arrive(host, b"stranger", sport=2001)
    ours.close()
    arrive(host, b"late stranger", sport=2001)
    assert friend.recvfrom_nowait(100)[0] == b"friend"
    assert anybody.recvfrom_nowait(100)[0] == b"late stranger"
    assert not friend.readable
    assert not anybody.readable


def test_a_broadcast_reaches_every_socket_on_its_port(host: BenchHost) -> None:
    sockets = [bound(host, 1000, reuseaddr=True) for _ in range(3)]
    bound(host, 1000, host.address, reuseaddr=True)
    arrive(host, b"to all", dst=host.interface.broadcast, dst_mac=ethernet.BROADCAST)
    assert [socket.recvfrom_nowait(100)[0] for socket in sockets] == [b"to all"] * 3
    assert host.drops == {}


def test_an_address_is_bound_once_unless_both_agree_to_share(host: BenchHost) -> None:
    bound(host, 1000, host.address)
    with raises(errno.EADDRINUSE):
        bound(host, 1000)
    with raises(errno.EADDRINUSE):
        bound(host, 1000, host.address, reuseaddr=True)
    bound(host, 1001)
    with raises(errno.EADDRINUSE):
        bound(host, 1001, host.address)
    with raises(errno.EADDRNOTAVAIL):
        bound(host, 1002, ip("10.0.0.7"))
    first = bound(host, 1003)
    with raises(errno.EINVAL):
        first.bind(ANY, 1004)
    first.close()
    bound(host, 1003)


def test_ports_that_nobody_names_are_ephemeral_random_and_free(host: BenchHost) -> None:
    ports = [bound(host, 0).port for _ in range(200)]
    assert len(set(ports)) == 200
    assert all(32768 <= port < 61000 for port in ports)
    assert ports != sorted(ports)


def test_all_ports_can_be_used_up(host: BenchHost) -> None:
    for port in range(32768, 61000):
        bound(host, port)
    with raises(errno.EADDRINUSE):
        host.udp.socket().sendto_nowait(b"", (host.peer, 1))


def test_a_connected_socket_names_itself_and_its_peer(host: BenchHost) -> None:
    socket = host.udp.socket()
    assert socket.local == (ANY, 0)
    with raises(errno.EDESTADDRREQ):
        socket.sendto_nowait(b"to whom?")
    socket.connect(host.peer, 2000)
    assert socket.local == (host.address, socket.port)
    assert socket.remote == (host.peer, 2000)
    socket.sendto_nowait(b"to the peer")
    socket.disconnect()
    assert socket.local == (ANY, socket.port)
    assert len(host.take_sent()) == 1


def test_a_change_of_routes_does_not_disturb_a_connected_socket(host: BenchHost) -> None:
    socket = host.udp.socket()
    socket.connect(host.peer, 2000)
    host.ipv4.routes.add(bytes(4), 0, host.interface, host.peer)
    socket.sendto_nowait(b"still there")
    assert len(host.take_sent()) == 1


def test_options_of_the_socket_are_on_the_packet(host: BenchHost) -> None:
    bound(host, 1000, tos=0x10, ttl=3).sendto_nowait(b"payload", (host.peer, 2000))
    packet = dpkt.ethernet.Ethernet(host.take_sent()[0]).data
    assert (packet.tos, packet.ttl, packet.data.sport, packet.data.dport) == (0x10, 3, 1000, 2000)


def test_any_buffer_can_be_sent(host: BenchHost) -> None:
    socket = bound(host, 1000)
    for data in (b"ab", bytearray(b"ab"), memoryview(b"ab"), memoryview(array("H", [0x6261]))):
        assert socket.sendto_nowait(data, (host.peer, 2000)) == 2
    assert [frame[42:] for frame in host.take_sent()] == [b"ab"] * 4


def test_a_broadcast_needs_permission(host: BenchHost) -> None:
    for address in ("255.255.255.255", "10.0.0.255"):
        with raises(errno.EACCES):
            bound(host, 0).sendto_nowait(b"all", (ip(address), 9))
        bound(host, 0, broadcast=True).sendto_nowait(b"all", (ip(address), 9))
        assert host.take_sent()[0][:6] == ethernet.BROADCAST


def test_what_must_not_be_cut_is_refused(host: BenchHost) -> None:
    socket = bound(host, 1000, pmtudisc=PMTUDISC_DO)
    assert socket.sendto_nowait(bytes(1472), (host.peer, 2000)) == 1472
    with raises(errno.EMSGSIZE):
        socket.sendto_nowait(bytes(1473), (host.peer, 2000))


@pytest.mark.parametrize(("address", "number"), [("192.0.2.1", errno.ENETUNREACH), ("224.0.0.1", errno.ENETUNREACH)])
def test_there_must_be_a_route(host: BenchHost, address: str, number: int) -> None:
    with raises(number):
        host.udp.socket().connect(ip(address), 9)
    with raises(number):
        host.udp.socket().sendto_nowait(b"", (ip(address), 9))


def test_port_0_is_nobody(host: BenchHost) -> None:
    with raises(errno.EINVAL):
        host.udp.socket().connect(host.peer, 0)
    with raises(errno.EINVAL):
        host.udp.socket().sendto_nowait(b"", (host.peer, 0))


def test_a_queue_is_limited_by_truesize_not_by_payload(host: BenchHost) -> None:
    socket = bound(host, 1000, rcvbuf=4096)
    for _ in range(50):
        arrive(host, b"x")
    queued = 50 - host.drops["SOCKET_RCVBUFF"]
    assert host.env.mib.UdpRcvbufErrors == host.drops["SOCKET_RCVBUFF"]
    one = socket.account.bytes // queued
    assert one > 250, "a head alone is 232 bytes"
    assert 4096 < socket.account.bytes <= 4096 + one, "the datagram that crosses the limit is taken, as in the kernel"
    socket.recvfrom_nowait(1)
    arrive(host, b"there is room again")
    assert host.drops["SOCKET_RCVBUFF"] == 50 - queued


def exhaust(host: BenchHost) -> Callable[[], None]:
    """Take all memory above the reserve; returns how to give it back."""
    pages = host.env.memory.pages
    host.env.memory.pool.reap()
    owner = pages.owner_id("test")
    taken: list[int] = []
    while pfns := pages.alloc_bulk(1, 0, owner):
        taken += pfns
    return lambda: pages.free_bulk(taken)


def test_when_memory_is_short_only_memalloc_sockets_receive(host: BenchHost) -> None:
    ordinary = bound(host, 1000)
    privileged = bound(host, 1001, memalloc=True)
    give_back = exhaust(host)
    for port in (1000, 1001):
        arrive(host, bytes(1400), dport=port)
    assert not ordinary.readable
    assert privileged.readable
    assert host.drops == {"NOMEM": 1}
    privileged.recvfrom_nowait(2000)
    give_back()


class RingInTheReserve(LinearRing):
    """A ring all of whose buffers came from the reserve."""

    __slots__ = ()

    def _aim(self) -> None:
        super()._aim()
        self.frame.pfmemalloc = True


def test_a_frame_that_lies_in_the_reserve_is_only_for_memalloc_sockets() -> None:
    host = BenchHost(ring=RingInTheReserve, features=0, pages=512)
    host.arrive_arp(1, host.peer, host.address)
    bound(host, 1000)
    privileged = bound(host, 1001, memalloc=True)
    arrive(host, b"ordinary", dport=1000)
    arrive(host, b"privileged", dport=1001)
    assert privileged.recvfrom_nowait(100)[0] == b"privileged"
    assert host.drops == {"PFMEMALLOC": 1}
    host.close()


def test_a_broadcast_that_was_kept_from_the_reserve_is_not_cloned_for_ordinary_sockets(host: BenchHost) -> None:
    privileged = bound(host, 1000, memalloc=True, reuseaddr=True)
    ordinary = bound(host, 1000, reuseaddr=True)
    give_back = exhaust(host)
    arrive(host, bytes(1400), dst=host.interface.broadcast, dst_mac=ethernet.BROADCAST)
    assert privileged.readable
    assert not ordinary.readable
    privileged.recvfrom_nowait(2000)
    assert host.env.memory.live == 0
    give_back()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda wire: wire[:7], "PKT_TOO_SMALL"),
        (lambda wire: wire[:-1], "UDP_LENGTH"),
        (lambda wire: wire[:4] + b"\0\7" + wire[6:], "UDP_LENGTH"),
        (lambda wire: wire[:-1] + b"!", "UDP_CSUM"),
        (lambda wire: b"\0\0" + wire[2:], "UDP_CSUM"),
    ],
)
def test_a_damaged_datagram_is_dropped(host: BenchHost, spoil: Callable[[bytes], bytes], reason: str) -> None:
    socket = bound(host, 1000)
    host.arrive_ip(17, spoil(datagram(host, b"payload", 2000, 1000)))
    assert not socket.readable
    assert host.drops == {reason: 1}
    assert host.env.mib.UdpInErrors == 1


def test_what_follows_the_datagram_in_the_packet_is_not_its_payload(host: BenchHost) -> None:
    socket = bound(host, 1000)
    host.arrive_ip(17, datagram(host, b"payload", 2000, 1000) + b"trailer")
    assert socket.recvfrom_nowait(100)[0] == b"payload"


def test_no_checksum_and_a_checksum_that_the_device_vouches_for_are_accepted(host: BenchHost) -> None:
    socket = bound(host, 1000)
    host.arrive_ip(17, udp.build_header(2000, 1000, 2) + b"no")
    host.arrive_ip(17, udp.build_header(2000, 1000, 2, 0x1234) + b"ok", csum_ok=True)
    assert [socket.recvfrom_nowait(10)[0] for _ in range(2)] == [b"no", b"ok"]


def test_a_datagram_for_nobody_is_answered_with_port_unreachable(host: BenchHost) -> None:
    arrive(host, b"anybody?", dport=1234)
    assert host.drops == {"NO_SOCKET": 1}
    assert host.env.mib.UdpNoPorts == 1
    (frame,) = host.take_sent()
    header = icmp.parse_header(frame, 34, len(frame))
    assert header is not None
    assert (header.type, header.code) == (icmp.ICMP_DEST_UNREACH, icmp.ICMP_PORT_UNREACH)


def icmp_error(host: BenchHost, kind: int, code: int, sport: int, dport: int = 2000, mtu: int = 0) -> None:
    """An ICMP error about a datagram that we sent to the peer."""
    quoted = ipv4.build_header(host.address, host.peer, 17, 1000) + udp.build_header(sport, dport, 992)
    host.arrive_ip(1, icmp.build_header(kind, code, 0, mtu, [quoted]) + quoted)


@pytest.mark.parametrize(
    ("kind", "code", "number"),
    [
        (3, 3, errno.ECONNREFUSED),
        (3, 2, errno.ENOPROTOOPT),
        (3, 4, errno.EMSGSIZE),
        (12, 0, errno.EPROTO),
        (3, 1, 0),
        (11, 0, 0),
    ],
)
def test_a_connected_socket_is_told_of_errors_that_do_not_pass(host: BenchHost, kind: int, code: int, number: int) -> None:
    socket = bound(host, 1000)
    socket.connect(host.peer, 2000)
    woken: list[int] = []
    socket.wake = woken.append
    icmp_error(host, kind, code, 1000, mtu=900)
    assert woken == ([READABLE | WRITABLE] if number else [])
    if number:
        with raises(number):
            socket.recvfrom_nowait(10)
    with pytest.raises(BlockingIOError):
        socket.recvfrom_nowait(10)


def test_an_unconnected_socket_is_not_told_whom_the_error_is_about(host: BenchHost) -> None:
    socket = bound(host, 1000)
    socket.sendto_nowait(b"payload", (host.peer, 2000))
    icmp_error(host, 3, 3, 1000)
    assert socket.take_error() == 0
    assert host.drops == {}


def test_an_error_about_another_conversation_is_not_believed(host: BenchHost) -> None:
    socket = bound(host, 1000)
    socket.connect(host.peer, 2000)
    icmp_error(host, 3, 3, 1000, dport=2001)
    icmp_error(host, 3, 3, 1001)
    assert socket.take_error() == 0
    assert host.drops == {"ICMP_MALFORMED": 2}


def test_a_narrower_path_is_learned_from_a_datagram_that_did_not_fit(host: BenchHost) -> None:
    socket = bound(host, 1000, pmtudisc=PMTUDISC_DO)
    socket.connect(host.peer, 2000)
    icmp_error(host, 3, 4, 1000, mtu=900)
    with raises(errno.EMSGSIZE):
        socket.sendto_nowait(b"the error comes first")
    socket.sendto_nowait(bytes(872))
    with raises(errno.EMSGSIZE):
        socket.sendto_nowait(bytes(873))
    socket.options.pmtudisc = PMTUDISC_PROBE  # what the path is said to take does not count
    socket.sendto_nowait(bytes(1472))
    with raises(errno.EMSGSIZE):
        socket.sendto_nowait(bytes(1473))


def test_an_error_can_be_asked_for_once(host: BenchHost) -> None:
    socket = bound(host, 1000)
    socket.connect(host.peer, 2000)
    icmp_error(host, 3, 3, 1000)
    assert socket.readable
    assert (socket.take_error(), socket.take_error()) == (errno.ECONNREFUSED, 0)


def test_shutdown_ends_one_direction(host: BenchHost) -> None:
    socket = bound(host, 1000)
    with raises(errno.ENOTCONN):
        socket.shutdown(SHUT_RD)
    socket.connect(host.peer, 2000)
    arrive(host, b"queued")
    socket.shutdown(SHUT_RD)
    assert socket.recvfrom_nowait(10)[0] == b"queued"
    assert socket.recvfrom_nowait(10) == (b"", (ANY, 0))
    assert socket.recvfrom_into_nowait(memoryview(bytearray(1))) == (0, (ANY, 0))
    socket.shutdown(SHUT_WR)
    with raises(errno.EPIPE):
        socket.sendto_nowait(b"")


def test_a_closed_socket_holds_nothing_and_does_nothing(host: BenchHost) -> None:
    socket = bound(host, 1000)
    arrive(host, b"unread")
    socket.close()
    socket.close()
    assert host.udp.account.bytes == 0
    with raises(errno.EBADF):
        socket.recvfrom_nowait(10)
    with raises(errno.EBADF):
        socket.sendto_nowait(b"", (host.peer, 9))
    with raises(errno.EINVAL):
        socket.bind(ANY, 1001)
    arrive(host, b"nobody here")
    assert host.drops == {"NO_SOCKET": 1}


def test_when_the_stack_ends_its_sockets_are_told(host: BenchHost) -> None:
    socket = bound(host, 1000)
    woken: list[int] = []
    socket.wake = woken.append
    host.udp.close()
    assert woken == [READABLE | WRITABLE]
    with raises(errno.ECONNABORTED):
        socket.recvfrom_nowait(10)
