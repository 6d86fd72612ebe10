"""CUBIC (RFC 9438): after a loss the window grows as a cubic function of time, fast, then flat around where it was when packets
were lost, then fast again, whatever the round trip. Slow start is HyStart++ (RFC 9406).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from ustack.transport.tcp.congestion.base import CongestionControl
from ustack.transport.tcp.congestion.hystart import HyStart

if TYPE_CHECKING:
    from ustack.transport.tcp.sample import AckSample

C: Final = 0.4
"""Segments per second cubed (section 5.1)."""

BETA: Final = 0.7
"""What is left of the window after a loss (section 4.6)."""

ALPHA: Final = 3 * (1 - BETA) / (1 + BETA)
"""Segments per round trip by which Reno with BETA would grow (section 4.3)."""

IDLE: Final = -1.0


class Cubic(CongestionControl):
    """Windows with an underscore are in segments, as in the RFC; `_epoch` is when this congestion avoidance began, in seconds,
    IDLE before the first ACK of it.
    """

    __slots__ = ("_epoch", "_grown", "_hystart", "_k", "_origin", "_prior_max", "_w_est", "_w_max")

    name: ClassVar[str] = "cubic"

    def __init__(self, mss: int, initial_window: int) -> None:
        super().__init__(mss, initial_window)
        self._epoch = IDLE
        self._w_max = 0.0
        self._prior_max = 0.0
        self._w_est = 0.0
        self._origin = 0.0
        self._k = 0.0
        self._grown = 0.0
        self._hystart = HyStart()

    def on_ack(self, sample: AckSample) -> None:
        """Grow."""
        acked = sample.fresh if sample.after_timeout else sample.delivered
        if self.cwnd < self.ssthresh:
            hystart = self._hystart
            if not sample.after_timeout and hystart.on_ack(sample):
                self.ssthresh = self.cwnd
            else:
                acked = self.slow_start(acked // hystart.divisor)
                if not acked:
                    return
        self._avoid(acked, sample)

    def _avoid(self, acked: int, sample: AckSample) -> None:
        """Sections 4.2 to 4.5."""
        now = sample.now
        mss = self.mss
        if self._epoch == IDLE:
            self._grown = 0.0
        window = self.cwnd / mss + self._grown
        if self._epoch == IDLE:
            self._epoch = now
            self._w_est = window
            if window < self._w_max:
                self._k = ((self._w_max - window) / C) ** (1 / 3)
                self._origin = self._w_max
            else:
                self._k = 0.0
                self._origin = window
        # Reno's window, which is the least that there is to be (section 4.3).
        alpha = 1.0 if self._w_est >= self.prior_cwnd / mss else ALPHA
        self._w_est += alpha * acked / self.cwnd
        t = now - self._epoch + sample.srtt
        offset = t - self._k
        target = self._origin + C * offset * offset * offset
        target = min(max(target, window), 1.5 * window)
        growth = (target - window) / window * acked / mss
        if self._w_est > window + growth:
            growth = self._w_est - window
        self._grown += growth
        if self._grown >= 1.0:
            whole = int(self._grown)
            self._grown -= whole
            self.cwnd += whole * mss

    def on_congestion(self, flight_size: int) -> None:
        """Remember where it was, a little less when the window was still below the last time (fast convergence, section 4.7),
        and shrink by BETA (section 4.6). The window is taken, not FlightSize: it does not grow unless it is used.
        """
        self.prior_cwnd = self.cwnd
        window = self.cwnd / self.mss
        self._prior_max = self._w_max
        self._w_max = window * (1 + BETA) / 2 if window < self._w_max else window
        self.ssthresh = max(int(self.cwnd * BETA), 2 * self.mss)
        self._epoch = IDLE
        self._hystart.reset()

    def on_undo(self) -> None:
        """As if it had not happened (section 4.9)."""
        super().on_undo()
        self._w_max = self._prior_max
        self._epoch = IDLE

    def on_restart(self, now: float, idle: float, *, app_limited: bool) -> None:
        """Time in which nothing was sent does not count (section 5.8)."""
        if self._epoch != IDLE:
            self._epoch = min(self._epoch + idle, now)
