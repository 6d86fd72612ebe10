"""Finding losses and getting over them: fast retransmit and fast recovery with SACK (RFC 6675) and without (RFC 6582), and
after a timeout.

The states are those of Linux (tcp_ca_state). The scoreboard says what is lost, the congestion control how large the window
becomes, and `output` sends again what is lost before it sends anything new.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.inflight import SACKED

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

DUP_THRESH: Final = 3
"""Duplicate ACKs that mean a loss (RFC 5681, section 3.2)."""


class Phase(IntEnum):
    """What the sender is doing about losses."""

    OPEN = 0
    """Nothing is amiss."""
    RECOVERY = 3
    """Fast recovery: a loss was found while ACKs still come."""
    LOSS = 4
    """The retransmission timer expired: everything not sacked is sent again, in slow start."""


OPEN: Final = Phase.OPEN
RECOVERY: Final = Phase.RECOVERY
LOSS: Final = Phase.LOSS


class Recovery:
    """The phase, its end (`point`: SND.NXT when it began) and the duplicate ACKs seen. `cwnd_limited`: the window kept us from
    sending.
    """

    __slots__ = ("cwnd_limited", "dupacks", "phase", "point")

    def __init__(self) -> None:
        self.phase = Phase.OPEN
        self.point = 0
        self.dupacks = 0
        self.cwnd_limited = False

    def on_ack(self, conn: Connection, acked: int, *, duplicate: bool) -> None:
        """An acceptable ACK was applied to the scoreboard: `acked` bytes are newly acknowledged, or it is a `duplicate`."""
        inflight = conn.inflight
        if self.phase is OPEN:
            if acked:
                self.dupacks = 0
                inflight.reno_sacked = 0
                if self.cwnd_limited:
                    conn.cc.on_ack(acked)
                if not inflight.sacked:
                    return
            elif duplicate:
                self.dupacks += 1
                if not conn.sack_ok:
                    inflight.on_duplicate_ack(conn.mss)
            self._look_for_loss(conn)
            return
        if conn.snd_una >= self.point:
            self._recovered(conn)
            if inflight.sacked:
                self._look_for_loss(conn)
            return
        if conn.sack_ok:
            inflight.mark_lost_by_sack(conn.mss)
        elif duplicate:
            inflight.on_duplicate_ack(conn.mss)
        if self.phase is LOSS:
            if acked:
                conn.cc.on_ack(acked)
        elif acked:
            inflight.reno_sacked = max(inflight.reno_sacked - max(acked - conn.mss, 0), 0)
            inflight.mark_head_lost(conn.mss)

    def _look_for_loss(self, conn: Connection) -> None:
        inflight = conn.inflight
        lost = conn.sack_ok and inflight.mark_lost_by_sack(conn.mss)
        if not lost and self.dupacks >= DUP_THRESH and (conn.sack_ok or conn.snd_una > self.point):
            lost = inflight.mark_head_lost(conn.mss)
        if lost:
            mib = conn.tcp.env.mib
            if conn.sack_ok:
                mib.TcpExtTCPSackRecovery += 1
            else:
                mib.TcpExtTCPRenoRecovery += 1
            self.phase = Phase.RECOVERY
            self.point = conn.snd_nxt
            conn.cc.on_loss(inflight.outstanding())

    def _recovered(self, conn: Connection) -> None:
        if self.phase is RECOVERY:
            conn.cc.on_recovered()
        self.phase = Phase.OPEN
        self.dupacks = 0
        conn.inflight.reno_sacked = 0

    def on_timeout(self, conn: Connection) -> None:
        """The retransmission timer expired: take everything that is not sacked for lost, and start slowly (RFC 6298, 5.4; RFC
        5681, 3.1).
        """
        inflight = conn.inflight
        conn.cc.on_timeout(inflight.outstanding())
        # SACKed data at the very left edge means that the peer reneged: it would have moved the edge otherwise.
        inflight.mark_all_lost(reneged=bool(inflight.segments and inflight.segments[0].flags & SACKED))
        self.phase = Phase.LOSS
        self.point = conn.snd_nxt
        self.dupacks = 0
