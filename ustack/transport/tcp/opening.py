"""Opening a connection (RFC 9293, section 3.5): what the peer's SYN says, and the moment when both sides know each other."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.transport.events import SHUT_WR, WRITABLE
from ustack.transport.tcp import output, timers
from ustack.transport.tcp.acks import process_ack
from ustack.transport.tcp.arriving import unwrap
from ustack.transport.tcp.output import ACK_NOW, MASK32
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, CWR, ECE, FIN, RST, SYN, WSCALE_MAX

if TYPE_CHECKING:
    from ustack.transport.tcp.arriving import ArrivingSegment
    from ustack.transport.tcp.connection import Connection
    from ustack.wire.tcp import TcpOptions

MSS_DEFAULT: Final = 536
"""Bytes of a full segment until larger ones are seen (RFC 9293, section 3.7.1)."""


def accept_syn(conn: Connection, irs: int, window: int, options: TcpOptions | None) -> None:
    """Take the peer's SYN or SYN-ACK: its sequence number `irs`, its window and its options (RFC 7323, RFC 2018, RFC 6691)."""
    config = conn.tcp.config
    conn.irs = irs
    conn.rcv_nxt = conn.rcv_wup = conn.irs + 1
    conn.rcv_adv = conn.rcv_nxt + output.syn_window(conn)
    conn.receive_queue.copied_seq = conn.rcvq_seq = conn.rcv_nxt
    conn.snd_wnd = window
    conn.max_window = window
    conn.snd_wl1 = conn.irs
    conn.snd_wscale = -1
    if options is not None:
        if options.mss > 0:
            conn.peer_mss = options.mss
        if options.wscale >= 0 and config.window_scaling:
            conn.snd_wscale = min(options.wscale, WSCALE_MAX)
        conn.sack_ok = options.sack_permitted and config.sack
        conn.receive_queue.dsack = conn.sack_ok and config.dsack
        if options.ts_val >= 0 and config.timestamps:
            conn.ts_ok = True
            conn.ts_recent = options.ts_val
            conn.ts_recent_at = conn.tcp.env.timers.now
    if conn.snd_wscale < 0:
        conn.rcv_wscale = 0
    output.sync_mss(conn)
    conn.rcv_mss = min(conn.mss, conn.adv_mss, MSS_DEFAULT)  # grows with what arrives (tcp_initialize_rcv_mss)
    conn.cc.cwnd = conn.tcp.config.initial_window * conn.mss
    conn.rcvq_space = conn.tcp.config.initial_window * conn.adv_mss
    if not conn.options.rcvbuf:
        # Room for the initial window of a peer whose frames are as large as ours may be (tcp_init_buffer_space).
        conn.rcvbuf = max(conn.rcvbuf, min(4 * conn.rcvq_space, config.rmem_max))


def in_syn_sent(conn: Connection, segment: ArrivingSegment) -> DropReason | None:
    """A segment in SYN-SENT (RFC 9293, section 3.10.7.3). What it carries beside SYN and ACK is left to the caller."""
    flags = segment.flags
    env = conn.tcp.env
    ack = unwrap(segment.ack, conn.snd_nxt)
    if flags & ACK and not conn.iss < ack <= conn.snd_nxt:
        if not flags & RST:
            conn.tcp.reset_stray(conn)
        return DropReason.TCP_INVALID_ACK
    if flags & ACK and segment.ts_ecr > 0 and conn.tcp.config.timestamps and not _echoes_our_syn(conn, segment.ts_ecr):
        env.mib.TcpExtPAWSActive += 1
        if not flags & RST:
            conn.tcp.reset_stray(conn)
        return DropReason.TCP_RFC7323_PAWS
    if flags & RST:
        if not flags & ACK:
            return DropReason.TCP_RESET
        env.mib.TcpAttemptFails += 1
        conn.fail(errno.ECONNREFUSED)
        return None
    if not flags & SYN:
        return DropReason.TCP_FLAGS
    accept_syn(conn, segment.seq, segment.window, segment.options)
    if flags & ECE and output.asks_for_ecn(conn):
        conn.ecn.ok = flags & CWR == 0 if flags & ACK else flags & CWR != 0
    if segment.options is not None and segment.options.fastopen:
        conn.tcp.fastopen.remember(conn.path.dst, segment.options.fastopen, conn.peer_mss)
    if flags & ACK:
        if conn.snd_nxt > conn.iss + 1:
            _early_data_answered(conn, ack)
        conn.snd_una = ack
        conn.snd_wl2 = ack
        conn.enter(State.ESTABLISHED)
        _established(conn)
        conn.ack_due = ACK_NOW
        return None
    # Simultaneous open.
    conn.enter(State.SYN_RECV)
    output.send_syn(conn)
    return None


def _echoes_our_syn(conn: Connection, echoed: int) -> bool:
    """Whether a SYN-ACK echoes a timestamp of one of our SYNs: otherwise it is not for this connection (RFC 7323, section 3.2;
    tcp_rcv_synsent_state_process).
    """
    first = output.timestamp(conn, conn.last_sent)
    return (echoed - first) & MASK32 <= (output.timestamp(conn, conn.tcp.env.timers.now) - first) & MASK32


def _early_data_answered(conn: Connection, ack: int) -> None:
    """The SYN-ACK says how much of the data that went with our SYN was taken; the rest is as if it had not been sent (RFC 7413,
    section 4.2.2).
    """
    mib = conn.tcp.env.mib
    if ack == conn.snd_nxt:
        mib.TcpExtTCPFastOpenActive += 1
        conn.fastopen = True
    else:
        mib.TcpExtTCPFastOpenActiveFail += 1
    conn.send_queue.release(ack)
    conn.snd_nxt = ack


def _established(conn: Connection) -> None:
    """The three-way handshake is done: start the clocks and tell the user."""
    env = conn.tcp.env
    now = env.timers.now
    conn.retransmit_timer.cancel()
    if conn.inflight.segments:
        env.timers.set(conn.retransmit_timer, now + conn.rtt.rto)
    if conn.retries:
        conn.rtt.on_lost_syn()
        conn.cc.cwnd = conn.mss  # RFC 5681, section 3.1
    elif conn.last_sent >= 0:
        conn.rtt.on_sample(now - conn.last_sent)
    conn.rcv_rtt = max(conn.rtt.srtt, 0.001)
    conn.retries = 0
    conn.last_received = conn.last_data = now
    conn.rcvq_time = now
    scale = conn.rcv_wscale
    # What the SYN promised, which is not scaled, as a window that can be said from now on (RFC 7323, section 2.4).
    conn.rcv_adv = conn.rcv_nxt + (conn.rcv_adv - conn.rcv_nxt + (1 << scale) - 1 >> scale << scale)
    conn.nagle_end = conn.snd_una
    conn.recovery.usage.full_at = now
    conn.recovery.point = conn.iss
    conn.rate.delivered_at = conn.rate.first_sent_at = now
    timers.start_keepalive(conn)
    conn.path.neighbour.confirm()
    if not conn.options.sndbuf:
        conn.sndbuf = max(conn.sndbuf, 4 * conn.cc.cwnd)
    if conn.listener is not None:
        conn.listener.on_established(conn)
    if conn.shutdown_mask & SHUT_WR:
        conn.enter(State.FIN_WAIT1)  # the user has shut down meanwhile
    conn.notify(WRITABLE)


def in_syn_recv(conn: Connection, segment: ArrivingSegment, seq: int) -> DropReason | None:
    """The acknowledgment of a segment in SYN-RECEIVED (RFC 9293, section 3.10.7.4, fifth): of our SYN, or of nothing."""
    ack = unwrap(segment.ack, conn.snd_una)
    if not conn.iss < ack <= conn.snd_nxt:
        conn.tcp.reset_stray(conn)
        return DropReason.TCP_INVALID_ACK
    if conn.listener is not None and not conn.fastopen:
        # A bare ACK does not do while data is to come (tcp_check_req).
        if conn.retries < conn.options.defer_accept and not segment.length and not segment.flags & FIN:
            conn.deferred = True
            conn.tcp.env.mib.TcpExtTCPDeferAcceptDrop += 1
            return None
        if not conn.listener.may_establish():
            return DropReason.LISTEN_OVERFLOW  # forgotten: our SYN-ACK, sent again, asks for it again
    conn.snd_una = conn.iss + 1
    if segment.flags & SYN:
        segment.window >>= max(conn.snd_wscale, 0)  # the window of a SYN is not scaled (RFC 7323, section 2.2): undo below
    conn.snd_wnd = segment.window << max(conn.snd_wscale, 0)
    conn.max_window = max(conn.max_window, conn.snd_wnd)
    conn.snd_wl1 = seq
    conn.snd_wl2 = ack
    conn.enter(State.ESTABLISHED)
    _established(conn)
    return process_ack(conn, segment, seq, ack)
