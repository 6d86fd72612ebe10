"""ARP for IPv4 over Ethernet (RFC 826); a packet with other hardware or protocol is none of ours."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ustack.skb import Buffer

PACKET: Final = Struct("!HHBBH6s4s6s4s")
"""Hardware, protocol, their address lengths, operation, sender's addresses, target's addresses."""

PACKET_LEN: Final = 28
"""Bytes of the packet."""

ARPHRD_ETHER: Final = 1
ARPOP_REQUEST: Final = 1
ARPOP_REPLY: Final = 2

_ETHERNET_IPV4: Final = (ARPHRD_ETHER, 0x0800, 6, 4)


class ArpPacket(NamedTuple):
    """An ARP packet: operation, and hardware (6 bytes) and protocol (4 bytes) address of sender and target."""

    op: int
    sha: bytes
    spa: bytes
    tha: bytes
    tpa: bytes


def parse(buffer: Buffer, start: int, end: int) -> ArpPacket | None:
    """The packet in `buffer[start:end]`; None when it is too short or not about IPv4 over Ethernet."""
    if end - start < PACKET_LEN or end > len(buffer):
        return None
    hardware, protocol, hlen, plen, op, sha, spa, tha, tpa = PACKET.unpack_from(buffer, start)
    if (hardware, protocol, hlen, plen) != _ETHERNET_IPV4:
        return None
    return ArpPacket(op, sha, spa, tha, tpa)


def build(op: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    """The 28 bytes of a packet."""
    return PACKET.pack(*_ETHERNET_IPV4, op, sha, spa, tha, tpa)
