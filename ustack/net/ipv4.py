"""IPv4 (RFC 791; host requirements RFC 1122, section 3.2): header checks and local delivery on the way in, paths on the way
out.

A host, not a router: what is not for us is dropped. Options are accepted and ignored, except that source routes are refused;
fragments are dropped. Path MTU discovery is RFC 1191: what a router reports is remembered for ten minutes.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net.icmp import Icmp
from ustack.net.path import Path
from ustack.net.routes import RouteTable
from ustack.timers import Timer
from ustack.wire import ethernet, ipv4
from ustack.wire.icmp import ICMP_PROT_UNREACH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.env import Env
    from ustack.link.rxring import RxFrame
    from ustack.net.interface import Interface

LIMITED_BROADCAST: Final = b"\xff\xff\xff\xff"
"""Everybody on the link (RFC 1122, section 3.2.1.3)."""

PATHS_MAX: Final = 1024
"""Paths kept; the one that was looked up longest ago goes first."""

PMTU_EXPIRES: Final = 600.0
"""Seconds after which a path may be tried with larger packets again (RFC 1191, section 6.3)."""

PMTU_ENTRIES_MAX: Final = 1024
"""Destinations whose path MTU is remembered; the oldest is forgotten first."""

_FRAGMENT: Final = ipv4.IP_MF | ipv4.IP_OFFSET
_BROADCAST_PROTOCOLS: Final = (ipv4.IPPROTO_ICMP, ipv4.IPPROTO_UDP)


class IpPacket:
    """A packet that is being delivered. There is one of these; it is valid, like the frame, until the handler returns.

    `l3` and `l4` are offsets of the IP and the transport header in `frame`, both within `frame.head`; `l4_len` counts transport
    header and payload in bytes, without any padding of the frame. `src` and `dst` are packed. `broadcast`: sent to everybody.
    """

    __slots__ = ("broadcast", "dst", "frame", "interface", "l3", "l4", "l4_len", "proto", "src", "tos", "ttl")

    frame: RxFrame
    interface: Interface

    def __init__(self) -> None:
        self.src = b""
        self.dst = b""
        self.l3 = 0
        self.l4 = 0
        self.l4_len = 0
        self.proto = 0
        self.ttl = 0
        self.tos = 0
        self.broadcast = False


class Ipv4:
    """IPv4 of one stack. `addresses` maps each of our addresses to its interface; `protocols` each protocol to its handler."""

    __slots__ = (
        "_drops",
        "_mib",
        "_never_sources",
        "_packet",
        "_paths",
        "_pmtu",
        "_pmtu_timer",
        "addresses",
        "env",
        "icmp",
        "interfaces",
        "protocols",
        "routes",
    )

    def __init__(self, env: Env) -> None:
        self.env = env
        self.interfaces: list[Interface] = []
        self.addresses: dict[bytes, Interface] = {}
        self.protocols: dict[int, Callable[[IpPacket], None]] = {}
        self.routes = RouteTable(self._invalidate)
        self._drops = env.drops
        self._mib = env.mib
        self._packet = IpPacket()
        self._never_sources: frozenset[bytes] = frozenset()
        self._paths: dict[bytes, Path] = {}  # by dst, or dst + src; the one looked up last comes last
        self._pmtu: dict[bytes, tuple[float, int]] = {}  # by dst: when it expires, and the MTU; oldest first
        self._pmtu_timer = Timer(self._expire_pmtu)
        self.icmp = Icmp(self)
        self.register(ipv4.IPPROTO_ICMP, self.icmp.input)

    def register(self, proto: int, handler: Callable[[IpPacket], None]) -> None:
        """Hand packets of the IP protocol `proto` to `handler`."""
        self.protocols[proto] = handler

    # -- interfaces --

    def add_interface(self, interface: Interface) -> None:
        """Use `interface`: its address is ours and is announced, its network gets a route. The device must be attached.

        Raises ValueError when the address is ours already.
        """
        if interface.address in self.addresses:
            raise ValueError(f"{interface.device.name}: its address is in use on another interface")
        self.interfaces.append(interface)
        self.addresses[interface.address] = interface
        self._addresses_changed()
        interface.handlers[ethernet.ETH_P_IP] = self.input
        interface.neighbours.on_failed = self.icmp.on_neighbour_failed
        self.routes.add(interface.network, interface.prefix_len, interface)
        interface.arp.announce()

    def remove_interface(self, interface: Interface) -> None:
        """Forget `interface`, its address and the routes through it, and free what waits for its neighbours."""
        self.interfaces.remove(interface)
        del self.addresses[interface.address]
        self._addresses_changed()
        self.routes.remove_interface(interface)
        self._invalidate()
        interface.close()

    def close(self) -> None:
        """Remove every interface."""
        for interface in self.interfaces[:]:
            self.remove_interface(interface)
        self._pmtu_timer.cancel()

    def _addresses_changed(self) -> None:
        broadcasts = {interface.broadcast for interface in self.interfaces if interface.broadcast is not None}
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
            broadcast = dst in (LIMITED_BROADCAST, interface.broadcast)
            # A unicast packet in a broadcast frame is refused (RFC 1122, section 3.3.6), TCP to a broadcast address as well.
            if (proto not in _BROADCAST_PROTOCOLS) if broadcast else (dst not in self.addresses or head[0] & 1):
                self._drops.count(DropReason.IP_INADDRERRORS)
                return
        first = src[0]
        if first >= 224 or first == 127 or not first or src in self._never_sources:
            self._drops.count(DropReason.IP_INADDRERRORS)
            return
        if frag & _FRAGMENT:
            # Nobody knows whose a fragment is before all have come, so the reserve holds none.
            self._drops.count(DropReason.PFMEMALLOC if frame.pfmemalloc else DropReason.FRAGMENT)
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
            if frame.pfmemalloc:
                self._drops.count(DropReason.PFMEMALLOC)  # IGMP, for one: there are no memalloc sockets for it
                return
            self._drops.count(DropReason.IP_NOPROTO)
            self.icmp.send_unreachable(packet, ICMP_PROT_UNREACH)
            return
        self._mib.IpInDelivers += 1
        handler(packet)

    # -- out --

    def path(self, dst: bytes, src: bytes | None = None) -> Path:
        """The path to `dst` from our address `src`, or from the address that the route says (both packed).

        Raises OSError: ENETUNREACH when there is no route, EADDRNOTAVAIL when `src` is not ours, ENOBUFS when there are too
        many neighbours.
        """
        key = dst if src is None else dst + src
        path = self._paths.pop(key, None)
        if path is None or path.obsolete:
            path = self._make_path(dst, src)
            if len(self._paths) >= PATHS_MAX:
                oldest = next(iter(self._paths))
                self._paths.pop(oldest).close()
        self._paths[key] = path
        return path

    def _make_path(self, dst: bytes, src: bytes | None) -> Path:
        if src is not None and src not in self.addresses:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        broadcast = self._broadcast_interface(dst, src)
        if broadcast is not None:
            everybody = broadcast.neighbours.permanent(dst, ethernet.BROADCAST)
            return Path(self.env, broadcast, everybody, src or broadcast.address, dst, broadcast=True)
        route = self.routes.lookup(dst)
        if route is None or dst in self.addresses or not 0 < dst[0] < 224 or dst[0] == 127:
            self._drops.count(DropReason.IP_OUTNOROUTES)
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        interface = route.interface
        neighbour = interface.neighbours.lookup(dst if route.via is None else route.via)
        path = Path(self.env, interface, neighbour, src or interface.address, dst, broadcast=False)
        neighbour.paths.append(path)
        if dst in self._pmtu:
            path.narrow(self._pmtu[dst][1])
        return path

    def _broadcast_interface(self, dst: bytes, src: bytes | None) -> Interface | None:
        if dst == LIMITED_BROADCAST and self.interfaces:
            return self.interfaces[0] if src is None else self.addresses[src]
        for interface in self.interfaces:
            if dst == interface.broadcast:
                return interface
        return None

    def _invalidate(self) -> None:
        for path in self._paths.values():
            path.close()
        self._paths.clear()

    # -- path MTU --

    def _paths_to(self, dst: bytes) -> Iterator[Path]:
        return (path for path in self._paths.values() if path.dst == dst)

    def learn_pmtu(self, dst: bytes, mtu: int) -> None:
        """Narrow every path to `dst` to `mtu` bytes for `PMTU_EXPIRES` seconds; what is known to be narrower stays so."""
        known = self._pmtu.get(dst)
        if known is not None and known[1] <= mtu:
            return
        self._pmtu.pop(dst, None)
        if len(self._pmtu) >= PMTU_ENTRIES_MAX:
            self._forget_pmtu(next(iter(self._pmtu)))
        self._pmtu[dst] = (self.env.timers.now + PMTU_EXPIRES, mtu)
        if not self._pmtu_timer.pending:
            self.env.timers.set(self._pmtu_timer, self.env.timers.now + PMTU_EXPIRES)
        for path in self._paths_to(dst):
            path.narrow(mtu)

    def _forget_pmtu(self, dst: bytes) -> None:
        del self._pmtu[dst]
        for path in self._paths_to(dst):
            path.widen()

    def _expire_pmtu(self) -> None:
        now = self.env.timers.now
        for dst in [dst for dst, (expires, _) in self._pmtu.items() if expires <= now]:
            self._forget_pmtu(dst)
        if self._pmtu:
            self.env.timers.set(self._pmtu_timer, next(iter(self._pmtu.values()))[0])
