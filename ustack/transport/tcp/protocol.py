"""TCP of one stack: finds the connection of a segment, answers segments that have none, owns ports and listeners."""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.mem.protocol import ProtocolMemory, limits_for
from ustack.net.addresses import ANY4, ANY6, overlap
from ustack.net.icmpv6 import errno_of
from ustack.skb import Account
from ustack.timers import Timer
from ustack.transport.events import READABLE, WRITABLE
from ustack.transport.ports import ephemeral_ports
from ustack.transport.tcp import output
from ustack.transport.tcp.arriving import MARKED, ArrivingSegment, unwrap
from ustack.transport.tcp.connection import Connection
from ustack.transport.tcp.ecn import CE, ECN_MASK
from ustack.transport.tcp.fastopen import CLIENT, CLIENT_NO_COOKIE, FastOpen
from ustack.transport.tcp.input import segment_arrives
from ustack.transport.tcp.isn import IsnGenerator
from ustack.transport.tcp.listener import Listener
from ustack.transport.tcp.output import ACK_NONE, ACK_NOW, IPPROTO_TCP, MASK32
from ustack.transport.tcp.sample import AckSample
from ustack.transport.tcp.states import CLOSE, State
from ustack.transport.tcp.syncookies import SynCookies
from ustack.transport.tcp.timewait import TimeWait
from ustack.wire.checksum import finish, ones_sum_views, pseudo_v4
from ustack.wire.icmp import ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED
from ustack.wire.icmpv6 import ICMPV6_PKT_TOOBIG, ICMPV6_TIME_EXCEED
from ustack.wire.tcp import (
    ACK,
    FIN,
    FLAGS_MASK,
    HEADER,
    HEADER_LEN,
    HEADER_MAX,
    OFF_CSUM,
    RST,
    SYN,
    TS,
    TS_LEN,
    TS_MARK,
    WSCALE_MAX,
    parse_options,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.env import Env
    from ustack.net.ip import Ip
    from ustack.net.layer import IpPacket
    from ustack.net.path import Path
    from ustack.skb import Buffer, Skb
    from ustack.transport.options import SocketOptions
    from ustack.transport.tcp.config import TcpConfig

WINDOW_MAX: Final = 0xFFFF << WSCALE_MAX
"""Bytes of the largest window: what an old segment of a connection lies at most beyond its SND.NXT."""

TCP_EIGHTHS: Final = 6
"""Eighths of the arena, without its watermarks, that all connections together may hold unless configured: so that there is
always something left for the rest."""

MEMORY_RETRY: Final = 0.05
"""Seconds between looks for free pages while somebody waits for them."""

_UNREACHABLE_ERRNO: Final = {
    0: errno.ENETUNREACH,
    1: errno.EHOSTUNREACH,
    2: errno.ENOPROTOOPT,
    3: errno.ECONNREFUSED,
    5: errno.EOPNOTSUPP,
    6: errno.ENETUNREACH,
    7: errno.EHOSTUNREACH,
    9: errno.ENETUNREACH,
    10: errno.EHOSTUNREACH,
    13: errno.EHOSTUNREACH,
}
"""ICMP unreachable codes as errors (RFC 1122, section 4.2.3.9; Linux icmp_err_convert)."""


def connection_key(remote: bytes, local: bytes, remote_port: int, local_port: int) -> bytes:
    """The name of a connection, in the order in which an arriving segment spells it."""
    return remote + local + remote_port.to_bytes(2) + local_port.to_bytes(2)


class Tcp:
    """TCP of one stack. `connections` holds those in TIME-WAIT as well; the accounts are the memory of all sockets by kind."""

    __slots__ = (
        "_challenge_second",
        "_challenges",
        "_local_ports",
        "_memory_timer",
        "_memory_waiters",
        "_pending",
        "_pressure_since",
        "_time_wait_timer",
        "_time_waits",
        "_woken_listeners",
        "config",
        "connections",
        "cookies",
        "env",
        "fastopen",
        "ip",
        "isn",
        "listeners",
        "mem",
        "ofo_account",
        "receive_account",
        "sample",
        "segment",
        "send_account",
    )

    def __init__(self, env: Env, ip: Ip, config: TcpConfig) -> None:
        self.env = env
        self.ip = ip
        self.config = config
        self.isn = IsnGenerator(env.random.randbytes(16))
        self.cookies = SynCookies(env.random.randbytes(16))
        self.fastopen = FastOpen(env.random.randbytes(16))
        self.connections: dict[bytes, Connection | TimeWait] = {}
        self.listeners: dict[tuple[bytes | None, int], Listener] = {}
        self.segment = ArrivingSegment()
        self.sample = AckSample()
        self.send_account = Account("tcp send")
        self.receive_account = Account("tcp receive")
        self.ofo_account = Account("tcp out of order")
        pages = env.memory.pages
        limits = limits_for(pages, config.mem_pages(), TCP_EIGHTHS)
        self.mem = ProtocolMemory(pages, limits, config.rmem_min, config.wmem_min, self._on_pressure)
        self._pressure_since = 0.0
        self._pending: list[Connection] = []
        self._woken_listeners: list[Listener] = []
        self._memory_waiters: dict[Connection, None] = {}
        self._memory_timer = Timer(self._wake_memory_waiters)
        self._local_ports: dict[int, int] = {}  # how many connections use each local port
        self._time_waits: deque[tuple[float, TimeWait]] = deque()
        self._time_wait_timer = Timer(self._expire_time_waits)
        self._challenge_second = -1
        self._challenges = 0
        ip.register(IPPROTO_TCP, self.input, self.on_icmp_error, self.on_icmpv6_error, self.is_memalloc)

    def _on_pressure(self, on: bool) -> None:
        """Pressure begins or ends (tcp_enter_memory_pressure, tcp_leave_memory_pressure)."""
        now = self.env.timers.now
        if on:
            self.env.mib.TcpExtTCPMemoryPressures += 1
            self._pressure_since = now
        else:
            self.env.mib.TcpExtTCPMemoryPressuresChrono += int((now - self._pressure_since) * 1000)

    # -- segments in --

    def input(self, packet: IpPacket) -> None:
        """A packet of protocol 6 arrived."""
        env = self.env
        env.mib.TcpInSegs += 1
        frame = packet.frame
        l4 = packet.l4
        l4_len = packet.l4_len
        if l4_len < HEADER_LEN:
            self._bad_segment(DropReason.PKT_TOO_SMALL)
            return
        head = frame.head
        _, dport, seq, ack, off_flags, window, _, _ = HEADER.unpack_from(head, l4)
        hlen = off_flags >> 10 & 0x3C
        if hlen < HEADER_LEN or hlen > l4_len:
            self._bad_segment(DropReason.TCP_HDR)
            return
        if not frame.csum_ok and finish(
            pseudo_v4(packet.src, packet.dst, IPPROTO_TCP, l4_len) + ones_sum_views(frame.views(l4, l4_len))
        ):
            self._bad_segment(DropReason.TCP_CSUM)
            return
        segment = self.segment
        segment.frame = frame
        segment.seq = seq
        segment.ack = ack
        segment.flags = off_flags & FLAGS_MASK
        if packet.tos & ECN_MASK == CE:
            segment.flags |= MARKED
        segment.window = window
        segment.offset = l4 + hlen
        segment.length = l4_len - hlen
        if hlen == HEADER_LEN:
            segment.options = None
            segment.ts_val = segment.ts_ecr = -1
        else:
            self._parse_options(segment, head, l4 + HEADER_LEN, l4 + hlen)
        # Without IP options the name of the connection lies in the packet as it is: addresses, then ports.
        key = bytes(head[l4 - 8 : l4 + 4]) if l4 - packet.l3 == 20 else packet.src + packet.dst + bytes(head[l4 : l4 + 4])
        conn = self.connections.get(key)
        if isinstance(conn, Connection):
            if frame.pfmemalloc and not conn.options.memalloc:
                self._drop_pfmemalloc()
                return
            reason = segment_arrives(conn, segment)
            if conn.handed:
                self._tell_reader(conn)
        elif conn is not None:
            reason = self._in_time_wait(conn, packet, key, dport)
        else:
            reason = self._without_connection(packet, key, dport)
        if reason is not None:
            env.drops.counts[reason] += 1

    def _parse_options(self, segment: ArrivingSegment, head: memoryview, start: int, end: int) -> None:
        if end - start == TS_LEN and not segment.flags & SYN:
            mark, segment.ts_val, segment.ts_ecr = TS.unpack_from(head, start)
            if mark == TS_MARK:
                segment.options = None
                return
        segment.options = options = parse_options(head, start, end)
        segment.ts_val = options.ts_val
        segment.ts_ecr = options.ts_ecr

    def _tell_reader(self, conn: Connection) -> None:
        """Data of this segment went straight to the user's buffer, and everything about the segment is done."""
        size = conn.handed
        conn.handed = 0
        if conn.reader is not None:
            conn.reader.took(size)
            output.after_read(conn)

    def _bad_segment(self, reason: DropReason) -> None:
        self.env.mib.TcpInErrs += 1
        self.env.drops.count(reason)

    def _drop_pfmemalloc(self) -> None:
        """The drop rule: memory of the reserve is not for this socket (sk_filter; Linux 3.6)."""
        self.env.mib.TcpExtPFMemallocDrop += 1
        self.env.drops.count(DropReason.PFMEMALLOC)

    def _in_time_wait(self, old: TimeWait, packet: IpPacket, key: bytes, dport: int) -> DropReason | None:
        segment = self.segment
        if old.may_be_reused_by(segment) and self._listener(packet.dst, dport) is not None:
            self._end_time_wait(old)
            return self._without_connection(packet, key, dport, old.snd_nxt)
        return old.segment_arrives(segment)

    def _listener(self, address: bytes, port: int) -> Listener | None:
        listeners = self.listeners
        anybody = ANY4 if len(address) == 4 else ANY6
        return listeners.get((address, port)) or listeners.get((anybody, port)) or listeners.get((None, port))

    def _without_connection(self, packet: IpPacket, key: bytes, dport: int, used: int = -1) -> DropReason | None:
        """LISTEN and CLOSED (RFC 9293, sections 3.10.7.1 and 3.10.7.2)."""
        segment = self.segment
        flags = segment.flags
        listener = self._listener(packet.dst, dport)
        if listener is None:
            if not flags & RST:
                self._reset_reply(packet.dst, packet.src, key)
            return DropReason.NO_SOCKET
        if flags & RST:
            return DropReason.TCP_RESET
        if flags & ACK:
            if listener.expects_cookies and not flags & SYN:
                return self._on_cookie(listener, packet, key)
            self._reset_reply(packet.dst, packet.src, key)
            return DropReason.TCP_INVALID_ACK
        if not flags & SYN or flags & FIN:
            return DropReason.TCP_FLAGS
        if packet.frame.pfmemalloc and not listener.options.memalloc:
            self._drop_pfmemalloc()
            return None
        refused = listener.refusal()
        if refused is not None:
            return refused
        try:
            path = self.ip.path(packet.src, packet.dst)
        except OSError:
            return None  # counted where the route was looked for
        conn = self._new(path, key, listener.options.copy(), self._isn(key, used))
        if listener.needs_cookies:
            listener.send_cookie(conn)
        else:
            listener.on_syn(conn)
        return None

    def _on_cookie(self, listener: Listener, packet: IpPacket, key: bytes) -> DropReason | None:
        """An ACK without a connection, at a listener that has answered SYNs with cookies (RFC 4987, section 3.6)."""
        segment = self.segment
        mib = self.env.mib
        cookie = (segment.ack - 1) & MASK32
        mss = self.cookies.check(key, (segment.seq - 1) & MASK32, cookie, self.env.timers.now)
        if not mss:
            mib.TcpExtSyncookiesFailed += 1
            self._reset_reply(packet.dst, packet.src, key)
            return DropReason.TCP_INVALID_ACK
        mib.TcpExtSyncookiesRecv += 1
        if packet.frame.pfmemalloc and not listener.options.memalloc:
            self._drop_pfmemalloc()
            return None
        if not listener.may_establish():
            return DropReason.LISTEN_OVERFLOW
        try:
            path = self.ip.path(packet.src, packet.dst)
        except OSError:
            return None
        conn = self._new(path, key, listener.options.copy(), cookie)
        return listener.on_cookie(conn, mss)

    def _isn(self, key: bytes, used: int) -> int:
        """An initial sequence number; `used`, unless -1, is SND.NXT of the connection of that name before, and it starts beyond
        (RFC 9293, section 3.6.1).
        """
        iss = self.isn.isn(key, self.env.timers.now)
        if used >= 0 and unwrap(iss, used) <= used:
            iss = (used + WINDOW_MAX) & MASK32
        return iss

    def _new(self, path: Path, key: bytes, options: SocketOptions, iss: int) -> Connection:
        """A connection that nobody finds yet."""
        conn = Connection(self, path, key, options, iss)
        if self.config.window_scaling:
            largest = options.rcvbuf or self.config.rmem_max
            while conn.rcv_wscale < WSCALE_MAX and 0xFFFF << conn.rcv_wscale < largest:
                conn.rcv_wscale += 1
        return conn

    def register(self, conn: Connection) -> None:
        """From now on segments find `conn`, and its local port is taken."""
        self.connections[conn.key] = conn
        port = conn.local_port
        self._local_ports[port] = self._local_ports.get(port, 0) + 1

    # -- segments out that belong to no connection --

    def send_bare(self, path: Path, key: bytes, seq: int, ack: int, flags: int, window: int, options: bytes = b"") -> None:
        """Send a segment without data for the connection named `key`; numbers as on the wire."""
        at = path.l4
        hlen = HEADER_LEN + len(options)
        HEADER.pack_into(
            path.head, at, int.from_bytes(key[-2:]), int.from_bytes(key[-4:-2]), seq, ack, hlen << 10 | flags, window, 0, 0
        )
        path.head[at + HEADER_LEN : at + hlen] = options
        self.env.mib.TcpOutSegs += 1
        path.send(IPPROTO_TCP, hlen, [], 0, OFF_CSUM)

    def _reset_reply(self, local: bytes, remote: bytes, key: bytes) -> None:
        """Reset what sent the current segment (RFC 9293, section 3.5.2): nobody here knows it."""
        segment = self.segment
        try:
            path = self.ip.path(remote, local)
        except OSError:
            return
        self.env.mib.TcpOutRsts += 1
        if segment.flags & ACK:
            self.send_bare(path, key, segment.ack, 0, RST, 0)
        else:
            end = segment.seq + segment.length + bool(segment.flags & SYN) + (segment.flags & FIN)
            self.send_bare(path, key, 0, end & MASK32, RST | ACK, 0)

    def reset_stray(self, conn: Connection) -> None:
        """Reset what sent the current segment, whose acknowledgment does not fit the opening connection `conn`."""
        self._reset_reply(conn.path.src, conn.path.dst, conn.key)

    def may_challenge(self) -> bool:
        """Whether one more challenge ACK may be sent in this second (RFC 5961, section 7)."""
        second = int(self.env.timers.now)
        if second != self._challenge_second:
            # Not exactly the limit, or who can draw challenges can count those of others by it (CVE-2016-5696).
            limit = self.config.challenge_ack_limit
            self._challenge_second = second
            self._challenges = (limit + 1) // 2 + self.env.random.randrange(max(limit, 1))
        self._challenges -= 1
        return self._challenges >= 0

    # -- opening --

    def connect(
        self, path: Path, local_port: int, remote_port: int, options: SocketOptions, early: Buffer | None = None
    ) -> Connection:
        """Open a connection actively; `local_port` 0 chooses one. It is made when `wake` says WRITABLE and no error is pending.

        With `early`, as much of it as fits goes with the SYN if the server's Fast Open cookie is known, and is in the send
        queue then; otherwise the SYN asks for the cookie (RFC 7413, section 4.1).

        Raises OSError: EADDRNOTAVAIL when no port is free, EADDRINUSE when the connection exists.
        """
        used = -1
        if local_port:
            key = connection_key(path.dst, path.src, remote_port, local_port)
            old = self.connections.get(key)
            if isinstance(old, TimeWait) and old.ts_ok:
                self._end_time_wait(old)  # its successor's timestamps are newer (RFC 6191)
                used = old.snd_nxt
            elif old is not None:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        else:
            key = self._choose_key(path, remote_port)
        conn = self._new(path, key, options, self._isn(key, used))
        self.register(conn)
        conn.charges.join()
        conn.snd_nxt = conn.iss + 1
        conn.enter(State.SYN_SENT)
        self.env.mib.TcpActiveOpens += 1
        timers = self.env.timers
        conn.last_sent = timers.now
        if early is None or not self.config.fastopen & CLIENT:
            output.send_syn(conn)
        else:
            self._send_early(conn, memoryview(early).cast("B"))
        timers.set(conn.retransmit_timer, timers.now + conn.rtt.rto)
        return conn

    def may_send_early(self, server: bytes) -> bool:
        """Whether data for `server` (packed) may go with a SYN."""
        flags = self.config.fastopen
        return flags & CLIENT != 0 and (flags & CLIENT_NO_COOKIE != 0 or self.fastopen.recall(server) is not None)

    def _send_early(self, conn: Connection, data: memoryview) -> None:
        known = self.fastopen.recall(conn.path.dst)
        cookie, mss = known or (b"", conn.peer_mss)
        size = 0
        if self.may_send_early(conn.path.dst):
            room = min(mss, conn.adv_mss) - (HEADER_MAX - HEADER_LEN)
            size = conn.send_queue.append(data[:room], conn.sndbuf, conn.gfp)
            conn.snd_nxt += size
            conn.push_seq = conn.send_queue.end
        output.send_syn(conn, fastopen=None if size and not cookie else cookie, early=size)

    def _choose_key(self, path: Path, remote_port: int) -> bytes:
        """A name whose ephemeral port is free for this peer, starting at random (RFC 6056, algorithm 1)."""
        for port in ephemeral_ports(self.env.random):
            key = connection_key(path.dst, path.src, remote_port, port)
            if key not in self.connections and not self._is_listening(port):
                return key
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    def _is_listening(self, port: int) -> bool:
        return any(bound == port for _, bound in self.listeners)

    def check_bind(self, address: bytes | None, port: int, *, reuse: bool) -> None:
        """Raises OSError EADDRINUSE when a socket must not be bound to `port`; `reuse` is SO_REUSEADDR."""
        for bound, listening in self.listeners:
            if listening == port and overlap(address, bound):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        if not reuse and self._local_ports.get(port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def free_port(self) -> int:
        """An ephemeral port that nothing uses. Raises OSError EADDRINUSE when there is none."""
        for port in ephemeral_ports(self.env.random):
            if not self._local_ports.get(port) and not self._is_listening(port):
                return port
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def listen(self, address: bytes | None, port: int, backlog: int, options: SocketOptions) -> Listener:
        """Listen on `port` of `address` (packed; 0.0.0.0 or :: for any of that version, None for any). Raises OSError
        EADDRINUSE.
        """
        self.check_bind(address, port, reuse=True)
        listener = Listener(self, address, port, backlog, options)
        self.listeners[address, port] = listener
        return listener

    def forget_listener(self, listener: Listener) -> None:
        """The listener is closed."""
        del self.listeners[listener.address, listener.port]

    def queued(self) -> Iterator[Skb]:
        """The packets that wait in the queues of all connections."""
        for conn in self.connections.values():
            if isinstance(conn, Connection):
                yield from conn.receive_queue.queue
                yield from conn.receive_queue.ofo
                yield from conn.send_queue.skbs()

    # -- the batch --

    def schedule(self, conn: Connection) -> None:
        """`conn` has something to tell its user or to send at the next flush."""
        conn.pending = True
        if not self._pending:
            self.env.want_flush()
        self._pending.append(conn)

    def schedule_wake(self, listener: Listener) -> None:
        """`listener` has a connection to accept."""
        self._woken_listeners.append(listener)

    def wait_for_memory(self, conn: Connection) -> None:
        """Tell `conn` when there are pages again. Nobody says when, so it is looked for (vm_wait of sk_stream_wait_memory)."""
        self._memory_waiters[conn] = None
        if not self._memory_timer.pending:
            self.env.timers.set(self._memory_timer, self.env.timers.now + MEMORY_RETRY)

    def flush(self) -> None:
        """End a batch: wake the users of everything that changed, then send what each connection owes."""
        while self._woken_listeners:
            self._woken_listeners.pop().wake(READABLE)
        if self._memory_waiters and not self.mem.under_pressure():
            self._wake_memory_waiters()
        while self._pending:
            batch = self._pending
            self._pending = []
            for conn in batch:
                conn.pending = False
                mask = conn.wake_mask
                if mask:
                    conn.wake_mask = 0
                    conn.wake(mask)
                if conn.state is not CLOSE:
                    output.push(conn)
                    if conn.ack_due == ACK_NOW:
                        output.send_ack(conn)

    def _wake_memory_waiters(self) -> None:
        pages = self.env.memory.pages
        waiters = self._memory_waiters
        if pages.free_pages > pages.min_pages and self.mem.allocated < self.mem.high:
            woken = waiters
            self._memory_waiters = {}
        elif pages.free_pages:
            woken = {conn: None for conn in waiters if conn.options.memalloc}
            for conn in woken:
                del waiters[conn]
        else:
            woken = {}
        for conn in woken:
            conn.write_blocked = False
            conn.notify(WRITABLE)
        if self._memory_waiters and not self._memory_timer.pending:
            self.env.timers.set(self._memory_timer, self.env.timers.now + MEMORY_RETRY)

    # -- ending --

    def forget(self, conn: Connection) -> None:
        """The connection is over: no segment finds it any more, its timers stop, its unsent data is freed."""
        if conn.state is State.CLOSE:
            return
        conn.enter(State.CLOSE)
        if self.connections.get(conn.key) is conn:
            self._remove(conn.key)
        if conn.listener is not None:
            conn.listener.on_failed(conn)
        conn.retransmit_timer.cancel()
        conn.delack_timer.cancel()
        conn.keepalive_timer.cancel()
        conn.send_queue.clear()
        conn.inflight.clear()
        if conn.pacer is not None:
            conn.pacer.cancel()
        conn.receive_queue.drop_out_of_order()
        if conn.orphan:
            conn.receive_queue.clear()
        conn.charges.leave()
        self._memory_waiters.pop(conn, None)

    def _remove(self, key: bytes) -> None:
        del self.connections[key]
        port = int.from_bytes(key[-2:])
        count = self._local_ports[port] - 1
        if count:
            self._local_ports[port] = count
        else:
            del self._local_ports[port]

    def enter_time_wait(self, conn: Connection) -> None:
        """Both FINs are acknowledged: a small record takes the place of the connection."""
        conn.enter(State.TIME_WAIT)
        if conn.ack_due != ACK_NONE:
            output.send_ack(conn)
        now = self.env.timers.now
        key = conn.key
        conn.fail(0)
        port = int.from_bytes(key[-2:])
        self._local_ports[port] = self._local_ports.get(port, 0) + 1
        wait = TimeWait(conn, now + self.config.time_wait)
        self.connections[key] = wait
        self._time_waits.append((wait.expires, wait))
        self.env.mib.TcpExtTW += 1
        if len(self._time_waits) > self.config.max_tw_buckets:
            self._end_time_wait(self._time_waits.popleft()[1])
        if not self._time_wait_timer.pending:
            self.env.timers.set(self._time_wait_timer, wait.expires)

    def restart_time_wait(self, wait: TimeWait) -> None:
        """The peer has sent its FIN again: wait the full time from now."""
        wait.expires = self.env.timers.now + self.config.time_wait

    def _end_time_wait(self, wait: TimeWait) -> None:
        if self.connections.get(wait.key) is wait:
            self._remove(wait.key)

    def _expire_time_waits(self) -> None:
        now = self.env.timers.now
        queue = self._time_waits
        while queue and queue[0][0] <= now:
            wait = queue.popleft()[1]
            if wait.expires <= now:
                self._end_time_wait(wait)
            elif self.connections.get(wait.key) is wait:
                queue.append((wait.expires, wait))
        if queue:
            self.env.timers.set(self._time_wait_timer, queue[0][0])

    def close(self) -> None:
        """Reset every connection, tell its user ECONNABORTED, and forget it: the stack goes down."""
        for listener in list(self.listeners.values()):
            listener.close()
        connections = [conn for conn in self.connections.values() if isinstance(conn, Connection)]
        for conn in connections:
            conn.abort(errno.ECONNABORTED)
        self.flush()
        for conn in connections:
            conn.close()
        self.connections.clear()
        self._local_ports.clear()
        self._time_waits.clear()
        self._time_wait_timer.cancel()
        self._memory_timer.cancel()
        self._pending.clear()

    # -- ICMP --

    def on_icmp_error(self, icmp_type: int, code: int, mtu: int, src: bytes, dst: bytes, quoted: bytes) -> bool:
        """An ICMP error about a segment that we sent. Returns whether it is plausible (RFC 5927: its sequence number is
        outstanding).
        """
        conn = self._outstanding(src, dst, quoted)
        if conn is None:
            return False
        if icmp_type != ICMP_DEST_UNREACH:
            return True
        if code == ICMP_FRAG_NEEDED:
            self._too_big(conn, mtu)
        else:
            self._unreachable(conn, _UNREACHABLE_ERRNO.get(code, errno.EHOSTUNREACH))
        return True

    def on_icmpv6_error(self, icmp_type: int, code: int, mtu: int, src: bytes, dst: bytes, quoted: bytes) -> bool:
        """The same for an ICMPv6 error."""
        conn = self._outstanding(src, dst, quoted)
        if conn is None:
            return False
        if icmp_type == ICMPV6_PKT_TOOBIG:
            self._too_big(conn, mtu)
        elif icmp_type != ICMPV6_TIME_EXCEED:
            self._unreachable(conn, errno_of(icmp_type, code)[0])
        return True

    def _outstanding(self, src: bytes, dst: bytes, quoted: bytes) -> Connection | None:
        """The connection that sent the segment that begins with `quoted`, if that is not acknowledged yet (RFC 5927)."""
        local_port, remote_port = int.from_bytes(quoted[:2]), int.from_bytes(quoted[2:4])
        conn = self.connections.get(connection_key(dst, src, remote_port, local_port))
        if not isinstance(conn, Connection):
            return None
        seq = unwrap(int.from_bytes(quoted[4:8]), conn.snd_una)
        opening = conn.state in (State.SYN_SENT, State.SYN_RECV)
        return conn if (conn.iss if opening else conn.snd_una) <= seq < conn.snd_nxt else None

    def _too_big(self, conn: Connection, mtu: int) -> None:
        if conn.state is State.SYN_SENT and conn.snd_nxt > conn.iss + 1:
            self.env.mib.TcpRetransSegs += 1
            output.send_syn(conn)  # without the data that made it too large (RFC 7413, section 4.1.3.1)
        elif mtu < conn.mtu:
            conn.recovery.on_narrower_path(conn)
            self.schedule_once(conn)

    def _unreachable(self, conn: Connection, error: int) -> None:
        if conn.state in (State.SYN_SENT, State.SYN_RECV):
            conn.fail(error)  # hard in these states (RFC 5461 discusses why this is what users want)
        else:
            conn.soft_error = error

    def is_memalloc(self, src: bytes, dst: bytes, quoted: bytes) -> bool:
        """Whether the segment from `src` to `dst` whose first bytes are `quoted` is one of a memalloc socket's."""
        local_port, remote_port = int.from_bytes(quoted[:2]), int.from_bytes(quoted[2:4])
        conn = self.connections.get(connection_key(dst, src, remote_port, local_port))
        return isinstance(conn, Connection) and conn.options.memalloc

    def resume(self, conn: Connection) -> None:
        """The pacing timer: `conn` may go on sending."""
        if conn.state is not CLOSE:
            output.push(conn)

    def schedule_once(self, conn: Connection) -> None:
        """Flush `conn` with the next batch."""
        if not conn.pending:
            self.schedule(conn)
