"""BSD sockets with await: the calls, options and errors of the socket module, over our stack.

Every call that may have to wait has a `_nowait` twin, which raises BlockingIOError instead. The waiting calls do no I/O: they
park a future until the transport says that it is worth trying again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket as names
import termios
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from ustack import sockaddr
from ustack.net.addresses import ANY4, ANY6, is_any, is_multicast
from ustack.socket_options import GETTERS, SETTERS, TCP_INQ
from ustack.socket_poll import readiness
from ustack.transport.events import READABLE, SHUT_RD, SHUT_WR, WRITABLE, nobody
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.info import tcp_info
from ustack.transport.tcp.states import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from ustack.env import Env
    from ustack.mem.page_flip import GivenPages, PageFlipper
    from ustack.mem.reserve import Demand, Reserve
    from ustack.net.interface import Interface
    from ustack.net.ip import Ip
    from ustack.skb import Buffer
    from ustack.sockaddr import Address
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.listener import Listener
    from ustack.transport.tcp.protocol import Tcp
    from ustack.transport.udp import Udp, UdpSocket

SIOCINQ: Final = termios.FIONREAD
"""Ask `Socket.ioctl` for the bytes that wait to be read (tcp(7))."""

SIOCOUTQ: Final = termios.TIOCOUTQ
"""Ask `Socket.ioctl` for the bytes that the peer has not acknowledged, a FIN counted as one (tcp(7))."""

SHUT: Final = {names.SHUT_RD: SHUT_RD, names.SHUT_WR: SHUT_WR, names.SHUT_RDWR: SHUT_RD | SHUT_WR}


class Host(Protocol):
    """What a socket needs of its stack."""

    env: Env
    inet: Ip
    interfaces: list[Interface]
    tcp: Tcp
    udp: Udp
    reserve: Reserve
    flipper: PageFlipper | None

    def tick(self) -> None:
        """Bring the stack's clock up to date."""


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Socket:
    """An endpoint: `family` AF_INET or AF_INET6, `type` SOCK_STREAM or SOCK_DGRAM. Made by `Stack.socket`; also a context
    manager that closes it.
    """

    __slots__ = (
        "_bound",
        "_closed",
        "_connecting",
        "_deferred",
        "_error",
        "_listener",
        "_readers",
        "_writers",
        "datagram",
        "family",
        "host",
        "options",
        "stream",
        "type",
    )

    host: Host
    """The stack that the socket belongs to."""
    family: int
    type: int
    options: SocketOptions
    """What `setsockopt` has set."""
    stream: Connection | None
    """The TCP connection, once there is one."""
    datagram: UdpSocket | None
    """The UDP socket of a SOCK_DGRAM."""

    def __init__(self, host: Host, family: int, type: int) -> None:
        if family not in (names.AF_INET, names.AF_INET6):
            raise _error(errno.EAFNOSUPPORT)
        if type not in (names.SOCK_STREAM, names.SOCK_DGRAM):
            raise _error(errno.EPROTONOSUPPORT)
        self.family = family
        self.type = type
        self.host = host
        self.options = SocketOptions()
        self._bound: tuple[bytes | None, int] | None = None
        self.stream = None
        self._listener: Listener | None = None
        self.datagram = None
        self._closed = False
        self._connecting = False  # nobody has been told yet what became of the attempt
        self._error = 0  # what a disconnect leaves behind
        self._deferred: Address | None = None  # to be connected by what is sent first
        self._readers: deque[asyncio.Future[None]] = deque()
        self._writers: deque[asyncio.Future[None]] = deque()
        if type == names.SOCK_DGRAM:
            self.datagram = host.udp.socket(self.options, self._wildcard())
            self.datagram.wake = self._wake

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "SOCK_STREAM" if self.type == names.SOCK_STREAM else "SOCK_DGRAM"
        return f"<ustack.Socket {kind}{' closed' if self._closed else ''}>"

    # -- waiting --

    def _wake(self, mask: int) -> None:
        if mask & READABLE:
            _release(self._readers)
        if mask & WRITABLE:
            _release(self._writers)

    async def _wait(self, queue: deque[asyncio.Future[None]]) -> None:
        future = asyncio.get_running_loop().create_future()
        queue.append(future)
        try:
            await future
        finally:
            if future in queue:  # cancelled, and not woken since
                queue.remove(future)
        if self._closed:
            raise _error(errno.EBADF)

    def watch(self, wake: Callable[[int], None] | None) -> None:
        """Call `wake` with READABLE and WRITABLE from now on, instead of resuming the waiting calls; None undoes it. For
        transports.
        """
        target = self.stream or self._listener or self.datagram
        if target is not None:
            target.wake = self._wake if wake is None else wake

    @property
    def connection(self) -> Connection:
        """The TCP connection, for transports and tools. Raises OSError ENOTCONN when there is none."""
        return self._stream()

    def tick(self) -> None:
        """Bring the stack's clock up to date, before calls on `connection`."""
        self.host.tick()

    # -- names --

    def _wildcard(self) -> bytes | None:
        """What stands for all our addresses that the socket can have: None is both versions (RFC 3493, section 5.3)."""
        if self.family == names.AF_INET:
            return ANY4
        return ANY6 if self.options.v6only else None

    def set_v6only(self, on: bool) -> None:
        """Take no IPv4, or IPv4 as well (IPV6_V6ONLY). Raises OSError EINVAL once the socket is bound."""
        if self._bound is not None or self.stream is not None or (self.datagram is not None and self.datagram.port):
            raise _error(errno.EINVAL)
        self.options.v6only = on
        if self.datagram is not None:
            self.datagram.wildcard = self.datagram.bound = self._wildcard()

    def _local(self, address: Address) -> tuple[bytes | None, int]:
        """`address` to bind to, as the layers below have it. Raises OSError EINVAL for IPv4 on a socket that is IPv6 only."""
        packed, port = sockaddr.pack(self.family, address, self.host.interfaces)
        if packed == ANY6 or (packed == ANY4 and self.family == names.AF_INET):
            return self._wildcard(), port
        if len(packed) == 4 and self.options.v6only:
            raise _error(errno.EINVAL)
        return packed, port

    def _remote(self, address: Address) -> tuple[bytes | None, int]:
        """`address` to send to; its host is None when that is nobody. Raises OSError ENETUNREACH for IPv4 on a socket that is
        IPv6 only.
        """
        packed, port = sockaddr.pack(self.family, address, self.host.interfaces)
        if len(packed) == 4 and self.options.v6only:
            raise _error(errno.ENETUNREACH)
        return (None if is_any(packed) else packed), port

    def _named(self, local: bytes | None, port: int) -> Address:
        return sockaddr.unpack(self.family, local, port)

    def bind(self, address: Address) -> None:
        """Bind to a local `address`; port 0 chooses one.

        Raises OSError EINVAL when it is bound already, EADDRINUSE, EADDRNOTAVAIL; gaierror for a name; OverflowError for a port
        that is none.
        """
        self._check_open()
        packed, port = self._local(address)
        if self.datagram is not None:
            self.datagram.bind(packed, port)
            return
        if self._bound is not None or self.stream is not None:
            raise _error(errno.EINVAL)
        if packed is not None and not is_any(packed) and not self.host.inet.is_own(packed):
            raise _error(errno.EADDRNOTAVAIL)
        tcp = self.host.tcp
        if port:
            tcp.check_bind(packed, port, reuse=self.options.reuseaddr)
        else:
            port = tcp.free_port()
        self._bound = (packed, port)

    def getsockname(self) -> Address:
        """The local address."""
        self._check_open()
        if self.datagram is not None:
            return self._named(*self.datagram.local)
        if self.stream is not None:
            return self._named(*self.stream.local)
        return self._named(*(self._bound or (self._wildcard(), 0)))

    def getpeername(self) -> Address:
        """The peer's address. Raises OSError ENOTCONN."""
        self._check_open()
        if self.datagram is not None:
            if self.datagram.remote is None:
                raise _error(errno.ENOTCONN)
            return self._named(*self.datagram.remote)
        conn = self.stream
        if conn is None or not (conn.synchronized or conn.shutdown_mask == 0):
            raise _error(errno.ENOTCONN)
        return self._named(*conn.remote)

    # -- opening --

    def listen(self, backlog: int = 128) -> None:
        """Take connections. Raises OSError EOPNOTSUPP for a datagram socket, EADDRINUSE, EINVAL when connected."""
        self._check_open()
        if self.type != names.SOCK_STREAM:
            raise _error(errno.EOPNOTSUPP)
        if self.stream is not None:
            raise _error(errno.EINVAL)
        if self._listener is not None:
            self._listener.backlog = max(backlog, 1)
            return
        if self._bound is None:
            self._bound = (self._wildcard(), self.host.tcp.free_port())
        self._listener = self.host.tcp.listen(*self._bound, backlog, self.options)
        self._listener.wake = self._wake

    def accept_nowait(self) -> tuple[Socket, Address]:
        """The connection that has waited longest, as a socket, and its peer. Raises BlockingIOError, OSError EINVAL when not
        listening.
        """
        self._check_open()
        if self._listener is None:
            raise _error(errno.EINVAL)
        conn = self._listener.accept()
        accepted = Socket(self.host, self.family, self.type)
        accepted._adopt(conn)
        return accepted, self._named(*conn.remote)

    def _adopt(self, conn: Connection) -> None:
        self.stream = conn
        self.options = conn.options
        conn.wake = self._wake
        if conn.options.memalloc:
            self.host.reserve.set_memalloc()

    async def accept(self) -> tuple[Socket, Address]:
        """Wait for a connection; see `accept_nowait`."""
        while True:
            try:
                return self.accept_nowait()
            except BlockingIOError:
                await self._wait(self._readers)

    def connect_nowait(self, address: Address) -> None:
        """Begin to connect; for a stream raises BlockingIOError EINPROGRESS. Called again, say what became of it (connect(2)):
        BlockingIOError EALREADY, nothing the first time after it was made and EISCONN from then on, or why it failed.
        """
        self._check_open()
        packed, port = self._remote(address)
        if packed is None:
            raise _error(errno.ECONNREFUSED)
        self.host.tick()
        if self.datagram is not None:
            self.datagram.connect(packed, port)
            return
        if self._listener is not None or self._deferred is not None:
            raise _error(errno.EISCONN)
        if self.stream is not None:
            self._connected(self.stream)
            return
        if self.options.fastopen_connect and self.host.tcp.may_send_early(packed):
            self._deferred = address
            return
        self._open(packed, port, b"" if self.options.fastopen_connect else None)
        raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))

    def _open(self, packed: bytes, port: int, early: Buffer | None = None) -> Connection:
        """Send a SYN, with what of `early` may go with it (RFC 7413)."""
        local, local_port = self._bound or (None, 0)
        path = self.host.inet.path(packed, None if local is None or is_any(local) else local)
        if path.broadcast or is_multicast(packed):
            raise _error(errno.ENETUNREACH)
        self.stream = conn = self.host.tcp.connect(path, local_port, port, self.options, early)
        conn.wake = self._wake
        self._connecting = True
        self._error = 0
        self._deferred = None
        return conn

    def _fast_open(self, data: Buffer, address: Address) -> int:
        """Connect to `address` and send `data` with the SYN, as much as fits (MSG_FASTOPEN); return how many bytes went.

        Raises BlockingIOError EINPROGRESS when none may, because the server's cookie is not known yet.
        """
        packed, port = self._remote(address)
        if packed is None:
            raise _error(errno.ECONNREFUSED)
        self.host.tick()
        taken = self._open(packed, port, data).snd_nxt - self._stream().iss - 1
        if not taken:
            raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        return taken

    def _connected(self, conn: Connection) -> None:
        """Say once what became of the attempt to connect; after a failure the next attempt may begin."""
        if not self._connecting:
            raise _error(errno.EISCONN)
        if conn.state is State.SYN_SENT or conn.state is State.SYN_RECV:
            raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY))
        self._connecting = False
        if conn.state is State.CLOSE:
            self.stream = None
            conn.close()
            raise _error(conn.take_error() or errno.ECONNABORTED)

    async def connect(self, address: Address) -> None:
        """Connect, or wait until the attempt that is under way has been made. Raises what the kernel's would:
        ConnectionRefusedError, TimeoutError, OSError EHOSTUNREACH or ENETUNREACH.
        """
        while True:
            try:
                self.connect_nowait(address)
                return
            except BlockingIOError:
                await self._wait(self._writers)

    def disconnect(self) -> None:
        """Have no peer, and listen no more: an open connection is reset. The socket may then connect or listen again, from the
        port that it was bound to (connect(2) with AF_UNSPEC).
        """
        self._check_open()
        self.host.tick()
        if self.datagram is not None:
            self.datagram.disconnect()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        conn = self.stream
        if conn is not None:
            self.stream = None
            self._connecting = False
            self._error = conn.error if conn.state is State.CLOSE else errno.ECONNRESET
            conn.abort(0)
            conn.close()
        _release(self._readers)
        _release(self._writers)

    # -- data --

    def _stream(self, otherwise: int = errno.ENOTCONN) -> Connection:
        """The connection. Without one raises the error that a disconnect has left, or else errno `otherwise`."""
        if self._closed:
            raise _error(errno.EBADF)
        if self.stream is None:
            raise _error(self.take_error() or otherwise)
        return self.stream

    def recv_nowait(self, size: int, flags: int = 0) -> bytes:
        """Take up to `size` bytes, b"" at the end of the stream; of a datagram what does not fit is lost. With MSG_PEEK in
        `flags` they stay. Raises BlockingIOError, ValueError for a negative size, OSError EOPNOTSUPP for any other flag.
        """
        if flags & ~names.MSG_PEEK:
            raise _error(errno.EOPNOTSUPP)
        if size < 0:
            raise ValueError("negative buffersize in recv")
        if self.datagram is not None:
            self._check_open()
            return self.datagram.recvfrom_nowait(size, peek=flags != 0)[0]
        conn = self._stream()
        self.host.tick()
        if flags:
            target = bytearray(min(size, conn.unread or 1))
            return bytes(target[: conn.recv_into(memoryview(target), peek=True)])
        return conn.recv(size)

    async def recv(self, size: int, flags: int = 0) -> bytes:
        """Wait for data, for as much as SO_RCVLOWAT asks for; see `recv_nowait`."""
        while True:
            try:
                if self._has_enough(size):
                    return self.recv_nowait(size, flags)
            except BlockingIOError:
                pass
            await self._wait(self._readers)

    def _has_enough(self, size: int) -> bool:
        """Whether a call that waits for up to `size` bytes may return with what there is (sock_rcvlowat)."""
        conn = self.stream
        return conn is None or conn.options.rcvlowat <= 1 or conn.readable or conn.unread >= size > 0

    def recv_into_nowait(self, buffer: bytearray | memoryview, size: int = 0) -> int:
        """Take bytes into a writable `buffer` (at most `size` of them, if that is not 0); return how many. Raises
        BlockingIOError, ValueError for a `size` that is negative or more than the buffer has.
        """
        view = memoryview(buffer).cast("B")
        if size:
            if not 0 < size <= len(view):
                raise ValueError(f"no room for {size} bytes in a buffer of {len(view)}")
            view = view[:size]
        if self.datagram is not None:
            self._check_open()
            return min(self.datagram.recvfrom_into_nowait(view)[0], len(view))
        conn = self._stream()
        self.host.tick()
        return conn.recv_into(view)

    async def recv_into(self, buffer: bytearray | memoryview, size: int = 0) -> int:
        """Wait for data, for as much as SO_RCVLOWAT asks for; see `recv_into_nowait`."""
        while True:
            try:
                if self._has_enough(size or memoryview(buffer).nbytes):
                    return self.recv_into_nowait(buffer, size)
            except BlockingIOError:
                pass
            await self._wait(self._readers)

    def recv_pages_nowait(self, pages: int) -> GivenPages:
        """Take the data of a stream that lies on the next `pages` pages, in whole packets and at least one, as pages that the
        caller may hand to another process: nothing else is on them, and nothing ever will be. The caller closes them when they
        are not needed any more. No pages at the end of the stream. See `ustack.mem.page_flip`.

        Raises BlockingIOError, OSError EOPNOTSUPP for datagrams and where the stack was not made with `zero_copy`.
        """
        flipper = self.host.flipper
        if flipper is None or self.datagram is not None:
            raise _error(errno.EOPNOTSUPP)
        conn = self._stream()
        self.host.tick()
        return conn.recv_pages(flipper, pages)

    async def recv_pages(self, pages: int) -> GivenPages:
        """Wait for data; see `recv_pages_nowait`."""
        while True:
            try:
                return self.recv_pages_nowait(pages)
            except BlockingIOError:
                await self._wait(self._readers)

    def control_messages(self) -> list[tuple[int, int, bytes]]:
        """What recvmsg(2) tells beside the data, as `(level, type, data)`: with TCP_INQ set, how much is left to read, and 1 at
        the end of the stream (tcp_inq_hint).
        """
        conn = self.stream
        if conn is None or not self.options.inq:
            return []
        left = conn.unread or int(conn.at_end)
        return [(names.IPPROTO_TCP, TCP_INQ, left.to_bytes(4, "little"))]

    def send_nowait(self, data: Buffer, flags: int = 0) -> int:
        """Send as much of `data` as there is room for; return how many bytes. With MSG_MORE in `flags` a stream holds a last
        segment that is not full. Raises BlockingIOError, BrokenPipeError, the connection's error, or OSError EOPNOTSUPP for any
        other flag; for a datagram see `sendto_nowait`, and EDESTADDRREQ without a peer.
        """
        if self._deferred is not None:
            return self._fast_open(data, self._deferred)
        if flags and flags & ~names.MSG_MORE | (self.datagram is not None):
            raise _error(errno.EOPNOTSUPP)
        if self.datagram is not None:
            self._check_open()
            self.host.tick()
            return self.datagram.sendto_nowait(data)
        conn = self._stream(errno.EPIPE)
        self.host.tick()
        return conn.send(data, more=flags != 0)

    async def send(self, data: Buffer, flags: int = 0) -> int:
        """Wait for room for some of `data`; see `send_nowait`."""
        while True:
            try:
                return self.send_nowait(data, flags)
            except BlockingIOError:
                await self._wait(self._writers)

    async def sendall(self, data: Buffer) -> None:
        """Send all of `data`, waiting for room as often as it takes."""
        view = memoryview(data).cast("B")
        while view:
            view = view[await self.send(view) :]

    def recvfrom_nowait(self, size: int) -> tuple[bytes, Address]:
        """Take one datagram, cut to `size` bytes, and its sender. Raises BlockingIOError, ValueError for a negative size."""
        self._check_open()
        if size < 0:
            raise ValueError("negative buffersize in recvfrom")
        if self.datagram is None:
            return self.recv_nowait(size), self.getpeername()
        data, sender = self.datagram.recvfrom_nowait(size)
        return data, self._named(*sender)

    async def recvfrom(self, size: int) -> tuple[bytes, Address]:
        """Wait for a datagram; see `recvfrom_nowait`."""
        while True:
            try:
                return self.recvfrom_nowait(size)
            except BlockingIOError:
                await self._wait(self._readers)

    def sendto_nowait(self, data: Buffer, address: Address, flags: int = 0) -> int:
        """Send one datagram; what is lost below is lost silently. On a stream the same as `send_nowait`, but that with
        MSG_FASTOPEN in `flags` it connects first, and `data` goes with the SYN if it may (RFC 7413).

        Raises OSError: an error that arrived earlier, EMSGSIZE when it does not fit and must not be cut, EACCES for a broadcast
        without SO_BROADCAST, ENETUNREACH without a route, EPIPE after a shutdown.
        """
        self._check_open()
        if self.datagram is None:
            if flags & names.MSG_FASTOPEN:
                if self._listener is not None or self._deferred is not None or self.stream is not None:
                    raise _error(errno.EISCONN if self.stream is None or not self._connecting else errno.EALREADY)
                return self._fast_open(data, address)
            return self.send_nowait(data, flags)
        packed, port = self._remote(address)
        if packed is None:
            raise _error(errno.ENETUNREACH)
        self.host.tick()
        return self.datagram.sendto_nowait(data, (packed, port))

    async def sendto(self, data: Buffer, address: Address) -> int:
        """Send one datagram, which never waits; on a stream the same as `send`. See `sendto_nowait`."""
        while True:
            try:
                return self.sendto_nowait(data, address)
            except BlockingIOError:
                await self._wait(self._writers)

    # -- ending --

    def shutdown(self, how: int) -> None:
        """Close one direction or both (SHUT_RD, SHUT_WR, SHUT_RDWR). To receive no more ends a listener, and an attempt to
        connect ends at once (shutdown(2)). Raises OSError ENOTCONN, EINVAL.
        """
        self._check_open()
        if how not in SHUT:
            raise _error(errno.EINVAL)
        if self.datagram is not None:
            self.datagram.shutdown(SHUT[how])
            return
        conn = self.stream
        if self._listener is not None or (conn is not None and conn.state is State.SYN_SENT):
            if conn is not None or SHUT[how] & SHUT_RD:
                self.disconnect()
            return
        if conn is None:
            raise _error(errno.ENOTCONN)
        self.host.tick()
        conn.shutdown(SHUT[how])

    def close(self) -> None:
        """Close. Calls that wait fail with EBADF; the stack finishes the connection in order, or by SO_LINGER."""
        if self._closed:
            return
        self._closed = True
        self.host.tick()
        if self.options.memalloc:
            self.host.reserve.clear_memalloc()
            self.host.reserve.release(self)
        for endpoint in (self.stream, self._listener, self.datagram):
            if endpoint is not None:
                endpoint.wake = nobody
                endpoint.close()
        _release(self._readers)
        _release(self._writers)

    def abort(self) -> None:
        """Reset the connection, if there is one; what was not sent is lost."""
        if self.stream is not None:
            self.host.tick()
            self.stream.abort(0)

    def _check_open(self) -> None:
        if self._closed:
            raise _error(errno.EBADF)

    # -- state --

    def poll(self, events: int = select.POLLIN | select.POLLOUT) -> int:
        """What of `events` (select.POLLIN, POLLOUT, POLLRDHUP) is the case, and POLLERR and POLLHUP in any event (poll(2)).

        It does not wait. A stream that has no room now tells `watch` when it has.
        """
        self._check_open()
        if self._deferred is not None:
            return events & select.POLLOUT
        return readiness(self.stream, self._listener, self.datagram, self._error) & (events | select.POLLERR | select.POLLHUP)

    def ioctl(self, request: int) -> int:
        """The answer to SIOCINQ or SIOCOUTQ, in bytes. Raises OSError EINVAL on a listener, ENOTTY for any other request and on
        a datagram socket.
        """
        self._check_open()
        if request not in (SIOCINQ, SIOCOUTQ) or self.datagram is not None:
            raise _error(errno.ENOTTY)
        if self._listener is not None:
            raise _error(errno.EINVAL)
        if self.stream is None:
            return 0
        return self.stream.unread if request == SIOCINQ else self.stream.unacknowledged

    # -- options --

    def set_memalloc(self, on: bool) -> None:
        """Let the socket use the reserve, or no longer (sk_set_memalloc). Only for what others depend on when memory is out.

        Connections that a listener accepts inherit it.
        """
        self._check_open()
        if on == self.options.memalloc:
            return
        self.options.memalloc = on
        if on:
            self.host.reserve.set_memalloc()
        else:
            self.host.reserve.clear_memalloc()

    def reserve_for(self, demand: Demand, owner: object = None) -> None:
        """Say what the memalloc socket is used for. The reserve is made large enough (where it is "auto"), and what the socket
        may queue in either direction is bounded by it.

        It stays so until the socket is closed; with an `owner`, who has all the connections of the demand, until he calls
        `reserve.release(owner)`: who connects again must find it as he left it. Raises OSError ENOMEM when there is not enough
        packet memory for that.
        """
        self._check_open()
        budget = self.host.reserve.claim(self if owner is None else owner, demand)
        if budget is None:
            return
        self.options.sndbuf, self.options.rcvbuf = budget.sndbuf, budget.rcvbuf
        if self.stream is not None:
            self.stream.sndbuf, self.stream.rcvbuf = budget.sndbuf, budget.rcvbuf

    @property
    def reserve(self) -> Reserve:
        """The reserve of the stack."""
        return self.host.reserve

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set an option of SOL_SOCKET, IPPROTO_TCP, IPPROTO_IP or IPPROTO_IPV6. Raises OSError ENOPROTOOPT for one that there
        is not, EINVAL.
        """
        self._check_open()
        setter = SETTERS.get((level, option))
        if setter is None:
            raise _error(errno.ENOPROTOOPT)
        setter(self, option, value)

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """An option's value; bytes when `buflen` is given. Raises OSError ENOPROTOOPT for one that there is not."""
        self._check_open()
        getter = GETTERS.get((level, option))
        if getter is None:
            raise _error(errno.ENOPROTOOPT)
        value = getter(self)
        if isinstance(value, bytes):
            return value[:buflen] if buflen else value
        return value.to_bytes(4, "little", signed=True)[:buflen] if buflen else value

    def tcp_info(self) -> dict[str, int | bool | str]:
        """The inner state of the connection, by the names of Linux's struct tcp_info (TCP_INFO). Raises OSError ENOTCONN when
        there is none.
        """
        self._check_open()
        if self.stream is None:
            raise _error(errno.ENOTCONN)
        return tcp_info(self.stream)

    def take_error(self) -> int:
        """The pending errno, or 0; it is cleared by being read (SO_ERROR)."""
        if self.stream is not None:
            return self.stream.take_error()
        if self.datagram is not None:
            return self.datagram.take_error()
        error = self._error
        self._error = 0
        return error


def _release(queue: deque[asyncio.Future[None]]) -> None:
    while queue:
        future = queue.popleft()
        if not future.done():
            future.set_result(None)
