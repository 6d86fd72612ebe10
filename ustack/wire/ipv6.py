"""IPv6 header, extension headers and their options (RFC 8200)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Buffer

HEADER: Final = Struct("!IHBB16s16s")
"""Version, traffic class and flow label; payload length, next header, hop limit, addresses."""

HEADER_LEN: Final = 40
"""Bytes of the header."""

MIN_MTU: Final = 1280
"""Bytes of packet that every link must carry (RFC 8200, section 5)."""

OFF_PAYLOAD_LEN: Final = 4
OFF_NEXT_HEADER: Final = 6
OFF_HOP_LIMIT: Final = 7
OFF_SRC: Final = 8
OFF_DST: Final = 24

NEXTHDR_HOP: Final = 0
NEXTHDR_TCP: Final = 6
NEXTHDR_UDP: Final = 17
NEXTHDR_ROUTING: Final = 43
NEXTHDR_FRAGMENT: Final = 44
NEXTHDR_ICMP: Final = 58
NEXTHDR_NONE: Final = 59
NEXTHDR_DEST: Final = 60

FRAGMENT: Final = Struct("!BBHI")
"""Next header, reserved, offset and flag, identification (RFC 8200, section 4.5)."""

FRAGMENT_LEN: Final = 8
"""Bytes of a fragment header."""

FRAG_MORE: Final = 1
"""More fragments follow."""

FRAG_OFFSET: Final = 0xFFF8
"""Mask of the offset, which is in bytes once masked."""

OPT_PAD1: Final = 0
OPT_PADN: Final = 1
OPT_ROUTER_ALERT: Final = 5

OPT_ACTION: Final = 0xC0
"""The bits of an option's type that say what to do when it is unknown (RFC 8200, section 4.2)."""

ACTION_SKIP: Final = 0x00
ACTION_DISCARD: Final = 0x40
ACTION_REPORT: Final = 0x80
ACTION_REPORT_UNICAST: Final = 0xC0
"""Skip it; discard the packet; also report it; also report it unless it was sent to a group."""


class Ipv6Header(NamedTuple):
    """An IPv6 header as fields. Addresses are 16 bytes."""

    traffic_class: int
    flow_label: int
    payload_len: int
    next_header: int
    hop_limit: int
    src: bytes
    dst: bytes


def parse_header(buffer: Buffer, start: int, end: int) -> Ipv6Header | None:
    """The header of the packet in `buffer[start:end]`; None when it is too short or of another version.

    The packet itself may be longer than the buffer, as it is where an ICMPv6 error quotes it.
    """
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    first, payload_len, next_header, hop_limit, src, dst = HEADER.unpack_from(buffer, start)
    if first >> 28 != 6:
        return None
    return Ipv6Header(first >> 20 & 0xFF, first & 0xFFFFF, payload_len, next_header, hop_limit, src, dst)


def build_header(
    src: bytes, dst: bytes, next_header: int, payload_len: int, hop_limit: int = 64, traffic_class: int = 0, flow_label: int = 0
) -> bytes:
    """The 40 bytes of a header for `payload_len` bytes behind it."""
    return HEADER.pack(6 << 28 | traffic_class << 20 | flow_label, payload_len, next_header, hop_limit, src, dst)


def build_options(next_header: int, options: Sequence[tuple[int, bytes]]) -> bytes:
    """A hop-by-hop or destination options header with `options` (type and data), padded to a multiple of 8 bytes."""
    body = b"".join(bytes((kind, len(data))) + data for kind, data in options)
    spare = -(2 + len(body)) % 8
    if spare == 1:
        body += bytes((OPT_PAD1,))
    elif spare:
        body += bytes((OPT_PADN, spare - 2)) + bytes(spare - 2)
    return bytes((next_header, (len(body) + 2) // 8 - 1)) + body


def build_fragment(next_header: int, offset: int, more: bool, ident: int) -> bytes:
    """A fragment header for the bytes from `offset` (a multiple of 8) on."""
    return FRAGMENT.pack(next_header, 0, offset | more, ident)


def without_fragment(header: bytes, l3: int, payload_len: int, traffic_class: int) -> bytes:
    """`header`, whose IPv6 header begins at `l3` and which ends with a fragment header, as it is without that, for a whole
    packet of `payload_len` bytes behind the IPv6 header.
    """
    at = len(header) - FRAGMENT_LEN
    whole = bytearray(header[:at])
    names = l3 + OFF_NEXT_HEADER
    following = l3 + HEADER_LEN
    while following < at:
        names = following
        following += (header[following + 1] + 1) << 3
    whole[names] = header[at]
    whole[l3 + OFF_PAYLOAD_LEN : l3 + OFF_NEXT_HEADER] = payload_len.to_bytes(2, "big")
    whole[l3 : l3 + 2] = (0x6000 | traffic_class << 4 | whole[l3 + 1] & 15).to_bytes(2, "big")
    return bytes(whole)
