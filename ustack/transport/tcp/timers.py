"""What happens to a connection when nothing arrives: retransmission, window probes, delayed ACK, keepalive, waiting for the
last FIN.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ustack.transport.tcp import output, pacing
from ustack.transport.tcp.arming import PROBE, REORDERING, TIMEOUT, rearm_timeout
from ustack.transport.tcp.inflight import SACKED
from ustack.transport.tcp.output import ACK_NONE
from ustack.transport.tcp.states import State

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

RETRIES1: Final = 3
"""Timeouts after which something may be wrong with the path (tcp_retries1; R1 of RFC 9293, section 3.8.3)."""


def on_retransmit_timer(conn: Connection) -> None:
    """The retransmission timer expired (RFC 6298, section 5), or, with nothing outstanding, the persist timer."""
    if conn.state in (State.SYN_SENT, State.SYN_RECV):
        _retransmit_syn(conn)
    elif conn.inflight.segments:
        waited_for = conn.waits_for
        conn.waits_for = TIMEOUT
        if waited_for == PROBE:
            _send_loss_probe(conn)
        elif waited_for == REORDERING:
            _end_reordering_window(conn)
        else:
            _retransmit(conn)
    else:
        _probe_window(conn)


def _retransmit_syn(conn: Connection) -> None:
    config = conn.tcp.config
    active = conn.state is State.SYN_SENT
    limit = (conn.options.syncnt or config.syn_retries) if active else config.synack_retries
    if conn.deferred:
        # The peer's ACK has come, and its data is waited for: remind it once, then let the next ACK do (syn_ack_recalc).
        limit = max(limit, conn.options.defer_accept)
    if conn.retries >= limit:
        conn.tcp.env.mib.TcpAttemptFails += 1
        conn.fail(conn.soft_error or errno.ETIMEDOUT)
        return
    conn.retries += 1
    conn.rtt.backoff()
    if not conn.deferred or conn.retries >= conn.options.defer_accept:
        conn.tcp.env.mib.TcpRetransSegs += 1
        output.send_syn(conn)
    timers = conn.tcp.env.timers
    timers.set(conn.retransmit_timer, timers.now + conn.rtt.rto)


def _retransmit(conn: Connection) -> None:
    timers = conn.tcp.env.timers
    if not _window_was_shut(conn):
        if not conn.retries:
            conn.stalled_at = conn.inflight.segments[0].sent_at
        if _gives_up(conn, conn.retries):
            return
        conn.retries += 1
        if conn.retries > RETRIES1 and conn.tcp.config.mtu_probing:
            output.suspect_black_hole(conn)
    conn.tcp.env.mib.TcpExtTCPTimeouts += 1
    conn.recovery.on_timeout(conn)
    conn.rtt.backoff()
    pacing.update(conn)
    output.push(conn)
    conn.waits_for = TIMEOUT
    timers.set(conn.retransmit_timer, _next_attempt(conn, conn.rtt.rto))


def _send_loss_probe(conn: Connection) -> None:
    """Send one segment more, new data if there is any, else the last one again (RFC 8985, section 7.3)."""
    probe = conn.recovery.probe
    inflight = conn.inflight
    if not probe.outstanding:
        before = conn.snd_nxt
        if not output.send_one(conn):
            index = len(inflight.segments) - 1
            while index and inflight.segments[index].flags & SACKED:
                index -= 1  # the last that may be missing
            last = inflight.segments[index]
            if last.flags & SACKED:
                conn.waits_for = PROBE
                rearm_timeout(conn)
                return
            if last.end - last.seq - last.fin > conn.mss:
                cut = (last.end - last.fin - 1 - last.seq) // conn.mss * conn.mss
                inflight.split(index, last.seq + cut)
                index += 1
            output.retransmit(conn, index)
        probe.sent(conn, again=conn.snd_nxt == before)
        return
    conn.waits_for = PROBE  # the timeout counts from the first segment
    rearm_timeout(conn)


def _end_reordering_window(conn: Connection) -> None:
    conn.recovery.on_reordering_timeout(conn)
    output.push(conn)
    if not conn.retransmit_timer.pending:
        conn.waits_for = REORDERING
        rearm_timeout(conn)


def _window_was_shut(conn: Connection) -> bool:
    """Whether the peer has taken back the window of what is out, but is there: that counts as a probe (RFC 9293, 3.8.6.1)."""
    silence = conn.tcp.env.timers.now - conn.last_received
    return conn.snd_wnd == 0 and not conn.orphan and silence <= 2 * conn.tcp.config.rto_max


def _gives_up(conn: Connection, attempts: int) -> bool:
    """Fail the connection when it has gone unanswered too often or too long (R2 of RFC 9293, section 3.8.3; RFC 5482)."""
    if conn.orphan and conn.out_of_memory():
        conn.abort(0)
        return True
    config = conn.tcp.config
    user_timeout = conn.options.user_timeout
    if user_timeout and not conn.orphan:
        # The sum that `_next_attempt` sets the timer to: a difference is rounded otherwise, and would be due again at once.
        over = conn.tcp.env.timers.now >= conn.stalled_at + user_timeout
    else:
        over = attempts >= (config.orphan_retries if conn.orphan else config.retries2)
    if over:
        conn.tcp.env.mib.TcpExtTCPAbortOnTimeout += 1
        conn.fail(conn.soft_error or errno.ETIMEDOUT)
    return over


def _next_attempt(conn: Connection, pause: float) -> float:
    """When to try again: in `pause` seconds, or when the user's patience ends."""
    when = conn.tcp.env.timers.now + pause
    if conn.options.user_timeout and not conn.orphan:
        when = min(when, conn.stalled_at + conn.options.user_timeout)
    return when


def _probe_window(conn: Connection) -> None:
    """Ask whether the window is still closed; send what fits it, however little (RFC 9293, section 3.8.6.1).

    As long as the peer answers, this goes on for ever, unless the user has closed the connection (RFC 6429).
    """
    if conn.snd_nxt > conn.send_queue.end:
        return
    timers = conn.tcp.env.timers
    if not conn.persist_shift:
        conn.stalled_at = timers.now - conn.rtt.rto
    if _gives_up(conn, conn.persist_shift if conn.orphan else conn.probes):
        return
    if not output.force_out(conn):
        conn.probes += 1
        conn.persist_shift += 1
        conn.tcp.env.mib.TcpExtTCPWinProbe += 1
        output.send_probe(conn)
        timers.set(conn.retransmit_timer, _next_attempt(conn, output.persist_timeout(conn)))


def on_delack_timer(conn: Connection) -> None:
    """Nothing came along that the acknowledgment could ride on."""
    if conn.ack_due != ACK_NONE:
        conn.tcp.env.mib.TcpExtDelayedACKs += 1
        # Nothing came for it to ride on: wait longer, or, where answers were expected, no longer (tcp_delack_timer_handler).
        conn.ato = conn.tcp.config.delack if conn.pingpong else min(2 * conn.ato, conn.rtt.rto)
        conn.pingpong = False
        output.send_ack(conn)


def start_keepalive(conn: Connection) -> None:
    """Start keepalive when the user wants it (SO_KEEPALIVE)."""
    if conn.options.keepalive:
        timers = conn.tcp.env.timers
        timers.set(conn.keepalive_timer, timers.now + (conn.options.keepidle or conn.tcp.config.keepalive_time))
    elif conn.state is not State.FIN_WAIT2:
        conn.keepalive_timer.cancel()


def start_fin_wait2(conn: Connection) -> None:
    """A connection that its user has closed does not wait for the peer's FIN for ever (tcp_fin_timeout, TCP_LINGER2)."""
    timers = conn.tcp.env.timers
    timers.set(conn.keepalive_timer, timers.now + (conn.options.linger2 or conn.tcp.config.fin_timeout))


def on_keepalive_timer(conn: Connection) -> None:
    """Probe an idle peer (RFC 9293, section 3.8.4), or end a FIN-WAIT-2 that has lasted too long."""
    if conn.state is State.FIN_WAIT2 and conn.orphan:
        conn.fail(0)
        return
    if conn.state is State.CLOSE or not conn.options.keepalive:
        return
    options = conn.options
    config = conn.tcp.config
    timers = conn.tcp.env.timers
    now = timers.now
    wanted = options.keepidle or config.keepalive_time
    keepcnt = options.keepcnt or config.keepalive_probes
    if conn.inflight.segments or conn.snd_nxt < conn.send_queue.end:
        timers.set(conn.keepalive_timer, now + wanted)  # the retransmission timer watches the peer meanwhile
    elif now < (due := conn.last_received + wanted):  # the sum that the timer is set to: a difference is rounded otherwise
        conn.probes = 0
        timers.set(conn.keepalive_timer, due)
    elif now - conn.last_received >= options.user_timeout if options.user_timeout and conn.probes else conn.probes >= keepcnt:
        conn.tcp.env.mib.TcpExtTCPAbortOnTimeout += 1
        conn.abort(conn.soft_error or errno.ETIMEDOUT)
    else:
        conn.probes += 1
        conn.tcp.env.mib.TcpExtTCPKeepAlive += 1
        output.send_probe(conn)
        timers.set(conn.keepalive_timer, now + (options.keepintvl or config.keepalive_intvl))
