"""Slow start, congestion avoidance and the halving of the window (RFC 5681) with byte counting (RFC 3465)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ustack.transport.tcp.congestion.base import CongestionControl

if TYPE_CHECKING:
    from ustack.transport.tcp.sample import AckSample


class NewReno(CongestionControl):
    """Reno's window. The recovery that goes with it (RFC 6582, RFC 6675) is in `recovery`, the same for every algorithm."""

    __slots__ = ("_acked",)

    name: ClassVar[str] = "reno"

    def __init__(self, mss: int, initial_window: int) -> None:
        super().__init__(mss, initial_window)
        self._acked = 0

    def on_ack(self, sample: AckSample) -> None:
        """Grow by what was acknowledged in slow start, by one segment per window afterwards."""
        acked = sample.fresh if sample.after_timeout else sample.delivered
        if self.cwnd < self.ssthresh:
            acked = self.slow_start(acked)
            if not acked:
                return
        self._acked += acked
        if self._acked >= self.cwnd:
            self._acked -= self.cwnd
            self.cwnd += self.mss

    def on_congestion(self, flight_size: int) -> None:
        """Half of what was in flight (RFC 5681, equation 4)."""
        self.prior_cwnd = self.cwnd
        self.ssthresh = max(flight_size // 2, 2 * self.mss)
        self._acked = 0
