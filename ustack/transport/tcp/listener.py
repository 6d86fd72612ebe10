"""Passive opening: half-open connections, and those that wait to be accepted."""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING

from ustack.drops import DropReason
from ustack.transport.events import READABLE, nobody
from ustack.transport.tcp import output
from ustack.transport.tcp.input import accept_syn
from ustack.transport.tcp.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.transport.options import SocketOptions
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.protocol import Tcp


class Listener:
    """A listening socket on `address` (packed; None: any of ours) and `port`.

    `backlog` bounds the connections that wait in `queue` to be accepted; `half_open` counts those in SYN-RECEIVED.
    """

    __slots__ = ("_closed", "address", "backlog", "half_open", "options", "port", "queue", "tcp", "wake")

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

    def refusal(self) -> DropReason | None:
        """Why another SYN must not be answered now, counted; None when it may be (tcp_conn_request, sk_acceptq_is_full)."""
        mib = self.tcp.env.mib
        if len(self.queue) > self.backlog:
            mib.TcpExtListenOverflows += 1
            mib.TcpExtListenDrops += 1
            return DropReason.LISTEN_OVERFLOW
        if len(self.half_open) >= self.tcp.config.max_syn_backlog:
            mib.TcpExtListenDrops += 1
            return DropReason.SYN_OVERFLOW
        return None

    def on_syn(self, conn: Connection) -> None:
        """A SYN came for us: `conn` is new and answers it with its SYN-ACK."""
        accept_syn(conn, self.tcp.segment)
        conn.listener = self
        conn.snd_nxt = conn.iss + 1
        conn.enter(State.SYN_RECV)
        self.half_open.add(conn)
        timers = self.tcp.env.timers
        conn.last_sent = timers.now
        output.send_syn(conn)
        timers.set(conn.retransmit_timer, timers.now + conn.rtt.rto)

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
        self.tcp.env.mib.TcpPassiveOpens += 1
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
        for conn in [*self.half_open, *self.queue]:
            conn.abort(0)
            conn.close()
        self.half_open.clear()
        self.queue.clear()
        self.wake(READABLE)
