"""One connection to an NBD server over any asyncio transport: negotiation, requests in flight, and the end.

An error of one request is an OSError from that `call`. When the connection is lost, the server breaks the protocol or does not
answer in time, every pending and every later call fails at once with an OSError that says so. A connection never comes back.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self, TypeAlias, TypedDict, Unpack

from ustack.nbd.admission import Admission
from ustack.nbd.constants import (
    COMMAND_NAMES,
    MAX_STRING,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_ESHUTDOWN,
    WIRE_TO_ERRNO,
)
from ustack.nbd.errors import NbdProtocolError, describe_errno
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.handshake import Aborted, ClientHandshake, Event, Negotiated, Purpose
from ustack.nbd.transmission import ClientTransmission, Request

QUEUE_DEPTH: Final = 64
"""Requests in flight on one connection (libnbd's advice)."""
MAX_BYTES_IN_FLIGHT: Final = 64 << 20
"""Bytes of payload in flight on one connection: two requests of the largest size that every server takes."""
REQUEST_SIZE: Final = 64 << 10
"""Bytes of a request that the reserve is made for, unless told otherwise."""

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for TCP connection and negotiation together."""
REQUEST_TIMEOUT: Final = 30.0
"""Seconds from sending a request to the end of its reply."""
CLOSE_TIMEOUT: Final = 5.0
"""Seconds that `close` waits for answers still outstanding and for the transport to drain."""

Buffer: TypeAlias = bytes | bytearray | memoryview
ProtocolFactory: TypeAlias = Callable[[], asyncio.BufferedProtocol]
Connector: TypeAlias = Callable[[ProtocolFactory], Awaitable[tuple[Any, Any]]]
"""Connects somewhere: takes a protocol factory, returns (transport, protocol) like loop.create_connection."""
CreateConnection: TypeAlias = Callable[[ProtocolFactory, str, int], Awaitable[tuple[Any, Any]]]
"""loop.create_connection or Stack.create_connection."""


class ConnectionOptions(TypedDict, total=False):
    """Keyword arguments that `connect` and `NbdClient.open` hand on to `Connection`."""

    purpose: Purpose
    queue_depth: int
    max_bytes_in_flight: int
    request_size: int
    request_timeout: float | None


class _Call(Request):
    """A request with the future that its caller waits for."""

    __slots__ = ("future", "sent_at")

    def __init__(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        view: memoryview | None,
        future: asyncio.Future[None],
        now: float,
    ) -> None:
        super().__init__(command, flags, offset, length, view)
        self.future = future
        self.sent_at = now


class Connection(asyncio.BufferedProtocol):
    """One connection to one export. `open` makes it; the methods of asyncio.BufferedProtocol are for its transport.

    After negotiation `info` describes the export, and `negotiation` has all that was said.
    """

    def __init__(
        self,
        export: str = "",
        *,
        purpose: Purpose = Purpose.GO,
        queue_depth: int = QUEUE_DEPTH,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
        request_size: int = REQUEST_SIZE,
        request_timeout: float | None = REQUEST_TIMEOUT,
    ) -> None:
        """At most `queue_depth` requests with `max_bytes_in_flight` bytes of payload are in flight; each must be answered
        within `request_timeout` seconds (None: whenever it likes), or the connection is given up. Over our own stack there is
        a reserve for `queue_depth` requests of `request_size` bytes each, and no more bytes than that are in flight. ValueError
        for an impossible name."""
        self.info = ExportInfo(export, 0)
        self.structured_replies = False
        self.negotiation: list[Event] = []
        self._loop = asyncio.get_running_loop()
        self._handshake = ClientHandshake(export, purpose)
        self._negotiated: asyncio.Future[None] = self._loop.create_future()
        self._greeting_buffer = bytearray(MAX_STRING)
        self._transmission: ClientTransmission[_Call] | None = None
        self._transport: Any = None
        self._connected = False
        self._peer = "NBD server"
        self._closed = self._loop.create_future()
        # Why nothing can be sent any more: (errno, text). The first cause stays.
        self._failure: tuple[int, str] | None = None
        self._leaving = False
        self._queue_depth = queue_depth
        self._request_size = request_size
        self._admission = Admission(queue_depth, max_bytes_in_flight)
        self._idle: asyncio.Future[None] | None = None
        self._outgoing: list[Buffer] = []
        self._request_timeout = request_timeout
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(
        cls,
        connector: Connector,
        export: str = "",
        *,
        connect_timeout: float | None = CONNECT_TIMEOUT,
        **options: Unpack[ConnectionOptions],
    ) -> Self:
        """Connect with `connector`, negotiate, and return the connection ready for use.

        `options` are those of the constructor. Raises OSError: what the connector raised, NbdOptionError when the server
        refuses the export, NbdProtocolError when it is no proper NBD server, TimeoutError (ETIMEDOUT) after `connect_timeout`
        seconds.
        """
        connection = cls(export, **options)
        deadline = asyncio.timeout(connect_timeout)
        try:
            async with deadline:
                await connector(lambda: connection)
                await asyncio.shield(connection._negotiated)
        except BaseException as error:
            connection._fail(errno.ECONNABORTED, "connection attempt given up")
            if isinstance(error, TimeoutError) and deadline.expired():
                missing = connection._handshake.waiting_for if connection._connected else "the connection"
                raise OSError(
                    errno.ETIMEDOUT, f"{connection._peer}: waited {connect_timeout} s in vain for {missing}"
                ) from None
            raise
        return connection

    @property
    def requests_in_flight(self) -> int:
        """Requests sent and not yet answered, including those whose callers have given up."""
        return self._admission.count

    async def close(self, grace: float = CLOSE_TIMEOUT) -> None:
        """Wait up to `grace` seconds for requests in flight, say NBD_CMD_DISC, and close the connection. Later calls fail
        with EPIPE."""
        self._leaving = True
        try:
            async with asyncio.timeout(grace):
                if self._admission.count and self._failure is None:
                    self._idle = self._idle or self._loop.create_future()
                    await asyncio.shield(self._idle)
                self._say_goodbye()
                if self._transport is not None:
                    await asyncio.shield(self._closed)
        except TimeoutError:
            self._fail(errno.ETIMEDOUT, f"closed with requests still unanswered after {grace} s")
        finally:
            if self._transport is not None:
                self._transport.abort()

    async def wait_lost(self) -> OSError:
        """Wait until the connection is gone, and return the reason: what every call raises from then on."""
        await asyncio.shield(self._closed)
        return self._error()

    # -- requests ----------------------------------------------------------------------------------------------------------

    async def call(
        self, command: int, flags: int, offset: int, length: int, view: memoryview | None, payload: memoryview | None
    ) -> None:
        """Do one request: wait for a place, send it, wait for the reply. `view` is where a read goes, `payload` the data of a
        write. A request of no bytes is done already, since the protocol has none. Raises OSError."""
        if length == 0 and command != NBD_CMD_FLUSH:
            return
        size = length if view is not None or payload is not None else 0
        self._check_open()
        admission = self._admission
        if not admission.try_enter(size):
            await admission.enter(size)
            try:
                self._check_open()
            except OSError:
                admission.leave(size)
                raise
        transmission = self._transmission
        assert transmission is not None
        future = self._loop.create_future()
        call = _Call(command, flags, offset, length, view, future, self._loop.time())
        header = transmission.submit(call)
        if payload is not None:
            self._outgoing.append(header)
            self._outgoing.append(payload)
            self._send_outgoing()
        elif admission.count == 1:
            self._transport.write(header)
        else:
            # With more in flight, requests of the same turn of the loop leave in one write.
            if not self._outgoing:
                self._loop.call_soon(self._send_outgoing)
            self._outgoing.append(header)
        if self._timer is None and self._request_timeout is not None:
            self._timer = self._loop.call_later(self._request_timeout, self._check_timeout)
        try:
            await future
        except asyncio.CancelledError:
            transmission.abandon(call)
            raise
        if call.error:
            raise self._error_of(call)

    def _check_open(self) -> None:
        if self._failure is not None or self._leaving:
            raise self._error()

    def _send_outgoing(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._failure is None:
            self._transport.writelines(outgoing)

    # -- replies -------------------------------------------------------------------------------------------------------

    def _deliver(self, transmission: ClientTransmission[_Call]) -> None:
        """Wake the callers of the requests that are complete."""
        admission = self._admission
        for call in transmission.completed:
            admission.leave(call.length if call.command in (NBD_CMD_READ, NBD_CMD_WRITE) else 0)
            if not call.future.done():
                call.future.set_result(None)
            if call.error == NBD_ESHUTDOWN:
                self._leaving = True  # "the client MUST initiate a soft disconnect"
        transmission.completed.clear()
        admission.admit()
        if not admission.count:
            if self._idle is not None and not self._idle.done():
                self._idle.set_result(None)
            elif self._leaving:
                self._say_goodbye()

    # -- trouble -----------------------------------------------------------------------------------------------------------

    def _check_timeout(self) -> None:
        self._timer = None
        assert self._request_timeout is not None
        if self._transmission is None or not self._transmission.in_flight:
            return
        oldest = next(iter(self._transmission.in_flight.values()))
        left = oldest.sent_at + self._request_timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_timeout)
        else:
            self._fail(errno.ETIMEDOUT, f"no reply to {oldest!r} within {self._request_timeout} s")

    def _fail(self, code: int, text: str) -> None:
        """The connection is of no more use: everybody who waits hears why, and so does everybody who comes later."""
        if self._failure is not None:
            return
        if self._transport is not None:
            self._transport.abort()
        self._end(code, text)
        self._refuse(self._error())
        if self._transmission is not None:
            for call in self._transmission.in_flight.values():
                self._transmission.abandon(call)
                if not call.future.done():
                    call.future.set_exception(self._error())
            self._transmission.in_flight.clear()
        self._outgoing.clear()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _end(self, code: int, text: str) -> None:
        """From now on nothing is sent; those who wait in line go on and find out why."""
        self._failure = (code, text)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._admission.closed = True
        self._admission.admit()

    def _refuse(self, error: OSError) -> None:
        """Negotiation has failed."""
        if not self._negotiated.done():
            self._negotiated.set_exception(error)
            self._negotiated.exception()  # marked as seen: perhaps nobody waits any more

    def _error(self) -> OSError:
        """A fresh exception for the reason why the connection cannot be used."""
        if self._failure is None:
            return OSError(errno.EPIPE, f"{self._peer}: the connection is being closed")
        code, text = self._failure
        if code == errno.EPROTO:
            return NbdProtocolError(f"{self._peer}: {text}")
        return OSError(code, f"{self._peer}: {text}")

    @staticmethod
    def _error_of(call: _Call) -> OSError:
        code = WIRE_TO_ERRNO.get(call.error, errno.EINVAL)
        said = f': "{call.message}"' if call.message else ""
        what = COMMAND_NAMES[call.command]
        where = "" if call.command == NBD_CMD_FLUSH else f" of {call.length} bytes at {call.offset}"
        return OSError(code, f"{what}{where} failed on the server with {describe_errno(code)}{said}")

    def _say_goodbye(self) -> None:
        if self._failure is None and self._transmission is not None and self._transport is not None:
            self._send_outgoing()
            self._transport.write(self._transmission.disconnect())
            self._end(errno.EPIPE, "closed")
            self._transport.close()

    # -- asyncio.BufferedProtocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Mark the socket memalloc where it can be (our own stack's), so that even the negotiation may use the reserve."""
        self._transport = transport
        self._connected = True
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._peer = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        elif peer:
            self._peer = str(peer)
        sock = transport.get_extra_info("socket")
        if hasattr(sock, "reserve_for"):
            sock.set_memalloc(True)
            sock.reserve_for(self._queue_depth, self._request_size)
            reserve = sock.reserve
            self._admission.limit_bytes(self._queue_depth * self._request_size)
            self._admission.may_begin = lambda: bool(reserve.more_than_half_free)
        if self._failure is not None:
            transport.abort()

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        """Where the transport puts the next bytes."""
        if self._transmission is not None:
            return self._transmission.get_buffer(sizehint)
        return self._greeting_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived in the buffer of `get_buffer`."""
        if self._failure is not None:
            return
        transmission = self._transmission
        if transmission is None:
            self._negotiate(self._greeting_buffer[:nbytes])
            return
        try:
            transmission.buffer_updated(nbytes)
        except NbdProtocolError as error:
            self._deliver(transmission)
            self._fail(errno.EPROTO, str(error.strerror))
            return
        if transmission.completed:
            self._deliver(transmission)

    def _negotiate(self, data: bytearray) -> None:
        try:
            self.negotiation += self._handshake.receive_data(data)
        except OSError as error:
            self._transport.write(self._handshake.data_to_send())
            self._refuse(error)
            self._end(error.errno or errno.EPROTO, str(error.strerror))
            self._transport.close()
            return
        out = self._handshake.data_to_send()
        if out:
            self._transport.write(out)
        last = self.negotiation[-1] if self.negotiation else None
        if isinstance(last, Negotiated):
            self.info = last.info
            self.structured_replies = last.structured_replies
            self._transmission = ClientTransmission(last.structured_replies)
        elif isinstance(last, Aborted):
            self._end(errno.EPIPE, "closed")
            self._transport.close()
        else:
            return
        if not self._negotiated.done():
            self._negotiated.set_result(None)

    def eof_received(self) -> bool:
        """The server has closed its side; `connection_lost` follows."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        if not self._closed.done():
            self._closed.set_result(None)
        if self._failure is None:
            if exc is not None:
                code, reason = (exc.errno, exc.strerror) if isinstance(exc, OSError) else (None, None)
                self._fail(code or errno.ECONNRESET, f"connection lost: {reason or exc}")
            elif self._transmission is None:
                error = self._handshake.end_of_stream()
                self._fail(error.errno or errno.ECONNRESET, str(error.strerror))
            else:
                waiting = len(self._transmission.in_flight)
                self._fail(errno.ECONNRESET, f"server closed the connection with {waiting} requests unanswered")
        self._transport = None

    def pause_writing(self) -> None:
        """The transport has enough to send: new requests wait."""
        self._admission.paused = True

    def resume_writing(self) -> None:
        """The transport takes data again."""
        self._admission.paused = False
        self._admission.admit()
