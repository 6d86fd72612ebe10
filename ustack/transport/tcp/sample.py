"""What one acknowledgment tells the sender: gathered once while the scoreboard takes it in, read by loss detection, delivery
rate and congestion control.
"""

from __future__ import annotations

from sys import maxsize
from typing import Final

from ustack.transport.tcp.phase import OPEN

NO_TIME: Final = -1.0
"""A time that is not known."""


class AckSample:
    """One object per stack, begun anew for each acknowledgment. Bytes, and seconds of the stack's clock.

    `acked`: cumulatively acknowledged; `sacked`: newly held by the peer beyond that; `delivered`: newly known to have arrived,
    both ways; `fresh`: the part of it that was sent since the last timeout. `lost`: newly taken for lost, copies included.
    `lost_retransmission`: a copy was among it. `prior_in_flight` and `in_flight`: before and after.

    `rtt_sent_at`: when the latest segment of it that was sent once was sent. `original`: data from before `point` that was sent
    once has arrived. `reordered`: the lowest such data that arrived after data beyond it. `duplicate`: the peer says that it
    got something twice; `tlp_duplicate`: namely the loss probe.

    `rack_sent_at`, `rack_end`: the segment sent last of those that arrived (RFC 8985, section 6.2, step 2); `rack_last`: when
    the last of them by number was sent. `prior_delivered`
    and the following: the delivery rate's view of that segment, see `rate`. `rtt`: the round trip, or NO_TIME. `echo`: when
    what the peer answers was sent, by its timestamp, in whole milliseconds; -1 when that is not known.

    What congestion control needs beside: `phase` and `after_timeout`, the connection's smoothed round trip, SND.UNA before and
    after and SND.NXT, and `total`, all that was ever delivered. It sets `starved` when it makes the flow small on purpose.
    """

    __slots__ = (
        "acked",
        "after_timeout",
        "app_limited",
        "delivered",
        "duplicate",
        "ece",
        "echo",
        "first_sent_at",
        "fresh",
        "in_flight",
        "interval",
        "last_sent_at",
        "lost",
        "lost_retransmission",
        "min_rtt",
        "now",
        "nxt",
        "original",
        "phase",
        "point",
        "prior_at",
        "prior_delivered",
        "prior_in_flight",
        "rack_end",
        "rack_last",
        "rack_sent_at",
        "rate_delivered",
        "reordered",
        "rtt",
        "rtt_sent_at",
        "sacked",
        "srtt",
        "starved",
        "tlp_duplicate",
        "total",
        "una",
        "una_before",
    )

    def __init__(self) -> None:
        self.begin(0.0, 0.0, 0, 0, 0)
        self.echo = -1
        self.after_timeout = False
        self.phase = OPEN
        self.srtt = 0.0
        self.total = 0
        self.una = 0
        self.nxt = 0

    def begin(self, now: float, min_rtt: float, una: int, point: int, prior_in_flight: int) -> None:
        """Forget the last acknowledgment: a new one is about to be taken in."""
        self.now = now
        self.min_rtt = min_rtt
        self.point = point
        self.prior_in_flight = prior_in_flight
        self.una_before = una
        self.in_flight = prior_in_flight
        self.acked = 0
        self.sacked = 0
        self.delivered = 0
        self.fresh = 0
        self.lost = 0
        self.lost_retransmission = False
        self.rtt_sent_at = NO_TIME
        self.rtt = NO_TIME
        self.original = False
        self.reordered = maxsize
        self.duplicate = False
        self.tlp_duplicate = False
        self.ece = False
        self.rack_sent_at = NO_TIME
        self.rack_end = 0
        self.rack_last = NO_TIME
        self.last_sent_at = NO_TIME
        self.prior_delivered = 0
        self.prior_at = NO_TIME
        self.first_sent_at = NO_TIME
        self.app_limited = False
        self.rate_delivered = 0
        self.interval = NO_TIME
        self.starved = False
