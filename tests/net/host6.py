"""A host for tests with IPv6 as well, whose network is the test."""

from __future__ import annotations

from socket import AF_INET6, inet_pton
from typing import TYPE_CHECKING, Any

from tests.net.host import BenchHost
from ustack.net.ipv6 import Ipv6Config
from ustack.wire import ethernet, icmpv6, ipv6, ndp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.net.inet6 import Inet6


def ip6(text: str) -> bytes:
    """The packed form of an IPv6 address."""
    return inet_pton(AF_INET6, text)


US = ip6("fd00::1")
PEER = ip6("fd00::2")
ROUTER = ip6("fe80::99")


class BenchHost6(BenchHost):
    """The host fd00::1/64; `peer` is fd00::2, with the MAC `peer_mac`. Nobody is asked whether the address is in use, unless
    `config` says so.
    """

    def __init__(self, config: Ipv6Config | None = None, **options: Any) -> None:
        self.config = config or Ipv6Config(dad_transmits=0)
        super().__init__(**options)

    def up(self) -> BenchHost6:
        """Use the interface for both versions."""
        super().up()
        self.ipv6.config = self.config
        self.ipv6.add_interface(self.interface).add_address(US, 64)
        return self

    @property
    def inet6(self) -> Inet6:
        """What the interface knows of IPv6."""
        assert self.interface.inet6 is not None
        return self.interface.inet6

    def packet(
        self, proto: int, payload: bytes, *, src: bytes = PEER, dst: bytes = US, hops: int = 64, mac: bytes | None = None
    ) -> bytes:
        """A frame from the peer with an IPv6 packet."""
        station = mac or (ethernet.multicast_v6(dst) if dst[0] == 0xFF else self.device.mac)
        header = ipv6.build_header(src, dst, proto, len(payload), hops)
        return ethernet.build_header(station, self.peer_mac, ethernet.ETH_P_IPV6) + header + payload

    def icmp(
        self, kind: int, body: bytes, *, code: int = 0, word: int = 0, src: bytes = PEER, dst: bytes = US, hops: int = 255
    ) -> bytes:
        """A frame with an ICMPv6 message."""
        message = icmpv6.build_header(src, dst, kind, code, word, (body,)) + body
        return self.packet(ipv6.NEXTHDR_ICMP, message, src=src, dst=dst, hops=hops)

    def solicitation(self, target: bytes = US, src: bytes = PEER, *, lladdr: bool = True, hops: int = 255) -> bytes:
        """The peer asks for `target`."""
        body = target + (ndp.build_lladdr(ndp.OPT_SOURCE_LL_ADDR, self.peer_mac) if lladdr else b"")
        return self.icmp(icmpv6.ND_NEIGHBOR_SOLICIT, body, src=src, dst=target, hops=hops)

    def advertisement(
        self, target: bytes = PEER, *, src: bytes = PEER, flags: int = 0x60000000, mac: bytes = b"", hops: int = 255
    ) -> bytes:
        """Somebody says that `target` is the station `mac`."""
        body = target + ndp.build_lladdr(ndp.OPT_TARGET_LL_ADDR, mac or self.peer_mac)
        return self.icmp(icmpv6.ND_NEIGHBOR_ADVERT, body, word=flags, src=src, hops=hops)

    def router_advertisement(
        self, options: Sequence[bytes] = (), *, src: bytes = ROUTER, lifetime: int = 1800, hops: int = 255, hop_limit: int = 64
    ) -> bytes:
        """A router says what it offers."""
        body = bytes(8) + b"".join(options)
        word = hop_limit << 24 | lifetime
        return self.icmp(icmpv6.ND_ROUTER_ADVERT, body, word=word, src=src, dst=ip6("ff02::1"), hops=hops)

    def take_icmp(self, kind: int) -> list[bytes]:
        """The ICMPv6 messages of that type that were sent since the last time, each from its type on."""
        found = []
        for frame in self.take_sent():
            if frame[12:14] == b"\x86\xdd" and frame[20] == ipv6.NEXTHDR_ICMP and frame[54] == kind:
                found.append(frame[54:])
        return found
