"""Neighbor Discovery on one interface: who has an address, and better next hops (RFC 4861, sections 7 and 8).

Every message is checked as the RFC says: it must come from the link (hop limit 255), be well-formed, and not in fragments (RFC
6980, which the fragment's own drop sees to). What is learned lives in the neighbour table, which is bounded; an advertisement
for somebody whom we never asked changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.drops import DropReason
from ustack.net.addresses import ALL_NODES, ANY6, is_link_local, solicited_node, with_zone
from ustack.net.source_address import select
from ustack.wire import ethernet, icmpv6, ndp

if TYPE_CHECKING:
    from ustack.net.inet6 import Address6, Inet6
    from ustack.net.layer import IpPacket
    from ustack.net.neighbour import Neighbour


class Ndp:
    """Neighbor Discovery for the interface of `inet6`."""

    __slots__ = ("_drops", "_inet6", "_mib")

    def __init__(self, inet6: Inet6) -> None:
        self._inet6 = inet6
        self._drops = inet6.env.drops
        self._mib = inet6.env.mib

    # -- out --

    def solicit(self, address: bytes, lladdr: bytes | None) -> None:
        """Ask for `address`: the station `lladdr`, or its solicited-node group when that is None (RFC 4861, section 7.2.2)."""
        inet6 = self._inet6
        interface = inet6.interface
        source = select((each for each in inet6.addresses.values() if not each.tentative), address, interface)
        if source is None:
            return
        target = address[:16]
        dst = target if lladdr is not None else solicited_node(target)
        body = target + ndp.build_lladdr(ndp.OPT_SOURCE_LL_ADDR, interface.device.mac)
        self._mib.Icmp6OutNeighborSolicits += 1
        inet6.send(source[:16], dst, lladdr or ethernet.multicast_v6(dst), icmpv6.ND_NEIGHBOR_SOLICIT, 0, body)

    def ask_whether_used(self, own: Address6) -> None:
        """Ask whether somebody has the tentative address `own` (RFC 4862, section 5.4.2)."""
        target = own.address[:16]
        group = solicited_node(target)
        body = target + ndp.build_nonce(own.nonce)
        self._mib.Icmp6OutNeighborSolicits += 1
        self._inet6.send(ANY6, group, ethernet.multicast_v6(group), icmpv6.ND_NEIGHBOR_SOLICIT, 0, body)

    def _advertise(self, target: bytes, dst: bytes, lladdr: bytes) -> None:
        """Say to `dst` at the station `lladdr` that `target` is ours (RFC 4861, section 7.2.4)."""
        inet6 = self._inet6
        flags = ndp.NA_OVERRIDE | (0 if dst == ALL_NODES else ndp.NA_SOLICITED)
        body = target + ndp.build_lladdr(ndp.OPT_TARGET_LL_ADDR, inet6.interface.device.mac)
        self._mib.Icmp6OutNeighborAdvertisements += 1
        inet6.send(target, dst, lladdr, icmpv6.ND_NEIGHBOR_ADVERT, flags, body)

    # -- in --

    def input(self, packet: IpPacket, kind: int, code: int) -> None:
        """A message of Neighbor Discovery arrived, whose checksum is right."""
        if packet.ttl != ndp.HOP_LIMIT:
            self._drops.count(DropReason.IPV6_NDISC_HOP_LIMIT)
            return
        head = packet.frame.head
        end = packet.l4 + packet.l4_len
        good = False
        if code == 0 and end <= len(head):
            if kind == icmpv6.ND_NEIGHBOR_SOLICIT:
                self._mib.Icmp6InNeighborSolicits += 1
                good = self._on_solicit(packet, ndp.parse_neighbor_solicit(head, packet.l4, end))
            elif kind == icmpv6.ND_NEIGHBOR_ADVERT:
                self._mib.Icmp6InNeighborAdvertisements += 1
                good = self._on_advert(packet, ndp.parse_neighbor_advert(head, packet.l4, end))
            elif kind == icmpv6.ND_ROUTER_ADVERT:
                self._mib.Icmp6InRouterAdvertisements += 1
                good = self._inet6.routers.on_advert(packet, ndp.parse_router_advert(head, packet.l4, end))
            elif kind == icmpv6.ND_REDIRECT:
                self._mib.Icmp6InRedirects += 1
                good = self._on_redirect(packet, ndp.parse_redirect(head, packet.l4, end))
            else:
                good = True  # a router solicitation: we are none
        if not good:
            self._drops.count(DropReason.IPV6_NDISC_BAD_OPTIONS)

    def _on_solicit(self, packet: IpPacket, message: ndp.NeighborSolicit | None) -> bool:
        """RFC 4861, sections 7.1.1 and 7.2.3; RFC 4862, section 5.4.3."""
        if message is None or message.target[0] == 0xFF:
            return False
        inet6 = self._inet6
        lladdr = message.options.source
        if lladdr is not None and lladdr[0] & 1:
            return False
        probing = packet.src == ANY6
        if probing and (lladdr is not None or packet.dst[:16] != solicited_node(message.target)):
            return False
        own = inet6.addresses.get(with_zone(message.target, inet6.interface.zone))
        if own is None:
            self._drops.count(DropReason.IPV6_NDISC_NS_OTHERHOST)
            return True
        if own.tentative:
            # Somebody else asks for it as well, unless it is our own question that comes back (RFC 7527).
            if probing and (not message.options.nonce or message.options.nonce != own.nonce):
                inet6.on_duplicate(own)
            return True
        if probing:
            self._advertise(message.target, ALL_NODES, ethernet.multicast_v6(ALL_NODES))
            return True
        neighbour = self.learn(packet.src, lladdr)
        station = lladdr or (neighbour.lladdr if neighbour is not None else None)
        if station is None:
            station = bytes(packet.frame.head[6:12])  # who asked has not said where it is, and we have not asked
        self._advertise(message.target, packet.src[:16], station)
        return True

    def learn(self, address: bytes, lladdr: bytes | None) -> Neighbour | None:
        """`address` said where it is without having been asked: make or correct its entry. None when there is none."""
        neighbours = self._inet6.neighbours
        neighbour = neighbours.find(address)
        if lladdr is None:
            return neighbour
        if neighbour is None:
            if not self._inet6.on_link(address):
                return None
            try:
                neighbour = neighbours.lookup(address)
            except OSError:
                return None  # full, and counted there
        neighbour.update(lladdr, solicited=False, override=True)
        return neighbour

    def _on_advert(self, packet: IpPacket, message: ndp.NeighborAdvert | None) -> bool:
        """RFC 4861, sections 7.1.2 and 7.2.5."""
        if message is None or message.target[0] == 0xFF or packet.src == ANY6:
            return False
        solicited = message.flags & ndp.NA_SOLICITED != 0
        if solicited and packet.broadcast:
            return False
        lladdr = message.options.target
        if lladdr is not None and lladdr[0] & 1:
            return False
        inet6 = self._inet6
        target = with_zone(message.target, inet6.interface.zone)
        own = inet6.addresses.get(target)
        if own is not None:
            if own.tentative:
                inet6.on_duplicate(own)
            return True
        neighbour = inet6.neighbours.find(target)
        if neighbour is None:
            self._drops.count(DropReason.IPV6_NDISC_NS_OTHERHOST)
            return True
        if lladdr is None and neighbour.lladdr is None:
            return True
        neighbour.update(lladdr, solicited, message.flags & ndp.NA_OVERRIDE != 0)
        if not message.flags & ndp.NA_ROUTER:
            inet6.routers.forget(target)  # it routes no more
        return True

    def _on_redirect(self, packet: IpPacket, message: ndp.Redirect | None) -> bool:
        """RFC 4861, sections 8.1 and 8.3: only the router that we send there now may say where to send instead."""
        if message is None or not is_link_local(packet.src) or message.destination[0] == 0xFF:
            return False
        inet6 = self._inet6
        zone = inet6.interface.zone
        dst = with_zone(message.destination, zone)
        target = with_zone(message.target, zone)
        lladdr = message.options.target
        if (target != dst and not is_link_local(target)) or target[0] == 0xFF or (lladdr is not None and lladdr[0] & 1):
            return False
        if dst[16:] or not inet6.layer.next_hop_is(dst, packet.src) or inet6.interface.is_own(target):
            return False
        if lladdr is not None:
            try:
                inet6.neighbours.lookup(target).update(lladdr, solicited=False, override=True)
            except OSError:
                return True  # full, and counted there
        inet6.layer.redirect(dst, target)
        return True
