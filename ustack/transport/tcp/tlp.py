"""Tail loss probe: when ACKs fail to come, send one segment more, so that the answer shows what was lost before a timeout has
to (RFC 8985, section 7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.arming import TIMEOUT, rearm_timeout

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.sample import AckSample

NO_PROBE: Final = -1


class TailLossProbe:
    """`point` is SND.NXT when the probe was sent (TLP.end_seq), NO_PROBE when none is out; `was_retransmission`: the probe was
    the last segment again, and not new data. `off`: there are to be none.
    """

    __slots__ = ("off", "point", "was_retransmission")

    def __init__(self, *, off: bool) -> None:
        self.off = off
        self.point = NO_PROBE
        self.was_retransmission = False

    @property
    def outstanding(self) -> bool:
        """Whether a probe is out, whose fate is not known."""
        return self.point != NO_PROBE

    def sent(self, conn: Connection, *, again: bool) -> None:
        """A probe was sent: new data, or the last segment `again`."""
        self.point = conn.snd_nxt
        self.was_retransmission = again
        conn.tcp.env.mib.TcpExtTCPLossProbes += 1
        conn.waits_for = TIMEOUT  # the timeout counts from now on (section 7.3)
        rearm_timeout(conn)

    def on_ack(self, conn: Connection, ack: int, sample: AckSample, *, pure_duplicate: bool) -> None:
        """See whether the probe repaired a loss (section 7.4): then the window must be reduced, as if it had been seen."""
        if ack < self.point:
            return
        if not self.was_retransmission or sample.tlp_duplicate:
            self.point = NO_PROBE
        elif ack > self.point:
            self.point = NO_PROBE
            conn.tcp.env.mib.TcpExtTCPLossProbeRecovery += 1
            conn.recovery.on_repaired_loss(conn)
        elif pure_duplicate:
            self.point = NO_PROBE  # original and probe have arrived
