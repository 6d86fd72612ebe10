"""The transmission control block (RFC 9293, section 3.3.1): all state of one connection, and the calls of its user.

The user is told by `wake`, called with READABLE, WRITABLE or both when something changed; it then makes the non-blocking calls
below. They raise what the BSD calls would: BlockingIOError when nothing can be done now, and OSError with the connection's
error.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from pools.gfp import ATOMIC, MEMALLOC
from ustack.link.device import ETH_HLEN
from ustack.mem.socket import SOCK_MIN_SNDBUF, SocketMemory
from ustack.timers import Timer
from ustack.transport.events import ORPHAN, READABLE, SHUT_RD, SHUT_WR, WRITABLE, nobody
from ustack.transport.tcp import output, pacing, timers
from ustack.transport.tcp.arming import TIMEOUT
from ustack.transport.tcp.congestion import CONTROLS
from ustack.transport.tcp.ecn import Ecn
from ustack.transport.tcp.inflight import Inflight
from ustack.transport.tcp.rate import DeliveryRate
from ustack.transport.tcp.receive_queue import ReceiveQueue
from ustack.transport.tcp.recovery import Recovery
from ustack.transport.tcp.rtt import RttEstimator
from ustack.transport.tcp.send_queue import SendQueue
from ustack.transport.tcp.states import CAN_SEND, FIN_ACKED, FOLLOWERS, SENDS_FIN, State
from ustack.wire.tcp import HEADER_LEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.mem.page_flip import GivenPages, PageFlipper
    from ustack.net.path import Path
    from ustack.skb import Buffer
    from ustack.transport.events import DirectReader
    from ustack.transport.options import SocketOptions
    from ustack.transport.tcp.congestion.base import CongestionControl
    from ustack.transport.tcp.listener import Listener
    from ustack.transport.tcp.pacing import Pacer
    from ustack.transport.tcp.protocol import Tcp

RATIO_INITIAL: Final = 128
"""`win_ratio` (payload per truesize, in 256ths) until segments have been seen: one half, as Linux (tcp_adv_win_scale = 1)."""


class Connection:
    """One TCP connection. Sequence numbers are unwrapped; sizes are bytes, times seconds.

    Send sequence variables: `iss snd_una snd_nxt snd_wnd snd_wl1 snd_wl2`; receive: `irs rcv_nxt`, `rcv_wup` (RCV.NXT when we
    last acknowledged) and `rcv_adv` (the right edge of the window that we advertised, which never moves left); `no_room_at` is
    RCV.NXT when a segment that begins there was dropped for want of memory, else -1: until it comes again or the user has read,
    the window that we say is 0 (ICSK_ACK_NOMEM of tcp_select_window; Linux 6.5).

    Acknowledgments: `ato` is how long one may wait, in seconds, 0 until data has come; `ack_pushed` counts, up to 2, the small
    segments that the next one is for; `last_segment` is the size of the last segment that was smaller than `rcv_mss`.
    `push_seq`: what lies before it was written by a user who had no more to say.
    """

    __slots__ = (
        "ack_due",
        "ack_pushed",
        "adv_mss",
        "ato",
        "bytes_retrans",
        "cc",
        "charges",
        "deferred",
        "delack_timer",
        "dsack_bytes",
        "ecn",
        "error",
        "fastopen",
        "fin_seq",
        "handed",
        "inflight",
        "irs",
        "iss",
        "keepalive_timer",
        "key",
        "last_ack_sent",
        "last_data",
        "last_received",
        "last_segment",
        "last_sent",
        "listener",
        "local_port",
        "max_window",
        "mss",
        "mss_limit",
        "mss_limit_until",
        "mtu",
        "nagle_end",
        "no_room_at",
        "options",
        "pacer",
        "path",
        "peer_mss",
        "pending",
        "persist_shift",
        "pingpong",
        "probes",
        "push_seq",
        "quick_acks",
        "rate",
        "rcv_adv",
        "rcv_mss",
        "rcv_nxt",
        "rcv_rtt",
        "rcv_ssthresh",
        "rcv_wscale",
        "rcv_wup",
        "rcvbuf",
        "rcvq_seq",
        "rcvq_space",
        "rcvq_time",
        "reader",
        "receive_queue",
        "recovery",
        "remote_port",
        "retransmit_timer",
        "retries",
        "rtt",
        "sack_ok",
        "send_queue",
        "shutdown_mask",
        "snd_nxt",
        "snd_una",
        "snd_wl1",
        "snd_wl2",
        "snd_wnd",
        "snd_wscale",
        "sndbuf",
        "soft_error",
        "stalled_at",
        "state",
        "stray_at",
        "tcp",
        "total_retrans",
        "ts_offset",
        "ts_ok",
        "ts_recent",
        "ts_recent_at",
        "waits_for",
        "wake",
        "wake_mask",
        "win_ratio",
        "write_blocked",
    )

    def __init__(self, tcp: Tcp, path: Path, key: bytes, options: SocketOptions, iss: int) -> None:
        env = tcp.env
        config = tcp.config
        now = env.timers.now
        self.tcp = tcp
        self.path = path
        self.key = key
        self.local_port = int.from_bytes(key[-2:])
        self.remote_port = int.from_bytes(key[-4:-2])
        self.options = options
        self.state = State.CLOSE
        self.listener: Listener | None = None
        self.deferred = False
        self.fastopen = False
        self.error = 0
        self.soft_error = 0
        self.shutdown_mask = 0
        self.wake: Callable[[int], None] = nobody
        self.wake_mask = 0
        self.reader: DirectReader | None = None
        self.handed = 0
        self.pending = False
        self.write_blocked = False

        self.iss = iss
        self.snd_una = self.iss
        self.snd_nxt = self.iss
        self.snd_wnd = 0
        self.snd_wl1 = 0
        self.snd_wl2 = 0
        self.snd_wscale = 0
        self.max_window = 0
        self.nagle_end = self.iss
        self.push_seq = self.iss
        self.irs = 0
        self.rcv_nxt = 0
        self.rcv_wup = 0
        self.rcv_adv = 0
        self.no_room_at = -1
        self.rcv_wscale = 0
        self.fin_seq = -1

        self.mtu = path.mtu
        self.adv_mss = path.link_mtu - path.l4 + ETH_HLEN - HEADER_LEN
        if options.maxseg:
            self.adv_mss = min(self.adv_mss, options.maxseg)
        self.peer_mss = 536 if path.version == 4 else 1220  # what may be assumed (RFC 9293, section 3.7.1)
        self.mss = 536
        self.mss_limit = 0
        self.mss_limit_until = 0.0
        self.sack_ok = False
        self.ts_ok: bool = False
        self.ts_offset: int = tcp.isn.timestamp_offset(key)
        self.ts_recent: int = 0
        self.ts_recent_at = now
        self.last_ack_sent = 0

        self.ack_due = output.ACK_NONE
        self.ack_pushed = 0
        self.ato = 0.0
        self.quick_acks = output.QUICK_ACKS
        self.pingpong = False
        self.last_received = now
        self.last_data = -1.0
        self.last_sent = now
        self.stray_at = now
        self.stalled_at = now
        self.rcv_mss = 536
        self.last_segment = 0
        self.win_ratio = RATIO_INITIAL
        self.rcv_ssthresh = output.WINDOW_UNCLAMPED
        self.rcvbuf = options.rcvbuf or config.rmem_default
        self.sndbuf = options.sndbuf or config.wmem_default
        self.rcvq_space = config.initial_window * 536
        self.rcvq_seq = 0
        self.rcvq_time = now
        self.rcv_rtt = 0.0

        self.rtt = RttEstimator(config)
        self.cc: CongestionControl = CONTROLS[options.congestion or path.congestion or config.congestion](
            self.mss, config.initial_window
        )
        self.pacer: Pacer | None = None
        self.rate = DeliveryRate(now)
        self.recovery = Recovery(config)
        self.inflight = Inflight()
        self.ecn = Ecn()
        self.bytes_retrans = 0
        self.total_retrans = 0
        self.dsack_bytes = 0
        self.waits_for = TIMEOUT
        self.retries = 0
        self.probes = 0
        self.persist_shift = 0
        self.charges = SocketMemory(tcp.mem, tcp.receive_account, tcp.ofo_account, tcp.send_account)
        self.send_queue = SendQueue(env.memory, self.charges, self.iss + 1)
        self.receive_queue = ReceiveQueue(env.memory, self.charges, 0)
        self.retransmit_timer = Timer(lambda: timers.on_retransmit_timer(self))
        self.delack_timer = Timer(lambda: timers.on_delack_timer(self))
        self.keepalive_timer = Timer(lambda: timers.on_keepalive_timer(self))

    # -- names --

    @property
    def local(self) -> tuple[bytes, int]:
        """Our address (packed) and port."""
        return self.path.src, self.local_port

    @property
    def remote(self) -> tuple[bytes, int]:
        """The peer's address (packed) and port."""
        return self.path.dst, self.remote_port

    @property
    def memalloc(self) -> bool:
        """Whether the connection may use the reserve."""
        return self.options.memalloc

    @property
    def gfp(self) -> int:
        """What this connection's allocations may do."""
        return MEMALLOC if self.options.memalloc else ATOMIC

    def under_pressure(self) -> bool:
        """Whether the connection is to hold back, because memory is short and it is an ordinary one."""
        return not self.options.memalloc and self.tcp.mem.under_pressure()

    # -- state --

    def enter(self, state: State) -> None:
        """Change the state; only as figure 5 of RFC 9293 allows."""
        assert state in FOLLOWERS[self.state], (self.state.name, state.name)
        self.state = state

    @property
    def synchronized(self) -> bool:
        """Whether both sides know each other's sequence numbers."""
        return self.state not in (State.CLOSE, State.LISTEN, State.SYN_SENT, State.SYN_RECV)

    @property
    def early(self) -> bool:
        """Whether data came with the peer's SYN, so that an answer need not wait for the end of the handshake (RFC 7413)."""
        return self.fastopen and self.state is State.SYN_RECV

    @property
    def orphan(self) -> bool:
        """Whether the user has closed the connection."""
        return self.shutdown_mask & ORPHAN != 0

    def notify(self, mask: int) -> None:
        """Remember what to tell the user at the next flush."""
        self.wake_mask |= mask
        if not self.pending:
            self.tcp.schedule(self)

    def fail(self, error: int) -> None:
        """The connection is over, with errno `error` (0: in order). Tells the user and releases everything but unread data."""
        if error and not self.error:
            self.error = error
        self.tcp.forget(self)
        self.shutdown_mask |= SHUT_RD | SHUT_WR
        self.notify(READABLE | WRITABLE)

    def set_congestion(self, name: str) -> None:
        """Use the congestion control `name` from now on, with the window as it is. Raises KeyError for one that is none."""
        control = CONTROLS[name]
        old = self.cc
        if control is type(old):
            return
        self.cc = control(self.mss, self.tcp.config.initial_window)
        self.cc.cwnd = self.cc.prior_cwnd = old.cwnd
        self.cc.ssthresh = old.ssthresh
        pacing.update(self)

    # -- what the user calls --

    def send(self, data: Buffer, *, more: bool = False) -> int:
        """Queue bytes of `data` and send what may be sent; return how many were taken. `more` follows at once: do not send yet
        (MSG_MORE).

        Raises BlockingIOError when not one byte can be taken now, BrokenPipeError after a shutdown, or the connection's error.
        """
        self.raise_error()
        if self.shutdown_mask & SHUT_WR or not (self.state in CAN_SEND or self.early):
            if self.state in (State.SYN_SENT, State.SYN_RECV):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        if not view:
            return 0
        queue = self.send_queue
        if self.snd_nxt == queue.end and not self.inflight.to_resend:
            in_flight = self.inflight.in_flight()
            if in_flight < self.cc.cwnd:
                self.rate.on_starved(in_flight)
        lowat = self.options.notsent_lowat
        if lowat:
            # Whole transmissions until the mark is passed, as sendmsg(2) asks for each skb whether there is room.
            room = lowat - (queue.end - self.snd_nxt)
            part = view[: max(-(-room // queue.goal) * queue.goal, 0)]
        else:
            part = view
        taken = queue.append(part, self.sndbuf, self.gfp) if part else 0
        if taken:
            complete = taken == len(view)
            if more and complete:
                output.push(self, output.TAIL_HELD)
            else:
                self.push_seq = queue.end
                output.push(self)
            if complete:
                return taken
        self.write_blocked = True
        if taken < len(part) and queue.account.bytes < self.sndbuf:
            self._moderate_send_limit()
            self.tcp.wait_for_memory(self)
        if not taken:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return taken

    def _moderate_send_limit(self) -> None:
        """There was no memory below the send limit: pressure begins, and the limit comes down to half of what is queued
        (sk_stream_moderate_sndbuf). It grows again with what is acknowledged.
        """
        self.tcp.mem.enter_pressure()
        if not self.options.sndbuf:
            self.sndbuf = max(min(self.sndbuf, self.send_queue.account.bytes >> 1), SOCK_MIN_SNDBUF)

    @property
    def writable(self) -> bool:
        """Whether `send` would take a fair amount of data or say an error at once (poll's POLLOUT; sk_stream_is_writeable)."""
        if self.error or self.shutdown_mask & SHUT_WR:
            return True
        queue = self.send_queue
        if not (self.state in CAN_SEND or self.early) or queue.account.bytes * 3 >= self.sndbuf * 2:
            return False
        lowat = self.options.notsent_lowat
        return not lowat or (queue.end - self.snd_nxt) * 2 < lowat

    @property
    def readable(self) -> bool:
        """Whether `recv` would give data (as much as SO_RCVLOWAT asks for), end of file or an error at once (poll's POLLIN)."""
        if self.error or self.at_end:
            return True
        lowat = self.options.rcvlowat
        return bool(self.receive_queue.queue) and (lowat <= 1 or self.unread >= lowat)

    @property
    def unread(self) -> int:
        """Bytes that `recv` would give (SIOCINQ)."""
        return self.receive_queue.available(self.rcv_nxt - (0 <= self.fin_seq < self.rcv_nxt))

    @property
    def unacknowledged(self) -> int:
        """Bytes of the stream that the peer has not acknowledged, sent or not; a FIN counts as one (SIOCOUTQ)."""
        if not self.synchronized:
            return 0
        return max(self.send_queue.end + (self.state in FIN_ACKED) - self.snd_una, 0)

    @property
    def at_end(self) -> bool:
        """Whether no more data can come."""
        return self.shutdown_mask & SHUT_RD != 0 or (0 <= self.fin_seq < self.rcv_nxt)

    def recv(self, limit: int) -> bytes:
        """Take up to `limit` bytes; b"" at the end of the stream. Raises BlockingIOError or the connection's error."""
        queue = self.receive_queue
        available = queue.available(self.rcv_nxt - (0 <= self.fin_seq < self.rcv_nxt))
        if available and limit:
            data = queue.read(limit, available)
            output.after_read(self)
            return data
        self._raise_nothing_to_read(limit)
        return b""

    def recv_into(self, target: memoryview, *, peek: bool = False) -> int:
        """Like `recv`, into a writable view of bytes; returns how many; 0 at the end of the stream. `peek` leaves them."""
        queue = self.receive_queue
        if queue.queue and target:
            done = queue.read_into(target, peek=peek)
            if not peek:
                output.after_read(self)
            return done
        self._raise_nothing_to_read(len(target))
        return 0

    def recv_pages(self, flipper: PageFlipper, pages: int) -> GivenPages:
        """Like `recv`, as up to `pages` pages that are given away: whole skbs, at least one. No pages at the end of the
        stream.
        """
        skbs = self.receive_queue.first(pages)
        given = flipper.give(skbs)
        if skbs:
            self.receive_queue.skip(len(skbs))
            output.after_read(self)
        else:
            self._raise_nothing_to_read(pages)
        return given

    def _raise_nothing_to_read(self, limit: int) -> None:
        if (self.receive_queue.queue and not limit) or 0 <= self.fin_seq < self.rcv_nxt:
            return  # the stream has ended in order: a reset that came later is for who writes
        self.raise_error()
        if not self.at_end and limit:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def raise_error(self) -> None:
        """Raise the pending error, once (SO_ERROR's clearing read)."""
        if self.error:
            error = self.take_error()
            raise OSError(error, os.strerror(error))

    def take_error(self) -> int:
        """The pending errno, or 0; it is cleared by being read (SO_ERROR)."""
        error = self.error
        self.error = 0
        return error

    def shutdown(self, how: int) -> None:
        """Close the directions `how` (SHUT_RD, SHUT_WR or both; shutdown(2)). Raises ENOTCONN when there is no connection."""
        if self.state in (State.CLOSE, State.SYN_SENT):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if how & SHUT_WR and not self.shutdown_mask & SHUT_WR:
            self.shutdown_mask |= SHUT_WR
            self._send_fin()
        if how & SHUT_RD:
            self.shutdown_mask |= SHUT_RD
            self.notify(READABLE)

    def _send_fin(self) -> None:
        if self.state in SENDS_FIN:  # in SYN-RECEIVED it waits until the peer has our SYN (RFC 9293, section 3.10.4)
            self.enter(SENDS_FIN[self.state])
            output.push(self)

    def close(self) -> None:
        """The user is done (close(2)): the stack finishes in order, or resets when data was left unread (RFC 9293, 3.6; RFC
        2525, 2.17).
        """
        self.wake = nobody
        self.reader = None
        unread = bool(self.receive_queue.queue)
        self.receive_queue.clear()
        self.shutdown_mask |= SHUT_RD | ORPHAN
        if self.state is State.CLOSE:
            self.send_queue.clear()
            self.charges.reclaim()
            return
        if self.state is State.SYN_SENT:
            self.fail(0)
        elif unread or self.options.linger == 0:
            self.abort(0)
        else:
            if not self.shutdown_mask & SHUT_WR:
                self.shutdown_mask |= SHUT_WR
                self._send_fin()
            if self.state is State.FIN_WAIT2:
                if self.options.linger2 < 0:
                    self.abort(0)
                else:
                    timers.start_fin_wait2(self)
            elif self.out_of_memory():
                self.abort(0)

    def out_of_memory(self) -> bool:
        """Whether the connection, which its user has closed, holds unsent data that nobody can afford any more; counted
        (tcp_check_oom).
        """
        mem = self.tcp.mem
        if mem.allocated <= mem.high or self.options.memalloc or self.send_queue.account.bytes <= SOCK_MIN_SNDBUF:
            return False
        self.tcp.env.mib.TcpExtTCPAbortOnMemory += 1
        return True

    def abort(self, error: int) -> None:
        """Reset the connection; the user gets errno `error` (0: none)."""
        if self.synchronized or self.state is State.SYN_RECV:
            output.send_reset(self)
        if self.state is not State.CLOSE:
            self.fail(error)
