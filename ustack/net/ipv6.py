"""IPv6 (RFC 8200; node requirements RFC 8504): header checks and local delivery on the way in, paths on the way out.

A host, not a router: what is not for us is dropped. Fragments are put together by the rules of RFC 5722 (nothing may overlap)
and RFC 6946 (a fragment that is all there is waits for nobody). Path MTU discovery is RFC 8201.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.link.skbring import SkbRing
from ustack.net import addresses
from ustack.net.addresses import ANY6, LOOPBACK6, V4_MAPPED, needs_zone
from ustack.net.extension_headers import DELIVER, REASSEMBLE, REPORT, ExtensionHeaders
from ustack.net.fragments import PACKET_MAX, FragmentParameters, Fragments
from ustack.net.icmpv6 import Icmpv6
from ustack.net.inet6 import Inet6
from ustack.net.layer import IpLayer, IpPacket
from ustack.net.neighbour import NUD_FAILED
from ustack.net.path import Path
from ustack.net.routes import IPV6_BITS, RouteTable
from ustack.net.source_address import select
from ustack.wire import ethernet, icmpv6, ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.env import Env
    from ustack.link.rxring import RxFrame
    from ustack.net.fragments import FragmentQueue
    from ustack.net.inet6 import Address6
    from ustack.net.interface import Interface
    from ustack.net.neighbour import Neighbour

REDIRECTS_MAX: Final = 256
"""Destinations whose better next hop is remembered; the oldest is forgotten first."""

_GROUP_PROTOCOLS: Final = (ipv6.NEXTHDR_ICMP, ipv6.NEXTHDR_UDP)


@dataclass(slots=True)
class Ipv6Config:
    """One stack's IPv6 settings. Names are those of Linux sysctls (net.ipv6.conf.*) where there is one."""

    accept_ra: bool = False
    """Take routers, prefixes, routes and the link's MTU from router advertisements (RFC 4861, section 6.3)."""
    autoconf: bool = False
    """Form addresses from the prefixes that routers advertise (RFC 4862); implies `accept_ra`."""
    dad_transmits: int = 1
    """Questions whether an address is in use before it is ours, one every `retrans_time` (RFC 4862, section 5.1); 0: none."""
    stable_secret: str = ""
    """What stable privacy addresses are made from (RFC 7217): the same text, the same addresses; empty: new at every start."""
    addr_gen_mode: str = "stable_privacy"
    """How the lower half of our own addresses is made: `stable_privacy` (RFC 7217), or `eui64` from the Ethernet address."""
    max_addresses: int = 16
    """Addresses of one interface that are formed from advertised prefixes (max_addresses)."""
    router_solicitations: int = 3
    """Questions for routers when an interface begins (RFC 4861, section 10)."""
    router_solicitation_interval: float = 4.0
    """Seconds between them."""


class Ipv6(IpLayer):
    """IPv6 of one stack. `addresses` maps each of our addresses that is in use, which a tentative one is not, to its interface;
    for the rest see `IpLayer`.
    """

    __slots__ = (
        "_drops",
        "_headers",
        "_mib",
        "_packet",
        "_redirects",
        "_whole",
        "addresses",
        "config",
        "fragments",
        "icmp",
        "routes",
        "secret",
    )

    def __init__(self, env: Env, config: Ipv6Config | None = None) -> None:
        super().__init__(env)
        self.config = config or Ipv6Config()
        self.secret = self.config.stable_secret.encode() or env.random.randbytes(16)
        self.addresses: dict[bytes, Interface] = {}
        self.routes = RouteTable(self.invalidate, IPV6_BITS)
        self._drops = env.drops
        self._mib = env.mib
        self._packet = IpPacket()
        self._headers = ExtensionHeaders()
        self._redirects: dict[bytes, bytes] = {}  # by destination: the next hop, oldest first
        parameters = FragmentParameters(time=60.0, exact=True)
        self.fragments = Fragments(env, parameters, self._on_reassembly_failed)
        self._whole = SkbRing(env.memory)  # delivers what was put together
        self.icmp = Icmpv6(self)
        self.register(ipv6.NEXTHDR_ICMP, self.icmp.input)

    # -- interfaces --

    def add_interface(self, interface: Interface) -> Inet6:
        """Speak IPv6 on `interface`, with a link-local address to begin with; nothing changes when we do already. The device
        must be attached.

        Raises ValueError when the device takes no packets of 1280 bytes.
        """
        if interface.inet6 is not None:
            return interface.inet6
        if interface.device.mtu < ipv6.MIN_MTU:
            raise ValueError(f"{interface.device.name}: IPv6 needs an MTU of at least {ipv6.MIN_MTU}")
        self.interfaces.append(interface)
        interface.inet6 = inet6 = Inet6(self, interface)
        interface.handlers[ethernet.ETH_P_IPV6] = self.input
        inet6.start()
        return inet6

    def remove_interface(self, interface: Interface) -> None:
        """Forget `interface`, its IPv6 addresses and the routes through it."""
        self.interfaces.remove(interface)
        self.routes.remove_interface(interface)
        if interface.inet6 is not None:
            interface.inet6.close()
            interface.inet6 = None
        interface.handlers.pop(ethernet.ETH_P_IPV6, None)
        self.invalidate()

    def own_addresses(self) -> Iterator[Address6]:
        """All our addresses that may be used."""
        for interface in self.interfaces:
            if interface.inet6 is not None:
                yield from (each for each in interface.inet6.addresses.values() if not each.tentative)

    # -- in --

    def input(self, interface: Interface, frame: RxFrame, offset: int) -> None:
        """A packet arrived, its header at `offset` of `frame`: check it and hand it to its protocol."""
        self._mib.Ip6InReceives += 1
        length = frame.len - offset
        if length < ipv6.HEADER_LEN:
            self._drops.count(DropReason.PKT_TOO_SMALL)
            return
        head = frame.head
        first, payload_len, proto, hop_limit, src, dst = ipv6.HEADER.unpack_from(head, offset)
        if first >> 28 != 6 or payload_len + ipv6.HEADER_LEN > length:
            self._drops.count(DropReason.IP_INHDR)
            return
        if needs_zone(src):
            src += interface.zone if not interface.loopback else self._own_zone(src)
        multicast = dst[0] == 0xFF
        if dst[0] >= 0xFE and needs_zone(dst):
            dst += interface.zone if not interface.loopback else self._own_zone(dst)
        if multicast:
            inet6 = interface.inet6
            if inet6 is None or dst not in inet6.groups:
                self._drops.count(DropReason.IP_INADDRERRORS)
                return
        elif (dst not in self.addresses and not (interface.loopback and dst == LOOPBACK6)) or head[0] & 1:
            self._drops.count(DropReason.IP_INADDRERRORS)
            return
        if src[0] == 0xFF or src in self.addresses or src == LOOPBACK6 or (not src[0] and src.startswith(V4_MAPPED)):
            if not interface.loopback or src[0] == 0xFF:
                self._drops.count(DropReason.IP_INADDRERRORS)
                return
        packet = self._packet
        packet.interface = interface
        packet.frame = frame
        packet.src = src
        packet.dst = dst
        packet.l3 = offset
        packet.l4 = at = offset + ipv6.HEADER_LEN
        packet.l4_len = payload_len
        packet.proto = proto
        packet.ttl = hop_limit
        packet.tos = first >> 20 & 0xFF
        packet.broadcast = multicast
        names_proto = offset + ipv6.OFF_NEXT_HEADER
        if proto not in self.protocols:
            headers = self._headers
            verdict = headers.walk(head, offset, at, at + payload_len, proto, names_proto, multicast)
            packet.proto = proto = headers.proto
            if verdict == REASSEMBLE:
                self._fragment_arrives(packet, headers.at)
                return
            if verdict != DELIVER:
                self._drops.count(headers.reason)
                if verdict == REPORT:
                    self.icmp.send_parameter_problem(packet, headers.code, headers.pointer)
                return
            packet.l4 = headers.at
            packet.l4_len = at + payload_len - headers.at
            names_proto = offset + headers.pointer
        self.deliver(packet, names_proto)

    def _own_zone(self, address: bytes) -> bytes:
        """The zone of our own link-local `address`, of which a packet that we sent to ourselves does not tell."""
        for interface in self.interfaces:
            if address + interface.zone in self.addresses:
                return interface.zone
        return b""

    def is_own(self, address: bytes) -> bool:
        """Whether packets to `address` come back to us."""
        return address in self.addresses or (address == LOOPBACK6 and self.loopback is not None)

    def deliver(self, packet: IpPacket, names_proto: int) -> None:
        """Hand a whole packet to its protocol, which the byte at `names_proto` of the frame names."""
        proto = packet.proto
        handler = self.protocols.get(proto)
        if handler is None:
            self._drops.count(DropReason.IP_NOPROTO)
            self.icmp.send_parameter_problem(packet, icmpv6.UNK_NEXTHDR, names_proto - packet.l3)
            return
        if (packet.broadcast and proto not in _GROUP_PROTOCOLS) or (packet.src == ANY6 and proto != ipv6.NEXTHDR_ICMP):
            self._drops.count(DropReason.IP_INADDRERRORS)
            return
        self._mib.Ip6InDelivers += 1
        handler(packet)

    # -- fragments (RFC 8200, section 4.5) --

    def _fragment_arrives(self, packet: IpPacket, at: int) -> None:
        """The packet has a fragment header at `at`: deliver the datagram if that makes it whole."""
        mib = self._mib
        mib.Ip6ReasmReqds += 1
        head = packet.frame.head
        proto, _, fragment, ident = ipv6.FRAGMENT.unpack_from(head, at)
        start = fragment & ipv6.FRAG_OFFSET
        more = fragment & ipv6.FRAG_MORE != 0
        data = at + ipv6.FRAGMENT_LEN
        length = packet.l4 + packet.l4_len - data
        reason = None
        if packet.frame is self._whole.frame or not length:
            reason = DropReason.FRAG_INVALID  # a fragment in a fragment, or nothing
        elif more and length & 7:
            reason = DropReason.FRAG_INVALID
            self.icmp.send_parameter_problem(packet, icmpv6.HDR_FIELD, ipv6.OFF_PAYLOAD_LEN)
        elif at - packet.l4 + start + length > PACKET_MAX:
            reason = DropReason.PKT_TOO_BIG
            self.icmp.send_parameter_problem(packet, icmpv6.HDR_FIELD, at + 2 - packet.l3)
        elif not start and not self._headers.is_complete(head, data, data + length, proto):
            reason = DropReason.FRAG_TINY
            self.icmp.send_parameter_problem(packet, icmpv6.HDR_INCOMP, 0)
        if reason is not None:
            mib.Ip6ReasmFails += 1
            self._drops.count(reason)
            return
        key = packet.src + packet.dst + ident.to_bytes(4, "big")
        header = b"" if start else bytes(head[:data])
        interface = packet.interface
        queue = self.fragments.add(
            key, packet.src, interface, packet.frame, data, start, start + length, more, packet.tos, header, packet.l3,
            packet.broadcast,
        )  # fmt: skip
        if queue is not None:
            self._deliver_whole(queue, interface)

    def _deliver_whole(self, queue: FragmentQueue, interface: Interface) -> None:
        l3 = queue.l3
        at = len(queue.header) - ipv6.FRAGMENT_LEN
        tos = queue.marked_tos()
        payload_len = at - l3 - ipv6.HEADER_LEN + queue.length
        if tos < 0 or payload_len > PACKET_MAX:
            self.fragments.discard(queue, DropReason.FRAG_INVALID if tos < 0 else DropReason.PKT_TOO_BIG)
            return
        header = ipv6.without_fragment(queue.header, l3, payload_len, tos)
        ring = self._whole
        ring.load(header, self.fragments.join(queue))
        self._mib.Ip6ReasmOKs += 1
        self._mib.Ip6InReceives -= 1  # it was counted when it came, in pieces
        self.input(interface, ring.frame, l3)
        ring.unload()

    def _on_reassembly_failed(self, queue: FragmentQueue, reason: DropReason) -> None:
        self._mib.Ip6ReasmFails += 1
        if reason is DropReason.FRAG_REASM_TIMEOUT:
            self._mib.Ip6ReasmTimeout += 1
            first = queue.first
            if first is not None and not queue.broadcast:
                self.icmp.send_reassembly_timeout(queue.header[queue.l3 :], first, queue.interface)

    def close(self) -> None:
        """Use no interface any more, and free what was not put together."""
        super().close()
        self.fragments.close()

    # -- out --

    def _make_path(self, dst: bytes, src: bytes | None) -> Path:
        if src is not None and not self.is_own(src):
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        if self.loopback is not None:
            if self.is_own(dst):
                return self._path_to_us(self.loopback, dst, src or dst)
            if src == LOOPBACK6:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if dst in self.addresses or dst in (ANY6, LOOPBACK6):
            raise self._no_route()
        interface, via = self._next_hop(dst, src)
        source = src if src is not None else select(self.own_addresses(), dst, interface)
        if source is None or interface.inet6 is None:
            self._drops.count(DropReason.IP_OUTNOROUTES)
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        neighbours = interface.inet6.neighbours
        if addresses.is_multicast(dst):
            group = neighbours.permanent(dst, ethernet.multicast_v6(dst))
            return Path(self.env, interface, group, source, dst, broadcast=False)
        neighbour = neighbours.lookup(via)
        path = Path(self.env, interface, neighbour, source, dst, broadcast=False)
        neighbour.paths.append(path)
        route = self.routes.lookup(dst)
        if route is not None:
            path.congestion = route.congestion
        return self._known_pmtu(path)

    def _no_route(self) -> OSError:
        self._drops.count(DropReason.IP_OUTNOROUTES)
        return OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def _next_hop(self, dst: bytes, src: bytes | None) -> tuple[Interface, bytes]:
        """The interface and the next hop to `dst` (RFC 4861, section 5.2). Raises OSError ENETUNREACH."""
        if dst[16:]:
            for interface in self.interfaces:
                if interface.zone == dst[16:]:
                    return interface, dst
            raise self._no_route()
        if needs_zone(dst):
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: a link-local address needs a scope")
        if dst[0] == 0xFF:
            if src is not None:
                return self.addresses[src], dst
            if self.interfaces:
                return self.interfaces[0], dst
            raise self._no_route()
        redirected = self._redirects.get(dst)
        for routes in self.routes.matches(dst):
            if redirected is not None:
                known = self._neighbour(routes[0].interface, redirected)
                if known is None or known.state != NUD_FAILED:
                    return routes[0].interface, redirected
                del self._redirects[dst]
            # A router that does not answer is passed over as long as there is another (RFC 4861, section 6.3.6).
            for route in routes:
                if route.via is None:
                    return route.interface, dst
                known = self._neighbour(route.interface, route.via)
                if known is None or known.state != NUD_FAILED:
                    return route.interface, route.via
            return routes[0].interface, routes[0].via or dst
        raise self._no_route()

    @staticmethod
    def _neighbour(interface: Interface, address: bytes) -> Neighbour | None:
        return None if interface.inet6 is None else interface.inet6.neighbours.find(address)

    def next_hop_is(self, dst: bytes, router: bytes) -> bool:
        """Whether packets to `dst` go by way of `router` now."""
        try:
            return self._next_hop(dst, None)[1] == router
        except OSError:
            return False

    def redirect(self, dst: bytes, next_hop: bytes) -> None:
        """Send what is for `dst` to `next_hop` from now on; who says so has been checked."""
        self._redirects.pop(dst, None)
        if len(self._redirects) >= REDIRECTS_MAX:
            del self._redirects[next(iter(self._redirects))]
        self._redirects[dst] = next_hop
        for path in list(self._paths_to(dst)):
            path.close()
