"""ARP (RFC 826): asking which station has an address, answering for our own, and speaking up when it is ours (RFC 5227).

Which claims are believed is Linux's choice: an entry is made only for somebody who asks for us, or whom we asked; anything
else, a gratuitous ARP included, only updates an entry that exists. Left out: probing before an address is used (RFC 5227,
section 2.1); the address of a stack on a TAP device is the administrator's word.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.timers import Timer
from ustack.wire import arp, ethernet

if TYPE_CHECKING:
    from ustack.env import Env
    from ustack.link.rxring import RxFrame
    from ustack.net.interface import Interface

ANNOUNCE_NUM: Final = 2
"""Announcements of an address of ours (RFC 5227, section 1.1)."""

ANNOUNCE_INTERVAL: Final = 2.0
"""Seconds between them (RFC 5227, section 1.1)."""

DEFEND_INTERVAL: Final = 10.0
"""Seconds in which an address is defended at most once (RFC 5227, section 1.1)."""

_NOBODY: Final = bytes(4)
_UNKNOWN: Final = bytes(6)


class Arp:
    """ARP on one interface. `conflicts` counts packets of other stations that use our address."""

    __slots__ = ("_announce_timer", "_announcements", "_defended", "_env", "_interface", "conflicts")

    def __init__(self, env: Env, interface: Interface) -> None:
        self._env = env
        self._interface = interface
        self._announcements = 0
        self._announce_timer = Timer(self._announce)
        self._defended = -inf
        self.conflicts = 0

    def solicit(self, address: bytes, lladdr: bytes | None) -> None:
        """Ask for `address`: the station `lladdr`, or everybody when that is None."""
        source = self._interface.source_for(address)
        self._send(arp.ARPOP_REQUEST, lladdr or ethernet.BROADCAST, _UNKNOWN, address, source)

    def announce(self) -> None:
        """Tell everybody that the interface's addresses are ours, twice, so that stale entries elsewhere are updated."""
        self._announcements = ANNOUNCE_NUM
        self._announce()

    def _announce(self) -> None:
        self._announcements -= 1
        for own in self._interface.addresses:
            self._send(arp.ARPOP_REQUEST, ethernet.BROADCAST, _UNKNOWN, own.address, own.address)
        if self._announcements > 0:
            self._env.timers.set(self._announce_timer, self._env.timers.now + ANNOUNCE_INTERVAL)

    def _send(self, op: int, lladdr: bytes, tha: bytes, tpa: bytes, spa: bytes) -> None:
        device = self._interface.device
        frame = ethernet.build_header(lladdr, device.mac, ethernet.ETH_P_ARP)
        frame += arp.build(op, device.mac, spa, tha, tpa)
        sent = device.transmit(frame, ())
        if device.sniffers is not None:
            device.sniffers.sent(device, frame, (), sent)
        if not sent:
            self._env.drops.count(DropReason.TX_DEVICE)

    def input(self, interface: Interface, frame: RxFrame, offset: int) -> None:
        """An ARP packet arrived: the packet reception of RFC 826 with the checks of RFC 5227."""
        head = frame.head
        if frame.len - offset < arp.PACKET_LEN:
            self._env.drops.count(DropReason.PKT_TOO_SMALL)
            return
        packet = arp.parse(head, offset, frame.len)
        if (
            packet is None
            or packet.op not in (arp.ARPOP_REQUEST, arp.ARPOP_REPLY)
            or packet.sha[0] & 1
            or packet.sha == _UNKNOWN
            or packet.spa[0] >= 224
            or packet.spa[0] == 127
            or (packet.spa[0] == 0 and packet.spa != _NOBODY)
            or packet.spa in interface.broadcasts
            or packet.sha == interface.device.mac
        ):
            self._env.drops.count(DropReason.INVALID_PROTO)
            return
        if interface.is_own(packet.spa):
            self._defend(packet.spa)
            return
        for_us = interface.is_own(packet.tpa)
        if packet.spa != _NOBODY:
            self._learn(packet, for_us, not head[0] & 1)
        if for_us and packet.op == arp.ARPOP_REQUEST:
            self._send(arp.ARPOP_REPLY, packet.sha, packet.sha, packet.spa, packet.tpa)

    def _learn(self, packet: arp.ArpPacket, for_us: bool, unicast: bool) -> None:
        neighbours = self._interface.neighbours
        neighbour = neighbours.find(packet.spa)
        request = packet.op == arp.ARPOP_REQUEST
        if neighbour is None:
            if not (request and for_us and self._interface.on_link(packet.spa)):
                return
            try:
                neighbour = neighbours.lookup(packet.spa)
            except OSError:
                return  # full, and counted there; the answer needs no entry
        neighbour.update(packet.sha, solicited=not request and unicast, override=packet.spa == packet.tpa)

    def _defend(self, address: bytes) -> None:
        """Somebody else uses our `address`: keep it, and say so now and then (RFC 5227, section 2.4, case c)."""
        self.conflicts += 1
        self._env.drops.count(DropReason.INVALID_PROTO)
        now = self._env.timers.now
        if now - self._defended >= DEFEND_INTERVAL:
            self._defended = now
            self._send(arp.ARPOP_REQUEST, ethernet.BROADCAST, _UNKNOWN, address, address)

    def close(self) -> None:
        """Announce no more."""
        self._announce_timer.cancel()
