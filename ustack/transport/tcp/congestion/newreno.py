"""Slow start, congestion avoidance and the halving of the window (RFC 5681) with byte counting (RFC 3465)."""

from __future__ import annotations

from typing import ClassVar

from ustack.transport.tcp.congestion.base import CongestionControl


class NewReno(CongestionControl):
    """Reno's window. The recovery that goes with it (RFC 6582, RFC 6675) is in `recovery`, the same for every algorithm."""

    __slots__ = ("_acked",)

    name: ClassVar[str] = "reno"

    def __init__(self, mss: int, initial_window: int) -> None:
        super().__init__(mss, initial_window)
        self._acked = 0

    def on_ack(self, acked: int) -> None:
        """Grow by what was acknowledged in slow start, by one segment per window afterwards."""
        if self.cwnd < self.ssthresh:
            grown = min(acked, self.ssthresh - self.cwnd)
            self.cwnd += grown
            acked -= grown
            if not acked:
                return
        self._acked += acked
        if self._acked >= self.cwnd:
            self._acked -= self.cwnd
            self.cwnd += self.mss

    def _halve(self, in_flight: int) -> None:
        self.ssthresh = max(in_flight // 2, 2 * self.mss)
        self._acked = 0

    def on_loss(self, in_flight: int) -> None:
        """Halve (RFC 5681, equation 4); what leaves the network while recovering is the scoreboard's to count."""
        self._halve(in_flight)
        self.cwnd = self.ssthresh

    def on_timeout(self, in_flight: int) -> None:
        """Back to one segment (RFC 5681, section 3.1)."""
        self._halve(in_flight)
        self.cwnd = self.mss
