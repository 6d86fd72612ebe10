"""IPv4 (RFC 791; host requirements RFC 1122, section 3.2): header checks and local delivery on the way in, paths on the way
out.

A host, not a router: what is not for us is dropped. Options are accepted and ignored, except that source routes are refused.
Fragments are put together by `net.fragments`.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.link.skbring import SkbRing
from ustack.net import addresses
from ustack.net.fragments import PACKET_MAX, FragmentParameters, FragmentQueue, Fragments
from ustack.net.icmp import Icmp
from ustack.net.layer import IpLayer, IpPacket
from ustack.net.path import Path
from ustack.net.routes import RouteTable
from ustack.wire import ethernet, ipv4
from ustack.wire.icmp import ICMP_DEST_UNREACH, ICMP_PROT_UNREACH

if TYPE_CHECKING:
    from ustack.env import Env
    from ustack.link.rxring import RxFrame
    from ustack.net.interface import Interface, InterfaceAddress

LOOPBACK4: Final = bytes((127, 0, 0, 1))
LOOPBACK_NET: Final = 127
"""The address that stands for ourselves, and the first byte of all that do (RFC 1122, section 3.2.1.3 g)."""

RP_OFF: Final = 0
RP_STRICT: Final = 1
RP_LOOSE: Final = 2
"""What is asked of the source of a packet that arrives (RFC 3704; Linux, rp_filter): nothing; that the way back to it leads
through the interface that it came by; that there is a way back.
"""

LIMITED_BROADCAST: Final = b"\xff\xff\xff\xff"
"""Everybody on the link (RFC 1122, section 3.2.1.3)."""

TCP_FIRST_MIN: Final = 20
"""Bytes that the first fragment of a TCP segment has at least: its header (RFC 3128)."""

_FRAGMENT: Final = ipv4.IP_MF | ipv4.IP_OFFSET
_BROADCAST_PROTOCOLS: Final = (ipv4.IPPROTO_ICMP, ipv4.IPPROTO_UDP)


@dataclass(slots=True)
class Ipv4Config:
    """One stack's IPv4 settings. Names are those of Linux sysctls (net.ipv4.conf.*)."""

    rp_filter: int = RP_OFF
    """Whether the way back to the source of a packet must lead through the interface that it came by: 0 no, 1 yes (strict),
    2 through any (loose; RFC 3704).
    """


class Ipv4(IpLayer):
    """IPv4 of one stack. `addresses` maps each of our addresses to its interface; for the rest see `IpLayer`."""

    __slots__ = ("_drops", "_mib", "_never_sources", "_packet", "_whole", "addresses", "config", "fragments", "icmp", "routes")

    def __init__(self, env: Env, config: Ipv4Config | None = None) -> None:
        super().__init__(env)
        self.config = config or Ipv4Config()
        self.addresses: dict[bytes, Interface] = {}
        self.routes = RouteTable(self.invalidate)
        self._drops = env.drops
        self._mib = env.mib
        self._packet = IpPacket()
        self._never_sources: frozenset[bytes] = frozenset()
        self.fragments = Fragments(env, FragmentParameters(), self._on_reassembly_failed)
        self._whole = SkbRing(env.memory)  # delivers what was put together
        self.icmp = Icmp(self)
        self.register(ipv4.IPPROTO_ICMP, self.icmp.input)

    # -- interfaces --

    def add_interface(self, interface: Interface) -> None:
        """Use `interface`: its addresses are ours and are announced, its networks get routes. The device must be attached.

        Raises ValueError when an address is ours already.
        """
        if any(own.address in self.addresses for own in interface.addresses):
            raise ValueError(f"{interface.device.name}: its address is in use on another interface")
        self.interfaces.append(interface)
        interface.handlers[ethernet.ETH_P_IP] = self.input
        interface.neighbours.on_failed = self.icmp.on_neighbour_failed
        for own in interface.addresses:
            self._use(interface, own)

    def add_address(self, interface: Interface, own: InterfaceAddress) -> None:
        """Have one more address on an `interface` in use. Raises ValueError when it is ours already."""
        if own.address in self.addresses:
            raise ValueError(f"{addresses.text(own.address)} is ours already")
        interface.add_address(own)
        self._use(interface, own)

    def _use(self, interface: Interface, own: InterfaceAddress) -> None:
        self.addresses[own.address] = interface
        self._addresses_changed()
        if not any(r.network == own.network and r.prefix_len == own.prefix_len and r.metric == 0 for r in self.routes):
            self.routes.add(own.network, own.prefix_len, interface)
        else:
            self.invalidate()
        interface.arp.announce()

    def remove_address(self, interface: Interface, own: InterfaceAddress) -> None:
        """Have the address `own` of `interface` no longer. Routes by way of gateways stay."""
        interface.remove_address(own)
        del self.addresses[own.address]
        self._addresses_changed()
        if not any(other.network == own.network and other.prefix_len == own.prefix_len for other in interface.addresses):
            for route in list(self.routes):
                if route.interface is interface and route.via is None and route.metric == 0 and route.network == own.network:
                    self.routes.remove(route)
        self.invalidate()

    def remove_interface(self, interface: Interface) -> None:
        """Forget `interface`, its addresses and the routes through it, and free what waits for its neighbours."""
        self.interfaces.remove(interface)
        for own in interface.addresses:
            del self.addresses[own.address]
        self._addresses_changed()
        self.routes.remove_interface(interface)
        self.invalidate()
        self.fragments.forget_interface(interface)
        interface.close()

    def _addresses_changed(self) -> None:
        broadcasts = [broadcast for interface in self.interfaces for broadcast in interface.broadcasts]
        self._never_sources = frozenset((*self.addresses, *broadcasts))

    # -- in --

    def input(self, interface: Interface, frame: RxFrame, offset: int) -> None:
        """A packet arrived, its header at `offset` of `frame`: check it and hand it to its protocol."""
        self._mib.IpInReceives += 1
        length = frame.len - offset
        if length < 20:
            self._drops.count(DropReason.PKT_TOO_SMALL)
            return
        head = frame.head
        version_ihl, tos, total, _, frag, ttl, proto, _, src, dst = ipv4.HEADER.unpack_from(head, offset)
        ihl = 20
        if version_ihl != 0x45:
            ihl = (version_ihl & 15) << 2
            if version_ihl >> 4 != 4 or ihl < 20 or ihl > length or ipv4.has_source_route(head, offset + 20, offset + ihl):
                self._drops.count(DropReason.IP_INHDR)
                return
        if total > length or total < ihl:
            self._drops.count(DropReason.IP_INHDR)
            return
        if int.from_bytes(head[offset : offset + ihl], "big") % 0xFFFF:
            self._drops.count(DropReason.IP_CSUM)
            return
        broadcast = False
        if dst != interface.address or head[0] & 1:
            broadcast = dst == LIMITED_BROADCAST or dst in interface.broadcasts
            # A unicast packet in a broadcast frame is refused (RFC 1122, section 3.3.6), TCP to a broadcast address as well.
            unknown = dst not in self.addresses and not (interface.loopback and dst[0] == LOOPBACK_NET)
            if (proto not in _BROADCAST_PROTOCOLS) if broadcast else (unknown or head[0] & 1):
                self._drops.count(DropReason.IP_INADDRERRORS)
                return
        first = src[0]
        if first >= 224 or first == LOOPBACK_NET or not first or src in self._never_sources:
            if not interface.loopback or first >= 224 or not first:
                self._drops.count(DropReason.IP_INADDRERRORS)
                return
        elif self.config.rp_filter and not self._way_back(src, interface):
            self._mib.TcpExtIPReversePathFilter += 1
            self._drops.count(DropReason.IP_RPFILTER)
            return
        if frag & _FRAGMENT:
            self._fragment_arrives(interface, frame, offset, ihl, broadcast)
            return
        packet = self._packet
        packet.interface = interface
        packet.frame = frame
        packet.src = src
        packet.dst = dst
        packet.l3 = offset
        packet.l4 = offset + ihl
        packet.l4_len = total - ihl
        packet.proto = proto
        packet.ttl = ttl
        packet.tos = tos
        packet.broadcast = broadcast
        handler = self.protocols.get(proto)
        if handler is None:
            self._refuse_protocol(packet)
            return
        self._mib.IpInDelivers += 1
        handler(packet)

    def _way_back(self, src: bytes, interface: Interface) -> bool:
        """Whether `rp_filter` lets a packet from `src` in (fib_validate_source)."""
        if self.config.rp_filter == RP_LOOSE:
            return self.routes.lookup(src) is not None
        for routes in self.routes.matches(src):
            return any(route.interface is interface for route in routes if route.metric == routes[0].metric)
        return False

    def is_own(self, address: bytes) -> bool:
        """Whether packets to `address` come back to us."""
        return address in self.addresses or (address[0] == LOOPBACK_NET and self.loopback is not None)

    def _refuse_protocol(self, packet: IpPacket) -> None:
        if packet.frame.pfmemalloc:
            self._drops.count(DropReason.PFMEMALLOC)  # IGMP, for one: there are no memalloc sockets for it
            return
        self._drops.count(DropReason.IP_NOPROTO)
        self.icmp.send_error(packet, ICMP_DEST_UNREACH, ICMP_PROT_UNREACH)

    # -- fragments --

    def _fragment_arrives(self, interface: Interface, frame: RxFrame, offset: int, ihl: int, broadcast: bool) -> None:
        """The packet at `offset`, whose header has been checked, is a fragment: deliver the datagram if that makes it whole."""
        mib = self._mib
        mib.IpReasmReqds += 1
        head = frame.head
        _, tos, total, _, frag, _, proto, _, src, _ = ipv4.HEADER.unpack_from(head, offset)
        start = (frag & ipv4.IP_OFFSET) << 3
        length = total - ihl
        more = frag & ipv4.IP_MF != 0
        if more:
            length &= ~7  # as Linux: what does not fill eight bytes would overlap with what follows
        reason = None
        if not length:
            reason = DropReason.FRAG_INVALID
        elif ihl + start + length > PACKET_MAX:
            reason = DropReason.PKT_TOO_BIG
        elif proto == ipv4.IPPROTO_TCP and (start == 8 or (not start and length < TCP_FIRST_MIN)):
            reason = DropReason.FRAG_TINY
        if reason is not None:
            mib.IpReasmFails += 1
            self._drops.count(reason)
            return
        key = bytes(head[offset + ipv4.OFF_SRC : offset + 20]) + bytes(head[offset + ipv4.OFF_ID : offset + ipv4.OFF_FRAG])
        key += bytes((proto,))
        at = offset + ihl
        header = b"" if start else bytes(head[:at])
        queue = self.fragments.add(key, src, interface, frame, at, start, start + length, more, tos, header, offset, broadcast)
        if queue is not None:
            self._deliver_whole(queue, interface)

    def _deliver_whole(self, queue: FragmentQueue, interface: Interface) -> None:
        l3 = queue.l3
        l4 = len(queue.header)
        tos = queue.marked_tos()
        total = l4 - l3 + queue.length
        if tos < 0 or total > PACKET_MAX:
            self.fragments.discard(queue, DropReason.FRAG_INVALID if tos < 0 else DropReason.PKT_TOO_BIG)
            return
        header = ipv4.whole_header(queue.header, l3, total, tos)
        _, _, _, _, _, ttl, proto, _, src, dst = ipv4.HEADER.unpack_from(header, l3)
        ring = self._whole
        ring.load(header, self.fragments.join(queue))
        self._mib.IpReasmOKs += 1
        packet = self._packet
        packet.interface = interface
        packet.frame = ring.frame
        packet.src = src
        packet.dst = dst
        packet.l3 = l3
        packet.l4 = l4
        packet.l4_len = queue.length
        packet.proto = proto
        packet.ttl = ttl
        packet.tos = tos
        packet.broadcast = queue.broadcast
        handler = self.protocols.get(proto)
        if handler is None:
            self._refuse_protocol(packet)
        else:
            self._mib.IpInDelivers += 1
            handler(packet)
        ring.unload()

    def _on_reassembly_failed(self, queue: FragmentQueue, reason: DropReason) -> None:
        self._mib.IpReasmFails += 1
        if reason is DropReason.FRAG_REASM_TIMEOUT:
            self._mib.IpReasmTimeout += 1
            first = queue.first
            if first is not None and not queue.broadcast:
                self.icmp.send_reassembly_timeout(queue.header[queue.l3 :], first)

    def close(self) -> None:
        """Use no interface any more, and free what was not put together."""
        super().close()
        self.fragments.close()

    # -- out --

    def _make_path(self, dst: bytes, src: bytes | None) -> Path:
        if src is not None and not self.is_own(src):
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        if self.loopback is not None:
            if dst in self.addresses or dst[0] == LOOPBACK_NET:
                return self._path_to_us(self.loopback, dst, src or (LOOPBACK4 if dst[0] == LOOPBACK_NET else dst))
            if src is not None and src[0] == LOOPBACK_NET:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        broadcast = self._broadcast_interface(dst, src)
        if broadcast is not None:
            everybody = broadcast.neighbours.permanent(dst, ethernet.BROADCAST)
            return Path(self.env, broadcast, everybody, src or broadcast.source_for(dst), dst, broadcast=True)
        route = self.routes.lookup(dst)
        if route is None or dst in self.addresses or not 0 < dst[0] < 224 or dst[0] == 127:
            self._drops.count(DropReason.IP_OUTNOROUTES)
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        interface = route.interface
        next_hop = dst if route.via is None else route.via
        source = src or interface.source_for(next_hop)
        if not source:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        neighbour = interface.neighbours.lookup(next_hop)
        path = Path(self.env, interface, neighbour, source, dst, broadcast=False)
        path.congestion = route.congestion
        neighbour.paths.append(path)
        return self._known_pmtu(path)

    def _broadcast_interface(self, dst: bytes, src: bytes | None) -> Interface | None:
        if dst == LIMITED_BROADCAST and self.interfaces:
            return self.interfaces[0] if src is None else self.addresses[src]
        for interface in self.interfaces:
            if dst in interface.broadcasts:
                return interface
        return None
