"""BSD sockets with await: the calls, options and errors of the socket module, over our stack.

Every call that may have to wait has a `_nowait` twin, which raises BlockingIOError instead. The waiting calls do no I/O: they park a future
until the transport says that it is worth trying again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket as names
import struct
from collections import deque
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING, Final, Protocol, cast

from ustack.transport.events import READABLE, SHUT_RD, SHUT_WR, WRITABLE, nobody
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.output import push
from ustack.transport.tcp.states import State
from ustack.transport.tcp.timers import start_keepalive
from ustack.transport.udp import RCVBUF_DEFAULT

if TYPE_CHECKING:
    from typing import Self

    from ustack.env import Env
    from ustack.mem.reserve import Reserve
    from ustack.net.ipv4 import Ipv4
    from ustack.skb import Buffer
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.listener import Listener
    from ustack.transport.tcp.protocol import Tcp
    from ustack.transport.udp import Udp, UdpSocket

Address = tuple[str, int]
"""Host as dotted decimals ("" for any, when binding) and port."""

ANY: Final = "0.0.0.0"  # noqa: S104 (the name of the wildcard)
SOCK_MIN_RCVBUF: Final = 2304
SOCK_MIN_SNDBUF: Final = 4608
SHUT: Final = {names.SHUT_RD: SHUT_RD, names.SHUT_WR: SHUT_WR, names.SHUT_RDWR: SHUT_RD | SHUT_WR}
_LINGER: Final = struct.Struct("ii")


class Host(Protocol):
    """What a socket needs of its stack."""

    env: Env
    ip: Ipv4
    tcp: Tcp
    udp: Udp
    reserve: Reserve

    def tick(self) -> None:
        """Bring the stack's clock up to date."""


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def pack_host(host: str) -> bytes | None:
    """The packed form of an IPv4 address; None for "" and 0.0.0.0. Raises gaierror for anything else: there is no name service."""
    if host in ("", ANY):
        return None
    try:
        return IPv4Address(host).packed
    except AddressValueError:
        raise names.gaierror(names.EAI_NONAME, f"{host!r} is not an IPv4 address, and the stack has no name service") from None


def unpack_host(address: bytes | None) -> str:
    """The dotted decimals of a packed address; 0.0.0.0 for None."""
    return ANY if address is None else names.inet_ntoa(address)


class Socket:
    """An endpoint: `family` AF_INET, `type` SOCK_STREAM or SOCK_DGRAM. Made by `Stack.socket`; also a context manager that closes it."""

    __slots__ = (
        "_bound",
        "_closed",
        "_connection",
        "_host",
        "_listener",
        "_options",
        "_readers",
        "_udp",
        "_writers",
        "family",
        "type",
    )

    def __init__(self, host: Host, family: int, type: int) -> None:  # noqa: A002 (the name of the BSD call's argument)
        if family != names.AF_INET:
            raise _error(errno.EAFNOSUPPORT)
        if type not in (names.SOCK_STREAM, names.SOCK_DGRAM):
            raise _error(errno.EPROTONOSUPPORT)
        self.family = family
        self.type = type
        self._host = host
        self._options = SocketOptions()
        self._bound: tuple[bytes | None, int] | None = None
        self._connection: Connection | None = None
        self._listener: Listener | None = None
        self._udp: UdpSocket | None = None
        self._closed = False
        self._readers: deque[asyncio.Future[None]] = deque()
        self._writers: deque[asyncio.Future[None]] = deque()
        if type == names.SOCK_DGRAM:
            self._udp = host.udp.socket(self._options)
            self._udp.wake = self._wake

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
            if not future.done() or future.cancelled():
                queue.remove(future)
        if self._closed:
            raise _error(errno.EBADF)

    def watch(self, wake: Callable[[int], None] | None) -> None:
        """Call `wake` with READABLE and WRITABLE from now on, instead of resuming the waiting calls; None undoes it. For transports."""
        target = self._connection or self._listener or self._udp
        if target is not None:
            target.wake = self._wake if wake is None else wake

    @property
    def connection(self) -> Connection:
        """The TCP connection, for transports and tools. Raises OSError ENOTCONN when there is none."""
        return self._stream()

    def tick(self) -> None:
        """Bring the stack's clock up to date, before calls on `connection`."""
        self._host.tick()

    # -- names --

    def bind(self, address: Address) -> None:
        """Bind to a local `address`; port 0 chooses one. Raises OSError EINVAL, EADDRINUSE, EADDRNOTAVAIL."""
        self._check_open()
        host, port = address
        packed = pack_host(host)
        if not 0 <= port <= 65535:
            raise OverflowError("port must be 0-65535")
        if self._udp is not None:
            self._udp.bind(packed or bytes(4), port)
            return
        if self._bound is not None or self._connection is not None:
            raise _error(errno.EINVAL)
        if packed is not None and packed not in self._host.ip.addresses:
            raise _error(errno.EADDRNOTAVAIL)
        tcp = self._host.tcp
        if port:
            tcp.check_bind(packed, port, reuse=self._options.reuseaddr)
        else:
            port = tcp.free_port()
        self._bound = (packed, port)

    def getsockname(self) -> Address:
        """The local address."""
        self._check_open()
        if self._udp is not None:
            local, port = self._udp.local
            return unpack_host(local), port
        if self._connection is not None:
            local, port = self._connection.local
            return unpack_host(local), port
        if self._bound is None:
            return ANY, 0
        return unpack_host(self._bound[0]), self._bound[1]

    def getpeername(self) -> Address:
        """The peer's address. Raises OSError ENOTCONN."""
        self._check_open()
        if self._udp is not None:
            if self._udp.remote is None:
                raise _error(errno.ENOTCONN)
            return unpack_host(self._udp.remote[0]), self._udp.remote[1]
        conn = self._connection
        if conn is None or not (conn.synchronized or conn.shutdown_mask == 0):
            raise _error(errno.ENOTCONN)
        remote, port = conn.remote
        return unpack_host(remote), port

    # -- opening --

    def listen(self, backlog: int = 128) -> None:
        """Take connections. Raises OSError EOPNOTSUPP for a datagram socket, EADDRINUSE, EINVAL when connected."""
        self._check_open()
        if self.type != names.SOCK_STREAM:
            raise _error(errno.EOPNOTSUPP)
        if self._connection is not None:
            raise _error(errno.EINVAL)
        if self._listener is not None:
            self._listener.backlog = max(backlog, 1)
            return
        if self._bound is None:
            self._bound = (None, self._host.tcp.free_port())
        self._listener = self._host.tcp.listen(*self._bound, backlog, self._options)
        self._listener.wake = self._wake

    def accept_nowait(self) -> tuple[Socket, Address]:
        """The connection that has waited longest, as a socket, and its peer. Raises BlockingIOError, OSError EINVAL when not listening."""
        self._check_open()
        if self._listener is None:
            raise _error(errno.EINVAL)
        conn = self._listener.accept()
        accepted = Socket(self._host, self.family, self.type)
        accepted._adopt(conn)
        remote, port = conn.remote
        return accepted, (unpack_host(remote), port)

    def _adopt(self, conn: Connection) -> None:
        self._connection = conn
        self._options = conn.options
        conn.wake = self._wake
        if conn.options.memalloc:
            self._host.reserve.set_memalloc()

    async def accept(self) -> tuple[Socket, Address]:
        """Wait for a connection; see `accept_nowait`."""
        while True:
            try:
                return self.accept_nowait()
            except BlockingIOError:
                await self._wait(self._readers)

    def connect_nowait(self, address: Address) -> None:
        """Begin to connect; for a stream raises BlockingIOError EINPROGRESS, and when called again what became of it (connect(2))."""
        self._check_open()
        host, port = address
        packed = pack_host(host)
        if packed is None:
            raise _error(errno.ECONNREFUSED)
        self._host.tick()
        if self._udp is not None:
            self._udp.connect(packed, port)
            return
        if self._listener is not None:
            raise _error(errno.EISCONN)
        conn = self._connection
        if conn is not None:
            if conn.state is State.SYN_SENT or conn.state is State.SYN_RECV:
                raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY))
            conn.raise_error()
            raise _error(errno.EISCONN if conn.synchronized else errno.ECONNABORTED)
        local, local_port = self._bound or (None, 0)
        path = self._host.ip.path(packed, local)
        if path.broadcast:
            raise _error(errno.ENETUNREACH)
        self._connection = conn = self._host.tcp.connect(path, local_port, port, self._options)
        conn.wake = self._wake
        raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))

    async def connect(self, address: Address) -> None:
        """Connect. Raises what the kernel's would: ConnectionRefusedError, TimeoutError, OSError EHOSTUNREACH or ENETUNREACH."""
        try:
            self.connect_nowait(address)
            return
        except BlockingIOError as error:
            if error.errno != errno.EINPROGRESS:
                raise
        conn = cast("Connection", self._connection)
        while conn.state is State.SYN_SENT or conn.state is State.SYN_RECV:
            await self._wait(self._writers)
        error_now = conn.take_error()
        if error_now:
            self._connection = None
            raise _error(error_now)

    # -- data --

    def _stream(self) -> Connection:
        if self._closed:
            raise _error(errno.EBADF)
        if self._connection is None:
            raise _error(errno.ENOTCONN)
        return self._connection

    def recv_nowait(self, size: int) -> bytes:
        """Take up to `size` bytes, b"" at the end of the stream; of a datagram what does not fit is lost. Raises BlockingIOError."""
        if self._udp is not None:
            self._check_open()
            return self._udp.recvfrom_nowait(size)[0]
        conn = self._stream()
        self._host.tick()
        return conn.recv(size)

    async def recv(self, size: int) -> bytes:
        """Wait for data; see `recv_nowait`."""
        while True:
            try:
                return self.recv_nowait(size)
            except BlockingIOError:
                await self._wait(self._readers)

    def recv_into_nowait(self, buffer: bytearray | memoryview, size: int = 0) -> int:
        """Take bytes into a writable `buffer` (at most `size` of them, if that is not 0); return how many. Raises BlockingIOError."""
        view = memoryview(buffer).cast("B")
        if size:
            view = view[:size]
        if self._udp is not None:
            self._check_open()
            return min(self._udp.recvfrom_into_nowait(view)[0], len(view))
        conn = self._stream()
        self._host.tick()
        return conn.recv_into(view)

    async def recv_into(self, buffer: bytearray | memoryview, size: int = 0) -> int:
        """Wait for data; see `recv_into_nowait`."""
        while True:
            try:
                return self.recv_into_nowait(buffer, size)
            except BlockingIOError:
                await self._wait(self._readers)

    def send_nowait(self, data: Buffer) -> int:
        """Send as much of `data` as there is room for; return how many bytes. Raises BlockingIOError, BrokenPipeError."""
        if self._udp is not None:
            self._check_open()
            self._host.tick()
            return self._udp.sendto_nowait(data)
        conn = self._stream()
        self._host.tick()
        return conn.send(data)

    async def send(self, data: Buffer) -> int:
        """Wait for room for some of `data`; see `send_nowait`."""
        while True:
            try:
                return self.send_nowait(data)
            except BlockingIOError:
                await self._wait(self._writers)

    async def sendall(self, data: Buffer) -> None:
        """Send all of `data`, waiting for room as often as it takes."""
        view = memoryview(data).cast("B")
        while view:
            view = view[await self.send(view) :]

    def recvfrom_nowait(self, size: int) -> tuple[bytes, Address]:
        """Take one datagram, cut to `size` bytes, and its sender. Raises BlockingIOError."""
        self._check_open()
        if self._udp is None:
            return self.recv_nowait(size), self.getpeername()
        data, (host, port) = self._udp.recvfrom_nowait(size)
        return data, (unpack_host(host), port)

    async def recvfrom(self, size: int) -> tuple[bytes, Address]:
        """Wait for a datagram; see `recvfrom_nowait`."""
        while True:
            try:
                return self.recvfrom_nowait(size)
            except BlockingIOError:
                await self._wait(self._readers)

    def sendto_nowait(self, data: Buffer, address: Address) -> int:
        """Send one datagram. Raises OSError EMSGSIZE when it does not fit the path MTU, EACCES for a broadcast without SO_BROADCAST."""
        self._check_open()
        if self._udp is None:
            return self.send_nowait(data)
        host, port = address
        packed = pack_host(host)
        if packed is None:
            raise _error(errno.ENETUNREACH)
        self._host.tick()
        return self._udp.sendto_nowait(data, (packed, port))

    async def sendto(self, data: Buffer, address: Address) -> int:
        """Send one datagram, waiting for room; see `sendto_nowait`."""
        while True:
            try:
                return self.sendto_nowait(data, address)
            except BlockingIOError:
                await self._wait(self._writers)

    # -- ending --

    def shutdown(self, how: int) -> None:
        """Close one direction or both (SHUT_RD, SHUT_WR, SHUT_RDWR). Raises OSError ENOTCONN, EINVAL."""
        self._check_open()
        if how not in SHUT:
            raise _error(errno.EINVAL)
        if self._udp is not None:
            self._udp.shutdown(SHUT[how])
            return
        self._host.tick()
        self._stream().shutdown(SHUT[how])

    def close(self) -> None:
        """Close. Calls that wait fail with EBADF; the stack finishes the connection in order, or by SO_LINGER."""
        if self._closed:
            return
        self._closed = True
        self._host.tick()
        if self._options.memalloc and (self._connection or self._udp):
            self._host.reserve.clear_memalloc()
        for endpoint in (self._connection, self._listener, self._udp):
            if endpoint is not None:
                endpoint.wake = nobody
                endpoint.close()
        _release(self._readers)
        _release(self._writers)

    def abort(self) -> None:
        """Reset the connection, if there is one; what was not sent is lost."""
        if self._connection is not None:
            self._host.tick()
            self._connection.abort(0)

    def _check_open(self) -> None:
        if self._closed:
            raise _error(errno.EBADF)

    # -- options --

    def set_memalloc(self, on: bool) -> None:
        """Let the socket use the reserve, or no longer (sk_set_memalloc). Only for what others depend on when memory is out."""
        self._check_open()
        if on == self._options.memalloc:
            return
        self._options.memalloc = on
        if on:
            self._host.reserve.set_memalloc()
        else:
            self._host.reserve.clear_memalloc()

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set an option of SOL_SOCKET, IPPROTO_TCP or IPPROTO_IP. Raises OSError ENOPROTOOPT for one that there is not, EINVAL."""
        self._check_open()
        setter = _SETTERS.get((level, option))
        if setter is None:
            raise _error(errno.ENOPROTOOPT)
        setter(self, option, value)

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """An option's value; bytes when `buflen` is given. Raises OSError ENOPROTOOPT for one that there is not."""
        self._check_open()
        getter = _GETTERS.get((level, option))
        if getter is None:
            raise _error(errno.ENOPROTOOPT)
        value = getter(self)
        if isinstance(value, bytes):
            return value[:buflen] if buflen else value
        return value.to_bytes(4, "little", signed=True)[:buflen] if buflen else value

    def _take_error(self) -> int:
        if self._connection is not None:
            return self._connection.take_error()
        return self._udp.take_error() if self._udp is not None else 0


def _release(queue: deque[asyncio.Future[None]]) -> None:
    while queue:
        future = queue.popleft()
        if not future.done():
            future.set_result(None)


# -- options: how each is set and read --


def _number(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    if len(value) < 4:
        raise _error(errno.EINVAL)
    return int.from_bytes(value[:4], "little", signed=True)


def _set_flag(sock: Socket, name: str, value: int | bytes) -> None:
    setattr(sock._options, name, _number(value) != 0)


def _set_within(sock: Socket, name: str, value: int | bytes, least: int, most: int, unit: float = 1) -> None:
    number = _number(value)
    if not least <= number <= most:
        raise _error(errno.EINVAL)
    setattr(sock._options, name, number * unit if unit != 1 else number)


def _set_buffer(sock: Socket, name: str, least: int, value: int | bytes) -> None:
    """The kernel doubles what is asked for, to allow for truesize, and refuses nothing (socket(7))."""
    limit = max(min(max(_number(value), 0), 1 << 30) * 2, least)
    setattr(sock._options, name, limit)
    if sock._connection is not None:
        setattr(sock._connection, name, limit)


def _set_linger(sock: Socket, _option: int, value: int | bytes) -> None:
    if isinstance(value, int) or len(value) < _LINGER.size:
        raise _error(errno.EINVAL)
    on, seconds = _LINGER.unpack_from(value)
    sock._options.linger = seconds if on else -1


def _set_keepalive(sock: Socket, _option: int, value: int | bytes) -> None:
    sock._options.keepalive = _number(value) != 0
    if sock._connection is not None and sock._connection.synchronized:
        start_keepalive(sock._connection)


def _set_keepalive_time(sock: Socket, option: int, value: int | bytes) -> None:
    _set_within(sock, "keepidle" if option == names.TCP_KEEPIDLE else "keepintvl", value, 1, 32767, 1.0)
    if sock._connection is not None and sock._connection.synchronized and sock._options.keepalive:
        start_keepalive(sock._connection)


def _set_nodelay(sock: Socket, option: int, value: int | bytes) -> None:
    _set_flag(sock, "nodelay" if option == names.TCP_NODELAY else "cork", value)
    if sock._connection is not None:
        sock._host.tick()
        push(sock._connection)


def _get_linger(sock: Socket) -> bytes:
    seconds = sock._options.linger
    return _LINGER.pack(seconds >= 0, max(seconds, 0))


def _get_rcvbuf(sock: Socket) -> int:
    if sock._connection is not None:
        return sock._connection.rcvbuf
    return sock._options.rcvbuf or (sock._host.tcp.config.rmem_default if sock._udp is None else RCVBUF_DEFAULT)


def _get_sndbuf(sock: Socket) -> int:
    if sock._connection is not None:
        return sock._connection.sndbuf
    return sock._options.sndbuf or sock._host.tcp.config.wmem_default


_Setter = Callable[[Socket, int, int | bytes], None]
_Getter = Callable[[Socket], int | bytes]

_SETTERS: Final[dict[tuple[int, int], _Setter]] = {
    (names.SOL_SOCKET, names.SO_RCVBUF): lambda sock, _, value: _set_buffer(sock, "rcvbuf", SOCK_MIN_RCVBUF, value),
    (names.SOL_SOCKET, names.SO_SNDBUF): lambda sock, _, value: _set_buffer(sock, "sndbuf", SOCK_MIN_SNDBUF, value),
    (names.SOL_SOCKET, names.SO_REUSEADDR): lambda sock, _, value: _set_flag(sock, "reuseaddr", value),
    (names.SOL_SOCKET, names.SO_REUSEPORT): lambda sock, _, value: _set_flag(sock, "reuseport", value),
    (names.SOL_SOCKET, names.SO_BROADCAST): lambda sock, _, value: _set_flag(sock, "broadcast", value),
    (names.SOL_SOCKET, names.SO_KEEPALIVE): _set_keepalive,
    (names.SOL_SOCKET, names.SO_LINGER): _set_linger,
    (names.IPPROTO_TCP, names.TCP_NODELAY): _set_nodelay,
    (names.IPPROTO_TCP, names.TCP_CORK): _set_nodelay,
    (names.IPPROTO_TCP, names.TCP_MAXSEG): lambda sock, _, value: _set_within(sock, "maxseg", value, 88, 32767),
    (names.IPPROTO_TCP, names.TCP_KEEPIDLE): _set_keepalive_time,
    (names.IPPROTO_TCP, names.TCP_KEEPINTVL): _set_keepalive_time,
    (names.IPPROTO_TCP, names.TCP_KEEPCNT): lambda sock, _, value: _set_within(sock, "keepcnt", value, 1, 127),
    (names.IPPROTO_TCP, names.TCP_SYNCNT): lambda sock, _, value: _set_within(sock, "syncnt", value, 1, 127),
    (names.IPPROTO_TCP, names.TCP_USER_TIMEOUT): lambda sock, _, value: _set_within(
        sock, "user_timeout", value, 0, 0x7FFFFFFF, 0.001
    ),
    (names.IPPROTO_IP, names.IP_TOS): lambda sock, _, value: _set_within(sock, "tos", value, 0, 255),
    (names.IPPROTO_IP, names.IP_TTL): lambda sock, _, value: _set_within(sock, "ttl", value, 1, 255),
}

_GETTERS: Final[dict[tuple[int, int], _Getter]] = {
    (names.SOL_SOCKET, names.SO_ERROR): lambda sock: sock._take_error(),
    (names.SOL_SOCKET, names.SO_TYPE): lambda sock: sock.type,
    (names.SOL_SOCKET, names.SO_DOMAIN): lambda sock: sock.family,
    (names.SOL_SOCKET, names.SO_PROTOCOL): lambda sock: names.IPPROTO_TCP if sock._udp is None else names.IPPROTO_UDP,
    (names.SOL_SOCKET, names.SO_ACCEPTCONN): lambda sock: int(sock._listener is not None),
    (names.SOL_SOCKET, names.SO_RCVBUF): _get_rcvbuf,
    (names.SOL_SOCKET, names.SO_SNDBUF): _get_sndbuf,
    (names.SOL_SOCKET, names.SO_REUSEADDR): lambda sock: int(sock._options.reuseaddr),
    (names.SOL_SOCKET, names.SO_REUSEPORT): lambda sock: int(sock._options.reuseport),
    (names.SOL_SOCKET, names.SO_BROADCAST): lambda sock: int(sock._options.broadcast),
    (names.SOL_SOCKET, names.SO_KEEPALIVE): lambda sock: int(sock._options.keepalive),
    (names.SOL_SOCKET, names.SO_LINGER): _get_linger,
    (names.IPPROTO_TCP, names.TCP_NODELAY): lambda sock: int(sock._options.nodelay),
    (names.IPPROTO_TCP, names.TCP_CORK): lambda sock: int(sock._options.cork),
    (names.IPPROTO_TCP, names.TCP_MAXSEG): lambda sock: sock._connection.mss if sock._connection else 536,
    (names.IPPROTO_TCP, names.TCP_KEEPIDLE): lambda sock: int(sock._options.keepidle or sock._host.tcp.config.keepalive_time),
    (names.IPPROTO_TCP, names.TCP_KEEPINTVL): lambda sock: int(sock._options.keepintvl or sock._host.tcp.config.keepalive_intvl),
    (names.IPPROTO_TCP, names.TCP_KEEPCNT): lambda sock: sock._options.keepcnt or sock._host.tcp.config.keepalive_probes,
    (names.IPPROTO_TCP, names.TCP_SYNCNT): lambda sock: sock._options.syncnt or sock._host.tcp.config.syn_retries,
    (names.IPPROTO_TCP, names.TCP_USER_TIMEOUT): lambda sock: round(sock._options.user_timeout * 1000),
    (names.IPPROTO_IP, names.IP_TOS): lambda sock: sock._options.tos,
    (names.IPPROTO_IP, names.IP_TTL): lambda sock: sock._options.ttl,
}
