"""How fast data arrives at the peer (draft-cheng-iccrg-delivery-rate-estimation; Linux tcp_rate.c).

Every transmission remembers how much had been delivered when it left. When it has arrived, what was delivered meanwhile, over
the longer of the time it took to send and the time it took to be acknowledged, is a sample of the path's rate. A sample taken
while the application had nothing to send says only that the path is at least so fast: it is marked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.inflight import APP_LIMITED

if TYPE_CHECKING:
    from ustack.transport.tcp.inflight import Segment
    from ustack.transport.tcp.sample import AckSample

NOT_LIMITED: Final = -1
"""`app_limited` while the application has more to send than may be sent."""


class DeliveryRate:
    """`delivered` bytes in all, the last of them at `delivered_at`; `first_sent_at` begins the flight that is being measured.

    Until `delivered` passes `app_limited`, samples are limited by the application. `rate` is the latest estimate in bytes per
    second, 0 before there is one, and `rate_app_limited` whether the application limited it.
    """

    __slots__ = ("app_limited", "delivered", "delivered_at", "first_sent_at", "rate", "rate_app_limited")

    def __init__(self, now: float) -> None:
        self.delivered = 0
        self.delivered_at = now
        self.first_sent_at = now
        self.app_limited = NOT_LIMITED
        self.rate = 0.0
        self.rate_app_limited = False

    def on_sent(self, segment: Segment, now: float, idle: bool) -> None:
        """`segment` is sent, for the first time or again; `idle`: nothing else is in flight."""
        if idle:
            self.first_sent_at = now
            self.delivered_at = now
        segment.first_sent_at = self.first_sent_at
        segment.delivered_at = self.delivered_at
        segment.delivered = self.delivered
        if self.app_limited >= 0:
            segment.flags |= APP_LIMITED
        else:
            segment.flags &= ~APP_LIMITED

    def on_ack(self, sample: AckSample) -> None:
        """Everything that an acknowledgment says is in `sample`: complete it with `rate_delivered` and `interval`."""
        self.delivered += sample.delivered
        if 0 <= self.app_limited < self.delivered:
            self.app_limited = NOT_LIMITED
        if sample.delivered:
            self.delivered_at = sample.now
        if sample.prior_at < 0:
            return
        self.first_sent_at = sample.last_sent_at
        sample.rate_delivered = self.delivered - sample.prior_delivered
        interval = max(sample.last_sent_at - sample.first_sent_at, sample.now - sample.prior_at)
        if interval < sample.min_rtt or interval <= 0:
            return  # faster than light: the path was idle in between, or an ACK was aggregated
        sample.interval = interval
        rate = sample.rate_delivered / interval
        if not sample.app_limited or rate >= self.rate:
            self.rate = rate
            self.rate_app_limited = sample.app_limited

    def on_starved(self, in_flight: int) -> None:
        """The application has nothing to send, though more might be in flight."""
        self.app_limited = self.delivered + in_flight or 1
