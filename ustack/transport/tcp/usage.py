"""Whether the congestion window is what limits a sender: one that does not use its window learns nothing about the path, and
the window must not grow (RFC 5681, section 3.1; RFC 7661; Linux tcp_cwnd_validate, tcp_is_cwnd_limited).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.transport.tcp.phase import OPEN
from ustack.transport.tcp.undo import current_ssthresh

if TYPE_CHECKING:
    from ustack.transport.tcp.congestion.base import CongestionControl
    from ustack.transport.tcp.connection import Connection


class WindowUsage:
    """What was outstanding of late, in bytes: `most` at most while the window that ends at `end` was sent, of which `limited`
    says whether the congestion window kept us from sending more; `used` at most since the window was last full, or made
    smaller, at `full_at` (seconds).
    """

    __slots__ = ("end", "full_at", "limited", "most", "used")

    def __init__(self) -> None:
        self.limited = False
        self.most = 0
        self.end = 0
        self.used = 0
        self.full_at = 0.0

    def on_sent(self, conn: Connection, now: float, limited: bool) -> None:
        """What may be sent has been sent; `limited`: but for the congestion window it would have been more."""
        out = conn.inflight.outstanding()
        if limited or conn.snd_una >= self.end or (not self.limited and out > self.most):
            self.limited = limited
            self.most = out
            self.end = conn.snd_nxt
        cc = conn.cc
        if self.limits(cc):
            self.used = 0
            self.full_at = now
            return
        if out > self.used:
            self.used = out
        if now - self.full_at >= conn.rtt.rto and conn.tcp.config.slow_start_after_idle and not cc.model_based:
            self._shrink(conn)
            self.restart(now)

    def _shrink(self, conn: Connection) -> None:
        """Half of what was not used for a timeout is lost (RFC 2861, section 3; tcp_cwnd_application_limited)."""
        if conn.recovery.phase is not OPEN or conn.write_blocked:
            return
        cc = conn.cc
        used = max(self.used, conn.tcp.config.initial_window * conn.mss)
        if used < cc.cwnd:
            cc.ssthresh = current_ssthresh(conn)
            cc.cwnd = (cc.cwnd + used) // 2

    def restart(self, now: float) -> None:
        """The window was made to fit what is used."""
        self.used = 0
        self.full_at = now

    def limits(self, cc: CongestionControl) -> bool:
        """Whether the window may grow: it was full, or, in slow start, half full."""
        return self.limited or (cc.cwnd < cc.ssthresh and cc.cwnd < 2 * self.most)
