"""asyncio transports and servers over our sockets, so that protocols written for `loop.create_connection` run on the stack.

A transport calls its protocol from the stack's flush, so that what the protocol writes at once leaves together with the
acknowledgment. Bytes that were received wait in skbs until the protocol takes them; bytes that do not fit the send limit wait
in the transport, which tells the protocol to pause.
"""

from __future__ import annotations

import asyncio
import socket as names
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, cast

from ustack.aio.tls import TlsOptions, handshake, tls_protocol
from ustack.sockaddr import family_of
from ustack.socket import Host, Socket
from ustack.transport.events import READABLE, SHUT_WR, WRITABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from ssl import SSLContext

    from ustack.skb import Buffer

READ_SIZE: Final = 256 << 10
"""Bytes handed to `data_received` at most."""

HIGH_WATER: Final = 64 << 10
"""Bytes that wait in a transport when the protocol is told to pause; as asyncio's own."""


class SocketMaker(Host, Protocol):
    """A stack that makes sockets."""

    def socket(self, family: int = names.AF_INET, type: int = names.SOCK_STREAM) -> Socket:
        """A new socket."""


class StreamTransport(asyncio.Transport):
    """A connected stream socket as an asyncio transport. The protocol may be a Protocol or a BufferedProtocol."""

    _start_tls_compatible = True  # asyncio's own loops ask; on uvloop there is Stack.start_tls

    __slots__ = (
        "_buffered",
        "_closing",
        "_conn",
        "_eof_received",
        "_eof_sent",
        "_high",
        "_loop",
        "_lost",
        "_low",
        "_paused",
        "_plain",
        "_protocol",
        "_size",
        "_sock",
        "_waiting",
        "_write_paused",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: Socket, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"socket": sock, "peername": sock.getpeername(), "sockname": sock.getsockname()})
        self._loop = loop
        self._sock = sock
        self._conn = sock.connection
        self._waiting: deque[memoryview] = deque()
        self._size = 0
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._closing = False
        self._lost = False
        self._paused = False
        self._write_paused = False
        self._eof_sent = False
        self._eof_received = False
        self.set_protocol(protocol)

    def start(self) -> None:
        """Tell the protocol that the connection is made, and begin to read."""
        self._protocol.connection_made(self)
        self._conn.wake = self._wake
        self._wake(READABLE)

    # -- what the stack says --

    def _wake(self, mask: int) -> None:
        try:
            if mask & WRITABLE and not self._lost:
                self._write_waiting()
            if mask & READABLE and not self._closing:
                self._read()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(error)

    def buffer_for(self, size: int) -> memoryview | None:
        """The protocol's buffer, if it is large enough and data is wanted (see `events.DirectReader`)."""
        if self._paused or self._closing or self._buffered is None:
            return None
        try:
            view = memoryview(self._buffered.get_buffer(size))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(error)
            return None
        return view if len(view) >= size else None

    def took(self, size: int) -> None:
        """Data lies in the buffer that `buffer_for` gave."""
        try:
            if self._buffered is not None and not self._closing:
                self._buffered.buffer_updated(size)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._fail(error)

    def _read(self) -> None:
        conn = self._conn
        queue = conn.receive_queue.queue
        while queue and not (self._paused or self._closing):
            if self._buffered is None:
                self._plain.data_received(conn.recv(READ_SIZE))
            else:
                view = memoryview(self._buffered.get_buffer(-1))
                self._buffered.buffer_updated(conn.recv_into(view))
        if queue or self._paused or self._closing or self._eof_received:
            return
        if conn.error:
            conn.raise_error()
        if conn.at_end:
            self._eof_received = True
            if not (self._buffered or self._plain).eof_received():
                self.close()

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, OSError):
            self._loop.call_exception_handler(
                {
                    "message": "Fatal error: protocol callback failed",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
        self._end(error if isinstance(error, Exception) else None, reset=True)

    def _end(self, error: Exception | None, *, reset: bool) -> None:
        """Close the socket and tell the protocol, once."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._waiting.clear()
        self._size = 0
        if reset:
            self._sock.abort()
        self._sock.close()
        if not self._loop.is_closed():
            self._loop.call_soon(self._protocol.connection_lost, error)

    # -- writing --

    def write(self, data: Buffer) -> None:
        """Send `data`, or keep what does not fit."""
        self._write(data, more=False)

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Send all pieces as one."""
        pieces = list(list_of_data)
        last = len(pieces) - 1
        for index, piece in enumerate(pieces):
            self._write(piece, more=index < last)

    def _write(self, data: Buffer, *, more: bool) -> None:
        if self._eof_sent:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._lost or not data:
            return
        rest: Buffer = data
        if not self._waiting:
            self._sock.tick()
            try:
                taken = self._conn.send(data, more=more)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self._end(error, reset=False)
                return
            if taken == len(data):
                return
            rest = memoryview(data)[taken:]
        # What the caller may change must be copied; what nobody can need not be.
        self._waiting.append(memoryview(rest) if isinstance(data, bytes) else memoryview(bytes(rest)))
        self._size += len(rest)
        if self._size > self._high and not self._write_paused:
            self._write_paused = True
            self._protocol.pause_writing()

    def _write_waiting(self) -> None:
        waiting = self._waiting
        if waiting:
            self._sock.tick()
        while waiting:
            try:
                taken = self._conn.send(waiting[0], more=len(waiting) > 1)
            except BlockingIOError:
                break
            self._size -= taken
            if taken < len(waiting[0]):
                waiting[0] = waiting[0][taken:]
                break
            waiting.popleft()
        if self._write_paused and self._size <= self._low:
            self._write_paused = False
            self._protocol.resume_writing()
        if not waiting:
            if self._closing:
                self._end(None, reset=False)
            elif self._eof_sent and not self._conn.shutdown_mask & SHUT_WR:
                self._conn.shutdown(SHUT_WR)

    def write_eof(self) -> None:
        """Close our direction once everything has been sent."""
        if self._closing or self._eof_sent:
            return
        self._eof_sent = True
        if not self._waiting:
            self._sock.tick()
            self._conn.shutdown(SHUT_WR)

    def can_write_eof(self) -> bool:
        """TCP can."""
        return True

    def get_write_buffer_size(self) -> int:
        """Bytes that wait in the transport."""
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Bytes at which the protocol is told to resume and to pause."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the bytes at which the protocol is told to pause and to resume. Raises ValueError unless high >= low >= 0."""
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high}) must be >= low ({low}) must be >= 0")
        self._high, self._low = high, low

    # -- reading --

    def is_reading(self) -> bool:
        """Whether the protocol is given data."""
        return not (self._paused or self._closing)

    def pause_reading(self) -> None:
        """Give the protocol no data until `resume_reading`; what arrives is charged to the socket and closes the window."""
        self._paused = True

    def resume_reading(self) -> None:
        """Give the protocol data again."""
        if self._paused and not self._closing:
            self._paused = False
            self._loop.call_soon(self._wake, READABLE)

    # -- state --

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Call `protocol` from now on."""
        self._protocol = protocol
        self._buffered = protocol if isinstance(protocol, asyncio.BufferedProtocol) else None
        self._plain = cast("asyncio.Protocol", protocol)
        self._conn.reader = self if self._buffered is not None else None

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol."""
        return self._protocol

    def is_closing(self) -> bool:
        """Whether the transport is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Read no more, send what waits, then close."""
        if self._closing:
            return
        self._closing = True
        if not self._waiting:
            self._end(None, reset=False)

    def abort(self) -> None:
        """Close at once with a reset; what waits is lost."""
        self._end(None, reset=True)

    def _force_close(self, error: Exception | None) -> None:
        """What `asyncio.sslproto` calls when TLS has failed."""
        self._end(error, reset=True)


class Server(asyncio.AbstractServer):
    """Listening sockets whose connections get a protocol each."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, listening: Iterable[Socket], factory: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._loop = loop
        self._listening = tuple(listening)
        self._factory = factory
        self._closed: asyncio.Future[None] = loop.create_future()

    @property
    def sockets(self) -> tuple[Socket, ...]:
        """The listening sockets, while there are any."""
        return self._listening

    def accept_waiting(self, listening: Socket, _: int = READABLE) -> None:
        """Accept whatever waits at `listening`. What a new protocol raises ends its connection, not the server."""
        while self._listening:
            try:
                accepted, _peer = listening.accept_nowait()
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            try:
                accepted.setsockopt(names.IPPROTO_TCP, names.TCP_NODELAY, 1)
                StreamTransport(self._loop, accepted, self._factory()).start()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                accepted.abort()
                accepted.close()
                self._loop.call_exception_handler({"message": "Error on a new connection", "exception": error})

    def close(self) -> None:
        """Listen no more. Connections that were accepted live on."""
        listening, self._listening = self._listening, ()
        for sock in listening:
            sock.close()
        if not self._closed.done():
            self._closed.set_result(None)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that serves."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return bool(self._listening)

    async def start_serving(self) -> None:
        """Nothing to do: a server serves from the start."""

    async def serve_forever(self) -> None:
        """Serve until cancelled or closed."""
        try:
            await asyncio.shield(self._closed)
        finally:
            self.close()

    async def wait_closed(self) -> None:
        """Wait until the server is closed."""
        await asyncio.shield(self._closed)


async def create_connection(
    stack: SocketMaker,
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str,
    port: int,
    *,
    local_addr: tuple[str, int] | None = None,
    memalloc: bool = False,
    ssl: SSLContext | bool | None = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: int | None = None,
    ssl_shutdown_timeout: int | None = None,
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """Connect to `host` and `port` over `stack` and give the connection to a protocol (`loop.create_connection`).

    `memalloc` lets the socket use the reserve, from its SYN on. With `ssl` the protocol gets a TLS transport; True is a context
    with the defaults, and the name that is checked is `server_hostname`, or else `host`. Raises what `Socket.connect` and the
    handshake raise.
    """
    loop = asyncio.get_running_loop()
    tls = None
    if ssl:
        tls = TlsOptions(
            ssl,
            server_side=False,
            server_hostname=host if server_hostname is None else server_hostname,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
    elif server_hostname is not None:
        raise ValueError("server_hostname is only meaningful with ssl")
    sock = stack.socket(family_of(host))
    try:
        sock.setsockopt(names.IPPROTO_TCP, names.TCP_NODELAY, 1)
        sock.set_memalloc(memalloc)
        if local_addr is not None:
            sock.bind(local_addr)
        await sock.connect((host, port))
        protocol = protocol_factory()
        if tls is not None:
            return await handshake(protocol, tls, lambda secured: _started(loop, sock, secured)), protocol
        return _started(loop, sock, protocol), protocol
    except BaseException:
        sock.close()
        raise


def _started(loop: asyncio.AbstractEventLoop, sock: Socket, protocol: asyncio.BaseProtocol) -> StreamTransport:
    transport = StreamTransport(loop, sock, protocol)
    transport.start()
    return transport


async def create_server(
    stack: SocketMaker,
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str | None,
    port: int,
    *,
    backlog: int = 100,
    reuse_address: bool = True,
    ssl: SSLContext | None = None,
    ssl_handshake_timeout: int | None = None,
    ssl_shutdown_timeout: int | None = None,
) -> Server:
    """Listen on `host` and `port` (0: any) over `stack`; each connection gets a protocol, with a TLS transport when there is an
    `ssl` context (`loop.create_server`). `host` None or "" is every address: two sockets, where an interface speaks IPv6.
    """
    loop = asyncio.get_running_loop()
    factory = protocol_factory
    if ssl is not None:
        tls = TlsOptions(ssl, server_side=True, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout)

        def factory() -> asyncio.BaseProtocol:
            return tls_protocol(loop, protocol_factory(), tls)

    families = [family_of(host)] if host else [names.AF_INET, names.AF_INET6] if stack.inet.v6.interfaces else [names.AF_INET]
    listening: list[Socket] = []
    try:
        for family in families:
            sock = stack.socket(family)
            listening.append(sock)
            sock.setsockopt(names.SOL_SOCKET, names.SO_REUSEADDR, reuse_address)
            if family == names.AF_INET6:
                sock.setsockopt(names.IPPROTO_IPV6, names.IPV6_V6ONLY, 1)
            sock.bind((host or "", port))
            port = sock.getsockname()[1]  # the same for both
            sock.listen(backlog)
    except BaseException:
        for sock in listening:
            sock.close()
        raise
    server = Server(loop, listening, factory)
    for sock in listening:
        sock.watch(partial(server.accept_waiting, sock))
    return server
