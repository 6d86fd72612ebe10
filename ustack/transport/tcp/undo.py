"""Taking back what was done about a loss that was none.

Three proofs are known: the peer reports a duplicate for every retransmission (D-SACK, RFC 3708), a timestamp says that the
original was acknowledged (Eifel, RFC 3522), or after a timeout data arrives that was sent once only (F-RTO, RFC 5682).
The response is that of Linux and RFC 4015: the window becomes what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.phase import CWR, RECOVERY

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.sample import AckSample

NOT_KNOWN: Final = -1


class Undo:
    """`marker` is SND.UNA when the window was reduced, NOT_KNOWN when there is nothing to undo; `retrans` bytes were sent again
    since and not reported as duplicates (NOT_KNOWN: none was); `stamp` is when the first of them was, in seconds, or -1.

    `prior_ssthresh` is the threshold before, 0 when it must not be restored.
    """

    __slots__ = ("marker", "prior_ssthresh", "retrans", "stamp")

    def __init__(self) -> None:
        self.marker = NOT_KNOWN
        self.retrans = NOT_KNOWN
        self.stamp = -1.0
        self.prior_ssthresh = 0

    def begin(self, conn: Connection) -> None:
        """The window is about to be reduced because of a loss (tcp_init_undo)."""
        self.marker = conn.snd_una
        probe = conn.recovery.probe
        self.retrans = conn.inflight.retrans + (conn.mss if probe.outstanding and probe.was_retransmission else 0) or NOT_KNOWN

    def remember_threshold(self, conn: Connection) -> None:
        """Keep the threshold of now, to be restored."""
        self.prior_ssthresh = current_ssthresh(conn)

    def on_retransmit(self, size: int, now: float) -> None:
        """`size` bytes are sent again."""
        if self.stamp < 0:
            self.stamp = now
        self.retrans = max(self.retrans, 0) + size

    def on_duplicate(self, left: int, right: int) -> None:
        """The peer has got `left .. right` twice."""
        if 0 <= self.marker < right and self.retrans > 0:
            self.retrans = max(self.retrans - (right - left), 0)

    def original_acknowledged(self, sample: AckSample) -> bool:
        """Whether the ACK echoes a timestamp from before the first retransmission (Eifel; tcp_packet_delayed)."""
        return self.stamp >= 0 and 0 <= sample.echo < int(self.stamp * 1000)

    def may_undo(self, sample: AckSample) -> bool:
        """Whether everything that was sent again need not have been (tcp_may_undo)."""
        return self.marker >= 0 and (not self.retrans or self.original_acknowledged(sample))

    def revert(self, conn: Connection, *, forget_losses: bool) -> None:
        """Make the window what it was (tcp_undo_cwnd_reduction)."""
        if forget_losses:
            conn.inflight.forget_losses()
        if self.prior_ssthresh:
            cc = conn.cc
            cc.on_undo()
            cc.ssthresh = max(cc.ssthresh, self.prior_ssthresh)
        self.marker = NOT_KNOWN
        conn.recovery.rack.advanced = True  # look at what is out once more
        conn.ecn.withdraw()


def current_ssthresh(conn: Connection) -> int:
    """The threshold that stands for the window of now (tcp_current_ssthresh)."""
    cc = conn.cc
    phase = conn.recovery.phase
    if phase is CWR or phase is RECOVERY:
        return cc.ssthresh
    return max(cc.ssthresh, (cc.cwnd >> 1) + (cc.cwnd >> 2))
