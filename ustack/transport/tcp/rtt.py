"""Round-trip time and retransmission timeout (RFC 6298)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ustack.transport.tcp.config import TcpConfig

ALPHA: Final = 1 / 8
BETA: Final = 1 / 4
K: Final = 4

AFTER_LOST_SYN: Final = 3.0
"""Seconds of the first timeout of data when the SYN was lost (RFC 6298, section 5.7)."""


class RttEstimator:
    """Smoothed RTT, its variation and the RTO that follows from them; all in seconds. `backoff` doubles the RTO, a new sample
    ends that.
    """

    __slots__ = ("_config", "backoff_shift", "initial", "latest", "minimum", "rto", "rttvar", "srtt")

    def __init__(self, config: TcpConfig) -> None:
        self._config = config
        self.srtt = 0.0
        self.rttvar = 0.0
        self.latest = 0.0
        self.minimum = 0.0
        self.backoff_shift = 0
        self.initial = config.initial_rto
        self.rto = self.initial

    def on_sample(self, rtt: float) -> None:
        """Take the RTT of a segment that was sent once only (Karn's rule; RFC 6298, sections 2 and 3)."""
        self.latest = rtt
        srtt = self.srtt
        if srtt == 0.0:
            self.srtt = max(rtt, 1e-6)
            self.rttvar = rtt / 2
            self.minimum = rtt
        else:
            self.rttvar += BETA * (abs(srtt - rtt) - self.rttvar)
            self.srtt = srtt + ALPHA * (rtt - srtt)
            if rtt < self.minimum:
                self.minimum = rtt
        self.backoff_shift = 0
        self._update()

    def backoff(self) -> None:
        """The timer expired: double the RTO (RFC 6298, section 5.5)."""
        self.backoff_shift += 1
        self._update()

    def on_lost_syn(self) -> None:
        """The connection is made, but its SYN was sent twice: no sample, and no hurry (RFC 6298, section 5.7)."""
        self.backoff_shift = 0
        self.initial = max(self.initial, AFTER_LOST_SYN)
        self._update()

    def end_backoff(self) -> None:
        """Everything outstanding is acknowledged: the next timeout starts small again."""
        if self.backoff_shift:
            self.backoff_shift = 0
            self._update()

    def _update(self) -> None:
        config = self._config
        rto = self.initial
        if self.srtt != 0.0:
            rto = self.srtt + max(K * self.rttvar, config.rto_min)
        if self.backoff_shift:
            rto *= 1 << min(self.backoff_shift, 16)
        self.rto = rto if rto < config.rto_max else config.rto_max
