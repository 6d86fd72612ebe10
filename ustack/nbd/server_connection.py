"""One client of the server: negotiation, TLS, commands to the export, answers back.

A client can make the server hold only so much: `MAX_UNDER_WAY` commands and `MAX_HELD` bytes of their data (and one command
more), and `WRITE_HIGH_WATER` bytes of replies that wait in the transport. Beyond that it is not read from. A client that begins
a message and does not go on, or does not take its replies, is dropped after a time.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final

from ustack.nbd.constants import (
    COMMAND_NAMES,
    ERRNO_TO_WIRE,
    NBD_CMD_DISC,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_EIO,
)
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.server_handshake import ServerHandshake, without_limit
from ustack.nbd.server_replies import HeaderStyle, ReplyEncoder
from ustack.nbd.server_transmission import ServerTransmission
from ustack.nbd.tls import TlsSettings, TlsTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.nbd.export import Export
    from ustack.nbd.server import NbdServer
    from ustack.nbd.server_transmission import Command

KEEPALIVE_IDLE: Final = 60
"""Seconds of silence before TCP asks a client whether it is still there,"""
KEEPALIVE_INTERVAL: Final = 15
"""seconds between two such questions,"""
KEEPALIVE_PROBES: Final = 4
"""and how many remain without an answer until it counts as gone: two minutes in all."""
HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds that a client may take to choose an export."""
STALL_TIMEOUT: Final = 120.0
"""Seconds in which a client that is amid a message, or has replies waiting, must move on."""
PROGRESS: Final = 16 << 10
"""Bytes in that time that count as moving on, when the message is long. A byte now and then does not."""
WRITE_HIGH_WATER: Final = 4 << 20
"""Bytes of replies in a transport from which on the client's requests are left unread."""
BATCH: Final = 256 << 10
"""Bytes of replies that are handed to the transport together."""
MAX_UNDER_WAY: Final = 256
"""Commands of one client that are being carried out at a time."""
MAX_HELD: Final = 64 << 20
"""Bytes of the data of these commands, together, from which on no further one is begun."""


class ServerConnection(asyncio.BufferedProtocol):
    """One client of `server`: the protocol of its transport, and where the export's answers go.

    With `export` there is no negotiation: the client knows the export already, and speaks with simple headers. That is how the
    kernel's nbd does when it is handed a socket.
    """

    def __init__(self, server: NbdServer, export: Export | None = None) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        # What bytes are read from and written to: the transport itself, and around it, once TLS has begun, the one for TLS.
        self._transport: Any = None
        self._writer: Any = None
        self._tls: TlsTransport | None = None
        self._handshake: ServerHandshake | None = None
        self._handshake_buffer = bytearray(4096)
        self._transmission: ServerTransmission
        self._encoder: ReplyEncoder
        self._export: Export
        self._out: list[bytes | bytearray | memoryview] = []
        self._out_bytes = 0
        self._under_way = 0
        self._held = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = False
        self._wake_up: asyncio.Handle | None = None
        self._write_paused = False
        self._reading_paused = False
        self._leaving = False
        # At the last look at whether the client moves on: requests served, bytes received, bytes that wait to be sent.
        self._served = 0
        self._mark = (0, 0, 0)
        self._resumed = False
        self._timer: asyncio.TimerHandle | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the client is gone and nothing is done for it any more."""
        if export is None:
            self._handshake = ServerHandshake(server.offers, server.tls_policy)
            self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT, self.drop)
        else:
            self._begin(ServerTransmission(without_limit(export.info), export.destination), export, HeaderStyle.SIMPLE)

    # -- asyncio.BufferedProtocol --------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Greet the client, if there is room for it."""
        self._transport = self._writer = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        if isinstance(transport.get_extra_info("peername"), tuple):
            _keep_alive(transport.get_extra_info("socket"))
        if not self._server.admit(self):
            self.drop()
        elif self._handshake is not None:
            transport.write(self._handshake.data_to_send())

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and with it the interest in what it has asked for."""
        self._leaving = True
        self._transport = self._writer = None
        self._stop_timer()
        self._server.forget(self)
        for task in list(self._tasks):
            self._export.abandon(task)
        if not self._tasks and not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        """Where the transport puts the next bytes."""
        if self._tls is not None:
            return self._tls.buffer
        return self._plain_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived in the buffer of `get_buffer`."""
        if self._leaving:
            return
        try:
            if self._tls is not None:
                self._tls.received(nbytes)
                self._decrypt(self._tls)
            else:
                self._received_plain(nbytes)
        except NbdProtocolError:
            self.drop()
        except ssl.SSLError:
            self._leaving = True
            self._transport.close()  # the alert, which says why, is sent before

    def eof_received(self) -> bool:
        """The client has closed its side: nothing can be understood by half."""
        return False

    def pause_writing(self) -> None:
        """The client does not take its replies."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """It does again."""
        self._write_paused = False
        self._resumed = True
        self._wake_soon()

    # -- the end -------------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """End the connection without a word ("hard disconnect")."""
        self._leaving = True
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    def _leave(self) -> None:
        """The client has said goodbye, and what it asked for before is done."""
        self._stop_timer()
        if self._writer is not None:
            self._send()
            self._writer.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _plain_buffer(self) -> bytearray | memoryview:
        return self._handshake_buffer if self._handshake is not None else self._transmission.get_buffer()

    def _received_plain(self, nbytes: int) -> None:
        if self._handshake is not None:
            self._negotiate(self._handshake, nbytes)
        else:
            self._transmission.buffer_updated(nbytes)
            self._serve()

    def _decrypt(self, tls: TlsTransport) -> None:
        """Take what TLS has, as long as it is wanted."""
        while not self._leaving and not self._reading_paused:
            got = tls.read_into(self._plain_buffer())
            if not got:
                break
            self._received_plain(got)

    # -- negotiation ---------------------------------------------------------------------------------------------------

    def _negotiate(self, handshake: ServerHandshake, nbytes: int) -> None:
        handshake.receive_data(self._handshake_buffer[:nbytes])
        self._writer.write(handshake.data_to_send())
        if handshake.starts_tls:
            assert self._server.tls_context is not None
            settings = TlsSettings(self._server.tls_context, None)
            self._writer = self._tls = TlsTransport(self._transport, settings, server_side=True)
            handshake.tls_begun()
        if self._write_paused and not handshake.done:
            self._reading_paused = True
            self._transport.pause_reading()
        if not handshake.done:
            return
        self._stop_timer()
        if handshake.chosen is None:
            self._leaving = True
            self._leave()
            return
        self._handshake = None
        export = self._server.exports[handshake.chosen.name]
        style = (
            HeaderStyle.EXTENDED
            if handshake.extended
            else HeaderStyle.STRUCTURED
            if handshake.structured
            else HeaderStyle.SIMPLE
        )
        transmission = ServerTransmission(
            handshake.chosen, export.destination, extended=handshake.extended, contexts=handshake.contexts
        )
        self._begin(transmission, export, style)
        if handshake.rest:
            size = len(handshake.rest)
            transmission.get_buffer()[:size] = handshake.rest
            transmission.buffer_updated(size)
            self._serve()

    def _begin(self, transmission: ServerTransmission, export: Export, style: HeaderStyle) -> None:
        self._transmission = transmission
        self._export = export
        self._encoder = ReplyEncoder(style)
        timeout = self._server.stall_timeout
        if timeout is not None:
            self._timer = self._loop.call_later(timeout, self._check_progress, timeout)

    def _check_progress(self, timeout: float) -> None:
        """Is the client still there? Idle it may be as long as it likes, but not amid a message, nor with replies waiting."""
        transmission = self._transmission
        unsent = self._transport.get_write_buffer_size()
        served, received, unsent_before = self._mark
        self._mark = (self._served, transmission.received, unsent)
        amid = transmission.amid_message and not self._reading_paused
        trickles = amid and self._served == served and transmission.received < received + PROGRESS
        clogged = self._write_paused and not self._resumed and 0 < unsent_before < unsent + PROGRESS
        self._resumed = False
        if trickles or clogged:
            self.drop()
        else:
            self._timer = self._loop.call_later(timeout, self._check_progress, timeout)

    # -- commands ------------------------------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        return self._write_paused or self._under_way >= MAX_UNDER_WAY or self._held >= MAX_HELD

    def _serve(self) -> None:
        """Begin commands as long as there are any and there is room for more."""
        self._serving = True
        try:
            while not self._leaving and not self._is_full():
                command = self._transmission.next_command()
                if command is None:
                    break
                self._served += 1
                self._execute(command)
                if self._out_bytes >= BATCH:
                    self._send()
        finally:
            self._serving = False
        self._send()
        if self._transport is None or self._leaving:
            return
        full = self._is_full()
        if full and not self._reading_paused:
            self._transport.pause_reading()
        elif self._reading_paused and not full:
            self._transport.resume_reading()
        self._reading_paused = full

    def _execute(self, command: Command) -> None:
        if command.command == NBD_CMD_DISC:
            self._leaving = True
            if not self._under_way:
                self._leave()
            return
        if command.error:
            self._refuse(command, command.error, command.reason)
            return
        self._under_way += 1
        self._held += _data_of(command)
        task = self._export.submit(command, self)
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.drop()  # its command will never be answered
            raise error
        if self._transport is None and not self._tasks and not self.closed.done():
            self.closed.set_result(None)

    def _wake_soon(self) -> None:
        """Send answers and go on, once for all that is answered in this turn of the loop."""
        if self._wake_up is None and not self._serving:
            self._wake_up = self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._wake_up = None
        if self._transport is None:
            return
        if self._leaving:
            if not self._under_way and self._handshake is None:
                self._leave()
            return
        try:
            if self._handshake is not None:
                self._reading_paused = False
                self._transport.resume_reading()
            else:
                self._serve()
            if self._tls is not None:
                self._decrypt(self._tls)
        except (NbdProtocolError, ssl.SSLError):
            self.drop()

    def _send(self) -> None:
        if self._out and self._writer is not None:
            out, self._out, self._out_bytes = self._out, [], 0
            self._writer.writelines(out)

    # -- answers (ustack.nbd.export.Answers) ---------------------------------------------------------------------------

    def done(self, command: Command) -> None:
        """The command was carried out."""
        self._reply(self._encoder.done(command.cookie, command.offset))
        self._answered(command)

    def read(self, command: Command, extents: Sequence[tuple[int, bytes | bytearray | memoryview | None]]) -> None:
        """What it was to read."""
        encoder, cookie, offset = self._encoder, command.cookie, command.offset
        if not encoder.chunks:
            self._reply(encoder.done(cookie, offset))
            for size, data in extents:
                self._reply(bytes(size) if data is None else data)
        else:
            at, stop = offset, offset + command.length
            for size, data in extents:
                last = at + size == stop
                if data is None:
                    self._reply(encoder.hole(cookie, offset, at, size, last))
                else:
                    self._reply(encoder.data(cookie, offset, at, size, last))
                    self._reply(data)
                at += size
        self._answered(command)

    def status(self, command: Command, extents: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> None:
        """What its contexts say."""
        last = extents[-1][0]
        for context, found in extents:
            self._reply(self._encoder.block_status(command.cookie, command.offset, context, found, context == last))
        self._answered(command)

    def failed(self, command: Command, error: OSError) -> None:
        """It was not carried out."""
        self._refuse(command, ERRNO_TO_WIRE.get(error.errno or errno.EIO, NBD_EIO), error.strerror or str(error))
        self._answered(command)

    def _refuse(self, command: Command, error: int, text: str) -> None:
        name = COMMAND_NAMES.get(command.command, str(command.command))
        self._reply(self._encoder.error(command.cookie, command.offset, error, f"{name}: {text}"))

    def _answered(self, command: Command) -> None:
        self._under_way -= 1
        self._held -= _data_of(command)
        self._wake_soon()

    def _reply(self, piece: bytes | bytearray | memoryview) -> None:
        if self._transport is not None:
            self._out.append(piece)
            self._out_bytes += len(piece)


def _keep_alive(sock: Any) -> None:
    """Let TCP find out by itself when an idle client's machine is gone: its place is another's then."""
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _data_of(command: Command) -> int:
    """Bytes that a command makes us hold."""
    return command.length if command.command in (NBD_CMD_READ, NBD_CMD_WRITE) else 0
