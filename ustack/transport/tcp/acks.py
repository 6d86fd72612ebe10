"""What an acknowledgment says: what has arrived, what is missing, how much more may be sent (RFC 9293, section 3.10.7.4, fifth;
RFC 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.drops import DropReason
from ustack.transport.events import SHUT_WR, WRITABLE
from ustack.transport.tcp import output, timers
from ustack.transport.tcp.arriving import unwrap
from ustack.transport.tcp.states import CLOSE, FIN_ACKED, State
from ustack.wire.tcp import FIN

if TYPE_CHECKING:
    from ustack.transport.tcp.arriving import ArrivingSegment
    from ustack.transport.tcp.connection import Connection


def process_ack(conn: Connection, segment: ArrivingSegment, seq: int, ack: int) -> DropReason | None:
    """Take the acknowledgment `ack` of a segment that begins at `seq`. Returns why the segment is to be dropped, or None."""
    una = conn.snd_una
    if ack > conn.snd_nxt or ack < una - conn.max_window:
        output.send_challenge_ack(conn)
        return DropReason.TCP_INVALID_ACK

    env = conn.tcp.env
    inflight = conn.inflight
    now = env.timers.now
    newly_sacked = 0
    sent_at = -1.0
    options = segment.options
    if options is not None and options.sack and conn.sack_ok:
        for left_wire, right_wire in options.sack:
            left = unwrap(left_wire, una)
            right = unwrap(right_wire, una)
            # A block at or below SND.UNA is a D-SACK or old; one beyond what was sent is a lie.
            if max(una, ack) <= left < right <= conn.snd_nxt:
                newly, at = inflight.on_sack(left, right)
                newly_sacked += newly
                sent_at = max(sent_at, at)
    window_changed = _update_window(conn, segment, seq, ack)
    if ack <= una:
        if not inflight.segments:
            if conn.persist_shift or conn.probes:
                conn.probes = 0
                if not conn.retransmit_timer.pending:
                    conn.persist_shift = 0
            _ask_for_output(conn, window_changed)
            return None
        duplicate = (
            newly_sacked > 0
            if conn.sack_ok
            else (ack == una and not segment.length and not segment.flags & FIN and not window_changed)
        )
        if duplicate:
            conn.recovery.on_ack(conn, 0, duplicate=True)
            _ask_for_output(conn, True)
        else:
            _ask_for_output(conn, window_changed)
        return None

    acked = ack - una
    conn.snd_una = ack
    at = inflight.on_ack(ack)
    if at >= 0:
        sent_at = max(sent_at, at)
    if sent_at >= 0:
        conn.rtt.on_sample(max(now - sent_at, 0.0))
    conn.retries = 0
    conn.probes = 0
    conn.persist_shift = 0
    conn.soft_error = 0
    queue = conn.send_queue
    queue.release(ack)
    conn.recovery.on_ack(conn, acked, duplicate=False)
    if inflight.segments:
        env.timers.set(conn.retransmit_timer, now + conn.rtt.rto)
    else:
        conn.retransmit_timer.cancel()
        conn.rtt.end_backoff()
    conn.path.neighbour.confirm()
    if conn.sndbuf < conn.tcp.config.wmem_max and not conn.options.sndbuf:
        _grow_send_limit(conn)
    if conn.write_blocked and queue.account.bytes * 3 < conn.sndbuf * 2:
        conn.write_blocked = False
        conn.notify(WRITABLE)
    if conn.state in FIN_ACKED and ack > queue.end:
        _fin_acked(conn)
        if conn.state in (State.CLOSE, State.TIME_WAIT):
            return None
    _ask_for_output(conn, True)
    return None


def _update_window(conn: Connection, segment: ArrivingSegment, seq: int, ack: int) -> bool:
    """RFC 9293, section 3.10.7.4, fifth: only newer segments change the window. Returns whether it changed."""
    if conn.snd_wl1 < seq or (conn.snd_wl1 == seq and conn.snd_wl2 <= ack):
        window = segment.window << max(conn.snd_wscale, 0)
        conn.snd_wl1 = seq
        conn.snd_wl2 = ack
        if window != conn.snd_wnd:
            if conn.snd_wnd < conn.mss <= window and not conn.inflight.segments:
                conn.retransmit_timer.cancel()  # the persist timer: the window is open
                conn.persist_shift = 0
            conn.snd_wnd = window
            conn.max_window = max(conn.max_window, window)
            return True
    return False


def _ask_for_output(conn: Connection, wanted: bool) -> None:
    if wanted and not conn.pending:
        end = conn.send_queue.end
        if conn.snd_nxt < end or conn.inflight.lost or (conn.snd_nxt == end and conn.shutdown_mask & SHUT_WR):
            conn.tcp.schedule(conn)


def _grow_send_limit(conn: Connection) -> None:
    """Let the send queue hold twice the congestion window (tcp_sndbuf_expand)."""
    mem = conn.tcp.mem
    if not conn.options.memalloc and (mem.under_pressure() or mem.allocated >= mem.low):
        return  # tcp_should_expand_sndbuf
    wanted = min(2 * conn.cc.cwnd + (conn.cc.cwnd >> 1), conn.tcp.config.wmem_max, mem.most_for_one())
    conn.sndbuf = max(conn.sndbuf, wanted)


def _fin_acked(conn: Connection) -> None:
    state = FIN_ACKED[conn.state]
    if state is CLOSE:
        conn.fail(0)
    elif state is State.TIME_WAIT:
        conn.tcp.enter_time_wait(conn)
    else:
        conn.enter(state)
        if conn.orphan:
            if conn.options.linger2 < 0:
                conn.abort(0)
            else:
                timers.start_fin_wait2(conn)
