"""What an acknowledgment says: what has arrived, what is missing, how much more may be sent (RFC 9293, section 3.10.7.4, fifth;
RFC 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.drops import DropReason
from ustack.transport.events import SHUT_WR, WRITABLE
from ustack.transport.tcp import output, pacing, timers
from ustack.transport.tcp.arming import rearm
from ustack.transport.tcp.arriving import unwrap
from ustack.transport.tcp.output import MASK32
from ustack.transport.tcp.phase import CWR, LOSS, OPEN, RECOVERY
from ustack.transport.tcp.states import CLOSE, FIN_ACKED, TIME_WAIT, State
from ustack.wire.tcp import ECE, FIN

if TYPE_CHECKING:
    from ustack.transport.tcp.arriving import ArrivingSegment
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.sample import AckSample


def process_ack(conn: Connection, segment: ArrivingSegment, seq: int, ack: int) -> DropReason | None:
    """Take the acknowledgment `ack` of a segment that begins at `seq`. Returns why the segment is to be dropped, or None."""
    una = conn.snd_una
    if ack > conn.snd_nxt or ack < una - conn.max_window:
        output.send_challenge_ack(conn)
        return DropReason.TCP_INVALID_ACK

    env = conn.tcp.env
    inflight = conn.inflight
    recovery = conn.recovery
    rtt = conn.rtt
    now = env.timers.now
    sample = conn.tcp.sample
    sample.begin(now, rtt.minimum, una, recovery.point, inflight.in_flight())
    if recovery.phase is not OPEN or recovery.probe.point >= 0:
        sample.echo = _echoed_at(conn, segment, now)
    if segment.flags & ECE and conn.ecn.ok:
        sample.ece = True
    options = segment.options
    highest_sacked = 0
    if options is not None and options.sack and conn.sack_ok:
        highest_sacked = inflight.highest_sacked()
        _take_sack(conn, options.sack, ack, sample)
    elif inflight.sacked:
        highest_sacked = inflight.highest_sacked()
    window_changed = _update_window(conn, segment, seq, ack)
    advanced = ack > una
    if advanced:
        conn.snd_una = ack
        inflight.on_ack(ack, sample)
        if inflight.reno_sacked:
            # The duplicates have told of this already (tcp_remove_reno_sacks).
            sample.delivered -= min(inflight.reno_sacked, max(sample.acked - conn.mss, 0))
        conn.retries = 0
        conn.probes = 0
        conn.persist_shift = 0
        conn.soft_error = 0
        conn.send_queue.release(ack)
    elif not inflight.segments:
        if sample.duplicate:
            recovery.on_ack(conn, sample, advanced=False, duplicate=False)  # a reduction may have been for nothing
        if conn.persist_shift or conn.probes:
            conn.probes = 0
            if not conn.retransmit_timer.pending:
                conn.persist_shift = 0
        _ask_for_output(conn, window_changed)
        return None
    if sample.rtt_sent_at >= 0:
        sample.rtt = max(now - sample.rtt_sent_at, 0.0)
        rtt.on_sample(sample.rtt)
    if highest_sacked and sample.reordered < highest_sacked and (recovery.phase is not LOSS or recovery.undo.marker >= 0):
        recovery.rack.on_reordering(conn, sample.reordered, highest_sacked)
    pure = not (advanced or segment.length or segment.flags & FIN or window_changed or ack < una)
    if conn.sack_ok:
        recovery.rack.on_ack(conn, sample)
        if recovery.probe.point >= 0:
            recovery.probe.on_ack(conn, ack, sample, pure_duplicate=pure and not sample.sacked)
    timer_set = recovery.on_ack(conn, sample, advanced=advanced, duplicate=pure)
    _control_congestion(conn, sample, advanced)
    if not inflight.segments:
        conn.retransmit_timer.cancel()
        rtt.end_backoff()
    elif advanced and not timer_set:
        rearm(conn, restarts=True)
    if advanced:
        _sent_and_arrived(conn, ack)
        if conn.state is CLOSE or conn.state is TIME_WAIT:
            return None
    _ask_for_output(conn, advanced or window_changed or sample.sacked > 0 or pure)
    return None


def _take_sack(conn: Connection, blocks: tuple[tuple[int, int], ...], ack: int, sample: AckSample) -> None:
    """Take in SACK blocks, of which the first may tell of a duplicate (RFC 2883, section 4)."""
    una = conn.snd_una
    nxt = conn.snd_nxt
    edge = max(una, ack)
    for position, (left_wire, right_wire) in enumerate(blocks):
        left = unwrap(left_wire, una)
        right = unwrap(right_wire, una)
        if not position and _is_duplicate(conn, blocks, left, right, edge):
            _on_dsack(conn, left, right, sample)
        elif edge <= left < right <= nxt:  # one beyond what was sent is a lie
            conn.inflight.on_sack(left, right, sample, conn.mss)


def _is_duplicate(conn: Connection, blocks: tuple[tuple[int, int], ...], left: int, right: int, edge: int) -> bool:
    """Whether the first block is a D-SACK: below the cumulative ACK, or inside the second."""
    if not edge - conn.max_window <= left < right:
        return False
    if right <= edge:
        return True
    if len(blocks) < 2:
        return False
    return unwrap(blocks[1][0], edge) <= left and right <= unwrap(blocks[1][1], edge)


def _on_dsack(conn: Connection, left: int, right: int, sample: AckSample) -> None:
    """The peer got `left .. right` twice (RFC 3708; tcp_dsack_seen)."""
    conn.tcp.env.mib.TcpExtTCPDSACKRecv += 1
    conn.dsack_bytes += right - left
    if conn.dsack_bytes > conn.bytes_retrans:
        return  # more than we have sent twice: the network did it, or the peer lies
    sample.duplicate = True
    recovery = conn.recovery
    if recovery.probe.was_retransmission and right == recovery.probe.point:
        sample.tlp_duplicate = True
    recovery.undo.on_duplicate(left, right)


def _echoed_at(conn: Connection, segment: ArrivingSegment, now: float) -> int:
    """When what this segment answers was sent, by the timestamp that it echoes: milliseconds of our clock, or -1."""
    if not conn.ts_ok or segment.ts_ecr <= 0:
        return -1
    milliseconds = int(now * 1000)
    return milliseconds - ((milliseconds + conn.ts_offset - segment.ts_ecr) & MASK32)


def _control_congestion(conn: Connection, sample: AckSample, advanced: bool) -> None:
    """Let the window follow what has arrived (tcp_cong_control)."""
    recovery = conn.recovery
    inflight = conn.inflight
    rate = conn.rate
    rate.on_ack(sample)
    cc = conn.cc
    phase = recovery.phase
    in_flight = inflight.in_flight()
    if cc.model_based:
        sample.in_flight = in_flight
        sample.phase = phase
        sample.srtt = conn.rtt.srtt
        sample.total = rate.delivered
        cc.on_ack(sample)
        if sample.starved:
            rate.on_starved(in_flight)
    elif phase is CWR or phase is RECOVERY:
        must_send = advanced and not conn.sack_ok  # a partial ACK (RFC 6582, section 3.2, step 3)
        recovery.reduction.on_ack(cc, in_flight, sample.delivered, sample.lost, advanced, must_send)
    elif recovery.usage.limits(cc) and (phase is LOSS or sample.acked or recovery.rack.reordering > conn.tcp.config.reordering):
        sample.after_timeout = phase is LOSS
        sample.srtt = conn.rtt.srtt
        sample.una = conn.snd_una
        sample.nxt = conn.snd_nxt
        if sample.delivered:
            cc.on_ack(sample)
    if conn.pacer is not None or cc.pacing_rate:
        pacing.update(conn)


def _sent_and_arrived(conn: Connection, ack: int) -> None:
    """SND.UNA has moved to `ack`: make room for the user, and see whether our FIN is among it."""
    conn.path.neighbour.confirm()
    if conn.sndbuf < conn.tcp.config.wmem_max and not conn.options.sndbuf:
        _grow_send_limit(conn)
    queue = conn.send_queue
    if conn.write_blocked and queue.account.bytes * 3 < conn.sndbuf * 2:
        conn.write_blocked = False
        conn.notify(WRITABLE)
    if conn.state in FIN_ACKED and ack > queue.end:
        _fin_acked(conn)


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
        if conn.snd_nxt < end or conn.inflight.to_resend or (conn.snd_nxt == end and conn.shutdown_mask & SHUT_WR):
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
