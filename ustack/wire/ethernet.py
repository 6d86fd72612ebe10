"""Ethernet II header (RFC 894)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ustack.skb import Buffer

HEADER: Final = Struct("!6s6sH")
"""Destination, source, ethertype."""

HEADER_LEN: Final = 14
"""Bytes of the header."""

OFF_DST: Final = 0
OFF_SRC: Final = 6
OFF_TYPE: Final = 12

ETH_P_IP: Final = 0x0800
ETH_P_ARP: Final = 0x0806
ETH_P_8021Q: Final = 0x8100
ETH_P_IPV6: Final = 0x86DD

BROADCAST: Final = b"\xff\xff\xff\xff\xff\xff"
"""The station address of everybody. The lowest bit of the first byte marks every group address."""


def multicast_v6(group: bytes) -> bytes:
    """The station address of the IPv6 `group` (packed; RFC 2464, section 7)."""
    return b"\x33\x33" + group[12:16]


class EthernetHeader(NamedTuple):
    """An Ethernet header as fields; addresses are 6 bytes."""

    dst: bytes
    src: bytes
    ethertype: int


def parse_header(buffer: Buffer, start: int, end: int) -> EthernetHeader | None:
    """The header of the frame in `buffer[start:end]`; None when the frame is too short."""
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    return EthernetHeader(*HEADER.unpack_from(buffer, start))


def build_header(dst: bytes, src: bytes, ethertype: int) -> bytes:
    """The 14 bytes of a header."""
    return HEADER.pack(dst, src, ethertype)
