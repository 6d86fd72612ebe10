"""What may be sent now, and how a segment is built (RFC 9293, sections 3.8 and 3.10.2; RFC 1122, section 4.2.3.4).

Segments are cut late: only here, from the bytes of the send queue, as long as window, congestion window and device allow, up to
a super-frame of 64 KiB that the device cuts into segments of the MSS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.gfp import ATOMIC, MEMALLOC
from ustack.link.device import ETH_HLEN
from ustack.timers import NEVER
from ustack.transport.events import SHUT_WR
from ustack.transport.tcp.arming import TIMEOUT, rearm
from ustack.transport.tcp.ecn import ALWAYS, ECT_0
from ustack.transport.tcp.inflight import Segment
from ustack.transport.tcp.phase import CWR, OPEN, RECOVERY
from ustack.transport.tcp.states import State
from ustack.transport.tcp.undo import current_ssthresh
from ustack.wire import tcp as wire
from ustack.wire.tcp import (
    ACK,
    ECE,
    FIN,
    HEADER,
    HEADER_LEN,
    OFF_CSUM,
    PSH,
    RST,
    SYN,
    TS,
    TS_LEN,
    TS_MARK,
    build_options,
    build_syn_options,
)

if TYPE_CHECKING:
    from ustack.net.path import Path
    from ustack.transport.tcp.connection import Connection

IPPROTO_TCP: Final = 6
MASK32: Final = 0xFFFFFFFF
IP_TOTAL_MAX: Final = 65535
SKB_MAX: Final = IP_TOTAL_MAX - 40 - HEADER_LEN - TS_LEN
"""Bytes of payload that one packet, IPv4 or IPv6, carries at most beside timestamps."""
MIN_MSS: Final = 48
"""Bytes of payload below which no path MTU pushes a segment (tcp_min_snd_mss)."""

BASE_MSS: Final = 1024
"""Bytes of payload that a segment has when larger ones seem to be swallowed (tcp_base_mss), and half if these are, too."""

BLACK_HOLE_MEMORY: Final = 600.0
"""Seconds after which larger segments are tried again (tcp_probe_interval)."""

WINDOW_UNCLAMPED: Final = 1 << 30
"""`rcv_ssthresh` while only the receive limit bounds the window."""

PRESSURE_SEGMENTS: Final = 4
"""Full segments that an ordinary connection's window and transmissions are bounded by under pressure
(tcp_adjust_rcv_ssthresh)."""

SACK_HEADER: Final = 4
SACK_BLOCK: Final = 8
"""Bytes that the SACK option and each block take (RFC 2018, section 3)."""

TAIL_BY_OPTIONS: Final = 0
TAIL_HELD: Final = 1
TAIL_SENT: Final = 2
"""Whether a last, small segment is sent: as TCP_CORK, TCP_NODELAY and Nagle have it; not, for more is to come (MSG_MORE); or in
any case (TCP_NODELAY being set, which flushes even what is corked)."""

ACK_NONE: Final = 0
ACK_DELAYED: Final = 1
"""An acknowledgment is owed; the timer sends it if nothing else does."""
ACK_NOW: Final = 2
"""An acknowledgment is owed at the next flush."""

QUICK_ACKS: Final = 16
"""Segments that are acknowledged at once when data begins to come, so that the peer leaves slow start soon (TCP_MAX_QUICKACKS).
"""

_SENDING: Final = frozenset({State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT1, State.CLOSING, State.LAST_ACK})
_NO_PAYLOAD: Final[list[memoryview]] = []


# -- sizes --


def sync_mss(conn: Connection) -> None:
    """Compute the payload of a full segment anew, after the handshake or when the path MTU has changed (RFC 9293, 3.7.1; RFC
    6691).
    """
    path = conn.path
    conn.mtu = path.mtu
    mss = min(conn.peer_mss, path.mtu - (path.l4 - ETH_HLEN) - HEADER_LEN)
    if conn.options.maxseg:
        mss = min(mss, conn.options.maxseg)
    if conn.ts_ok:
        mss -= TS_LEN
    if conn.mss_limit:
        if conn.tcp.env.timers.now < conn.mss_limit_until:
            mss = min(mss, conn.mss_limit)
        else:
            conn.mss_limit = 0
    conn.mss = max(mss, MIN_MSS)
    conn.cc.mss = conn.mss
    conn.send_queue.goal = max(SKB_MAX // conn.mss * conn.mss, conn.mss)


def suspect_black_hole(conn: Connection) -> None:
    """What is out has gone unanswered several times: perhaps it is too large for a router that says nothing. Cut it smaller,
    and what follows for some minutes (RFC 4821, section 7.7; RFC 8899, section 4.3; tcp_mtu_probing).
    """
    segment = conn.inflight.segments[0]
    smaller = BASE_MSS // 2 if conn.mss_limit else BASE_MSS
    if min(conn.mss, segment.end - segment.seq) <= smaller:
        return
    conn.mss_limit = smaller
    conn.mss_limit_until = conn.tcp.env.timers.now + BLACK_HOLE_MEMORY
    conn.tcp.env.mib.TcpExtTCPMTUPFail += 1
    sync_mss(conn)


def _beside_blocks(conn: Connection) -> int:
    """Payload of a full segment that carries our SACK blocks as well (RFC 6691)."""
    blocks = len(conn.receive_queue.sack_blocks(3 if conn.ts_ok else 4))
    return conn.mss - SACK_HEADER - SACK_BLOCK * blocks


def _largest_payload(conn: Connection, mss: int) -> int:
    """Bytes of one transmission: a multiple of the MSS that fits an IP packet, or one segment where the device cannot cut."""
    if not (conn.path.tso and conn.tcp.config.offload):
        return mss
    if conn.under_pressure():
        return PRESSURE_SEGMENTS * mss
    return max(SKB_MAX // mss, 1) * mss


# -- windows --


def receive_window(conn: Connection) -> int:
    """The window in bytes that may be advertised now: what the receive limit leaves, and never less than was promised (RFC
    9293, 3.8.6).
    """
    promised = conn.rcv_adv - conn.rcv_nxt
    rcvbuf = conn.rcvbuf
    free = rcvbuf - conn.receive_queue.truesize
    scale = conn.rcv_wscale
    window = free * conn.win_ratio >> 8
    mem = conn.tcp.mem
    if (mem.over_pressure or mem.pages.under_pressure) and not conn.options.memalloc:
        conn.rcv_ssthresh = min(conn.rcv_ssthresh, PRESSURE_SEGMENTS * conn.adv_mss)
    window = min(window, conn.rcv_ssthresh)
    # Silly window avoidance of the receiver (RFC 1122, section 4.2.3.3): a sliver of room is no room.
    if window < min(conn.rcv_mss, rcvbuf >> 2):
        window = 0
    window = min(window, conn.options.window_clamp or window, 0xFFFF << scale)
    if scale:
        window = window >> scale << scale
    if window < promised:
        return (promised + (1 << scale) - 1) >> scale << scale  # rounded down, its edge would move left (RFC 7323, section 2.4)
    return window


def syn_window(conn: Connection) -> int:
    """The window that our SYN offers, which is never scaled (RFC 7323, section 2.2)."""
    window = min(conn.rcvbuf * conn.win_ratio >> 8, 0xFFFF)
    return min(window, conn.options.window_clamp or window)


def after_read(conn: Connection) -> None:
    """The user has read: grow the receive limit if that would help, and tell the peer of the room when it matters.

    In a batch that waits for the flush, where one acknowledgment serves for all (tcp_cleanup_rbuf).
    """
    _adjust_receive_limit(conn)
    if conn.state in (State.ESTABLISHED, State.FIN_WAIT1, State.FIN_WAIT2):
        wanted = conn.ack_due != ACK_NONE and (
            conn.rcv_nxt - conn.rcv_wup > conn.rcv_mss
            # The reader is done, and what it read last was the end of something (tcp_cleanup_rbuf).
            or (conn.ack_pushed > conn.pingpong and not conn.receive_queue.truesize)
        )
        if not wanted:
            left = 0 if conn.no_room_at == conn.rcv_nxt else conn.rcv_adv - conn.rcv_nxt
            if left * 2 <= conn.rcvbuf * conn.win_ratio >> 8:
                window = receive_window(conn)
                wanted = window > 0 and window >= 2 * left
        if wanted:
            conn.no_room_at = -1
            if conn.tcp.env.batching:
                conn.ack_due = ACK_NOW
                conn.tcp.schedule_once(conn)
            else:
                send_ack(conn)


def _adjust_receive_limit(conn: Connection) -> None:
    """Dynamic right-sizing: the receive limit follows twice what the user read in the last round trip
    (tcp_rcv_space_adjust).
    """
    if conn.options.rcvbuf or conn.under_pressure():
        return
    now = conn.tcp.env.timers.now
    if now - conn.rcvq_time < conn.rcv_rtt:
        return
    read = conn.receive_queue.copied_seq - conn.rcvq_seq
    if read > conn.rcvq_space:
        wanted = 2 * read + 16 * conn.adv_mss
        wanted += 2 * wanted * (read - conn.rcvq_space) // conn.rcvq_space
        limit = min((wanted << 8) // conn.win_ratio, conn.tcp.config.rmem_max, conn.tcp.mem.most_for_one())
        conn.rcvbuf = max(conn.rcvbuf, limit)
        conn.rcvq_space = read
    conn.rcvq_seq = conn.receive_queue.copied_seq
    conn.rcvq_time = now


# -- building --


def _path(conn: Connection) -> Path:
    path = conn.path
    if path.obsolete:
        path = conn.path = conn.tcp.ip.path(path.dst, path.src)
    return path


def transmit(conn: Connection, seq: int, length: int, flags: int, ect: int = 0) -> bool:
    """Send `length` bytes of the send queue from `seq` on, with our acknowledgment and window. `ect`: the ECN field of its IP
    header. False when nothing could be sent.
    """
    try:
        path = _path(conn)
    except OSError as error:
        conn.soft_error = error.errno or 0
        return False
    env = conn.tcp.env
    now = env.timers.now
    head = path.head
    at = path.l4
    rcv_nxt = conn.rcv_nxt
    window = conn.rcv_adv - rcv_nxt
    if rcv_nxt != conn.rcv_wup or window << 9 < conn.rcvbuf * conn.win_ratio:
        # Something has arrived since, or the window is less than half open: see what it may be.
        window = receive_window(conn)
        conn.rcv_adv = rcv_nxt + window
        conn.rcv_wup = rcv_nxt
    if conn.no_room_at >= 0:
        if conn.no_room_at == rcv_nxt:
            window = 0  # what was promised is taken if it comes; but rather a probe now and then than all of it again and again
        else:
            conn.no_room_at = -1
    conn.ack_due = ACK_NONE
    conn.ack_pushed = 0
    conn.delack_timer.deadline = NEVER
    mss = conn.mss
    hlen = HEADER_LEN
    queue = conn.receive_queue
    if conn.sack_ok and (queue.ofo or queue.duplicate is not None):
        blocks = [(left & MASK32, right & MASK32) for left, right in queue.sack_blocks(3 if conn.ts_ok else 4)]
        queue.duplicate = None
        options = build_options(timestamp(conn, now) if conn.ts_ok else -1, conn.ts_recent, blocks)
        hlen += len(options)
        head[at + HEADER_LEN : at + hlen] = options
        mss -= hlen - HEADER_LEN - (TS_LEN if conn.ts_ok else 0)
    elif conn.ts_ok:
        hlen += TS_LEN
        TS.pack_into(head, at + HEADER_LEN, TS_MARK, timestamp(conn, now), conn.ts_recent)
    conn.last_ack_sent = rcv_nxt
    if conn.ecn.echo:
        flags |= ECE
    HEADER.pack_into(
        head,
        at,
        conn.local_port,
        conn.remote_port,
        seq & MASK32,
        rcv_nxt & MASK32,
        hlen << 10 | flags,
        window >> conn.rcv_wscale,
        0,
        0,
    )
    env.mib.TcpOutSegs += 1
    options_set = conn.options
    if length:
        return path.send(
            IPPROTO_TCP,
            hlen,
            conn.send_queue.views(seq, length),
            length,
            OFF_CSUM,
            mss if length > mss else 0,
            options_set.tos | ect,
            options_set.ttl,
            True,
            MEMALLOC if options_set.memalloc else ATOMIC,
        )
    gfp = MEMALLOC if options_set.memalloc else ATOMIC
    return path.send(IPPROTO_TCP, hlen, _NO_PAYLOAD, 0, OFF_CSUM, 0, options_set.tos, options_set.ttl, True, gfp)


def timestamp(conn: Connection, now: float) -> int:
    """TSval: milliseconds, with the connection's offset (RFC 7323, section 5.4)."""
    return (int(now * 1000) + conn.ts_offset) & MASK32


def send_ack(conn: Connection) -> None:
    """Send an acknowledgment without data, now."""
    transmit(conn, conn.snd_nxt, 0, ACK)


def send_challenge_ack(conn: Connection) -> None:
    """Acknowledge a segment that might be forged, within the stack's rate limit (RFC 5961, section 7)."""
    if conn.tcp.may_challenge():
        conn.tcp.env.mib.TcpExtTCPChallengeACK += 1
        send_ack(conn)


def send_probe(conn: Connection) -> None:
    """Send a segment from before the window, without data, which the peer must answer (keepalive and zero-window probes)."""
    transmit(conn, conn.snd_una - 1, 0, ACK)


def send_syn(conn: Connection, ts_val: int = -1, fastopen: bytes | None = None, early: int = 0) -> None:
    """Send our SYN, or SYN-ACK once the peer's SYN is known, for the first time or again; `ts_val` is its timestamp if it is
    not -1 (SYN cookies), `fastopen` a Fast Open option, and `early` the bytes of the send queue that go with it (RFC 7413).
    """
    passive = conn.state is State.SYN_RECV
    try:
        path = _path(conn)
    except OSError as error:
        conn.soft_error = error.errno or 0
        return
    now = conn.tcp.env.timers.now
    config = conn.tcp.config
    options = build_syn_options(
        conn.adv_mss,
        conn.rcv_wscale if (conn.snd_wscale >= 0 if passive else config.window_scaling) else -1,
        conn.sack_ok if passive else config.sack,
        (timestamp(conn, now) if ts_val < 0 else ts_val) if (conn.ts_ok if passive else config.timestamps) else -1,
        conn.ts_recent,
        fastopen,
    )
    window = syn_window(conn)
    hlen = HEADER_LEN + len(options)
    head = path.head
    at = path.l4
    head[at + HEADER_LEN : at + hlen] = options
    local, remote = conn.local[1], conn.remote[1]
    flags = SYN | ACK if passive else SYN
    if not passive and asks_for_ecn(conn):
        flags |= ECE | wire.CWR
    if passive:
        if conn.ecn.ok:
            flags |= ECE
        conn.rcv_wup = conn.rcv_nxt
        scale = conn.rcv_wscale
        conn.rcv_adv = conn.rcv_nxt + (window + (1 << scale) - 1 >> scale << scale)  # as an answer to early data has to say it
        conn.last_ack_sent = conn.rcv_nxt
        HEADER.pack_into(head, at, local, remote, conn.iss & MASK32, conn.rcv_nxt & MASK32, hlen << 10 | flags, window, 0, 0)
    else:
        HEADER.pack_into(head, at, local, remote, conn.iss & MASK32, 0, hlen << 10 | flags, window, 0, 0)
    conn.tcp.env.mib.TcpOutSegs += 1
    payload = conn.send_queue.views(conn.iss + 1, early) if early else _NO_PAYLOAD
    path.send(IPPROTO_TCP, hlen, payload, early, OFF_CSUM, 0, conn.options.tos, conn.options.ttl, True, conn.gfp)


def asks_for_ecn(conn: Connection) -> bool:
    """Whether our SYN asks for ECN: not when it is sent again, since the question may be why it was lost (RFC 3168, section
    6.1.1.1).
    """
    return conn.tcp.config.ecn == ALWAYS and not conn.retries


def send_reset(conn: Connection) -> None:
    """Tell the peer that the connection is gone (RFC 9293, section 3.10.5)."""
    conn.tcp.env.mib.TcpOutRsts += 1
    transmit(conn, conn.snd_nxt, 0, RST | ACK)


# -- deciding --


def push(conn: Connection, tail: int = TAIL_BY_OPTIONS) -> None:
    """Send everything that may be sent now: what is lost first, then new data, then the FIN; set the timer that goes with it.
    `tail`: what is done about a last segment that is not full.
    """
    if conn.state not in _SENDING and not conn.early:
        return
    if conn.path.mtu != conn.mtu or (conn.mss_limit and conn.tcp.env.timers.now >= conn.mss_limit_until):
        sync_mss(conn)
    inflight = conn.inflight
    recovery = conn.recovery
    if inflight.to_resend and not recovery.send_new:
        _retransmit_lost(conn)
    queue = conn.send_queue
    fin_wanted = conn.shutdown_mask & SHUT_WR != 0
    if conn.snd_nxt < queue.end or (fin_wanted and conn.snd_nxt == queue.end):
        _send_new(conn, fin_wanted, tail)
        if not inflight.segments:
            hold(conn)
    recovery.send_new = False


def hold(conn: Connection) -> None:
    """Data waits: for room in the window, or for more of it. What nothing else brings on its way, the timer does."""
    if not conn.inflight.segments and not conn.retransmit_timer.pending:
        timers = conn.tcp.env.timers
        conn.waits_for = TIMEOUT
        timers.set(conn.retransmit_timer, timers.now + persist_timeout(conn))


def force_out(conn: Connection) -> bool:
    """The persist timer expired: send what fits the window, however little it is. False when the window is closed."""
    mss = _beside_blocks(conn) if conn.sack_ok and conn.receive_queue.ofo else conn.mss
    size = min(conn.send_queue.end - conn.snd_nxt, conn.snd_una + conn.snd_wnd - conn.snd_nxt, mss)
    if size <= 0:
        return False
    now = conn.tcp.env.timers.now
    nxt = conn.snd_nxt
    conn.snd_nxt = conn.nagle_end = nxt + size
    _note(conn, Segment(nxt, conn.snd_nxt, now), now)
    conn.last_sent = now
    conn.waits_for = TIMEOUT
    conn.tcp.env.timers.set(conn.retransmit_timer, now + conn.rtt.rto)
    transmit(conn, nxt, size, ACK | PSH)
    return True


def _note(conn: Connection, segment: Segment, now: float) -> None:
    """A segment of new data goes on the scoreboard."""
    inflight = conn.inflight
    conn.rate.on_sent(segment, now, not inflight.segments)
    inflight.add(segment)


def send_one(conn: Connection) -> bool:
    """Send one segment of new data, whatever the congestion window says, if there is any and the peer's window takes it."""
    size = min(conn.send_queue.end - conn.snd_nxt, conn.mss)
    if size <= 0 or conn.snd_una + conn.snd_wnd - conn.snd_nxt < size:
        return False
    now = conn.tcp.env.timers.now
    nxt = conn.snd_nxt
    conn.snd_nxt = nxt + size
    _note(conn, Segment(nxt, conn.snd_nxt, now), now)
    conn.last_sent = now
    transmit(conn, nxt, size, ACK | PSH if conn.snd_nxt == conn.send_queue.end else ACK, ECT_0 if conn.ecn.ok else 0)
    return True


def persist_timeout(conn: Connection) -> float:
    """Seconds until the next probe of a closed window (RFC 9293, section 3.8.6.1)."""
    return min(conn.rtt.rto * (1 << min(conn.persist_shift, 16)), conn.tcp.config.rto_max)


def _send_new(conn: Connection, fin_wanted: bool, tail: int) -> None:
    env = conn.tcp.env
    now = env.timers.now
    inflight = conn.inflight
    segments = inflight.segments
    recovery = conn.recovery
    cc = conn.cc
    mss = conn.mss
    if conn.sack_ok and conn.receive_queue.ofo:
        mss = _beside_blocks(conn)
    end = conn.send_queue.end
    window_end = conn.snd_una + conn.snd_wnd
    if not segments:
        idle = now - conn.last_sent
        if idle > conn.rtt.rto and conn.tcp.config.slow_start_after_idle:
            cc.on_idle(conn.tcp.config.initial_window * mss, current_ssthresh(conn))
            recovery.usage.restart(now)
        cc.on_restart(now, idle, app_limited=conn.rate.app_limited >= 0)
    in_flight = inflight.in_flight()
    largest = _largest_payload(conn, mss)
    pacer = conn.pacer
    if pacer is not None:
        largest = min(largest, pacer.quantum(mss))
    ect = ECT_0 if conn.ecn.ok else 0
    reduction = recovery.reduction if recovery.phase is CWR or recovery.phase is RECOVERY else None
    sent = payload = 0
    limited = False
    while True:
        nxt = conn.snd_nxt
        unsent = end - nxt
        quota = cc.cwnd - in_flight
        usable = window_end - nxt
        if unsent <= 0:
            if not fin_wanted or nxt > end or usable <= 0:
                break
            size = 0
        else:
            if largest < unsent and largest <= quota and largest <= usable:
                size = largest
            elif quota < min(mss, unsent) and in_flight > 0:
                limited = True
                break
            else:
                size = min(unsent, usable, max(quota, mss), largest)
            if size == largest:
                pass
            elif size < unsent:
                if size < mss:
                    # The window is the limit. Silly window avoidance of the sender (RFC 1122, section 4.2.3.4).
                    if usable <= 0 or usable < conn.max_window >> 1:
                        break
                else:
                    size -= size % mss
                    if size < largest and size < usable and in_flight > 0 and _worth_waiting(conn, size):
                        limited = True
                        break
            elif size % mss and not fin_wanted and _hold_tail(conn, tail):
                size -= size % mss
                if not size:
                    break
        if pacer is not None and not pacer.may_send(conn, now):
            break
        flags = ACK
        if ect and conn.ecn.reduced and size:
            # A flag of one segment, not of a super-frame (RFC 3168, section 6.1.2).
            size = min(size, mss)
            conn.ecn.reduced = False
            flags |= wire.CWR
        fin = fin_wanted and size == unsent and usable > size
        if size and size == unsent and conn.push_seq > nxt:
            flags |= PSH
        if fin:
            flags |= FIN
        conn.snd_nxt = nxt + size + fin
        _note(conn, Segment(nxt, conn.snd_nxt, now, fin), now)
        in_flight += size
        sent += size + fin
        payload += size
        if size % mss:
            conn.nagle_end = conn.snd_nxt
        if reduction is not None:
            reduction.out += size
        if pacer is not None:
            pacer.sent(size, now)
        transmit(conn, nxt, size, flags, ect)
    if sent:
        if payload and now - conn.last_data < conn.ato:
            conn.pingpong = True  # an answer: acknowledgments may wait for the next one
        conn.last_sent = now
        rearm(conn, restarts=False)
    limited = limited or in_flight >= cc.cwnd
    if sent or limited:
        recovery.usage.on_sent(conn, now, limited)


def _worth_waiting(conn: Connection, size: int) -> bool:
    """Whether acknowledgments under way will soon allow a much larger transmission than `size` (tcp_tso_should_defer)."""
    return conn.recovery.phase is OPEN and size < min(conn.cc.cwnd, conn.max_window) // 3


def _hold_tail(conn: Connection, tail: int) -> bool:
    """Whether a last, small segment waits: corked, or by Nagle's algorithm while another small one is out (RFC 9293, 3.7.4;
    Minshall).
    """
    if tail != TAIL_BY_OPTIONS:
        return tail == TAIL_HELD
    options = conn.options
    return options.cork or (not options.nodelay and conn.nagle_end > conn.snd_una)


def _retransmit_lost(conn: Connection) -> None:
    """Send again what is lost, as far as the congestion window allows."""
    now = conn.tcp.env.timers.now
    inflight = conn.inflight
    mss = conn.mss
    if conn.sack_ok and conn.receive_queue.ofo:
        mss = _beside_blocks(conn)
    cwnd = conn.cc.cwnd
    largest = _largest_payload(conn, mss)
    pacer = conn.pacer
    if pacer is not None:
        largest = min(largest, pacer.quantum(mss))
    window_end = conn.snd_una + conn.snd_wnd
    in_flight = inflight.in_flight()
    while True:
        index = inflight.next_lost()
        if index < 0:
            break
        segment = inflight.segments[index]
        quota = cwnd - in_flight
        if quota < min(mss, segment.end - segment.seq) or (segment.seq >= window_end and index):
            break
        if pacer is not None and not pacer.may_send(conn, now):
            break
        most = max(min(largest, quota // mss * mss), mss)
        if segment.end - segment.seq - segment.fin > most:
            inflight.split(index, segment.seq + most)
        in_flight += retransmit(conn, index)
    if inflight.segments and not conn.retransmit_timer.pending:
        conn.waits_for = TIMEOUT
        conn.tcp.env.timers.set(conn.retransmit_timer, now + conn.rtt.rto)


def retransmit(conn: Connection, index: int) -> int:
    """Send segment `index` of the scoreboard again; returns its bytes."""
    env = conn.tcp.env
    now = env.timers.now
    recovery = conn.recovery
    inflight = conn.inflight
    segment = inflight.segments[index]
    size = segment.end - segment.seq - segment.fin
    idle = inflight.in_flight() == 0
    inflight.on_retransmit(index, now)
    conn.rate.on_sent(segment, now, idle)
    recovery.undo.on_retransmit(segment.end - segment.seq, now)
    conn.bytes_retrans += size + segment.fin
    conn.total_retrans += max(-(-size // conn.mss), 1)
    env.mib.TcpRetransSegs += 1
    phase = recovery.phase
    if phase is RECOVERY:
        env.mib.TcpExtTCPFastRetrans += 1
    if phase is RECOVERY or phase is CWR:
        recovery.reduction.out += size
    if conn.pacer is not None:
        conn.pacer.sent(size, now)
    flags = ACK | PSH if size and segment.seq + size == conn.send_queue.end and conn.push_seq > segment.seq else ACK
    transmit(conn, segment.seq, size, flags | FIN if segment.fin else flags)
    return size
