"""One timer waits for acknowledgments, for one of three things: the retransmission timeout (RFC 6298, section 5), the tail loss
probe (RFC 8985, section 7.2) or the end of the reordering window (section 6.2, step 5). What comes first is what it is set to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.phase import CWR, OPEN

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

TIMEOUT: Final = 0
PROBE: Final = 1
REORDERING: Final = 2
"""What `Connection.waits_for` says."""

TIMER_MIN: Final = 0.002
"""Seconds added to short timeouts for the grain of clocks (TCP_TIMEOUT_MIN)."""


def rearm_timeout(conn: Connection) -> None:
    """Wait for the retransmission timeout: of the first segment if something else was waited for, else from now on
    (tcp_rearm_rto).
    """
    segments = conn.inflight.segments
    if not segments:
        conn.retransmit_timer.cancel()
        return
    timers = conn.tcp.env.timers
    when = timers.now + conn.rtt.rto
    if conn.waits_for != TIMEOUT:
        conn.waits_for = TIMEOUT
        when = max(segments[0].sent_at + conn.rtt.rto, timers.now + TIMER_MIN)
    timers.set(conn.retransmit_timer, when)


def rearm(conn: Connection, restarts: bool) -> None:
    """Wait for the probe if there may be one, else for the timeout. `restarts`: an ACK starts the timeout anew
    (tcp_set_xmit_timer).
    """
    if schedule_probe(conn, restarts):
        return
    if restarts or conn.waits_for != TIMEOUT or not conn.retransmit_timer.pending:
        rearm_timeout(conn)


def schedule_probe(conn: Connection, restarts: bool) -> bool:
    """Set the timer for a tail loss probe, if this is a time for one (RFC 8985, section 7.2; tcp_schedule_loss_probe)."""
    recovery = conn.recovery
    phase = recovery.phase
    segments = conn.inflight.segments
    if not (segments and conn.sack_ok and (phase is OPEN or phase is CWR)) or recovery.probe.off or conn.inflight.sacked:
        return False
    rtt = conn.rtt
    timers = conn.tcp.env.timers
    now = timers.now
    if rtt.srtt:
        pause = 2 * rtt.srtt
        # One segment alone may be waiting for the peer's delayed ACK.
        pause += conn.tcp.config.rto_min if segments[-1].end - segments[0].seq <= conn.mss else TIMER_MIN
    else:
        pause = rtt.initial
    timeout = now + rtt.rto if restarts else segments[0].sent_at + rtt.rto
    if now < timeout < now + pause:
        pause = timeout - now
    conn.waits_for = PROBE
    timers.set(conn.retransmit_timer, now + pause)
    return True


def wait_for_reordering(conn: Connection, pause: float) -> None:
    """What is missing may still be on its way for `pause` seconds."""
    timers = conn.tcp.env.timers
    conn.waits_for = REORDERING
    timers.set(conn.retransmit_timer, timers.now + pause + TIMER_MIN)
