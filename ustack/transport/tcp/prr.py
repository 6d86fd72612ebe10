"""Proportional rate reduction: while the window shrinks, send in proportion to what arrives (RFC 6937, RFC 9937).

At the end of a recovery the window is where the congestion control wants it, and meanwhile there is neither silence nor a
burst, however many segments were lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ustack.transport.tcp.congestion.base import CongestionControl


class RateReduction:
    """`prior_cwnd`: the window when it began (RecoverFS); `delivered` and `out`: bytes that have arrived, and were sent,
    since.
    """

    __slots__ = ("delivered", "out", "prior_cwnd")

    def __init__(self) -> None:
        self.prior_cwnd = 0
        self.delivered = 0
        self.out = 0

    def begin(self, cwnd: int) -> None:
        """A reduction of the window `cwnd` begins; the target is the congestion control's `ssthresh`."""
        self.prior_cwnd = max(cwnd, 1)
        self.delivered = 0
        self.out = 0

    def on_ack(self, cc: CongestionControl, in_flight: int, delivered: int, lost: int, advanced: bool, must_send: bool) -> None:
        """Set the window: `delivered` bytes have arrived, `lost` bytes were newly found lost; `advanced`: SND.UNA moved;
        `must_send`: the ACK is one that draws a retransmission in any case.
        """
        if not delivered or not self.prior_cwnd:
            return
        self.delivered += delivered
        room = cc.ssthresh - in_flight
        if room < 0:
            count = -(-cc.ssthresh * self.delivered // self.prior_cwnd) - self.out
        else:
            count = max(self.delivered - self.out, delivered)
            if advanced and not lost:
                count += cc.mss  # the ACK is safe: nothing more was lost (slow start, RFC 9937, section 6.2)
            count = min(room, count)
        cc.cwnd = in_flight + max(count, cc.mss if must_send or not self.out else 0)
