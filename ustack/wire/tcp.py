"""TCP header and options (RFC 9293, section 3.1; RFC 7323; RFC 2018).

What is on the wire and nothing more: whether an option may appear in a segment is the connection's to decide.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Buffer

HEADER: Final = Struct("!HHIIHHHH")
"""Source port, destination port, sequence number, acknowledgment number, offset and flags, window, checksum, urgent pointer."""

HEADER_LEN: Final = 20
"""Bytes of a header without options."""

HEADER_MAX: Final = 60
"""Bytes of the longest header."""

OFF_SPORT: Final = 0
OFF_DPORT: Final = 2
OFF_SEQ: Final = 4
OFF_ACK: Final = 8
OFF_FLAGS: Final = 12
OFF_WINDOW: Final = 14
OFF_CSUM: Final = 16
OFF_URG: Final = 18

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
ECE: Final = 0x40
CWR: Final = 0x80
FLAGS_MASK: Final = 0xFF
"""The flags in the 16-bit word of offset and flags; its top 4 bits are the header length in words of 4 bytes."""

OPT_EOL: Final = 0
OPT_NOP: Final = 1
OPT_MSS: Final = 2
OPT_WSCALE: Final = 3
OPT_SACK_PERMITTED: Final = 4
OPT_SACK: Final = 5
OPT_TIMESTAMPS: Final = 8
OPT_FASTOPEN: Final = 34

TS: Final = Struct("!III")
"""The usual options of a segment, 12 bytes: `TS_MARK`, TSval, TSecr (RFC 7323, appendix A)."""

TS_MARK: Final = 0x0101080A
"""NOP, NOP, timestamps, length 10."""

TS_LEN: Final = 12
"""Bytes of the timestamps option with its padding."""

WSCALE_MAX: Final = 14
"""The largest window shift (RFC 7323, section 2.3): a larger one that is received counts as this."""

SACK_BLOCKS_MAX: Final = 4
"""SACK blocks that fit beside no other option; 3 beside timestamps."""

_BLOCK: Final = Struct("!II")
_U16: Final = Struct("!H")


class TcpOptions:
    """The options of one segment. A number that is absent is -1; `sack` holds blocks `(left, right)` in their order there;
    `fastopen` is a cookie, b"" where one is asked for (RFC 7413), or None.
    """

    __slots__ = ("fastopen", "mss", "sack", "sack_permitted", "ts_ecr", "ts_val", "wscale")

    def __init__(self) -> None:
        self.mss = -1
        self.wscale = -1
        self.sack_permitted = False
        self.ts_val = -1
        self.ts_ecr = -1
        self.sack: tuple[tuple[int, int], ...] = ()
        self.fastopen: bytes | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TcpOptions) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]  # mutable, and compared by value

    def __repr__(self) -> str:
        return (
            f"TcpOptions(fastopen={self.fastopen!r}, mss={self.mss}, sack={self.sack}, sack_permitted={self.sack_permitted}, "
            f"ts_ecr={self.ts_ecr}, ts_val={self.ts_val}, wscale={self.wscale})"
        )


def parse_options(buffer: Buffer, start: int, end: int) -> TcpOptions:
    """The options in `buffer[start:end]`. Unknown ones are skipped; the first malformed one ends the parsing; never raises."""
    options = TcpOptions()
    end = min(end, len(buffer))
    if end - start == TS_LEN:
        mark, ts_val, ts_ecr = TS.unpack_from(buffer, start)
        if mark == TS_MARK:
            options.ts_val = ts_val
            options.ts_ecr = ts_ecr
            return options
    at = start
    while at < end:
        kind = buffer[at]
        if kind == OPT_NOP:
            at += 1
            continue
        if kind == OPT_EOL or at + 1 >= end:
            break
        length = buffer[at + 1]
        if length < 2 or at + length > end:
            break
        if kind == OPT_TIMESTAMPS:
            if length == 10:
                options.ts_val, options.ts_ecr = _BLOCK.unpack_from(buffer, at + 2)
        elif kind == OPT_SACK:
            if length >= 10 and length & 7 == 2:
                edges = Struct(f"!{(length - 2) >> 2}I").unpack_from(buffer, at + 2)
                options.sack = tuple(zip(edges[::2], edges[1::2], strict=True))
        elif kind == OPT_MSS:
            if length == 4:
                options.mss = _U16.unpack_from(buffer, at + 2)[0]
        elif kind == OPT_WSCALE:
            if length == 3:
                options.wscale = min(buffer[at + 2], WSCALE_MAX)
        elif kind == OPT_SACK_PERMITTED:
            options.sack_permitted |= length == 2
        elif kind == OPT_FASTOPEN and (length == 2 or (6 <= length <= 18 and not length & 1)):
            options.fastopen = bytes(buffer[at + 2 : at + length])
        at += length
    return options


def build_syn_options(
    mss: int,
    wscale: int = -1,
    sack_permitted: bool = False,
    ts_val: int = -1,
    ts_ecr: int = 0,
    fastopen: bytes | None = None,
) -> bytes:
    """The options of a SYN, a multiple of 4 bytes, in the order that Linux sends them; `wscale`, `ts_val`: not when -1;
    `fastopen`: not when None.
    """
    options = b"\x02\x04" + _U16.pack(mss)
    if ts_val >= 0:
        options += b"\x04\x02\x08\x0a" if sack_permitted else b"\x01\x01\x08\x0a"
        options += _BLOCK.pack(ts_val, ts_ecr)
    elif sack_permitted:
        options += b"\x01\x01\x04\x02"
    if wscale >= 0:
        options += bytes((OPT_NOP, OPT_WSCALE, 3, wscale))
    if fastopen is not None:
        options += bytes((OPT_FASTOPEN, 2 + len(fastopen))) + fastopen
        options += bytes((OPT_NOP,)) * (-len(options) % 4)
    return options


def build_options(ts_val: int = -1, ts_ecr: int = 0, sack: Sequence[tuple[int, int]] = ()) -> bytes:
    """Timestamps (unless `ts_val` is -1) and as many blocks of `sack` as fit, a multiple of 4 bytes."""
    options = TS.pack(TS_MARK, ts_val, ts_ecr) if ts_val >= 0 else b""
    if sack:
        blocks = sack[: SACK_BLOCKS_MAX - 1 if options else SACK_BLOCKS_MAX]
        options += bytes((OPT_NOP, OPT_NOP, OPT_SACK, 2 + 8 * len(blocks)))
        options += b"".join([_BLOCK.pack(left, right) for left, right in blocks])
    return options


class TcpHeader(NamedTuple):
    """A TCP header as fields, for tools and tests: the input path reads `HEADER` where the segment lies.

    `length` is the header's own length in bytes, options included.
    """

    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    checksum: int
    urgent: int
    length: int
    options: TcpOptions


def parse_header(buffer: Buffer, start: int, end: int) -> TcpHeader | None:
    """The header of the segment in `buffer[start:end]`; None when its length or the segment's is impossible."""
    if end - start < HEADER_LEN or end > len(buffer):
        return None
    sport, dport, seq, ack, off_flags, window, checksum, urgent = HEADER.unpack_from(buffer, start)
    length = off_flags >> 12 << 2
    if not HEADER_LEN <= length <= end - start:
        return None
    options = parse_options(buffer, start + HEADER_LEN, start + length)
    return TcpHeader(sport, dport, seq, ack, off_flags & FLAGS_MASK, window, checksum, urgent, length, options)


def build_header(
    sport: int,
    dport: int,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    options: bytes = b"",
    checksum: int = 0,
    urgent: int = 0,
) -> bytes:
    """A header with `options` (a multiple of 4 bytes, at most 40)."""
    off_flags = (HEADER_LEN + len(options)) << 10 | flags
    return HEADER.pack(sport, dport, seq, ack, off_flags, window, checksum, urgent) + options
