"""One connection to an NBD server over any asyncio transport: negotiation, requests in flight, and the end.

A connection never comes back. What it had in flight when it was lost goes back to its owner, usually a `Session`, which may
send it again on another one.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeAlias

from ustack.nbd.constants import MAX_STRING, NBD_ESHUTDOWN
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.handshake import Aborted, ClientHandshake, Event, Negotiated, Purpose, TlsBegins, Wishes
from ustack.nbd.tls import TlsSettings, TlsTransport
from ustack.nbd.transmission import ClientTransmission

if TYPE_CHECKING:
    from ustack.nbd.call import Call

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for TCP connection and negotiation together."""
REQUEST_TIMEOUT: Final = 30.0
"""Seconds without any progress while a request waits, after which the server counts as dead."""
SLOW_FACTOR: Final = 10
"""A single request may take so many times the request timeout while the server answers others."""
CLOSE_TIMEOUT: Final = 5.0
"""Seconds that `close` waits for answers still outstanding and for the transport to drain."""
PROGRESS: Final = 16 << 10
"""Bytes of payload, received or taken by the transport, that count as progress. A byte now and then does not."""
KEEPALIVE_IDLE: Final = 10
"""Seconds of silence before TCP asks whether the peer is still there."""
KEEPALIVE_INTERVAL: Final = 5
"""Seconds between two such questions."""
KEEPALIVE_PROBES: Final = 4
"""Questions without an answer that end the connection: a dead peer is noticed within 30 s even when nothing is in flight."""

EVERYTHING: Final = Wishes()

Buffer: TypeAlias = bytes | bytearray | memoryview
ProtocolFactory: TypeAlias = Callable[[], asyncio.BufferedProtocol]
Connector: TypeAlias = Callable[[ProtocolFactory], Awaitable[tuple[Any, Any]]]
"""Connects somewhere: takes a protocol factory, returns (transport, protocol) like loop.create_connection."""
CreateConnection: TypeAlias = Callable[[ProtocolFactory, str, int], Awaitable[tuple[Any, Any]]]
"""loop.create_connection or Stack.create_connection."""


class Owner(Protocol):
    """Whoever uses a connection: hears of answers and of the end."""

    def connected(self, sock: Any) -> None:
        """A connection is made over this socket, and nothing was sent yet."""

    def answered(self, connection: Connection, calls: list[Call]) -> None:
        """These calls have their replies. The list is reused afterwards."""

    def lost(self, connection: Connection, calls: list[Call], error: OSError) -> None:
        """Nothing can be sent any more, for this reason; `calls` are unanswered, oldest first."""

    def held(self, connection: Connection) -> None:
        """The transport has enough to send."""

    def resumed(self, connection: Connection) -> None:
        """The transport takes data again."""


class Connection(asyncio.BufferedProtocol):
    """One connection to one export. `open` makes it; the methods of asyncio.BufferedProtocol are for its transport.

    After negotiation `info` describes the export, and `negotiation` has all that was said.
    """

    def __init__(
        self,
        export: str = "",
        *,
        owner: Owner | None = None,
        purpose: Purpose = Purpose.GO,
        request_timeout: float | None = REQUEST_TIMEOUT,
        tls: TlsSettings | None = None,
        wishes: Wishes = EVERYTHING,
    ) -> None:
        """While requests wait, something must be answered every `request_timeout` seconds (None: whenever the server likes), or
        the connection is given up. With `tls` there is TLS or no connection. ValueError for an impossible name."""
        self.info = ExportInfo(export, 0)
        self.fixed_newstyle = False
        self.structured_replies = False
        self.extended_headers = False
        self.contexts: frozenset[str] = frozenset()
        self.negotiation: list[Event] = []
        self.paused = False
        """The transport has enough to send."""
        self.slow_requests = 0
        """Requests that took longer than the request timeout while the server was alive."""
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._handshake = ClientHandshake(export, purpose, tls=tls is not None, wishes=wishes)
        self._tls_settings = tls
        self._tls: TlsTransport | None = None
        self._negotiated: asyncio.Future[None] = self._loop.create_future()
        self._greeting_buffer = bytearray(MAX_STRING)
        self._transmission: ClientTransmission[Call] | None = None
        self._transport: Any = None
        self._connected = False
        self._peer = "NBD server"
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the transport is gone."""
        # Why nothing can be sent any more: (errno, text). The first cause stays.
        self._failure: tuple[int, str] | None = None
        self._retiring = False
        self._outgoing: list[Buffer] = []
        self._request_timeout = request_timeout
        self._timer: asyncio.TimerHandle | None = None
        # When the server was last seen to do something; bytes received, and waiting in the transport, at the last look.
        self._progress_at = 0.0
        self._received = 0
        self._unsent = 0

    @classmethod
    async def open(
        cls,
        connector: Connector,
        export: str = "",
        *,
        connect_timeout: float | None = CONNECT_TIMEOUT,
        owner: Owner | None = None,
        purpose: Purpose = Purpose.GO,
        request_timeout: float | None = REQUEST_TIMEOUT,
        tls: TlsSettings | None = None,
        wishes: Wishes = EVERYTHING,
    ) -> Self:
        """Connect with `connector`, negotiate, and return the connection ready for use.

        The other arguments are those of the constructor. Raises OSError: what the connector raised, NbdOptionError when the
        server refuses the export, NbdProtocolError when it is no proper NBD server, TimeoutError (ETIMEDOUT) after
        `connect_timeout` seconds.
        """
        connection = cls(export, owner=owner, purpose=purpose, request_timeout=request_timeout, tls=tls, wishes=wishes)
        deadline = asyncio.timeout(connect_timeout)
        try:
            async with deadline:
                await connector(lambda: connection)
                await asyncio.shield(connection._negotiated)
        except BaseException as error:
            connection.fail(errno.ECONNABORTED, "connection attempt given up")
            if isinstance(error, TimeoutError) and deadline.expired():
                missing = connection._waiting_for() if connection._connected else "the connection"
                raise OSError(
                    errno.ETIMEDOUT, f"{connection._peer}: waited {connect_timeout} s in vain for {missing}"
                ) from None
            raise
        return connection

    def _waiting_for(self) -> str:
        if self._tls is not None and not self._tls.ready:
            return "the TLS handshake"
        return self._handshake.waiting_for

    @property
    def tls(self) -> bool:
        """Everything goes through TLS."""
        return self._tls is not None

    @property
    def peer(self) -> str:
        """The server's address, for messages."""
        return self._peer

    @property
    def in_flight(self) -> int:
        """Requests sent on this connection and not yet answered."""
        return len(self._transmission.in_flight) if self._transmission is not None else 0

    # -- requests ----------------------------------------------------------------------------------------------------------

    def send(self, call: Call) -> None:
        """Send a request. Its reply comes through the owner. Must not be called once the owner knows that the connection is
        lost."""
        transmission = self._transmission
        assert transmission is not None
        header = transmission.submit(call)
        call.sent_at = now = self._loop.time()
        if call.payload is not None:
            self._outgoing.append(header)
            self._outgoing.append(call.payload)
            self._send_outgoing()
        elif len(transmission.in_flight) == 1:
            self._transport.write(header)
        else:
            # With more in flight, requests of the same turn of the loop leave in one write.
            if not self._outgoing:
                self._loop.call_soon(self._send_outgoing)
            self._outgoing.append(header)
        if self._timer is None and self._request_timeout is not None:
            self._progress_at = now
            self._received, self._unsent = transmission.received, self._transport.get_write_buffer_size()
            self._timer = self._loop.call_later(self._request_timeout, self._check_timeout)

    def abandon(self, call: Call) -> None:
        """The caller of a request in flight has gone: its memory is not touched again."""
        if self._transmission is not None:
            self._transmission.abandon(call)

    def _send_outgoing(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._failure is None:
            self._transport.writelines(outgoing)

    # -- the end -------------------------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Nothing will be sent any more: say NBD_CMD_DISC and close as soon as nothing is in flight ("soft disconnect")."""
        self._retiring = True
        if self._transmission is not None and not self._transmission.in_flight:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self._failure is None and self._transmission is not None and self._transport is not None:
            self._send_outgoing()
            self._transport.write(self._transmission.disconnect())
            self._end(errno.EPIPE, "closed")
            self._transport.close()

    async def close(self, grace: float = CLOSE_TIMEOUT) -> None:
        """Wait up to `grace` seconds for requests in flight, say NBD_CMD_DISC, and close the connection."""
        self.retire()
        try:
            async with asyncio.timeout(grace):
                if self._transport is not None:
                    await asyncio.shield(self.closed)
        except TimeoutError:
            self.fail(errno.ETIMEDOUT, f"closed with requests still unanswered after {grace} s")
        finally:
            if self._transport is not None:
                self._transport.abort()

    def fail(self, code: int, text: str) -> None:
        """The connection is of no more use: its owner hears why, and gets back what is unanswered."""
        if self._failure is not None:
            return
        if self._transport is not None:
            self._transport.abort()
        self._end(code, text)
        error = self.error()
        self._refuse(error)
        calls: list[Call] = []
        if self._transmission is not None:
            calls = self._transmission.end()
        self._outgoing.clear()
        if self._owner is not None:
            self._owner.lost(self, calls, error)

    def _end(self, code: int, text: str) -> None:
        """From now on nothing is sent."""
        self._failure = (code, text)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: OSError) -> None:
        """Negotiation has failed."""
        if not self._negotiated.done():
            self._negotiated.set_exception(error)
            self._negotiated.exception()  # marked as seen: perhaps nobody waits any more

    def error(self) -> OSError:
        """A fresh exception for the reason why the connection cannot be used."""
        if self._failure is None:
            return OSError(errno.EPIPE, f"{self._peer}: the connection is being closed")
        code, text = self._failure
        if code == errno.EPROTO:
            return NbdProtocolError(f"{self._peer}: {text}")
        return OSError(code, f"{self._peer}: {text}")

    # -- slow or dead ------------------------------------------------------------------------------------------------------

    def _check_timeout(self) -> None:
        """Is the server only slow? It counts as dead when for a whole request timeout it has answered nothing, sent hardly any
        payload and taken hardly any; or when one request takes many times as long."""
        self._timer = None
        timeout = self._request_timeout
        transmission = self._transmission
        assert timeout is not None
        if transmission is None or not transmission.in_flight:
            return
        now = self._loop.time()
        received, unsent = transmission.received, self._transport.get_write_buffer_size()
        if received >= self._received + PROGRESS or unsent <= self._unsent - PROGRESS:
            self._progress_at = now
        self._received, self._unsent = received, unsent
        oldest = next(iter(transmission.in_flight.values()))
        age = now - oldest.sent_at
        silent_for = min(age, now - self._progress_at)
        if silent_for >= timeout:
            self.fail(errno.ETIMEDOUT, f"no reply to {oldest!r} within {timeout:g} s")
        elif age >= SLOW_FACTOR * timeout:
            self.fail(errno.ETIMEDOUT, f"no reply to {oldest!r} within {age:.0f} s, though there were others")
        else:
            self.slow_requests += age >= timeout
            self._timer = self._loop.call_later(timeout - silent_for, self._check_timeout)

    # -- asyncio.BufferedProtocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Let TCP find out by itself when the peer is gone."""
        self._transport = transport
        self._connected = True
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._peer = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        elif peer:
            self._peer = str(peer)
        sock = transport.get_extra_info("socket")
        if self._owner is not None:
            self._owner.connected(sock)
        if isinstance(peer, tuple) and hasattr(sock, "setsockopt"):
            self._keep_alive(sock)
        if self._failure is not None:
            transport.abort()

    def _keep_alive(self, sock: Any) -> None:
        tcp = socket.IPPROTO_TCP
        sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(tcp, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        sock.setsockopt(tcp, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
        sock.setsockopt(tcp, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        if self._request_timeout is not None:
            sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, max(1, int(self._request_timeout * 1000)))

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        """Where the transport puts the next bytes."""
        if self._tls is not None:
            return self._tls.buffer
        if self._transmission is not None:
            return self._transmission.get_buffer(sizehint)
        return self._greeting_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived in the buffer of `get_buffer`."""
        if self._tls is not None:
            self._decrypt(self._tls, nbytes)
        else:
            self._received_plain(nbytes)

    def _decrypt(self, tls: TlsTransport, nbytes: int) -> None:
        try:
            tls.received(nbytes)
            while self._failure is None:
                transmission = self._transmission
                view = self._greeting_buffer if transmission is None else transmission.get_buffer(-1)
                got = tls.read_into(view)
                if not got:
                    break
                self._received_plain(got)
        except ssl.SSLError as error:
            self._tls_failed(error)

    def _tls_failed(self, error: ssl.SSLError) -> None:
        reason = getattr(error, "verify_message", "") or error.reason or str(error)
        self.fail(errno.ECONNABORTED, f"TLS: {reason}")

    def _received_plain(self, nbytes: int) -> None:
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
            self.fail(errno.EPROTO, str(error.strerror))
            return
        if transmission.completed:
            self._deliver(transmission)

    def _deliver(self, transmission: ClientTransmission[Call]) -> None:
        completed = transmission.completed
        self._progress_at = self._loop.time()
        for call in completed:
            if call.error == NBD_ESHUTDOWN:
                self._retiring = True  # "the client MUST initiate a soft disconnect"
        if self._owner is not None:
            self._owner.answered(self, completed)
        completed.clear()
        if self._retiring and not transmission.in_flight:
            self._say_goodbye()

    @property
    def retiring(self) -> bool:
        """Nothing may be sent any more."""
        return self._retiring

    def _negotiate(self, data: bytearray) -> None:
        try:
            self.negotiation += self._handshake.receive_data(data)
        except OSError as error:
            self._transport.write(self._handshake.data_to_send())
            self._refuse(error)
            self._end(error.errno or errno.EPROTO, str(error.strerror))
            self._transport.close()
            return
        if self.negotiation and isinstance(self.negotiation[-1], TlsBegins) and self._tls is None:
            assert self._tls_settings is not None
            try:
                self._tls = TlsTransport(self._transport, self._tls_settings)
            except (ssl.SSLError, ValueError) as error:
                self.fail(errno.ECONNABORTED, f"TLS: {error}")
                return
            self._transport = self._tls
        out = self._handshake.data_to_send()
        if out:
            self._transport.write(out)
        self.fixed_newstyle = self._handshake.fixed
        self.structured_replies, self.extended_headers = self._handshake.structured, self._handshake.extended
        last = self.negotiation[-1] if self.negotiation else None
        if isinstance(last, Negotiated):
            self.info = last.info
            self.contexts = frozenset(last.contexts)
            self._transmission = ClientTransmission(last.structured_replies, last.extended_headers, last.contexts)
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
        if not self.closed.done():
            self.closed.set_result(None)
        if self._failure is None:
            if exc is not None:
                code, reason = (exc.errno, exc.strerror) if isinstance(exc, OSError) else (None, None)
                self.fail(code or errno.ECONNRESET, f"connection lost: {reason or exc}")
            elif self._transmission is None:
                error = self._handshake.end_of_stream()
                self.fail(error.errno or errno.ECONNRESET, str(error.strerror))
            else:
                waiting = len(self._transmission.in_flight)
                self.fail(errno.ECONNRESET, f"server closed the connection with {waiting} requests unanswered")
        self._transport = None

    def pause_writing(self) -> None:
        """The transport has enough to send: new requests wait."""
        self.paused = True
        if self._owner is not None and self._failure is None:
            self._owner.held(self)

    def resume_writing(self) -> None:
        """The transport takes data again."""
        self.paused = False
        if self._owner is not None and self._failure is None:
            self._owner.resumed(self)
