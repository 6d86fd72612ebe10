"""UDP header (RFC 768)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ustack.skb import Buffer

HEADER: Final = Struct("!HHHH")
"""Source port, destination port, length of header and data, checksum (0: none)."""

HEADER_LEN: Final = 8
"""Bytes of the header."""

OFF_CSUM: Final = 6


class UdpHeader(NamedTuple):
    """A UDP header as fields; `length` counts header and data in bytes."""

    sport: int
    dport: int
    length: int
    checksum: int


def parse_header(buffer: Buffer, start: int, end: int) -> UdpHeader | None:
    """The header of the datagram in `buffer[start:end]`; None when the lengths disagree. The checksum is not verified."""
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    header = UdpHeader(*HEADER.unpack_from(buffer, start))
    return header if HEADER_LEN <= header.length <= end - start else None


def build_header(sport: int, dport: int, payload_len: int, checksum: int = 0) -> bytes:
    """The 8 bytes of a header for `payload_len` bytes of data."""
    return HEADER.pack(sport, dport, HEADER_LEN + payload_len, checksum)
