"""Packed addresses, as every layer above the wire handles them, and what kind of address one is (RFC 4291; RFC 4007).

An IPv4 address is 4 bytes, an IPv6 address 16. A link-local IPv6 address means something only together with the link that it
is on, its zone, so it carries the zone along: 20 bytes, of which the last 4 are the index of the interface, twice, the second
time as its complement. Two addresses are the same exactly if their bytes are, whoever uses them as a key need not know about
zones, and the zone adds nothing to a checksum over the pseudo-header, because its sum is a ones-complement zero. What goes on
the wire is the first 16 bytes.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop
from typing import Final

ANY4: Final = bytes(4)
ANY6: Final = bytes(16)
"""The unspecified addresses, 0.0.0.0 and ::."""

LOOPBACK6: Final = b"\0" * 15 + b"\1"
ALL_NODES: Final = b"\xff\x02" + b"\0" * 13 + b"\1"
ALL_ROUTERS: Final = b"\xff\x02" + b"\0" * 13 + b"\2"
ALL_MLDV2_ROUTERS: Final = b"\xff\x02" + b"\0" * 13 + b"\x16"
"""ff02::1, ff02::2 (RFC 4291, section 2.7.1) and ff02::16 (RFC 3810, section 5.2.14)."""

LINK_LOCAL_NETWORK: Final = b"\xfe\x80" + bytes(14)
LINK_LOCAL_PREFIX_LEN: Final = 64

V4_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
"""The first 12 bytes of an IPv4 address that is written as an IPv6 address (RFC 4291, section 2.5.5.2)."""

SOLICITED_NODE: Final = b"\xff\x02" + b"\0" * 9 + b"\1\xff"
"""The first 13 bytes of a solicited-node group (RFC 4291, section 2.7.1)."""

SCOPE_LINK: Final = 2
SCOPE_SITE: Final = 5
SCOPE_GLOBAL: Final = 14
"""How far an address reaches, in the values of multicast scopes (RFC 4291, section 2.7; RFC 6724, section 3.1)."""

ZONE_LEN: Final = 4
"""Bytes of a zone behind an address."""


def version(address: bytes) -> int:
    """4 or 6."""
    return 4 if len(address) == 4 else 6


def zone(index: int) -> bytes:
    """What stands behind the link-local addresses of the interface with that index (1 to 65535)."""
    return index.to_bytes(2, "big") + (0xFFFF - index).to_bytes(2, "big")


def with_zone(address: bytes, behind: bytes) -> bytes:
    """The 16 bytes `address` as it is handled here: with the zone `behind` it if it is link-local."""
    return address + behind if needs_zone(address) else address


def scope_id(address: bytes) -> int:
    """The index of the interface that the link of `address` is on; 0 for an address that says nothing about that."""
    return int.from_bytes(address[16:18], "big")


def needs_zone(address: bytes) -> bool:
    """Whether `address` (packed) is IPv6 and means something on one link only: link-local unicast or multicast."""
    if len(address) == 4:
        return False
    return address[1] & 0xC0 == 0x80 if address[0] == 0xFE else (address[0] == 0xFF and address[1] & 15 <= SCOPE_LINK)


def is_link_local(address: bytes) -> bool:
    """Whether it is an IPv6 link-local unicast address (fe80::/10)."""
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80 and len(address) != 4


def is_multicast(address: bytes) -> bool:
    """Whether it is the address of a group, IPv4 or IPv6."""
    return address[0] == 0xFF if len(address) != 4 else address[0] & 0xF0 == 0xE0


def is_v4_mapped(address: bytes) -> bool:
    """Whether it is an IPv4 address written as IPv6."""
    return len(address) == 16 and address.startswith(V4_MAPPED)


def is_any(address: bytes | None) -> bool:
    """Whether it stands for all our addresses: 0.0.0.0, ::, or None for those of both versions."""
    return address is None or address in (ANY4, ANY6)


def overlap(a: bytes | None, b: bytes | None) -> bool:
    """Whether a packet could be for both of the local addresses `a` and `b`, either of which may be `is_any`."""
    if a is None or b is None:
        return True
    return (len(a) == 4) == (len(b) == 4) and (a == b or is_any(a) or is_any(b))


def covers(bound: bytes | None, address: bytes) -> bool:
    """Whether what is bound to `bound` gets packets for `address`."""
    return bound is None or bound == address or bound == (ANY4 if len(address) == 4 else ANY6)


def solicited_node(address: bytes) -> bytes:
    """The 16 bytes of the group in which the owner of the IPv6 `address` is asked for its link-layer address."""
    return SOLICITED_NODE + address[13:16]


def text(address: bytes) -> str:
    """The address as text; a zone is written behind it as RFC 4007, section 11 has it, with the number of the interface."""
    if len(address) == 4:
        return inet_ntop(AF_INET, address)
    if len(address) == 16:
        return inet_ntop(AF_INET6, address)
    if len(address) == 20:
        return f"{inet_ntop(AF_INET6, address[:16])}%{scope_id(address)}"
    return address.hex(".")
