"""ICMPv6 (RFC 4443): header, types and codes, and the checksum, which covers the pseudo-header of IPv6."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ustack.wire.checksum import finish, ones_sum_views, pseudo_v6
from ustack.wire.ipv6 import NEXTHDR_ICMP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Buffer

HEADER: Final = Struct("!BBHI")
"""Type, code, checksum; and a word: identifier and sequence number of an echo, the MTU, the pointer, or unused."""

ECHO: Final = Struct("!BBHHH")
"""The header of an echo: type, code, checksum, identifier, sequence number."""

HEADER_LEN: Final = 8
"""Bytes of the header."""

ICMPV6_DEST_UNREACH: Final = 1
ICMPV6_PKT_TOOBIG: Final = 2
ICMPV6_TIME_EXCEED: Final = 3
ICMPV6_PARAMPROB: Final = 4
ICMPV6_ECHO_REQUEST: Final = 128
ICMPV6_ECHO_REPLY: Final = 129
MLD_QUERY: Final = 130
MLD_REPORT: Final = 131
MLD_DONE: Final = 132
ND_ROUTER_SOLICIT: Final = 133
ND_ROUTER_ADVERT: Final = 134
ND_NEIGHBOR_SOLICIT: Final = 135
ND_NEIGHBOR_ADVERT: Final = 136
ND_REDIRECT: Final = 137
MLD2_REPORT: Final = 143

ERRORS_END: Final = 128
"""Types below are errors (RFC 4443, section 2.1)."""

NOROUTE: Final = 0
ADM_PROHIBITED: Final = 1
ADDR_UNREACH: Final = 3
PORT_UNREACH: Final = 4
"""Codes of "destination unreachable"."""

HDR_FIELD: Final = 0
UNK_NEXTHDR: Final = 1
UNK_OPTION: Final = 2
HDR_INCOMP: Final = 3
"""Codes of "parameter problem"; the last is RFC 7112."""


class Icmpv6Header(NamedTuple):
    """An ICMPv6 header as fields; what `word` means depends on the type."""

    type: int
    code: int
    checksum: int
    word: int


def parse_header(buffer: Buffer, start: int, end: int) -> Icmpv6Header | None:
    """The header of the message in `buffer[start:end]`; None when it is too short. The checksum is not verified."""
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    return Icmpv6Header(*HEADER.unpack_from(buffer, start))


def build_header(src: bytes, dst: bytes, kind: int, code: int, word: int, payload: Sequence[Buffer] = ()) -> bytes:
    """The 8 bytes of a header with the checksum of itself and `payload`, sent from `src` to `dst` (16 bytes each)."""
    length = HEADER_LEN + sum(len(piece) for piece in payload)
    header = HEADER.pack(kind, code, 0, word)
    checksum = finish(pseudo_v6(src, dst, NEXTHDR_ICMP, length) + ones_sum_views([header, *payload]))
    return HEADER.pack(kind, code, checksum, word)
