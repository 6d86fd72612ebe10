"""Capture files: pcapng with interface names, directions, nanoseconds, and why a frame was dropped as its comment.

The blocks are dpkt's, the format that of the IETF's draft (draft-ietf-opsawg-pcapng). Wireshark and tshark show all of it;
tcpdump reads the frames.
"""

from __future__ import annotations

from struct import pack, pack_into
from typing import IO, TYPE_CHECKING, Any, Final

from dpkt.pcapng import (
    PCAPNG_OPT_COMMENT,
    PCAPNG_OPT_ENDOFOPT,
    PCAPNG_OPT_IF_MACADDR,
    PCAPNG_OPT_IF_NAME,
    PCAPNG_OPT_IF_TSRESOL,
    PCAPNG_OPT_SHB_USERAPPL,
    EnhancedPacketBlockLE,
    InterfaceDescriptionBlockLE,
    PcapngOptionLE,
    SectionHeaderBlockLE,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

OPT_EPB_FLAGS: Final = 2
"""A packet's direction, in the lowest two bits."""

INBOUND: Final = 1
OUTBOUND: Final = 2

_ORIGINAL_LENGTH: Final = 24
"""Where an enhanced packet block says how long the frame was."""

_NANOSECONDS: Final = b"\x09"
"""Time stamps are in units of 10**-9 s (if_tsresol)."""

_END: Final = PcapngOptionLE(code=PCAPNG_OPT_ENDOFOPT)


class _FrameBlock(EnhancedPacketBlockLE):  # type: ignore[misc]
    """An enhanced packet block of which less than the whole frame may have been captured, for which dpkt has no field."""

    on_wire: int

    def __bytes__(self) -> bytes:
        block = bytearray(super().__bytes__())
        pack_into("<I", block, _ORIGINAL_LENGTH, self.on_wire)
        return bytes(block)


class PcapngWriter:
    """Writes to `file`. Each of `interfaces` is a dict with `name` and `mac`; a frame names one by its index."""

    def __init__(self, file: IO[bytes], interfaces: Sequence[dict[str, Any]], snaplen: int) -> None:
        self._file = file
        file.write(bytes(SectionHeaderBlockLE(opts=[_option(PCAPNG_OPT_SHB_USERAPPL, b"ustack capture"), _END])))
        for interface in interfaces:
            options = [
                _option(PCAPNG_OPT_IF_NAME, interface["name"].encode()),
                _option(PCAPNG_OPT_IF_MACADDR, bytes.fromhex(interface["mac"].replace(":", ""))),
                _option(PCAPNG_OPT_IF_TSRESOL, _NANOSECONDS),
                _END,
            ]
            file.write(bytes(InterfaceDescriptionBlockLE(snaplen=snaplen, opts=options)))
        file.flush()

    def write(self, stamp: int, interface: int, outgoing: bool, frame: bytes, length: int, comment: str = "") -> None:
        """A frame of `length` bytes that begins with the bytes `frame`, seen at `stamp` (nanoseconds since 1970)."""
        options = [_option(OPT_EPB_FLAGS, pack("<I", OUTBOUND if outgoing else INBOUND)), _END]
        if comment:
            options.insert(0, _option(PCAPNG_OPT_COMMENT, comment.encode()))
        block = _FrameBlock(iface_id=interface, ts_high=stamp >> 32, ts_low=stamp & 0xFFFFFFFF, pkt_data=frame, opts=options)
        block.on_wire = length
        self._file.write(bytes(block))

    def flush(self) -> None:
        """Let a reader of the file see what was written."""
        self._file.flush()


def _option(code: int, data: bytes) -> PcapngOptionLE:
    return PcapngOptionLE(code=code, data=data)
