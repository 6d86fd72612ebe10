"""Whatever arrives over IPv6, nothing is raised, nothing leaks, what is learned is bounded, and every drop is counted."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.net.host6 import PEER, ROUTER, US, BenchHost6, ip6
from ustack.link.rxring import LinearRing, PagedRing
from ustack.net.extension_headers import DELIVER, DROP, REASSEMBLE, REPORT, ExtensionHeaders
from ustack.net.ipv6 import REDIRECTS_MAX, Ipv6Config
from ustack.net.router_discovery import PREFIXES_MAX, ROUTES_MAX
from ustack.transport.options import SocketOptions
from ustack.wire import icmpv6, ipv6, mld, ndp, udp
from ustack.wire.checksum import finish, ones_sum, pseudo_v6

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.link.rxring import RxRing

HEAD = 14 + 40
"""Offset of what the IPv6 header carries."""


def datagram(payload: bytes, dport: int = 1000, src: bytes = PEER, dst: bytes = US) -> bytes:
    header = udp.build_header(2000, dport, len(payload))
    checksum = finish(pseudo_v6(src, dst, 17, 8 + len(payload)) + ones_sum(header + payload))
    return udp.build_header(2000, dport, len(payload), checksum) + payload


def prefix(text: str, valid: int = 7200, preferred: int = 3600, flags: int = 0xC0) -> bytes:
    return ndp.build_prefix(ndp.PrefixInfo(64, flags, valid, preferred, ip6(text)))


def query(version: int) -> tuple[int, bytes]:
    return 1000, bytes(16) + (bytes(4) if version == 2 else b"")


def honest(host: BenchHost6) -> dict[str, bytes]:
    """A frame of each kind that is understood."""
    ours = host.inet6.link_local()
    quoted = ipv6.build_header(US, PEER, 17, 1400) + udp.build_header(1000, 2000, 1392)
    all_nodes = ip6("ff02::1")
    options = ipv6.build_options(17, [(0x1E, b"skip"), (5, b"\0\0")])
    whole = datagram(bytes(2000))
    redirect = ip6("fe80::77") + ip6("fd99::1")
    asked = 1000, bytes(16) + bytes(4)
    return {
        "echo": host.icmp(128, b"payload", word=0x10001),
        "echo to a group": host.icmp(128, b"payload", word=0x10001, dst=all_nodes),
        "echo reply": host.icmp(129, b"payload", word=0x10001),
        "datagram": host.packet(17, datagram(b"payload")),
        "datagram for nobody": host.packet(17, datagram(b"payload", 1)),
        "datagram on pages": host.packet(17, datagram(bytes(7000))),
        "datagram behind options": host.packet(ipv6.NEXTHDR_DEST, options + datagram(b"payload")),
        "hop by hop": host.packet(ipv6.NEXTHDR_HOP, options + datagram(b"payload")),
        "routing": host.packet(ipv6.NEXTHDR_ROUTING, b"\x11\0\x04\0" + bytes(4) + datagram(b"payload")),
        "first fragment": host.packet(44, ipv6.build_fragment(17, 0, True, 7) + whole[:1024]),
        "last fragment": host.packet(44, ipv6.build_fragment(17, 1024, False, 7) + whole[1024:]),
        "fragment that is all": host.packet(44, ipv6.build_fragment(17, 0, False, 8) + datagram(b"payload")),
        "port unreachable": host.icmp(1, quoted, code=4),
        "too big": host.icmp(2, quoted, word=1300),
        "time exceeded": host.icmp(3, quoted),
        "parameter problem": host.icmp(4, quoted, word=6),
        "solicitation": host.solicitation(),
        "advertisement": host.advertisement(),
        "router": host.router_advertisement([prefix("fd01::"), ndp.build_mtu(1400)]),
        "redirect": host.icmp(137, redirect, src=ROUTER, dst=ours),
        "listener query": host.icmp(130, asked[1], word=asked[0] << 16, src=ROUTER, dst=all_nodes, hops=1),
        "strange protocol": host.packet(253, b"payload"),
        "nothing inside": host.packet(59, b""),
    }


@pytest.fixture(params=[PagedRing, LinearRing])
def victim(request: pytest.FixtureRequest) -> Iterator[BenchHost6]:
    """A host that believes routers, with a UDP socket that is never read, an echo client, and a path to its peer."""
    ring: Callable[..., RxRing] = request.param
    host = BenchHost6(Ipv6Config(autoconf=True, dad_transmits=0), mtu=9000, features=0, ring=ring, pages=2048)
    socket = host.udp.socket(SocketOptions(rcvbuf=60000), wildcard=None)
    socket.bind(None, 1000)
    host.ipv6.icmp.open_echo(lambda *_: None, lambda *_: None)
    yield host
    host.close()


def outcome(host: BenchHost6) -> int:
    """A number that changes with everything that may become of a packet."""
    mib = host.env.mib
    return host.env.drops.total() + mib.Ip6InDelivers + mib.Ip6ReasmReqds + mib.Icmp6InMsgs + mib.IpInDelivers


def attack(host: BenchHost6, data: bytes, csum_ok: bool) -> None:
    """Deliver `data`; it must be delivered to a protocol, or dropped for a reason."""
    before = outcome(host)
    host.arrive(data[: 14 + 9000], csum_ok)
    if data[12:14] not in (b"\x08\x06", b"\x08\x00"):
        assert outcome(host) > before
    host.sent.clear()
    assert host.env.memory.live < 1000


def repaired(data: bytearray) -> bytes:
    """`data` with a correct ICMPv6 checksum, so that the damage gets further."""
    if len(data) >= HEAD + 8 and data[20] == 58:
        message = data[HEAD:]
        message[2:4] = b"\0\0"
        total = pseudo_v6(bytes(data[22:38]), bytes(data[38:54]), 58, len(message))
        data[HEAD + 2 : HEAD + 4] = finish(total + ones_sum(message)).to_bytes(2, "big")
    return bytes(data)


def test_every_truncation_and_every_damaged_byte_is_survived(victim: BenchHost6) -> None:
    for whole in honest(victim).values():
        for length in [*range(min(len(whole), 160)), *range(160, len(whole), 997)]:
            attack(victim, whole[:length], csum_ok=True)
        for at in range(min(len(whole), 130)):
            for value in (0, 1, 0x80, 0xFF):
                damaged = bytearray(whole)
                damaged[at] = value
                attack(victim, repaired(damaged), csum_ok=True)


def test_any_mixture_of_damage_is_survived(victim: BenchHost6) -> None:
    frames = honest(victim)

    @settings(deadline=None, max_examples=150)
    @given(
        st.sampled_from(sorted(frames)),
        st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=6),
        st.integers(0, 200),
        st.booleans(),
    )
    def damage(kind: str, changes: list[tuple[int, int]], cut: int, csum_ok: bool) -> None:
        data = bytearray(frames[kind])
        for at, value in changes:
            data[at % len(data)] = value
        del data[len(data) - cut % len(data) :]
        attack(victim, repaired(data), csum_ok)

    damage()


# -- extension headers --

headers = st.lists(
    st.tuples(st.sampled_from([0, 43, 44, 60, 51, 59, 17, 6, 58, 253]), st.integers(0, 4), st.binary(max_size=40)), max_size=12
)


def test_any_chain_of_headers_ends(victim: BenchHost6) -> None:
    @settings(deadline=None, max_examples=150)
    @given(headers, st.sampled_from([17, 58, 6, 253, 59]), st.binary(max_size=60))
    def chain(parts: list[tuple[int, int, bytes]], last: int, tail: bytes) -> None:
        kinds = [kind for kind, _, _ in parts] + [last]
        packet = b""
        for number, (_, units, content) in enumerate(parts):
            body = content.ljust(6 + 8 * units, b"\0")[: 6 + 8 * units]
            packet += bytes((kinds[number + 1], units)) + body
        attack(victim, victim.packet(kinds[0], packet + tail), csum_ok=True)

    chain()


def walk(chain: bytes, proto: int, *, multicast: bool = False) -> tuple[int, ExtensionHeaders]:
    walker = ExtensionHeaders()
    packet = bytes(40) + chain
    return walker.walk(memoryview(packet), 0, 40, len(packet), proto, 6, multicast), walker


@given(st.binary(max_size=1400), st.sampled_from([0, 43, 44, 60]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_walk_stays_within_the_packet(chain: bytes, proto: int, multicast: bool) -> None:
    verdict, walker = walk(chain, proto, multicast=multicast)
    assert verdict in (DELIVER, DROP, REPORT, REASSEMBLE)
    assert walker.at <= 40 + len(chain)
    assert 0 <= walker.pointer <= 40 + len(chain)


def test_limits_of_a_chain() -> None:
    nothing = bytes((60, 0, 1, 4, 0, 0, 0, 0))
    ends = bytes((17, 0, 1, 4, 0, 0, 0, 0))
    assert walk(nothing * 7 + ends + bytes(8), 60)[0] == DELIVER
    assert walk(nothing * 8 + ends + bytes(8), 60)[0] == DROP, "nine headers"
    option = b"\x1e\0"
    assert walk(b"\x11\2" + option * 8 + b"\1\4" + bytes(4) + bytes(8), 60)[0] == DELIVER
    assert walk(b"\x11\2" + option * 9 + b"\1\2" + bytes(2) + bytes(8), 60)[0] == DROP, "nine options"
    assert walk(b"\x11\1\1\x0c" + bytes(12) + bytes(8), 60)[0] == DROP, "much padding"
    assert walk(bytes((0, 0, 1, 4, 0, 0, 0, 0)) + ends + bytes(8), 60)[0] == REPORT, "hop-by-hop options not first"


@pytest.mark.parametrize(
    ("kind", "unicast", "to_a_group"),
    [(0x1E, DELIVER, DELIVER), (0x5E, DROP, DROP), (0x9E, REPORT, REPORT), (0xDE, REPORT, DROP)],
)
def test_an_unknown_option_is_treated_as_its_type_says(kind: int, unicast: int, to_a_group: int) -> None:
    """RFC 8200, section 4.2."""
    chain = bytes((17, 0, kind, 0, 1, 2, 0, 0)) + bytes(8)
    assert walk(chain, 60)[0] == unicast
    assert walk(chain, 60, multicast=True)[0] == to_a_group


# -- parsers --


@given(st.binary(max_size=300), st.integers(0, 40), st.integers(0, 320))
@settings(max_examples=150, deadline=None)
def test_no_parser_raises(data: bytes, start: int, end: int) -> None:
    for parse in (
        ndp.parse_neighbor_solicit,
        ndp.parse_neighbor_advert,
        ndp.parse_router_advert,
        ndp.parse_redirect,
        mld.parse_query,
        icmpv6.parse_header,
        ipv6.parse_header,
    ):
        parse(data, start, end)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 5), st.binary(max_size=38)), max_size=40))
@settings(max_examples=150, deadline=None)
def test_options_of_neighbour_discovery_are_all_whole_or_none_counts(parts: list[tuple[int, int, bytes]]) -> None:
    data = b"".join(bytes((kind, units)) + content.ljust(38, b"\0")[: max(8 * units - 2, 0)] for kind, units, content in parts)
    options = ndp.parse_options(data, 0, len(data))
    counted = [units for _, units, _ in parts[: ndp.OPTIONS_MAX]]
    assert (options is None) == (0 in counted)
    if options is not None:
        assert len(options.prefixes) + len(options.routes) <= ndp.OPTIONS_MAX
        assert all(each.prefix_len <= 128 and len(each.prefix) == 16 for each in options.prefixes)
        assert all(each.prefix_len <= 128 and len(each.prefix) == 16 for each in options.routes)


# -- neighbours and routers --


@pytest.mark.parametrize("hops", [0, 1, 64, 254])
def test_what_was_forwarded_is_no_neighbour_discovery(hops: int) -> None:
    host = BenchHost6(Ipv6Config(autoconf=True, dad_transmits=0))
    host.take_sent()
    host.arrive(host.solicitation(hops=hops))
    host.arrive(host.advertisement(hops=hops))
    host.arrive(host.router_advertisement([prefix("fd01::")], hops=hops))
    host.arrive(host.icmp(137, ip6("fe80::77") + PEER, src=ROUTER, hops=hops))
    assert host.drops == {"IPV6_NDISC_HOP_LIMIT": 4}
    assert not host.take_icmp(136)
    assert not len(host.inet6.neighbours)
    host.close()


def test_a_flood_of_neighbours_fills_no_more_than_the_table() -> None:
    host = BenchHost6()
    for number in range(5000):
        src = ip6("fd00::")[:12] + struct.pack("!I", 0x1000 + number)
        host.arrive(host.solicitation(src=src))
        host.sent.clear()
    assert len(host.inet6.neighbours) <= host.inet6.neighbours.parameters.gc_thresh3
    host.arrive(host.icmp(128, b"still there?", word=1))
    host.arrive(host.advertisement())
    assert host.take_icmp(129)
    host.close()


def test_a_flood_of_routers_prefixes_and_redirects_is_bounded() -> None:
    host = BenchHost6(Ipv6Config(autoconf=True, dad_transmits=0))
    for number in range(300):
        router = ROUTER[:14] + struct.pack("!H", number + 1)
        options = [prefix(f"fd{number >> 8:02x}:{number & 255:x}:{each}::") for each in range(1, 4)]
        host.arrive(host.router_advertisement(options, src=router))
        host.sent.clear()
    inet6 = host.inet6
    assert len(inet6.prefixes) <= PREFIXES_MAX + 1
    assert sum(route.via is not None for route in host.ipv6.routes) <= ROUTES_MAX
    assert sum(each.autoconf for each in inet6.addresses.values()) <= host.config.max_addresses
    first = ROUTER[:14] + b"\0\1"
    for number in range(1000):
        target = ip6("fdee::")[:12] + struct.pack("!I", number + 1)
        host.arrive(host.icmp(137, ip6("fe80::77") + target, src=first, dst=inet6.link_local()))
    assert len(host.ipv6._redirects) <= REDIRECTS_MAX
    assert len(inet6.neighbours) <= inet6.neighbours.parameters.gc_thresh3
    host.close()


def test_nobody_can_take_an_address_away_or_end_it_soon() -> None:
    """RFC 4862, section 5.5.3 e: an advertisement alone leaves an address two hours."""
    host = BenchHost6(Ipv6Config(autoconf=True, dad_transmits=0))
    host.arrive(host.router_advertisement([prefix("fd01::", valid=1_000_000, preferred=1_000_000)]))
    (formed,) = [each for each in host.inet6.addresses.values() if each.autoconf]
    host.arrive(host.router_advertisement([prefix("fd01::", valid=0, preferred=0)]))
    assert formed.valid_until == host.env.timers.now + 7200
    assert formed.state == "deprecated"
    host.wait(7201)
    assert formed.address not in host.inet6.addresses
    host.close()


def test_a_stranger_that_says_that_it_is_a_neighbour_is_not_believed_unasked() -> None:
    host = BenchHost6()
    host.arrive(host.advertisement(mac=b"\x02\x66\0\0\0\1"))
    assert host.drops == {"IPV6_NDISC_NS_OTHERHOST": 1}
    assert host.inet6.neighbours.find(PEER) is None
    host.close()


def test_a_redirect_from_anybody_but_the_router_in_use_changes_nothing() -> None:
    host = BenchHost6(Ipv6Config(accept_ra=True, dad_transmits=0))
    host.arrive(host.router_advertisement())
    ours = host.inet6.link_local()
    target = ip6("fd99::1")
    body = ip6("fe80::77") + target
    host.arrive(host.icmp(137, body, src=ip6("fe80::98"), dst=ours))
    host.arrive(host.icmp(137, body, src=PEER, dst=ours))
    host.arrive(host.icmp(137, ip6("fd00::77") + target, src=ROUTER, dst=ours))
    assert host.drops == {"IPV6_NDISC_BAD_OPTIONS": 3}
    assert not host.ipv6._redirects
    host.arrive(host.icmp(137, body, src=ROUTER, dst=ours))
    assert host.ipv6._redirects
    host.close()


# -- fragments --


def fragment(host: BenchHost6, start: int, data: bytes, *, more: bool, ident: int = 7, proto: int = 17) -> bytes:
    return host.packet(44, ipv6.build_fragment(proto, start, more, ident) + data)


def test_fragments_that_overlap_lose_the_whole_datagram() -> None:
    """RFC 5722: all of it, with what comes later; an exact duplicate is no overlap."""
    host = BenchHost6()
    socket = host.udp.socket(SocketOptions(), wildcard=None)
    socket.bind(None, 1000)
    whole = datagram(bytes(range(256)) * 4)
    host.arrive(fragment(host, 0, whole[:512], more=True))
    host.arrive(fragment(host, 0, whole[:512], more=True))
    assert host.drops == {"DUP_FRAG": 1}
    host.arrive(fragment(host, 504, whole[504:], more=False))
    host.arrive(fragment(host, 512, whole[512:], more=False))
    with pytest.raises(BlockingIOError):
        socket.recvfrom_nowait(2000)
    host.wait(61)
    host.arrive(fragment(host, 0, whole[:512], more=True, ident=8))
    host.arrive(fragment(host, 512, whole[512:], more=False, ident=8))
    assert socket.recvfrom_nowait(2000)[0] == whole[8:]
    host.close()


def test_a_first_fragment_without_its_headers_is_refused() -> None:
    """RFC 7112: nothing may be decided about a packet whose headers are elsewhere."""
    host = BenchHost6()
    host.arrive(host.advertisement())
    host.inet6.neighbours.lookup(PEER).update(host.peer_mac, solicited=True, override=True)
    host.take_sent()
    host.arrive(fragment(host, 0, bytes(8), more=True, proto=6))
    host.arrive(fragment(host, 0, b"\x11\x08" + bytes(6), more=True, proto=60))
    assert host.drops["FRAG_TINY"] == 2
    problems = host.take_icmp(icmpv6.ICMPV6_PARAMPROB)
    assert [problem[1] for problem in problems] == [icmpv6.HDR_INCOMP] * 2
    assert not host.ipv6.fragments.account.bytes
    host.close()


def test_a_flood_of_fragments_is_bounded() -> None:
    host = BenchHost6(pages=4096)
    limit = host.ipv6.fragments.parameters.high_thresh
    for number in range(6000):
        host.arrive(fragment(host, 0, datagram(bytes(1000)), more=True, ident=number))
        assert host.ipv6.fragments.account.bytes <= limit + 65536
    host.arrive(host.packet(17, datagram(b"x", 1)))
    host.close()


# -- errors --


def test_errors_are_sent_within_a_limit_and_never_about_errors_or_groups() -> None:
    """RFC 4443, section 2.4 e and f."""
    host = BenchHost6()
    host.inet6.neighbours.lookup(PEER).update(host.peer_mac, solicited=True, override=True)
    host.take_sent()
    quoted = ipv6.build_header(US, PEER, 17, 1400) + udp.build_header(1000, 2000, 1392)
    host.arrive(host.icmp(1, quoted, code=4))
    host.arrive(host.icmp(77, quoted))  # an error that nobody knows
    host.arrive(host.packet(17, datagram(b"x", 9, dst=ip6("ff02::1")), dst=ip6("ff02::1")))
    host.arrive(host.packet(17, datagram(b"x", 9, src=bytes(16)), src=bytes(16)))
    assert not [frame for frame in host.take_sent() if frame[54] < 128]
    for _ in range(200):
        host.arrive(host.packet(17, datagram(b"x", 9)))
    assert 1 <= len(host.take_icmp(1)) <= 10
    assert host.drops["ICMP_RATELIMIT"] >= 190
    host.close()


def test_too_big_is_believed_only_where_it_can_be_true() -> None:
    """RFC 8201, section 4, and RFC 5927: about what we sent, larger than the least, and less than what it quotes."""
    host = BenchHost6()
    socket = host.udp.socket(SocketOptions(), wildcard=None)
    socket.bind(None, 1000)
    socket.connect(PEER, 2000)

    def quoted(length: int, sport: int = 1000, src: bytes = US) -> bytes:
        return ipv6.build_header(src, PEER, 17, length) + udp.build_header(sport, 2000, length)

    for mtu, body in (
        (1279, quoted(1400)),  # no link is so narrow
        (0, quoted(1400)),
        (1400, quoted(1300)),  # it would have fitted
        (1300, quoted(1400, sport=1001)),  # nobody sent it
        (1300, quoted(1400, src=PEER)),
        (1300, quoted(1400)[:44]),
    ):
        host.arrive(host.icmp(2, body, word=mtu))
        assert host.ipv6.path(PEER).mtu == 1500
    host.arrive(host.icmp(2, quoted(1400), word=1300))
    assert host.ipv6.path(PEER).mtu == 1300
    host.close()
