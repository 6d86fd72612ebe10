"""Whatever arrives, nothing is raised, nothing leaks, and what does not get through is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.net.host import BenchHost
from ustack.link.rxring import LinearRing, PagedRing
from ustack.transport.options import SocketOptions
from ustack.wire import arp, ethernet, icmp, ipv4, udp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.link.rxring import RxRing

US = bytes((10, 0, 0, 1))
PEER = bytes((10, 0, 0, 2))
OUR_MAC = b"\x02\x00" + US
PEER_MAC = b"\x02\x99" + PEER
EVERYBODY = b"\xff" * 6


def frame(ethertype: int, packet: bytes, dst: bytes = OUR_MAC) -> bytes:
    return ethernet.build_header(dst, PEER_MAC, ethertype) + packet


def ip_frame(proto: int, payload: bytes, options: bytes = b"") -> bytes:
    return frame(ethernet.ETH_P_IP, ipv4.build_header(PEER, US, proto, len(payload), options=options) + payload)


def datagram(payload: bytes, dport: int) -> bytes:
    header = udp.build_header(2000, dport, len(payload))
    checksum = finish(pseudo_v4(PEER, US, 17, 8 + len(payload)) + ones_sum(header + payload))
    return udp.build_header(2000, dport, len(payload), checksum) + payload


def error(code: int, mtu: int, quoted: bytes) -> bytes:
    return icmp.build_header(icmp.ICMP_DEST_UNREACH, code, 0, mtu, [quoted]) + quoted


QUOTED = ipv4.build_header(US, PEER, 17, 1400) + udp.build_header(1000, 2000, 1392)

HONEST = {
    "arp request": frame(ethernet.ETH_P_ARP, arp.build(arp.ARPOP_REQUEST, PEER_MAC, PEER, bytes(6), US), EVERYBODY),
    "arp reply": frame(ethernet.ETH_P_ARP, arp.build(arp.ARPOP_REPLY, PEER_MAC, PEER, OUR_MAC, US)),
    "echo": ip_frame(1, icmp.build_header(icmp.ICMP_ECHO, 0, 1, 2, [b"payload"]) + b"payload"),
    "echo reply": ip_frame(1, icmp.build_header(icmp.ICMP_ECHOREPLY, 0, 1, 2, [b"payload"]) + b"payload"),
    "datagram": ip_frame(17, datagram(b"payload", 1000)),
    "datagram with options": ip_frame(17, datagram(b"payload", 1000), b"\x94\x04\0\0\x07\x07\x04\0\0\0\0\0"),
    "datagram on pages": ip_frame(17, datagram(bytes(7000), 1000)),
    "datagram for nobody": ip_frame(17, datagram(b"payload", 1)),
    "port unreachable": ip_frame(1, error(icmp.ICMP_PORT_UNREACH, 0, QUOTED)),
    "fragmentation needed": ip_frame(1, error(icmp.ICMP_FRAG_NEEDED, 1000, QUOTED)),
    "strange protocol": ip_frame(253, b"payload"),
}


@pytest.fixture(params=[PagedRing, LinearRing])
def victim(request: pytest.FixtureRequest) -> Iterator[BenchHost]:
    """A host with a UDP socket that is never read, an echo client, and a path to its peer."""
    ring: Callable[..., RxRing] = request.param
    host = BenchHost(mtu=9000, features=0, ring=ring, pages=1024)
    socket = host.udp.socket(SocketOptions(rcvbuf=60000))
    socket.bind(bytes(4), 1000)
    socket.connect(PEER, 2000)
    host.ipv4.icmp.open_echo(lambda *_: None, lambda *_: None)
    yield host
    host.close()


def outcome(host: BenchHost) -> int:
    """A number that changes with everything that may become of a frame."""
    mib = host.env.mib
    return host.env.drops.total() + mib.IpInDelivers + mib.IpReasmReqds + mib.IcmpInMsgs + host.interface.arp.conflicts


def attack(host: BenchHost, data: bytes, csum_ok: bool) -> None:
    """Deliver `data`; it must be delivered to a protocol, dropped for a reason, or be ARP."""
    before = outcome(host)
    host.arrive(data[: 14 + 9000], csum_ok)
    if data[12:14] != b"\x08\x06":
        assert outcome(host) > before
    host.sent.clear()
    assert host.env.memory.live < 400


@pytest.mark.parametrize("kind", HONEST)
def test_every_truncation_of_an_honest_frame_is_survived(victim: BenchHost, kind: str) -> None:
    whole = HONEST[kind]
    for length in [*range(min(len(whole), 150)), *range(150, len(whole), 997)]:
        attack(victim, whole[:length], csum_ok=False)
        attack(victim, whole[:length], csum_ok=True)


@pytest.mark.parametrize("kind", HONEST)
def test_every_damaged_byte_of_an_honest_frame_is_survived(victim: BenchHost, kind: str) -> None:
    whole = bytearray(HONEST[kind])
    for at in range(min(len(whole), 90)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, whole[at] ^ 1):
            damaged = whole.copy()
            damaged[at] = value
            attack(victim, bytes(damaged), csum_ok=False)
            attack(victim, with_ip_checksum(damaged), csum_ok=True)


def with_ip_checksum(data: bytearray) -> bytes:
    """`data` with a correct IP header checksum, so that the damage gets further."""
    ihl = (data[14] & 15) << 2 if len(data) > 14 else 0
    if data[12:14] == b"\x08\x00" and 20 <= ihl <= len(data) - 14:
        data[24:26] = b"\0\0"
        data[24:26] = finish(ones_sum(data[14 : 14 + ihl])).to_bytes(2, "big")
    return bytes(data)


def test_any_mixture_of_damage_is_survived(victim: BenchHost) -> None:
    @settings(deadline=None, max_examples=300)
    @given(
        st.sampled_from(sorted(HONEST)),
        st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6),
        st.integers(0, 200),
        st.booleans(),
        st.booleans(),
    )
    def damage(kind: str, changes: list[tuple[int, int]], cut: int, repaired: bool, csum_ok: bool) -> None:
        data = bytearray(HONEST[kind])
        for at, value in changes:
            data[at % len(data)] = value
        del data[len(data) - cut % len(data) :]
        attack(victim, with_ip_checksum(data) if repaired else bytes(data), csum_ok)

    damage()


def test_any_bytes_at_all_are_survived(victim: BenchHost) -> None:
    @settings(deadline=None, max_examples=300)
    @given(st.sampled_from([0x0800, 0x0806, 0x86DD, 0]), st.binary(max_size=120), st.booleans())
    def noise(ethertype: int, data: bytes, csum_ok: bool) -> None:
        attack(victim, frame(ethertype, data), csum_ok)

    noise()
