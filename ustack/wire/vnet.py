"""virtio_net_hdr, which precedes every frame of a TAP device opened with IFF_VNET_HDR (virtio 1.2, section 5.1.6).

The legacy layout of 10 bytes in the byte order of the machine, which the kernel's tun driver uses unless told otherwise.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ustack.skb import Buffer

HEADER: Final = Struct("=BBHHHH")
"""Flags, GSO type, header length, GSO size, checksum start (both lengths count from the Ethernet header), checksum offset."""

HEADER_LEN: Final = 10
"""Bytes of the header."""

F_NEEDS_CSUM: Final = 1
"""The checksum field holds the sum of the pseudo-header, and the rest from `csum_start` on is still to be added."""

F_DATA_VALID: Final = 2
"""The checksum was verified."""

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_UDP: Final = 3
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
"""A bit in the GSO type: the super-frame has CWR set."""


class VnetHeader(NamedTuple):
    """A virtio_net_hdr as fields."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int


def parse_header(buffer: Buffer, start: int, end: int) -> VnetHeader | None:
    """The header at the start of `buffer[start:end]`; None when it is too short."""
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    return VnetHeader(*HEADER.unpack_from(buffer, start))


def build_header(
    flags: int = 0, gso_type: int = GSO_NONE, hdr_len: int = 0, gso_size: int = 0, csum_start: int = 0, csum_offset: int = 0
) -> bytes:
    """The 10 bytes of a header."""
    return HEADER.pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)
