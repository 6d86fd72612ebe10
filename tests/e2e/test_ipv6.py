"""IPv6 with the kernel as the other host on the link: finding each other, TCP and UDP in every mode, and what routers say."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from ipaddress import IPv6Address, IPv6Network
from random import Random
from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.capture import capture
from tests.e2e.conftest import KERNEL, KERNEL6, OURS, OURS6, kernel_socket, listen, until
from tests.e2e.peers import iperf3, iperf3_server, nc, nc_udp, ping
from tests.e2e.relay import echo, relay
from tests.needs import require_tool
from ustack.net import addresses
from ustack.net.ipv6 import Ipv6Config
from ustack.net.neighbour import NUD_REACHABLE
from ustack.net.path import PMTUDISC_DO
from ustack.socket_options import IPV6_MTU_DISCOVER
from ustack.wire import icmpv6, ipv6

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.net.inet6 import Address6, Inet6
    from ustack.stack import Stack

pytestmark = pytest.mark.e2e

AT_ONCE: Final = Ipv6Config(dad_transmits=0)
"""Addresses that nobody is asked about."""

DATA: Final = Random(6).randbytes(2_000_000)
HEADERS: Final = 48
"""Bytes of IPv6 and ICMPv6, or UDP, header."""

NOISE: Final = frozenset({"IP_INADDRERRORS"})
"""Why what the kernel says to routers, groups that we are not in, goes no further."""

FAULTS: Final = frozenset({"TCP_CSUM", "UDP_CSUM", "ICMP_CSUM", "IP_INHDR", "PKT_TOO_SMALL", "PKT_TOO_BIG", "IP_NOPROTO"})
"""Drops that none of the kernel's honest packets should meet; others only mean that somebody was slow."""

SOL_PACKET: Final = 263
PACKET_AUXDATA: Final = 8
"""Options of linux/if_packet.h."""

modes = pytest.mark.parametrize("mode", ["paged", "linear"])
offloads = pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])


def packed(text: str) -> bytes:
    """An address as the stack has it."""
    return socket.inet_pton(socket.AF_INET6, text)


def inet6_of(stack: Stack) -> Inet6:
    """What the only interface knows of IPv6."""
    inet6 = stack.interfaces[0].inet6
    assert inet6 is not None
    return inet6


def own(stack: Stack, network: str) -> Address6 | None:
    """Our address in `network`, once it can be used."""
    for each in inet6_of(stack).addresses.values():
        if not each.tentative and IPv6Address(each.address[:16]) in IPv6Network(network):
            return each
    return None


# -- finding each other --


@modes
@offloads
async def test_an_echo_of_any_size_comes_back(stack_on_tap: StackOnTap, netns: Namespace, mode: str, offload: bool) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload, ipv6=AT_ONCE)
    for size in (0, 1, 56, 1024, 1500 - HEADERS):
        answered = await ping(netns, OURS6, count=2, size=size, dont_fragment=True)
        assert answered.received >= 2, answered.output  # more, where the program was late to notice
        assert "wrong" not in answered.output
    for size in (1500 - HEADERS + 1, 5000, 65_000):
        assert (await ping(netns, OURS6, count=2, size=size)).received >= 2, "in fragments, and back in fragments"
    assert stack.drops.by_name().keys() <= NOISE
    assert stack.mib.Ip6FragOKs == stack.mib.Ip6ReasmOKs >= 6


async def test_link_local_addresses_find_each_other_too(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    ours = addresses.text(inet6_of(stack).link_local())
    assert (await ping(netns, f"{ours}%tap0")).received == 3


async def test_we_ask_whether_our_addresses_are_in_use_and_take_them_when_nobody_objects(
    stack_on_tap: StackOnTap, netns: Namespace
) -> None:
    stack = await stack_on_tap(ipv6=Ipv6Config())
    assert own(stack, f"{OURS6}/128") is None
    await until(lambda: own(stack, f"{OURS6}/128") is not None)
    assert (await ping(netns, OURS6)).received == 3


async def test_an_address_that_the_kernel_has_is_not_taken(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=Ipv6Config())
    stack.add_address(stack.interfaces[0], f"{KERNEL6}/64")
    await until(lambda: packed(KERNEL6) in inet6_of(stack).failed)
    assert packed(KERNEL6) not in inet6_of(stack).addresses


async def test_we_object_when_the_kernel_wants_an_address_of_ours(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    await stack_on_tap(ipv6=AT_ONCE)
    await netns.arun("ip", "address", "add", f"{OURS6}/64", "dev", "tap0")

    async def flags() -> bytes:
        return (await netns.arun("ip", "address", "show", "dev", "tap0")).stdout

    async with asyncio.timeout(10):
        while b"dadfailed" not in await flags():
            await asyncio.sleep(0.05)


async def test_a_neighbour_that_is_talked_to_stays_reachable(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    server = await stack.start_server(echo, None, 7)
    assert await nc(netns, OURS6, 7, DATA[:100_000]) == DATA[:100_000]
    neighbour = inet6_of(stack).neighbours.find(packed(KERNEL6))
    assert neighbour is not None
    await until(lambda: neighbour.state == NUD_REACHABLE)
    shown = (await netns.arun("ip", "-6", "neighbour", "show", OURS6)).stdout
    assert b"REACHABLE" in shown or b"DELAY" in shown or b"STALE" in shown
    server.close()


async def test_a_kernel_with_another_station_is_found_again(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    with (
        stack.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours,
        kernel_socket(netns, socket.SOCK_DGRAM, socket.AF_INET6) as theirs,
    ):
        theirs.bind((KERNEL6, 0))
        port = theirs.getsockname()[1]
        await ours.sendto(b"before", (KERNEL6, port))
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(theirs, 100) == b"before"
        netns.run("ip", "link", "set", "tap0", "address", "02:aa:bb:cc:dd:ee")
        netns.run("ip", "-6", "neighbour", "flush", "dev", "tap0")
        assert (await ping(netns, OURS6)).received == 3  # it asks us, and so tells us where it is
        await ours.sendto(b"after", (KERNEL6, port))
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(theirs, 100) == b"after"


async def test_a_silent_neighbour_is_unreachable(stack_on_tap: StackOnTap) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    with stack.socket(socket.AF_INET6) as ours, pytest.raises(OSError, match="No route to host"):
        await ours.connect(("fd00:77::99", 80))


# -- TCP and UDP --


@modes
@offloads
async def test_a_stream_both_ways_in_every_mode(
    stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path, mode: str, offload: bool
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload, ipv6=AT_ONCE)
    server = await stack.start_server(echo, None, 7)
    async with capture(netns, "tap0", tmp_path / "tap0.pcap") as seen:
        assert await nc(netns, OURS6, 7, DATA) == DATA
        assert await nc(netns, OURS, 7, DATA[:1000]) == DATA[:1000], "the server is on both versions"
    server.close()
    sizes = [len(frame) for frame in seen.frames()]
    assert (max(sizes) > 10_000) == offload, "super-frames, or none"
    assert seen.complaints(offload) == []
    assert not stack.drops.by_name().keys() & FAULTS


@offloads
@pytest.mark.parametrize("direction", [[], ["-R"]], ids=["up", "down"])
async def test_iperf3_sends_through_us(stack_on_tap: StackOnTap, netns: Namespace, offload: bool, direction: list[str]) -> None:
    stack = await stack_on_tap(offload=offload, ipv6=AT_ONCE)
    async with iperf3_server(netns, KERNEL6), relay(stack, 5201, host=KERNEL6):
        measured = await iperf3(netns, OURS6, "-6", *direction, size=10 << 20)
    assert measured.sent >= 10 << 20
    assert measured.received > 0


async def test_datagrams_of_every_kind_of_size(stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    loop = asyncio.get_running_loop()
    with (
        stack.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours,
        kernel_socket(netns, socket.SOCK_DGRAM, socket.AF_INET6) as theirs,
    ):
        ours.bind(("::", 7))
        theirs.bind((KERNEL6, 0))
        async with capture(netns, "tap0", tmp_path / "udp.pcap") as seen, asyncio.timeout(30):
            for size in (0, 1, 7, 1232, 1500 - HEADERS, 1500 - HEADERS + 1, 4000, 65_000):
                await loop.sock_sendto(theirs, DATA[:size], (OURS6, 7))
                received, sender = await ours.recvfrom(65535)
                assert (received, sender[0]) == (DATA[:size], KERNEL6)
                await ours.sendto(received, sender)
                assert (await loop.sock_recvfrom(theirs, 65535))[0] == DATA[:size]
    assert seen.complaints(offload=True) == []
    assert stack.mib.Ip6FragOKs == stack.mib.Ip6ReasmOKs == 3


async def test_nobody_listens_and_both_sides_say_so(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    with stack.socket(socket.AF_INET6) as stream, pytest.raises(ConnectionRefusedError):
        await stream.connect((KERNEL6, 9))
    with stack.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagram:
        await datagram.connect((KERNEL6, 9))
        await datagram.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            async with asyncio.timeout(10):
                await datagram.recv(100)
    with pytest.raises(AssertionError, match="exited with 1"):
        await nc(netns, OURS6, 9)
    with kernel_socket(netns, socket.SOCK_DGRAM, socket.AF_INET6) as theirs:
        theirs.connect((OURS6, 9))
        theirs.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().sock_recv(theirs, 100)
    assert stack.mib.Icmp6OutDestUnreachs == 1


async def test_one_socket_for_both_versions_or_for_one(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    with listen(stack, 80, socket.AF_INET6) as both, stack.socket(socket.AF_INET6) as only:
        only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        only.bind(("::", 81))
        only.listen()
        for where, seen_as in ((OURS6, KERNEL6), (OURS, f"::ffff:{KERNEL}")):
            with kernel_socket(netns, family=socket.AF_INET6 if ":" in where else socket.AF_INET) as theirs:
                await asyncio.get_running_loop().sock_connect(theirs, (where, 80))
                accepted, peer = await both.accept()
                assert peer[0] == seen_as
                accepted.close()
        with kernel_socket(netns) as theirs, pytest.raises(ConnectionRefusedError):
            await asyncio.get_running_loop().sock_connect(theirs, (OURS, 81))


async def test_hop_limit_and_traffic_class_are_on_the_wire(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    with (
        stack.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours,
        kernel_socket(netns, socket.SOCK_DGRAM, socket.AF_INET6) as theirs,
    ):
        theirs.bind((KERNEL6, 0))
        theirs.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        theirs.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 7)
        ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x28)
        await ours.sendto(b"x", (KERNEL6, theirs.getsockname()[1]))
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(theirs, readable.set)
        async with asyncio.timeout(10):
            await readable.wait()
        asyncio.get_running_loop().remove_reader(theirs)
        _, ancillary, _, _ = theirs.recvmsg(10, 100)
    said = {kind: struct.unpack("i", data)[0] for _, kind, data in ancillary}
    assert said == {socket.IPV6_HOPLIMIT: 7, socket.IPV6_TCLASS: 0x28}


# -- routers --


def advertise(
    netns: Namespace, *options: bytes, lifetime: int = 1800, hop_limit: int = 64, sent_from: str = "fe80::1", hops: int = 255
) -> None:
    """A router advertisement on `tap0` from a router on the kernel's side, to all nodes."""
    message = struct.pack("!BBHBBHII", 134, 0, 0, hop_limit, 0, lifetime, 0, 0) + b"".join(options)
    source, group = packed(sent_from), packed("ff02::1")
    total = sum(struct.unpack(f"!{len(message) // 2 + 16}H", source + group + message)) + len(message) + 58
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    message = message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]
    mac = bytes.fromhex(netns.mac("tap0").replace(":", ""))
    header = struct.pack("!IHBB", 6 << 28, len(message), 58, hops) + source + group
    with netns.open(socket.socket, socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("tap0", 0))
        wire.send(b"\x33\x33\0\0\0\1" + mac + b"\x86\xdd" + header + message)


def prefix(network: str, valid: int = 7200, preferred: int = 3600, flags: int = 0xC0) -> bytes:
    """A prefix option."""
    parsed = IPv6Network(network)
    return struct.pack("!BBBBIII", 3, 4, parsed.prefixlen, flags, valid, preferred, 0) + parsed.network_address.packed


def source_station(netns: Namespace) -> bytes:
    """The option that says that the router is the kernel."""
    return b"\1\1" + bytes.fromhex(netns.mac("tap0").replace(":", ""))


FROM_ROUTERS: Final = Ipv6Config(autoconf=True, stable_secret="test", dad_transmits=1)


async def test_an_address_and_a_way_out_come_from_a_router(stack_on_tap: StackOnTap, netns: Namespace, far: Namespace) -> None:
    """SLAAC: the kernel is the router, and forwards to a host behind it."""
    stack = await stack_on_tap(ipv6=FROM_ROUTERS)
    netns.run("ip", "address", "add", "fe80::1/64", "dev", "tap0", "nodad")
    netns.run("ip", "address", "add", "fd00:5::1/64", "dev", "tap0", "nodad")
    advertise(netns, prefix("fd00:5::/64"), source_station(netns), hop_limit=33)
    await until(lambda: own(stack, "fd00:5::/64") is not None)
    formed = own(stack, "fd00:5::/64")
    assert formed is not None
    assert formed.address[8:] != inet6_of(stack).link_local()[8:], "stable privacy: another identifier in another network"
    text = addresses.text(formed.address)
    assert (await ping(far, text)).received == 3
    with stack.socket(socket.AF_INET6) as ours, kernel_socket(far, family=socket.AF_INET6) as theirs:
        theirs.bind((FAR6, 0))
        theirs.listen()
        ours.bind((text, 0))
        await ours.connect((FAR6, theirs.getsockname()[1]))
        accepted, _ = await asyncio.get_running_loop().sock_accept(theirs)
        accepted.close()
    assert inet6_of(stack).hop_limit == 33


async def test_a_router_that_leaves_takes_its_route_along(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=FROM_ROUTERS)
    advertise(netns, source_station(netns))
    await until(lambda: any(route.via is not None for route in stack.ip6.routes))
    advertise(netns, source_station(netns), lifetime=0)
    await until(lambda: not any(route.via is not None for route in stack.ip6.routes))


async def test_what_comes_from_beyond_the_link_is_no_router(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(ipv6=FROM_ROUTERS)
    advertise(netns, prefix("fd00:6::/64"), hops=254)
    advertise(netns, prefix("fd00:6::/64"), sent_from="fd00:77::1")
    advertise(netns, prefix("fd00:6::/64")[:-8])
    await until(lambda: stack.drops.by_name().get("IPV6_NDISC_BAD_OPTIONS") == 2)
    assert stack.drops.by_name()["IPV6_NDISC_HOP_LIMIT"] == 1
    assert not any(route.via is not None for route in stack.ip6.routes)
    assert not stack.ip6.routes.lookup(packed("fd00:6::1"))


FAR6: Final = "fd00:78::2"
ROUTER6: Final = "fd00:78::1"


@pytest.fixture
def far(netns: Namespace, make_netns: object) -> Namespace:
    """A host with the address FAR6 on a cable behind the kernel of `netns`, which is its router and ours."""
    assert callable(make_netns)
    host: Namespace = make_netns("far")
    netns.add_veth("eth0", host, "eth0")
    for namespace, address in ((netns, ROUTER6), (host, FAR6)):
        namespace.set_up("eth0", f"{address}/64")
    netns.sysctl("net.ipv6.conf.all.forwarding", 1)
    host.add_route("default", ROUTER6)
    return host


@offloads
async def test_a_narrow_link_behind_the_router_is_learned_of(
    stack_on_tap: StackOnTap, netns: Namespace, far: Namespace, offload: bool
) -> None:
    """Path MTU discovery (RFC 8201): "packet too big" makes TCP cut smaller segments, and UDP cut datagrams."""
    stack = await stack_on_tap(offload=offload, ipv6=AT_ONCE)
    stack.add_route("fd00:78::/64", KERNEL6)
    netns.run("ip", "-6", "route", "replace", "fd00:78::/64", "dev", "eth0", "metric", "256", "mtu", "lock", "1300")
    server = await stack.start_server(echo, None, 7)
    assert await nc(far, OURS6, 7, DATA[:1_000_000], timeout=60) == DATA[:1_000_000]
    server.close()
    assert stack.ip6.path(packed(FAR6)).mtu == 1300
    assert stack.mib.Icmp6InPktTooBigs > 0
    with (
        stack.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours,
        kernel_socket(far, socket.SOCK_DGRAM, socket.AF_INET6) as theirs,
    ):
        theirs.bind((FAR6, 0))
        where = (FAR6, theirs.getsockname()[1])
        await ours.sendto(DATA[:1400], where)
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(theirs, 9999) == DATA[:1400]
        ours.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
        with pytest.raises(OSError, match="Message too long") as refused:
            await ours.sendto(DATA[:1400], where)
        assert refused.value.errno == errno.EMSGSIZE


async def test_nc_udp_and_traceroute_find_us(stack_on_tap: StackOnTap, netns: Namespace, far: Namespace) -> None:
    stack = await stack_on_tap(ipv6=AT_ONCE)
    stack.add_route("::/0", KERNEL6)
    with stack.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours:
        ours.bind(("", 7))

        async def answer() -> None:
            data, sender = await ours.recvfrom(100)
            await ours.sendto(data, sender)

        answering = asyncio.create_task(answer())
        assert await nc_udp(far, OURS6, 7, b"datagram") == b"datagram"
        await answering
    traced = await far.arun(require_tool("traceroute"), "-6", "-n", "-m", "4", "-w", "2", OURS6)
    hops = [line.split()[1] for line in traced.stdout.decode().splitlines()[1:]]
    assert hops == [ROUTER6, OURS6], traced.stdout


# -- VLANs --


@modes
@offloads
async def test_a_tagged_frame_is_answered_with_the_same_tag(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str, offload: bool
) -> None:
    """By hand, because not every kernel has VLANs: solicitation and echo with the tag of VLAN 5, and with one of nobody's."""
    stack = await stack_on_tap(mode=mode, offload=offload, ipv6=AT_ONCE)
    link = stack.interfaces[0]
    stack.add_vlan(link, 5, "fd00:5::2/64")
    mac, station = link.device.mac, b"\2\0\0\0\0\x55"
    us, peer = packed("fd00:5::2"), packed("fd00:5::1")

    def tagged(vid: int, kind: int, body: bytes, dst: bytes) -> bytes:
        message = icmpv6.build_header(peer, dst, kind, 0, 0, (body,)) + body
        tag = struct.pack("!HH", 0x8100, vid)
        return mac + station + tag + b"\x86\xdd" + ipv6.build_header(peer, dst, 58, len(message), 255) + message

    def answer(wire: socket.socket, kind: int) -> tuple[bytes, int]:
        """The message of that type for `station`, and the VLAN of its tag, which the kernel takes off (packet(7))."""
        while True:
            frame, ancillary, _, _ = wire.recvmsg(65535, 100)
            if frame[:6] == station and frame[54] == kind:
                return frame, struct.unpack_from("16xH", ancillary[0][2])[0]

    with netns.open(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
        wire.bind(("tap0", 0))
        wire.settimeout(10)
        wire.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        wire.send(tagged(6, 128, b"nobody there", us))
        wire.send(tagged(5, 135, us + b"\1\1" + station, us))
        wire.send(tagged(5, 128, b"x" * 1400, us))
        reply, vlan = await asyncio.to_thread(answer, wire, 129)
    assert vlan == 5
    assert reply.endswith(b"x" * 1400)
    assert stack.mib.Icmp6InEchos == 1
    assert stack.drops.by_name()["UNHANDLED_PROTO"] == 1
