"""Round-trip time and retransmission timeout (RFC 6298)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ustack.transport.tcp.config import TcpConfig

ALPHA: Final = 1 / 8
BETA: Final = 1 / 4
K: Final = 4


class RttEstimator:
    """Smoothed RTT, its variation and the RTO that follows from them; all in seconds. `backoff` doubles the RTO, a new sample
    ends that.
    """

    __slots__ = ("_config", "backoff_shift", "latest", "minimum", "rttvar", "srtt")

    def __init__(self, config: TcpConfig) -> None:
        self._config = config
        self.srtt = 0.0
        self.rttvar = 0.0
        self.latest = 0.0
        self.minimum = 0.0
        self.backoff_shift = 0

    def on_sample(self, rtt: float) -> None:
        """Take the RTT of a segment that was sent once only (Karn's rule; RFC 6298, sections 2 and 3)."""
        self.latest = rtt
        if self.srtt == 0.0:
            self.srtt = max(rtt, 1e-6)
            self.rttvar = rtt / 2
            self.minimum = rtt
        else:
            self.rttvar += BETA * (abs(self.srtt - rtt) - self.rttvar)
            self.srtt += ALPHA * (rtt - self.srtt)
            self.minimum = min(self.minimum, rtt)
        self.backoff_shift = 0

    def backoff(self) -> None:
        """The timer expired: double the RTO (RFC 6298, section 5.5)."""
        self.backoff_shift += 1

    @property
    def rto(self) -> float:
        """The retransmission timeout now."""
        config = self._config
        if self.srtt == 0.0:
            base = config.initial_rto
        else:
            base = self.srtt + max(K * self.rttvar, config.rto_min)
        return min(base * (1 << min(self.backoff_shift, 16)), config.rto_max)
