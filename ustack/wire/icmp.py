"""ICMP for IPv4 (RFC 792; RFC 1191 for the MTU in "fragmentation needed")."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ustack.wire.checksum import finish, ones_sum, ones_sum_views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Buffer

HEADER: Final = Struct("!BBHHH")
"""Type, code, checksum, two words: identifier and sequence of an echo; unused and next-hop MTU of "fragmentation needed"."""

HEADER_LEN: Final = 8
"""Bytes of the header."""

OFF_CSUM: Final = 2

ICMP_ECHOREPLY: Final = 0
ICMP_DEST_UNREACH: Final = 3
ICMP_ECHO: Final = 8
ICMP_TIME_EXCEEDED: Final = 11
ICMP_PARAMETERPROB: Final = 12

ICMP_NET_UNREACH: Final = 0
ICMP_HOST_UNREACH: Final = 1
ICMP_PROT_UNREACH: Final = 2
ICMP_PORT_UNREACH: Final = 3
ICMP_FRAG_NEEDED: Final = 4

ICMP_EXC_TTL: Final = 0
ICMP_EXC_FRAGTIME: Final = 1

ERROR_TYPES: Final = frozenset({ICMP_DEST_UNREACH, 4, 5, ICMP_TIME_EXCEEDED, ICMP_PARAMETERPROB})
"""Types that no error may be sent about, because they are errors (RFC 1122, section 3.2.2); 4 and 5 are obsolete ones."""


class IcmpHeader(NamedTuple):
    """An ICMP header as fields; what `word0` and `word1` mean depends on the type."""

    type: int
    code: int
    checksum: int
    word0: int
    word1: int


def parse_header(buffer: Buffer, start: int, end: int) -> IcmpHeader | None:
    """The header of the message in `buffer[start:end]`; None when it is too short. The checksum is not verified."""
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    return IcmpHeader(*HEADER.unpack_from(buffer, start))


def build_header(icmp_type: int, code: int, word0: int, word1: int, payload: Sequence[Buffer] = ()) -> bytes:
    """The 8 bytes of a header with the checksum of itself and `payload`."""
    header = HEADER.pack(icmp_type, code, 0, word0, word1)
    checksum = finish(ones_sum(header) + ones_sum_views(payload))
    return HEADER.pack(icmp_type, code, checksum, word0, word1)
