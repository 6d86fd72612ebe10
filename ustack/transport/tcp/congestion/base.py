"""What a congestion control is asked and told. Sizes are in bytes, times in seconds; whoever calls keeps the scoreboard and the
clock.

Two kinds exist. One that reacts to losses says with `on_congestion` how large the window is to become, and lets it grow with
`on_ack`; in between, proportional rate reduction has the window. One that is `model_based` sets its window, and the rate that
it is paced at, on every ACK, whatever happens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from sys import maxsize
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ustack.transport.tcp.sample import AckSample


class CongestionControl(ABC):
    """The window `cwnd` of one connection, in bytes, and the threshold `ssthresh` of slow start. `mss` is the sender's maximum
    segment size and may change with the path MTU. `prior_cwnd` is the window before the last reduction. `pacing_rate` in bytes
    per second is 0 where ACKs alone clock the sender; `paced`: it never is.
    """

    __slots__ = ("cwnd", "model_based", "mss", "paced", "pacing_rate", "prior_cwnd", "ssthresh")

    name: ClassVar[str]

    def __init__(self, mss: int, initial_window: int) -> None:
        self.mss = mss
        self.cwnd = initial_window * mss
        self.prior_cwnd = self.cwnd
        self.ssthresh = maxsize
        self.pacing_rate = 0.0
        self.paced = False
        self.model_based = False

    @abstractmethod
    def on_ack(self, sample: AckSample) -> None:
        """Something has arrived. Called only while the window is in use and not being reduced, unless `model_based`."""

    @abstractmethod
    def on_congestion(self, flight_size: int) -> None:
        """A loss was found, or the network has marked a packet, with `flight_size` bytes outstanding: set `ssthresh`."""

    def on_timeout(self) -> None:  # noqa: B027  # most do not care
        """The retransmission timer expired; `on_congestion` was called if it is the first time for this window. The caller sets
        the window.
        """

    def on_undo(self) -> None:
        """The congestion was none: the window becomes what it was."""
        self.cwnd = max(self.cwnd, self.prior_cwnd)

    def on_idle(self, window: int, threshold: int) -> None:
        """Nothing was sent for a retransmission timeout: start again from `window` bytes at most (RFC 5681, section 4.1), and
        remember what was in `threshold`.
        """
        self.ssthresh = max(self.ssthresh, threshold) if self.ssthresh < maxsize else self.ssthresh
        self.cwnd = min(self.cwnd, window)

    def on_restart(self, now: float, idle: float, *, app_limited: bool) -> None:  # noqa: B027  # most do not care
        """Sending begins at `now` with nothing in flight, after `idle` seconds; `app_limited`: for want of data."""

    def slow_start(self, acked: int) -> int:
        """Grow by what was acknowledged, up to the threshold; return what is left of `acked` for congestion avoidance.

        Bytes are counted (RFC 3465), without its limit per ACK, as Linux: a peer that acknowledges a super-frame at once would
        never get out of slow start. After a timeout only what was sent since counts (`AckSample.fresh`), which is what the
        limit of one segment is for.
        """
        grown = min(acked, self.ssthresh - self.cwnd)
        self.cwnd += grown
        return acked - grown
