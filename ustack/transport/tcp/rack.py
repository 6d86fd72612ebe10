"""RACK: what was sent before something that has arrived, and is late by more than packets overtake each other, is lost (RFC
8985, section 6).

It needs no counting of duplicates, finds lost retransmissions, and learns from D-SACK how much reordering there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.arming import wait_for_reordering
from ustack.transport.tcp.phase import RECOVERY

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.sample import AckSample

REO_WND_PERSIST: Final = 16
"""Recoveries without a spurious retransmission after which the reordering window is small again (section 6.2, step 4)."""

REO_WND_STEPS_MAX: Final = 255

REORDERING_MAX: Final = 300
"""Segments of reordering that are believed at most (tcp_max_reordering)."""

TICK: Final = 1e-6
"""Seconds that two times must be apart to be different."""


class Rack:
    """The segment sent last of all that have arrived: sent at `sent_at`, up to `end`, with round trip `rtt`.

    `reordering` is how many segments a packet was late by, at most (the duplicate ACKs that mean a loss: 3, unless more was
    seen); `reordering_seen` how often. The reordering window is `steps` quarters of the shortest round trip.
    """

    __slots__ = (
        "_adjusted_at",
        "_dsack",
        "advanced",
        "end",
        "persist",
        "reordering",
        "reordering_seen",
        "rtt",
        "sent_at",
        "steps",
    )

    def __init__(self, reordering: int) -> None:
        self.sent_at = -1.0
        self.end = 0
        self.rtt = 0.0
        self.advanced = False
        self.reordering = reordering
        self.reordering_seen = 0
        self.steps = 1
        self.persist = 0
        self._dsack = False
        self._adjusted_at = 0  # bytes delivered when the window was last made larger

    def on_ack(self, conn: Connection, sample: AckSample) -> None:
        """Take in what has arrived (section 6.2, steps 2 and 4)."""
        sent_at = sample.rack_sent_at
        if sent_at >= 0:
            self.advanced = True
            # As in Linux: of several that arrived the last by number counts, which was not always sent last.
            self.rtt = sample.now - sample.rack_last
            if sent_at > self.sent_at or (sent_at == self.sent_at and sample.rack_end > self.end):
                self.sent_at = sent_at
                self.end = sample.rack_end
        if sample.duplicate and self.reordering_seen and not sample.tlp_duplicate:
            self._dsack = True
        if sample.prior_at < 0:
            return
        if sample.prior_delivered < self._adjusted_at:
            self._dsack = False  # once in a round trip is enough
        if self._dsack:
            self.steps = min(self.steps + 1, REO_WND_STEPS_MAX)
            self._dsack = False
            self._adjusted_at = conn.rate.delivered
            self.persist = REO_WND_PERSIST
        elif not self.persist:
            self.steps = 1

    def on_reordering(self, conn: Connection, low: int, high: int) -> None:
        """What was sent at `low` arrived after what was sent up to `high` (section 6.2, step 3)."""
        if low >= high:
            return
        segments = (high - low + conn.mss - 1) // conn.mss
        if segments > self.reordering:
            self.reordering = min(segments, REORDERING_MAX)
        self.reordering_seen += 1
        conn.tcp.env.mib.TcpExtTCPSACKReorder += 1

    def window(self, conn: Connection) -> float:
        """Seconds by which packets may overtake each other (section 6.2, step 4; tcp_rack_reo_wnd)."""
        if not self.reordering_seen:
            # Nothing was ever reordered: three duplicates, or a recovery under way, and nothing is waited for.
            if conn.recovery.phase >= RECOVERY or conn.inflight.sacked_packets >= self.reordering:
                return 0.0
        return min(conn.rtt.minimum / 4 * self.steps, conn.rtt.srtt)

    def detect_loss(self, conn: Connection) -> float:
        """Mark what is lost (section 6.2, step 5). Returns in how many seconds the rest of what was sent before would be, or
        0.
        """
        inflight = conn.inflight
        now = conn.tcp.env.timers.now
        allowed = self.rtt + self.window(conn)
        timeout = 0.0
        segment = inflight.oldest
        while segment is not None:
            newer = segment.newer
            if segment.sent_at > self.sent_at or (segment.sent_at == self.sent_at and segment.end >= self.end):
                break
            remaining = segment.sent_at + allowed - now
            if remaining <= TICK:
                inflight.mark_lost(segment)
            elif remaining > timeout:
                timeout = remaining
            segment = newer
        return timeout

    def look(self, conn: Connection) -> bool:
        """After an ACK: mark what is lost, and wait for what may be late. Returns whether the timer was set."""
        if not self.advanced:
            return False
        self.advanced = False
        timeout = self.detect_loss(conn)
        if timeout:
            wait_for_reordering(conn, timeout)
        return timeout > 0
