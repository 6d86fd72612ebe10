"""What remains of a connection that was closed first by us: enough to answer the peer's last FIN again (RFC 9293, section
3.6.1).

A record of a few numbers takes the connection's place, so that tens of thousands of them cost little. A new SYN for the same
ports opens a new connection when its timestamp or sequence number proves that it is new (RFC 6191; RFC 9293, section 3.6.1),
and a reset does not end TIME-WAIT (RFC 1337).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.drops import DropReason
from ustack.transport.tcp.arriving import HALF, unwrap
from ustack.transport.tcp.output import MASK32
from ustack.wire.tcp import ACK, FIN, RST, SYN, build_options

if TYPE_CHECKING:
    from ustack.net.path import Path
    from ustack.transport.tcp.arriving import ArrivingSegment
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.protocol import Tcp


class TimeWait:
    """A connection in TIME-WAIT until `expires` (seconds)."""

    __slots__ = ("expires", "key", "path", "rcv_nxt", "snd_nxt", "tcp", "ts_offset", "ts_ok", "ts_recent", "window")

    def __init__(self, conn: Connection, expires: float) -> None:
        self.tcp: Tcp = conn.tcp
        self.key = conn.key
        self.path: Path = conn.path
        self.snd_nxt = conn.snd_nxt
        self.rcv_nxt = conn.rcv_nxt
        self.window = max(conn.rcv_adv - conn.rcv_nxt, 0) >> conn.rcv_wscale
        self.ts_ok = conn.ts_ok
        self.ts_offset = conn.ts_offset
        self.ts_recent = conn.ts_recent
        self.expires = expires

    @property
    def local(self) -> tuple[bytes, int]:
        """Our address (packed) and port."""
        return self.path.src, int.from_bytes(self.key[-2:])

    @property
    def remote(self) -> tuple[bytes, int]:
        """The peer's address (packed) and port."""
        return self.path.dst, int.from_bytes(self.key[-4:-2])

    def may_be_reused_by(self, segment: ArrivingSegment) -> bool:
        """Whether a SYN is certainly not an old one of this connection."""
        if not segment.flags & SYN or segment.flags & (RST | ACK):
            return False
        if self.ts_ok and segment.ts_val >= 0:
            age = (segment.ts_val - self.ts_recent) & MASK32
            if age:
                return age < HALF
        return unwrap(segment.seq, self.rcv_nxt) > self.rcv_nxt

    def segment_arrives(self, segment: ArrivingSegment) -> DropReason | None:
        """Answer what deserves an answer; a FIN sent again starts the time anew."""
        flags = segment.flags
        if flags & RST:
            return DropReason.TIME_WAIT
        if flags & FIN:
            self.tcp.restart_time_wait(self)
        if flags & (FIN | SYN) or segment.length or unwrap(segment.seq, self.rcv_nxt) != self.rcv_nxt:
            timestamp = (int(self.tcp.env.timers.now * 1000) + self.ts_offset) & MASK32 if self.ts_ok else -1
            options = build_options(timestamp, self.ts_recent)
            self.tcp.send_bare(self.path, self.key, self.snd_nxt & MASK32, self.rcv_nxt & MASK32, ACK, self.window, options)
        return DropReason.TIME_WAIT
