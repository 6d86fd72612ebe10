"""Passive opening: half-open connections, and those that wait to be accepted."""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING

from ustack.drops import DropReason
from ustack.transport.events import READABLE, nobody
from ustack.transport.tcp import output
from ustack.transport.tcp.ecn import ASKS_FOR_ECN, OFF
from ustack.transport.tcp.fastopen import SERVER, SERVER_COOKIE_NOT_REQD, SERVER_WO_SOCKOPT
from ustack.transport.tcp.input import segment_arrives
from ustack.transport.tcp.opening import accept_syn
from ustack.transport.tcp.output import MASK32
from ustack.transport.tcp.states import State
from ustack.transport.tcp.syncookies import LIFETIME, PERIOD, options_of, timestamp_with_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.transport.options import SocketOptions
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.protocol import Tcp
    from ustack.wire.tcp import TcpOptions


class Listener:
    """A listening socket on `address` (packed; None: any of ours) and `port`.

    `backlog` bounds the connections that wait in `queue` to be accepted; `half_open` counts those in SYN-RECEIVED.
    """

    __slots__ = ("_closed", "_cookies_until", "address", "backlog", "half_open", "options", "port", "queue", "tcp", "wake")

    def __init__(self, tcp: Tcp, address: bytes | None, port: int, backlog: int, options: SocketOptions) -> None:
        self.tcp = tcp
        self.address = address
        self.port = port
        self.backlog = max(backlog, 1)
        self.options = options
        self.queue: deque[Connection] = deque()
        self.half_open: set[Connection] = set()
        self.wake: Callable[[int], None] = nobody
        self._closed = False
        self._cookies_until = -1.0

    def refusal(self) -> DropReason | None:
        """Why another SYN must not be answered now, counted; None when it may be (tcp_conn_request, sk_acceptq_is_full)."""
        mib = self.tcp.env.mib
        if len(self.queue) > self.backlog:
            mib.TcpExtListenOverflows += 1
            mib.TcpExtListenDrops += 1
            return DropReason.LISTEN_OVERFLOW
        if not self.options.memalloc and self.tcp.mem.under_pressure():
            mib.TcpExtListenDrops += 1
            return DropReason.MEM_PRESSURE
        if self._full and not self.tcp.config.syncookies:
            mib.TcpExtTCPReqQFullDrop += 1
            mib.TcpExtListenDrops += 1
            return DropReason.SYN_OVERFLOW
        return None

    @property
    def _full(self) -> bool:
        return len(self.half_open) >= self.tcp.config.max_syn_backlog

    @property
    def needs_cookies(self) -> bool:
        """Whether the next SYN must be answered without keeping any state."""
        return self._full or self.tcp.config.syncookies == 2

    @property
    def expects_cookies(self) -> bool:
        """Whether cookies that were sent lately may come back."""
        return self.tcp.env.timers.now < self._cookies_until

    def send_cookie(self, conn: Connection) -> None:
        """A SYN came and the queue is full: `conn` answers it with a SYN-ACK whose sequence number is all that is kept
        (tcp_syncookies).
        """
        tcp = self.tcp
        segment = tcp.segment
        now = tcp.env.timers.now
        if self._full:
            tcp.env.mib.TcpExtTCPReqQFullDoCookies += 1
        tcp.env.mib.TcpExtSyncookiesSent += 1
        self._cookies_until = now + LIFETIME * PERIOD
        self._take_syn(conn, segment.seq, segment.window, segment.options)
        conn.iss = tcp.cookies.make(conn.key, segment.seq, conn.peer_mss, now)
        ts_val = -1
        if conn.ts_ok:
            clock = timestamp_with_state(output.timestamp(conn, now) - conn.ts_offset & MASK32, conn.snd_wscale, conn.sack_ok)
            ts_val = (clock + conn.ts_offset) & MASK32
        else:
            conn.snd_wscale = -1
            conn.sack_ok = False
        output.send_syn(conn, ts_val)

    def on_cookie(self, conn: Connection, mss: int) -> DropReason | None:
        """The current segment acknowledges a cookie, in which the peer's segment size was `mss`: its SYN is taken as if we had
        kept it, and then the segment itself.
        """
        segment = self.tcp.segment
        echoed = (segment.ts_ecr - conn.ts_offset) & MASK32
        options = options_of(mss, echoed, segment.ts_val)
        self._take_syn(conn, (segment.seq - 1) & MASK32, segment.window, options)
        self.tcp.register(conn)
        self.half_open.add(conn)
        conn.last_sent = -1.0  # nobody knows when the SYN-ACK left
        reason = segment_arrives(conn, segment)
        if conn.state is State.SYN_RECV:
            conn.fail(0)
        return reason

    def _take_syn(self, conn: Connection, irs: int, window: int, options: TcpOptions | None) -> None:
        accept_syn(conn, irs, window, options)
        conn.listener = self
        conn.snd_nxt = conn.iss + 1
        conn.enter(State.SYN_RECV)

    def on_syn(self, conn: Connection) -> None:
        """A SYN came for us: `conn` is new and answers it with its SYN-ACK."""
        segment = self.tcp.segment
        early, cookie = self._fast_open(conn)
        self.tcp.register(conn)
        self._take_syn(conn, segment.seq, segment.window, segment.options)
        conn.ecn.ok = self.tcp.config.ecn != OFF and segment.flags & ASKS_FOR_ECN == ASKS_FOR_ECN
        self.half_open.add(conn)
        timers = self.tcp.env.timers
        conn.last_sent = timers.now
        if early:
            self._take_early(conn)
        output.send_syn(conn, fastopen=cookie)
        timers.set(conn.retransmit_timer, timers.now + conn.rtt.rto)

    def _fast_open(self, conn: Connection) -> tuple[bool, bytes | None]:
        """What Fast Open makes of the current SYN: whether its data may be taken at once, and the option of the SYN-ACK (RFC
        7413, section 4.2).
        """
        tcp = self.tcp
        flags = tcp.config.fastopen
        limit = self.options.fastopen or (self.backlog if flags & SERVER_WO_SOCKOPT else 0)
        options = tcp.segment.options
        offered = options.fastopen if options is not None else None
        trusted = flags & SERVER_COOKIE_NOT_REQD != 0 and tcp.segment.length > 0
        if not (flags & SERVER and limit) or (offered is None and not trusted):
            return False, None
        mib = tcp.env.mib
        if trusted or (offered and tcp.fastopen.knows(conn.path.dst, offered)):
            if sum(other.fastopen for other in self.half_open) < limit:
                mib.TcpExtTCPFastOpenPassive += 1
                return True, None
            mib.TcpExtTCPFastOpenListenOverflow += 1
            return False, None
        if offered:
            mib.TcpExtTCPFastOpenPassiveFail += 1
        else:
            mib.TcpExtTCPFastOpenCookieReqd += 1
        return False, tcp.fastopen.cookie_for(conn.path.dst)

    def _take_early(self, conn: Connection) -> None:
        """The data of the current SYN is taken, and `conn` may be accepted before its handshake is done."""
        segment = self.tcp.segment
        size = min(segment.length, conn.rcv_adv - conn.rcv_nxt)
        if size and conn.receive_queue.put(segment.frame, segment.offset, size, conn.rcv_nxt, conn.gfp):
            conn.rcv_nxt += size
        conn.fastopen = True
        self.queue.append(conn)
        self.tcp.schedule_wake(self)
        self.tcp.env.want_flush()

    def may_establish(self) -> bool:
        """Whether a handshake may be completed now; counts the refusal when the queue has filled since its SYN
        (tcp_v4_syn_recv_sock). The peer is not reset, as with tcp_abort_on_overflow off: it may succeed later.
        """
        if len(self.queue) <= self.backlog:
            return True
        mib = self.tcp.env.mib
        mib.TcpExtListenOverflows += 1
        mib.TcpExtListenDrops += 1
        return False

    def on_established(self, conn: Connection) -> None:
        """The handshake of `conn` is done: it may be accepted."""
        self.half_open.discard(conn)
        conn.listener = None
        conn.charges.join()
        self.tcp.env.mib.TcpPassiveOpens += 1
        if not conn.fastopen:
            self.queue.append(conn)
            self.tcp.schedule_wake(self)

    def on_failed(self, conn: Connection) -> None:
        """The handshake of `conn` came to nothing."""
        self.half_open.discard(conn)
        conn.listener = None

    @property
    def readable(self) -> bool:
        """Whether `accept` would give a connection or an error at once."""
        return bool(self.queue) or self._closed

    def accept(self) -> Connection:
        """The connection that has waited longest. Raises BlockingIOError when there is none."""
        if self._closed:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not self.queue:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return self.queue.popleft()

    def close(self) -> None:
        """Listen no more; connections not accepted are reset (RFC 9293, section 3.10.4)."""
        if self._closed:
            return
        self._closed = True
        self.tcp.forget_listener(self)
        for conn in self.half_open:
            conn.listener = None
            if not conn.fastopen:
                self.queue.append(conn)
        for conn in self.queue:
            conn.abort(0)
            conn.close()
        self.half_open.clear()
        self.queue.clear()
        self.wake(READABLE)
