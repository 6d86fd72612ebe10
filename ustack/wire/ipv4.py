"""IPv4 header (RFC 791, section 3.1)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ustack.wire.checksum import finish, ones_sum

if TYPE_CHECKING:
    from ustack.skb import Buffer

HEADER: Final = Struct("!BBHHHBBH4s4s")
"""Version and header length, TOS, total length, identification, flags and offset, TTL, protocol, checksum, addresses."""

HEADER_LEN: Final = 20
"""Bytes of a header without options."""

HEADER_MAX: Final = 60
"""Bytes of the longest header."""

TOTAL_MAX: Final = 0xFFFF
"""Bytes of the longest packet."""

MIN_MTU: Final = 68
"""Bytes of packet that every link must carry (RFC 791, section 3.2)."""

OFF_TOTAL: Final = 2
OFF_ID: Final = 4
OFF_FRAG: Final = 6
OFF_TTL: Final = 8
OFF_PROTOCOL: Final = 9
OFF_CSUM: Final = 10
OFF_SRC: Final = 12
OFF_DST: Final = 16

IP_DF: Final = 0x4000
"""Do not fragment."""

IP_MF: Final = 0x2000
"""More fragments follow."""

IP_OFFSET: Final = 0x1FFF
"""Mask of the fragment offset, in units of 8 bytes."""

IPPROTO_ICMP: Final = 1
IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17

IPOPT_END: Final = 0
IPOPT_NOOP: Final = 1
IPOPT_LSRR: Final = 131
IPOPT_SSRR: Final = 137


class Ipv4Header(NamedTuple):
    """An IPv4 header as fields. `ihl` and `total` are bytes; `frag` is the word of flags and offset; addresses are 4 bytes."""

    ihl: int
    tos: int
    total: int
    ident: int
    frag: int
    ttl: int
    protocol: int
    checksum: int
    src: bytes
    dst: bytes


def parse_header(buffer: Buffer, start: int, end: int) -> Ipv4Header | None:
    """The header of the packet in `buffer[start:end]`; None when version or lengths are impossible.

    The packet itself may be longer than the buffer, as it is where an ICMP error quotes it; the checksum is not verified.
    """
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    version_ihl, tos, total, ident, frag, ttl, protocol, checksum, src, dst = HEADER.unpack_from(buffer, start)
    ihl = (version_ihl & 15) << 2
    if version_ihl >> 4 != 4 or ihl < HEADER_LEN or ihl > end - start or total < ihl:
        return None
    return Ipv4Header(ihl, tos, total, ident, frag, ttl, protocol, checksum, src, dst)


def build_header(
    src: bytes,
    dst: bytes,
    protocol: int,
    payload_len: int,
    ttl: int = 64,
    tos: int = 0,
    ident: int = 0,
    frag: int = IP_DF,
    options: bytes = b"",
) -> bytes:
    """A header with its checksum, for `payload_len` bytes behind it; `options` must be a multiple of 4 bytes, at most 40."""
    ihl = HEADER_LEN + len(options)
    header = bytearray(HEADER.pack(0x40 | ihl >> 2, tos, ihl + payload_len, ident, frag, ttl, protocol, 0, src, dst) + options)
    header[OFF_CSUM : OFF_CSUM + 2] = finish(ones_sum(header)).to_bytes(2, "big")
    return bytes(header)


def whole_header(header: Buffer, start: int, total: int, tos: int) -> bytearray:
    """The header at `start` of `header`, which is a fragment's, as that of the whole packet of `total` bytes; what comes before
    stays as it is.
    """
    whole = bytearray(header)
    whole[start + 1] = tos
    whole[start + OFF_TOTAL : start + OFF_ID] = total.to_bytes(2, "big")
    whole[start + OFF_FRAG : start + OFF_TTL] = b"\0\0"
    whole[start + OFF_CSUM : start + OFF_SRC] = b"\0\0"
    whole[start + OFF_CSUM : start + OFF_SRC] = finish(ones_sum(memoryview(whole)[start:])).to_bytes(2, "big")
    return whole


def has_source_route(buffer: Buffer, start: int, end: int) -> bool:
    """Whether the options in `buffer[start:end]` name a source route, loose or strict. A malformed option ends the search."""
    at = start
    while at < end and buffer[at] != IPOPT_END:
        kind = buffer[at]
        if kind == IPOPT_NOOP:
            at += 1
            continue
        if kind in (IPOPT_LSRR, IPOPT_SSRR):
            return True
        if at + 1 >= end or buffer[at + 1] < 2:
            break
        at += buffer[at + 1]
    return False
