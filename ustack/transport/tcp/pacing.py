"""Pacing: spread what the window allows over the round trip, instead of sending it as fast as ACKs come (Linux tcp_pacing,
sk_pacing_rate).

A transmission is as large as the rate carries in a millisecond, so that neither timers nor per-packet work set the rate; what
a late timer has missed is made up for, up to `CREDIT`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.timers import Timer

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

QUANTUM: Final = 0.001
"""Seconds that one transmission takes at the pacing rate (sk_pacing_shift 10)."""

QUANTUM_SEGMENTS_MIN: Final = 2
"""Segments of one transmission at least (tcp_min_tso_segs)."""

CREDIT: Final = 0.002
"""Seconds that sending may lag behind the rate and catch up: the grain of an event loop's timers."""

SLOW_START_GAIN: Final = 2.0
AVOIDANCE_GAIN: Final = 1.2
"""What a congestion control that does not pace by itself is paced at, in windows per round trip, where the user has set a rate
(tcp_pacing_ss_ratio, tcp_pacing_ca_ratio)."""


class Pacer:
    """`rate` in bytes per second; nothing is to be sent before `next_at` (seconds). `resume` is called then."""

    __slots__ = ("_timer", "next_at", "rate")

    def __init__(self, conn: Connection) -> None:
        self.rate = 0.0
        self.next_at = 0.0
        self._timer = Timer(lambda: conn.tcp.resume(conn))

    def may_send(self, conn: Connection, now: float) -> bool:
        """Whether a transmission may leave now; if not, the timer is set for when it may."""
        if self.next_at <= now or not self.rate:
            return True
        if not self._timer.pending:
            conn.tcp.env.timers.set(self._timer, max(self.next_at, now + QUANTUM))
        return False

    def sent(self, size: int, now: float) -> None:
        """`size` bytes have left."""
        if self.rate:
            self.next_at = max(self.next_at, now - CREDIT) + size / self.rate

    def quantum(self, mss: int) -> int:
        """Bytes of one transmission, a multiple of `mss`."""
        return max(int(self.rate * QUANTUM) // mss, QUANTUM_SEGMENTS_MIN) * mss

    def cancel(self) -> None:
        """The connection is over."""
        self._timer.cancel()


def pacing_rate(conn: Connection) -> float:
    """What the connection is paced at, or would be: bytes per second (tcp_update_pacing_rate)."""
    cc = conn.cc
    rate = cc.pacing_rate
    if not rate and conn.rtt.srtt:
        gain = SLOW_START_GAIN if cc.cwnd < cc.ssthresh // 2 else AVOIDANCE_GAIN
        rate = gain * max(cc.cwnd, conn.inflight.outstanding()) / conn.rtt.srtt
    most = conn.options.max_pacing_rate
    return min(rate, most) if most else rate


def update(conn: Connection) -> None:
    """The window or the rate has changed: follow it, if the connection is paced at all."""
    pacer = conn.pacer
    if pacer is None:
        if not (conn.cc.paced or conn.options.max_pacing_rate):
            return
        pacer = conn.pacer = Pacer(conn)
    elif not (conn.cc.paced or conn.options.max_pacing_rate):
        pacer.cancel()
        conn.pacer = None
        return
    pacer.rate = pacing_rate(conn)
