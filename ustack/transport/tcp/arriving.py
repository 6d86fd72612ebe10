"""A segment as it arrives, and sequence numbers as they are on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.output import MASK32

if TYPE_CHECKING:
    from ustack.link.rxring import RxFrame
    from ustack.wire.tcp import TcpOptions

HALF: Final = 1 << 31

MARKED: Final = 0x100
"""Among the flags of an arriving segment: a router has met congestion (CE, RFC 3168, section 5)."""


def unwrap(wire: int, near: int) -> int:
    """The sequence number that is `wire` modulo 2**32 and closest to `near`."""
    return near + ((wire - near + HALF) & MASK32) - HALF


class ArrivingSegment:
    """A segment as it arrives, parsed: one object per stack, filled for each. `seq` and `ack` are as on the wire.

    `options` is None when there are none but timestamps, whose values are `ts_val` and `ts_ecr` (-1: absent). The payload is
    `frame`'s bytes `offset .. offset+length`.
    """

    __slots__ = ("ack", "flags", "frame", "length", "offset", "options", "seq", "ts_ecr", "ts_val", "window")

    frame: RxFrame
    options: TcpOptions | None

    def __init__(self) -> None:
        self.seq = 0
        self.ack = 0
        self.flags = 0
        self.window = 0
        self.offset = 0
        self.length = 0
        self.options = None
        self.ts_val = -1
        self.ts_ecr = -1
