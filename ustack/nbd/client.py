"""NBD client for asyncio, over any transport: the kernel's sockets or our own stack.

    async with nbd.connect("nbd://10.77.0.1/disk", create_connection=stack.create_connection) as disk:
        data = await disk.pread(4096, 0)

Calls may be made from many tasks at once; up to `queue_depth` requests are in flight and the rest wait in line. What happens on
trouble: an error of one request is an OSError from that call; when the connection is lost, the server breaks the protocol or
does not answer in time, every pending and every later call fails at once with an OSError that says so. Nothing is retried here.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypedDict, Unpack

from ustack.nbd.admission import Admission
from ustack.nbd.constants import (
    COMMAND_NAMES,
    MAX_STRING,
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_ESHUTDOWN,
    WIRE_TO_ERRNO,
)
from ustack.nbd.errors import NbdProtocolError, describe_errno
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.handshake import (
    Aborted,
    ClientHandshake,
    Event,
    Negotiated,
    Purpose,
)
from ustack.nbd.transmission import ClientTransmission, Request

if TYPE_CHECKING:
    from types import TracebackType

QUEUE_DEPTH: Final = 64
"""Requests in flight on one connection (libnbd's advice)."""
MAX_BYTES_IN_FLIGHT: Final = 64 << 20
"""Bytes of payload in flight on one connection: two requests of the largest size that every server takes."""
CONNECT_TIMEOUT: Final = 10.0
"""Seconds for TCP connection and negotiation together."""
REQUEST_TIMEOUT: Final = 30.0
"""Seconds from sending a request to the end of its reply."""
CLOSE_TIMEOUT: Final = 5.0
"""Seconds that `close` waits for answers still outstanding and for the transport to drain."""
MAX_RANGE: Final = 128 << 20
"""Bytes of one trim or write-zeroes request. They carry no payload, but a server may need long to do them."""

Buffer: TypeAlias = bytes | bytearray | memoryview
ProtocolFactory: TypeAlias = Callable[[], asyncio.BufferedProtocol]
Connector: TypeAlias = Callable[[ProtocolFactory], Awaitable[tuple[Any, Any]]]
"""Connects somewhere: takes a protocol factory, returns (transport, protocol) like loop.create_connection."""
CreateConnection: TypeAlias = Callable[[ProtocolFactory, str, int], Awaitable[tuple[Any, Any]]]
"""loop.create_connection or Stack.create_connection."""


class ClientOptions(TypedDict, total=False):
    """Keyword arguments that `connect` and `NbdClient.open` hand on to `NbdClient`."""

    purpose: Purpose
    queue_depth: int
    max_bytes_in_flight: int
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


class NbdClient(asyncio.BufferedProtocol):
    """One connection to one export. Made by `connect` or `NbdClient.open`; the methods of asyncio.BufferedProtocol are for its
    transport.

    Offsets and lengths are bytes and must be multiples of `minimum_block`. Calls that break the export's limits are refused
    before anything is sent: EINVAL for misalignment and for what lies beyond the end (ENOSPC for writes), EPERM for writing to
    a read-only export, EOPNOTSUPP for what the server does not offer.
    """

    def __init__(
        self,
        export: str = "",
        *,
        purpose: Purpose = Purpose.GO,
        queue_depth: int = QUEUE_DEPTH,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
        request_timeout: float | None = REQUEST_TIMEOUT,
    ) -> None:
        """At most `queue_depth` requests with `max_bytes_in_flight` bytes of payload are in flight; each must be answered
        within `request_timeout` seconds (None: whenever it likes), or the connection is given up. ValueError for an impossible
        name."""
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
        **options: Unpack[ClientOptions],
    ) -> Self:
        """Connect with `connector`, negotiate, and return the client ready for use.

        `options` are those of the constructor. Raises OSError: what the connector raised, NbdOptionError when the server
        refuses the export, NbdProtocolError when it is no proper NBD server, TimeoutError (ETIMEDOUT) after `connect_timeout`
        seconds.
        """
        client = cls(export, **options)
        deadline = asyncio.timeout(connect_timeout)
        try:
            async with deadline:
                await connector(lambda: client)
                await asyncio.shield(client._negotiated)
        except BaseException as error:
            client._fail(errno.ECONNABORTED, "connection attempt given up")
            if isinstance(error, TimeoutError) and deadline.expired():
                missing = client._handshake.waiting_for if client._connected else "the connection"
                raise OSError(errno.ETIMEDOUT, f"{client._peer}: waited {connect_timeout} s in vain for {missing}") from None
            raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- what the export is ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes on the export."""
        return self.info.size

    @property
    def name(self) -> str:
        """The export's name: the server's own form of it if it told."""
        return self.info.name if self.info.canonical_name is None else self.info.canonical_name

    @property
    def description(self) -> str | None:
        """The server's description of the export, if it has one."""
        return self.info.description

    @property
    def minimum_block(self) -> int:
        """Offsets and lengths are multiples of this many bytes."""
        return self.info.minimum_block

    @property
    def preferred_block(self) -> int:
        """Bytes from which on requests are efficient."""
        return self.info.preferred_block

    @property
    def maximum_payload(self) -> int:
        """Bytes in one read or write on the wire. Larger calls are split."""
        return self.info.maximum_payload

    @property
    def read_only(self) -> bool:
        """Writes are refused."""
        return self.info.read_only

    @property
    def can_flush(self) -> bool:
        """`flush` is supported."""
        return self.info.can_flush

    @property
    def can_fua(self) -> bool:
        """`fua=True` is supported."""
        return self.info.can_fua

    @property
    def can_trim(self) -> bool:
        """`trim` is supported."""
        return self.info.can_trim

    @property
    def can_zero(self) -> bool:
        """`zero` is supported."""
        return self.info.can_zero

    @property
    def can_cache(self) -> bool:
        """`cache` is supported."""
        return self.info.can_cache

    @property
    def can_df(self) -> bool:
        """`df=True` is supported."""
        return self.info.can_df

    @property
    def can_multi_conn(self) -> bool:
        """Several connections to the export see one cache."""
        return self.info.can_multi_conn

    @property
    def is_rotational(self) -> bool:
        """The medium turns."""
        return self.info.is_rotational

    @property
    def requests_in_flight(self) -> int:
        """Requests sent and not yet answered, including those whose callers have given up."""
        return self._admission.count

    # -- commands ----------------------------------------------------------------------------------------------------------

    async def pread(self, length: int, offset: int, *, df: bool = False) -> bytearray:
        """Read `length` bytes at `offset`. `df` asks the server not to fragment its reply."""
        data = bytearray(length)
        await self.pread_into(data, offset, df=df)
        return data

    async def pread_into(self, buffer: bytearray | memoryview, offset: int, *, df: bool = False) -> None:
        """Fill `buffer` from `offset`. When this raises, or is cancelled, the contents of `buffer` are undefined, but nothing
        writes into it afterwards."""
        view = memoryview(buffer)
        if view.format != "B":
            view = view.cast("B")
        self._check(NBD_CMD_READ, offset, len(view), not df or self.info.can_df)
        flags = NBD_CMD_FLAG_DF if df else 0
        if len(view) <= self.info.maximum_payload:
            await self._call(NBD_CMD_READ, flags, offset, len(view), view, None)
        else:
            parts = self._parts(len(view), self.info.maximum_payload)
            await self._together(self._call(NBD_CMD_READ, flags, offset + at, n, view[at : at + n], None) for at, n in parts)

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is on stable storage when this returns. `data` must not change meanwhile. A
        cancelled write may or may not happen."""
        view = memoryview(data)
        if view.format != "B":
            view = view.cast("B")
        self._check(NBD_CMD_WRITE, offset, len(view), not fua or self.info.can_fua)
        flags = NBD_CMD_FLAG_FUA if fua else 0
        if len(view) <= self.info.maximum_payload:
            await self._call(NBD_CMD_WRITE, flags, offset, len(view), None, view)
        else:
            parts = self._parts(len(view), self.info.maximum_payload)
            await self._together(self._call(NBD_CMD_WRITE, flags, offset + at, n, None, view[at : at + n]) for at, n in parts)

    async def flush(self) -> None:
        """Bring every write that has been answered to stable storage."""
        if not self.info.can_flush:
            raise OSError(errno.EOPNOTSUPP, "the server does not offer NBD_CMD_FLUSH")
        await self._call(NBD_CMD_FLUSH, 0, 0, 0, None, None)

    async def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Tell the server that `length` bytes at `offset` are not needed. Their contents are undefined afterwards."""
        self._check(NBD_CMD_TRIM, offset, length, self.info.can_trim and (not fua or self.info.can_fua))
        await self._range(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA if fua else 0, offset, length, MAX_RANGE)

    async def zero(self, length: int, offset: int, *, fua: bool = False, no_hole: bool = False) -> None:
        """Write zeroes to `length` bytes at `offset`. With `no_hole` the server keeps the space allocated."""
        self._check(NBD_CMD_WRITE_ZEROES, offset, length, self.info.can_zero and (not fua or self.info.can_fua))
        flags = (NBD_CMD_FLAG_FUA if fua else 0) | (NBD_CMD_FLAG_NO_HOLE if no_hole else 0)
        await self._range(NBD_CMD_WRITE_ZEROES, flags, offset, length, MAX_RANGE)

    async def cache(self, length: int, offset: int) -> None:
        """Ask the server to bring `length` bytes at `offset` into its cache."""
        self._check(NBD_CMD_CACHE, offset, length, self.info.can_cache)
        await self._range(NBD_CMD_CACHE, 0, offset, length, self.info.maximum_payload)

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

    # -- requests ----------------------------------------------------------------------------------------------------------

    def _check(self, command: int, offset: int, length: int, offered: bool) -> None:
        info = self.info
        if not offered:
            raise OSError(errno.EOPNOTSUPP, f"the server does not offer {COMMAND_NAMES[command]} with these flags")
        if info.read_only and command in (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
            raise OSError(errno.EPERM, f"{COMMAND_NAMES[command]}: the export is read-only")
        if offset < 0 or length < 0 or offset + length > info.size:
            writes = command in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
            code = errno.ENOSPC if writes and offset >= 0 and length >= 0 else errno.EINVAL
            raise OSError(code, f"{COMMAND_NAMES[command]} of {length} bytes at {offset}: the export has {info.size} bytes")
        if (offset | length) & (info.minimum_block - 1):
            raise OSError(
                errno.EINVAL, f"{COMMAND_NAMES[command]} of {length} bytes at {offset}: blocks have {info.minimum_block} bytes"
            )

    async def _call(
        self, command: int, flags: int, offset: int, length: int, view: memoryview | None, payload: memoryview | None
    ) -> None:
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

    async def _range(self, command: int, flags: int, offset: int, length: int, limit: int) -> None:
        if length <= limit:
            await self._call(command, flags, offset, length, None, None)
        else:
            parts = self._parts(length, limit - limit % self.info.minimum_block)
            await self._together(self._call(command, flags, offset + at, n, None, None) for at, n in parts)

    @staticmethod
    def _parts(length: int, limit: int) -> Iterator[tuple[int, int]]:
        return ((at, min(limit, length - at)) for at in range(0, length, limit))

    @staticmethod
    async def _together(calls: Iterator[Any]) -> None:
        """Run the parts of a split call. All of them end before this returns, also on error, so that no part outlives the
        call."""
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

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
        set_memalloc = getattr(transport.get_extra_info("socket"), "set_memalloc", None)
        if set_memalloc is not None:
            set_memalloc(True)
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
                self._fail((exc.errno if isinstance(exc, OSError) else None) or errno.ECONNRESET, f"connection lost: {exc}")
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
