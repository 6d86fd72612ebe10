"""SEGMENT ARRIVES (RFC 9293, section 3.10.7), in the RFC's order: sequence number, RST, SYN, ACK, data, FIN.

With the robustness of RFC 5961 (challenge ACKs), PAWS (RFC 7323, section 5) and the acknowledgment policy of RFC 5681, section
4.2. Nothing is sent from here but resets and challenge ACKs: what is owed is noted, and sent when the batch is flushed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SIZE
from ustack.drops import DropReason
from ustack.transport.events import ORPHAN, READABLE, SHUT_RD
from ustack.transport.tcp import output
from ustack.transport.tcp.acks import process_ack
from ustack.transport.tcp.arriving import HALF, MARKED, unwrap
from ustack.transport.tcp.opening import MSS_DEFAULT, in_syn_recv, in_syn_sent
from ustack.transport.tcp.output import ACK_DELAYED, ACK_NONE, ACK_NOW, MASK32, QUICK_ACKS, WINDOW_UNCLAMPED
from ustack.transport.tcp.prune import grow_window, make_room, prune_ofo_queue
from ustack.transport.tcp.states import CAN_RECEIVE, CLOSE, ESTABLISHED, RECEIVES_FIN, SYN_RECV, SYN_SENT, State
from ustack.wire.tcp import ACK, FIN, FLAGS_MASK, PSH, RST, SYN

if TYPE_CHECKING:
    from ustack.transport.tcp.arriving import ArrivingSegment
    from ustack.transport.tcp.connection import Connection

PAWS_EXPIRES: Final = 24 * 86400.0
"""Seconds after which a remembered timestamp proves nothing any more (RFC 7323, section 5.5)."""

DELACK_MAX: Final = 0.2
DELACK_MAX_PUSHED: Final = 0.5
"""Seconds that an acknowledgment waits at most: when it is likely that data will carry it or that nothing follows, and
otherwise (TCP_DELACK_MAX; RFC 9293, section 3.8.6.3, MUST-40)."""

MIN_MSS: Final = 88
"""Bytes of the smallest segment that may be a full one (TCP_MIN_MSS)."""

STRAY_PAUSE: Final = 0.5
"""Seconds between answers to bare ACKs from outside the window: two ends that disagree must not answer each other for ever
(tcp_invalid_ratelimit).
"""

_UNPREDICTED: Final = (MARKED | FLAGS_MASK) & ~PSH
"""The flags that a predicted segment has none of, but for ACK."""

RATIO_MIN: Final = 32
RATIO_MAX: Final = 160
"""Bounds of `win_ratio`, in 256ths: however small or large segments are, the window stays within them. The upper one is what
single segments of 1448 bytes carry: a peer that sent super-frames may send these next, and what was promised to it must still
fit."""


def segment_arrives(conn: Connection, segment: ArrivingSegment) -> DropReason | None:
    """Process one segment for `conn`. Returns why it was dropped, or None when it was of use."""
    if conn.state is SYN_SENT:
        reason = in_syn_sent(conn, segment)
        if conn.synchronized and (segment.length or segment.flags & FIN):
            return _process_data(conn, segment, conn.rcv_nxt, conn.rcv_nxt + segment.length)
        return reason
    flags = segment.flags
    rcv_nxt = conn.rcv_nxt
    length = segment.length
    if length and segment.seq == rcv_nxt & MASK32 and flags & _UNPREDICTED == ACK and _predicted(conn, segment):
        env = conn.tcp.env
        env.mib.TcpExtTCPHPHits += 1
        conn.last_received = env.timers.now
        conn.snd_wl1 = rcv_nxt
        if conn.ts_ok and rcv_nxt == conn.last_ack_sent:
            conn.ts_recent = segment.ts_val
            conn.ts_recent_at = conn.last_received
        return _process_data(conn, segment, rcv_nxt, rcv_nxt + length)
    seq = unwrap(segment.seq, rcv_nxt)
    end = seq + length

    # First, PAWS and the sequence number. The test is Linux's (tcp_sequence): what the peer may have sent before it saw our
    # last acknowledgment is let in, so that ACKs overtaken by data do not draw answers.
    age = -1
    if conn.ts_ok and segment.ts_val >= 0:
        age = (segment.ts_val - conn.ts_recent) & MASK32
        if age >= HALF and not flags & RST and conn.tcp.env.timers.now - conn.ts_recent_at < PAWS_EXPIRES:
            conn.tcp.env.mib.TcpExtPAWSEstab += 1
            _duplicate_ack(conn)
            return DropReason.TCP_RFC7323_PAWS
    if seq > max(conn.rcv_adv, rcv_nxt) or end + (flags & FIN) + bool(flags & SYN) < conn.rcv_wup:
        return _unacceptable(conn, segment, seq, end)

    # Second, RST (RFC 5961, section 3).
    if flags & RST:
        if seq != rcv_nxt and not _resets_all_the_same(conn, seq):
            output.send_challenge_ack(conn)
            return DropReason.TCP_RESET
        _on_reset(conn)
        return None

    # Fourth, SYN (RFC 5961, section 4).
    if flags & SYN:
        if not flags & ACK or conn.state is not SYN_RECV or seq != conn.irs:
            return _unexpected_syn(conn, flags, seq)
        seq += 1  # the SYN-ACK of a simultaneous open: its ACK is what we wait for
        end += 1

    # Fifth, ACK.
    if not flags & ACK:
        return DropReason.TCP_FLAGS
    if age >= 0 and seq <= conn.last_ack_sent and unwrap(segment.ack, conn.snd_una) <= conn.snd_nxt:
        conn.ts_recent = segment.ts_val
        conn.ts_recent_at = conn.tcp.env.timers.now
    reason = _process_ack(conn, segment, seq)
    if reason is not None or conn.state is CLOSE:
        return reason
    conn.last_received = conn.tcp.env.timers.now

    # Seventh and eighth, data and FIN.
    if length or flags & FIN:
        return _process_data(conn, segment, seq, end)
    return None


def _predicted(conn: Connection, segment: ArrivingSegment) -> bool:
    """Header prediction (Van Jacobson; Linux tcp_rcv_established): whether the next segment in order brings data, and no
    news.
    """
    return (
        conn.state is ESTABLISHED
        and segment.ack == conn.snd_una & MASK32
        and segment.window << (conn.snd_wscale if conn.snd_wscale > 0 else 0) == conn.snd_wnd
        and segment.options is None
        and not (conn.probes or conn.persist_shift)
        and (not conn.ts_ok or (segment.ts_val >= 0 and (segment.ts_val - conn.ts_recent) & MASK32 < HALF))
    )


def _unacceptable(conn: Connection, segment: ArrivingSegment, seq: int, end: int) -> DropReason:
    """A segment that lies outside the receive window: acknowledge, so that the peer knows where we are (RFC 9293, 3.10.7.4)."""
    flags = segment.flags
    if flags & RST:
        return DropReason.TCP_RESET
    if flags & SYN:
        return _unexpected_syn(conn, flags, seq)
    if flags & ACK and seq < conn.rcv_nxt and end <= conn.rcv_nxt:
        # Old data or a keepalive, but its acknowledgment may be news: without this, two full windows would wait for each other.
        _process_ack(conn, segment, seq)
        if conn.state is CLOSE:
            return DropReason.TCP_CLOSE
    now = conn.tcp.env.timers.now
    if segment.length and seq < conn.rcv_nxt:
        _found_twice(conn, seq, min(end, conn.rcv_nxt))
    if segment.length or flags & FIN or now >= conn.stray_at:
        if not segment.length:
            conn.stray_at = now + STRAY_PAUSE
        _duplicate_ack(conn)
    if seq >= conn.rcv_adv:
        return DropReason.TCP_ZEROWINDOW if conn.rcv_adv == conn.rcv_nxt else DropReason.TCP_OVERWINDOW
    return DropReason.TCP_OLD_DATA


def _process_ack(conn: Connection, segment: ArrivingSegment, seq: int) -> DropReason | None:
    if conn.state is SYN_RECV:
        return in_syn_recv(conn, segment, seq)
    return process_ack(conn, segment, seq, unwrap(segment.ack, conn.snd_una))


def _found_twice(conn: Connection, left: int, right: int) -> None:
    """`left .. right` has arrived twice: the next ACK says so (D-SACK, RFC 2883, section 4)."""
    if conn.receive_queue.dsack:
        conn.receive_queue.duplicate = left, right
        conn.tcp.env.mib.TcpExtTCPDSACKOldSent += 1


def _duplicate_ack(conn: Connection) -> None:
    conn.ack_due = ACK_NOW
    if not conn.pending:
        conn.tcp.schedule(conn)


def _unexpected_syn(conn: Connection, flags: int, seq: int) -> DropReason:
    """A SYN where none belongs: that of a half-open connection again, or a blind attack (RFC 5961, section 4)."""
    if conn.state is SYN_RECV and seq == conn.irs and not flags & ACK:
        conn.retries = max(conn.retries, 1)  # our SYN-ACK was lost
        output.send_syn(conn)
        return DropReason.TCP_OLD_DATA
    output.send_challenge_ack(conn)
    return DropReason.TCP_INVALID_SYN


def _resets_all_the_same(conn: Connection, seq: int) -> bool:
    """Whether a reset that does not begin at RCV.NXT is sure to be the peer's: it begins where the last data that we have
    SACKed ends, or before the FIN that we have taken (tcp_validate_incoming, tcp_reset_check).
    """
    ofo = conn.receive_queue.ofo
    if ofo and conn.sack_ok:
        return seq == ofo[-1].end_seq
    return 0 <= conn.fin_seq == seq and seq == conn.rcv_nxt - 1


def _on_reset(conn: Connection) -> None:
    """The peer has reset the connection (RFC 9293, section 3.10.7.4, second)."""
    mib = conn.tcp.env.mib
    if conn.state is SYN_RECV:
        mib.TcpAttemptFails += 1
        conn.fail(errno.ECONNRESET if conn.fastopen else errno.ECONNREFUSED)
        return
    if conn.state in (State.ESTABLISHED, State.CLOSE_WAIT):
        mib.TcpEstabResets += 1
    conn.fail(errno.EPIPE if conn.state is State.CLOSE_WAIT else errno.ECONNRESET)


# -- data --


def _process_data(conn: Connection, segment: ArrivingSegment, seq: int, end: int) -> DropReason | None:
    fin = bool(segment.flags & FIN)
    if conn.state not in CAN_RECEIVE:
        _duplicate_ack(conn)
        return DropReason.TCP_CLOSE if segment.length else None
    if conn.ecn.ok and segment.length and conn.ecn.on_data(segment.flags & MARKED != 0, segment.flags):
        _duplicate_ack(conn)
    rcv_nxt = conn.rcv_nxt
    if end > rcv_nxt and conn.shutdown_mask & SHUT_RD and (conn.shutdown_mask & ORPHAN or conn.state is not ESTABLISHED):
        # Nobody will ever read this: say so (RFC 9293, section 3.6.1; RFC 2525, section 2.17).
        conn.tcp.reset_stray(conn)
        conn.fail(errno.ECONNRESET)
        return DropReason.SOCKET_SHUTDOWN
    offset = segment.offset
    if end > conn.rcv_adv:
        end = conn.rcv_adv
        fin = False
    if conn.fin_seq >= 0 and end > conn.fin_seq:
        end = conn.fin_seq
    queue = conn.receive_queue
    if fin and conn.fin_seq < 0 and end >= rcv_nxt:
        conn.fin_seq = end
        if queue.ofo and queue.ofo[-1].end_seq > end:
            queue.drop_out_of_order()  # nothing follows a FIN: a peer that says otherwise must say it all again
    if seq > rcv_nxt:
        if end <= seq:
            _duplicate_ack(conn)  # a FIN out of order, remembered
            return None
        return _out_of_order(conn, segment, offset, seq, end)
    if seq < rcv_nxt:
        if segment.length:
            _found_twice(conn, seq, min(seq + segment.length, rcv_nxt))
        offset += rcv_nxt - seq
        seq = rcv_nxt
    size = end - seq
    if size > 0:
        reason = _take(conn, segment, offset, size)
        if reason is not None:
            if conn.fin_seq == end:
                conn.fin_seq = -1
            _duplicate_ack(conn)
            return reason
        conn.rcv_nxt = rcv_nxt = end
        if queue.ofo:
            conn.rcv_nxt = rcv_nxt = queue.advance(rcv_nxt)
            conn.ack_due = ACK_NOW  # a hole is filled: tell at once (RFC 5681, section 4.2)
            conn.notify(READABLE)
        _schedule_ack(conn)
    if conn.fin_seq == rcv_nxt:
        _on_fin(conn)
    elif size <= 0:
        _duplicate_ack(conn)
        return DropReason.TCP_ZEROWINDOW if seq == conn.rcv_adv else DropReason.TCP_OLD_DATA
    return None


def _take(conn: Connection, segment: ArrivingSegment, offset: int, size: int) -> DropReason | None:
    """Take the next `size` bytes of the stream, which lie at `offset` of the frame, for a waiting reader or into the receive
    queue.
    """
    queue = conn.receive_queue
    frame = segment.frame
    gap = conn.last_received - conn.last_data
    conn.last_data = conn.last_received
    if conn.ato != (ato := conn.tcp.config.delack) or gap > ato / 2:
        _follow_gaps(conn, gap)
    if size < conn.rcv_mss:
        _learn_small(conn, segment, size)
    elif segment.flags & PSH and not conn.ack_pushed:
        conn.ack_pushed = 1
    if conn.rcv_ssthresh != WINDOW_UNCLAMPED:
        grow_window(conn, size)
    if conn.reader is not None and not queue.queue and not conn.handed:
        buffer = conn.reader.buffer_for(size)
        if buffer is not None:
            frame.copy_to(offset, size, buffer)
            queue.copied_seq += size
            conn.handed = size
            _learn_mss(conn, segment, size)
            return None
    charges = conn.charges
    reason = None
    if charges.receive.bytes + charges.ofo.bytes > conn.rcvbuf or (
        size + PAGE_SIZE > charges.forward_alloc and not charges.ample(size)
    ):
        reason = make_room(conn, conn.rcv_nxt, queue.truesize_of(frame, offset, size))
        if reason is not None and not queue.queue:
            reason = None  # one segment always: who has nothing to read would wait for ever (sk_forced_mem_schedule)
    if reason is None:
        while not queue.put(frame, offset, size, conn.rcv_nxt, conn.gfp):
            if not prune_ofo_queue(conn, conn.rcv_nxt):
                reason = DropReason.NOMEM
                break
        else:
            if _learn_mss(conn, segment, size):
                _learn_ratio(conn)
            conn.notify(READABLE)
            return None
    charges.drops += 1
    charges.reclaim()
    conn.no_room_at = conn.rcv_nxt
    conn.tcp.env.mib.TcpExtTCPRcvQDrop += 1
    conn.notify(READABLE)
    return reason


def _out_of_order(conn: Connection, segment: ArrivingSegment, offset: int, seq: int, end: int) -> DropReason | None:
    queue = conn.receive_queue
    mib = conn.tcp.env.mib
    _duplicate_ack(conn)
    reason = make_room(conn, seq, segment.frame.truesize(offset, end - seq))
    if reason is None:
        kept = queue.put_out_of_order(segment.frame, offset, seq, end, conn.gfp)
        if kept:
            mib.TcpExtTCPOFOQueue += 1
            return None
        reason = DropReason.TCP_OLD_DATA if kept is None else DropReason.NOMEM
    conn.charges.reclaim()
    if reason is not DropReason.TCP_OLD_DATA:
        conn.charges.drops += 1
        mib.TcpExtTCPOFODrop += 1
    return reason


def _learn_mss(conn: Connection, segment: ArrivingSegment, size: int) -> bool:
    """Learn the peer's segment size and the round trip as the receiver sees it. Returns whether the segment is a full one."""
    mss = segment.frame.gso_size or size
    if mss > conn.rcv_mss:
        conn.rcv_mss = min(mss, conn.adv_mss)
    if size < conn.rcv_mss:
        return False
    if conn.ts_ok and segment.ts_ecr > 0:
        delta = ((int(conn.tcp.env.timers.now * 1000) + conn.ts_offset - segment.ts_ecr) & MASK32) / 1000
        if delta < 60:
            conn.rcv_rtt += (max(delta, 0.001) - conn.rcv_rtt) / 8
    return True


def _learn_ratio(conn: Connection) -> None:
    """Learn from the skb queued last how much payload its truesize carries: the window is promised by that."""
    skb = conn.receive_queue.queue[-1]
    ratio = min(max(((skb.end_seq - skb.seq) << 8) // skb.truesize, RATIO_MIN), RATIO_MAX)
    conn.win_ratio += (ratio - conn.win_ratio) >> 3 if ratio < conn.win_ratio else (ratio - conn.win_ratio + 7) >> 3


def _schedule_ack(conn: Connection) -> None:
    """Decide when to acknowledge data that arrived in order (RFC 9293, section 3.8.6.3; RFC 5681, section 4.2)."""
    if conn.ack_due == ACK_NOW:
        return
    if conn.quick_acks and not conn.pingpong:
        conn.quick_acks -= 1
        conn.ack_due = ACK_NOW
    elif conn.rcv_nxt - conn.rcv_wup > conn.rcv_mss:
        conn.ack_due = ACK_NOW  # more than a full segment (__tcp_ack_snd_check)
    else:
        _delay_ack(conn)


def _delay_ack(conn: Connection) -> None:
    """An acknowledgment may wait, for as long as the peer pauses between segments (tcp_send_delayed_ack)."""
    timers_ = conn.tcp.env.timers
    least = conn.tcp.config.delack
    pause = conn.ato
    if pause > least:
        most = DELACK_MAX if conn.pingpong or conn.ack_pushed else DELACK_MAX_PUSHED
        if conn.rtt.srtt:
            most = min(most, max(conn.rtt.srtt, least))
        pause = min(pause, most, DELACK_MAX)
    if conn.ack_due == ACK_NONE:
        conn.ack_due = ACK_DELAYED
        timers_.set(conn.delack_timer, timers_.now + pause)
    elif conn.delack_timer.deadline <= timers_.now + pause / 4:
        conn.ack_due = ACK_NOW  # the timer is about to expire
    elif timers_.now + pause < conn.delack_timer.deadline:
        timers_.set(conn.delack_timer, timers_.now + pause)


def _follow_gaps(conn: Connection, gap: float) -> None:
    """Data came `gap` seconds after the last: so long may an acknowledgment wait, more or less (tcp_event_data_recv)."""
    least = conn.tcp.config.delack
    if not conn.ato:
        conn.ato = least
        _quicken_acks(conn)
    elif gap <= least / 2:
        conn.ato = conn.ato / 2 + least / 2
    elif gap < conn.ato:
        conn.ato = min(conn.ato / 2 + gap, conn.rtt.rto, DELACK_MAX)
    elif gap > conn.rtt.rto:
        _quicken_acks(conn)  # so long a pause, and the sender has perhaps a small window again


def _quicken_acks(conn: Connection) -> None:
    """Acknowledge at once for a while (tcp_incr_quickack)."""
    window = conn.rcv_adv - conn.rcv_nxt
    conn.quick_acks = max(conn.quick_acks, min(window // (2 * conn.rcv_mss) or 2, QUICK_ACKS))


def _learn_small(conn: Connection, segment: ArrivingSegment, size: int) -> None:
    """A segment that is not full, unless another of the same size comes: the peer's segments may have become smaller
    (tcp_measure_rcv_mss).
    """
    last = conn.last_segment
    conn.last_segment = 0
    if size >= MSS_DEFAULT or (size >= MIN_MSS and not segment.flags & (PSH | FIN)):
        conn.last_segment = size
        if size == last:
            conn.rcv_mss = size
            return
    conn.ack_pushed = min(conn.ack_pushed + 1, 2)


def _on_fin(conn: Connection) -> None:
    """The peer's FIN is next in sequence (RFC 9293, section 3.10.7.4, eighth)."""
    conn.rcv_nxt += 1
    conn.rcv_adv = max(conn.rcv_adv, conn.rcv_nxt)
    _duplicate_ack(conn)
    conn.receive_queue.drop_out_of_order()
    state = RECEIVES_FIN[conn.state]
    conn.notify(READABLE)
    if state is State.TIME_WAIT:
        conn.tcp.enter_time_wait(conn)
    else:
        conn.enter(state)
