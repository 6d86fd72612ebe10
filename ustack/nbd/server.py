"""A small NBD server on asyncio's kernel sockets, for demos, tests and lending a file to a neighbour.

Several exports, structured replies, holes, FUA, flush, trim, write-zeroes. No TLS and no access control: listen where only
friends are. Commands run in the order in which they come, each at once, except flushes of files, which run in threads. Memory
is bounded: a client that does not read its replies is not read from.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ustack.nbd.constants import (
    COMMAND_NAMES,
    ERRNO_TO_WIRE,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EIO,
)
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.server_handshake import ServerHandshake
from ustack.nbd.server_transmission import (
    Command,
    ServerTransmission,
    data_chunk,
    error_chunk,
    hole_chunk,
    none_chunk,
    simple_reply,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.nbd.export import Export

HANDSHAKE_TIMEOUT: Final = 30.0
"""Seconds that a client may take to choose an export."""
WRITE_HIGH_WATER: Final = 4 << 20
"""Bytes of replies in a transport from which on the client's requests are left unread."""
BATCH: Final = 256 << 10
"""Bytes of replies that are handed to the transport together."""
MAX_FLUSHES: Final = 16
"""Flushes of one connection that run in threads at a time."""


class NbdServer:
    """Serves exports on any number of addresses. Use `listen_*`, then leave it to the event loop, then `close`."""

    def __init__(self, exports: Iterable[Export]) -> None:
        """Exports with distinct names. A client that names none gets the first one. Raises ValueError."""
        self._exports: dict[str, Export] = {}
        for export in exports:
            if export.info.name in self._exports:
                raise ValueError(f"two exports are named {export.info.name!r}")
            self._exports[export.info.name] = export
        if not self._exports:
            raise ValueError("an NBD server needs at least one export")
        self._infos = {name: export.info for name, export in self._exports.items()}
        self._infos.setdefault("", next(iter(self._infos.values())))
        self._servers: list[asyncio.AbstractServer] = []
        self._unix_paths: list[str] = []
        self._connections: set[_Connection] = set()

    async def listen_tcp(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen on a TCP address; returns the port, which the kernel chooses for 0. Raises OSError."""
        server = await asyncio.get_running_loop().create_server(self.protocol, host, port)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_unix(self, path: str) -> None:
        """Listen on a unix socket that only this user may connect to. A dead server's socket is replaced; a living one's is
        EADDRINUSE."""
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX)
        try:
            mask = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(mask)
            await self.listen_socket(sock)
        except BaseException:
            sock.close()
            raise
        self._unix_paths.append(path)

    async def listen_socket(self, sock: socket.socket) -> None:
        """Listen on a stream socket that is bound already, for example inside of another network namespace."""
        self._servers.append(await asyncio.get_running_loop().create_server(self.protocol, sock=sock))

    def protocol(self) -> asyncio.BufferedProtocol:
        """The protocol for one client: what to give to any other loop.create_server, for example that of a stack."""
        return _Connection(self)

    async def close(self) -> None:
        """Stop listening, drop the clients, close the exports. A second call does nothing."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.drop()
        for connection in connections:
            await connection.closed
        for server in servers:
            await server.wait_closed()
        self._remove_sockets()
        exports, self._exports = self._exports, {}
        for export in exports.values():
            export.close()

    def _remove_sockets(self) -> None:
        while self._unix_paths:
            Path(self._unix_paths.pop()).unlink(missing_ok=True)


class _Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, server: NbdServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._handshake: ServerHandshake | None = ServerHandshake(server._infos)
        self._handshake_buffer = bytearray(4096)
        self._transmission: ServerTransmission
        self._export: Export
        self._structured = False
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._write_paused = False
        self._reading_paused = False
        self._flushes: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT, self.drop)
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # -- asyncio.BufferedProtocol --------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._server._connections.add(self)
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        assert self._handshake is not None
        transport.write(self._handshake.data_to_send())

    def connection_lost(self, exc: Exception | None) -> None:
        self._leaving = True
        self._timer.cancel()
        self._server._connections.discard(self)
        self._transport = None
        if not self._flushes:
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        if self._handshake is not None:
            return self._handshake_buffer
        return self._transmission.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        if self._leaving:
            return
        try:
            if self._handshake is not None:
                self._negotiate(self._handshake, nbytes)
            else:
                self._transmission.buffer_updated(nbytes)
                self._serve()
        except NbdProtocolError:
            self.drop()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._handshake is None and not self._leaving:
            self._go_on()

    # -- the two phases ------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """End the connection without a word ("hard disconnect")."""
        self._leaving = True
        if self._transport is not None:
            self._transport.abort()

    def _negotiate(self, handshake: ServerHandshake, nbytes: int) -> None:
        handshake.receive_data(self._handshake_buffer[:nbytes])
        self._transport.write(handshake.data_to_send())
        if not handshake.done:
            return
        self._timer.cancel()
        if handshake.chosen is None:
            self._leaving = True
            self._transport.close()
            return
        self._handshake = None
        self._structured = handshake.structured
        self._export = self._server._exports[handshake.chosen.name]
        self._transmission = ServerTransmission(handshake.chosen, self._export.destination)
        if handshake.rest:
            size = len(handshake.rest)
            self._transmission.get_buffer()[:size] = handshake.rest
            self._transmission.buffer_updated(size)
            self._serve()

    def _serve(self) -> None:
        """Execute commands as long as there are any and the client takes the replies."""
        while not self._leaving:
            if self._write_paused or len(self._flushes) >= MAX_FLUSHES:
                self._send()
                if not self._reading_paused:
                    self._reading_paused = True
                    self._transport.pause_reading()
                return
            command = self._transmission.next_command()
            if command is None:
                break
            self._execute(command)
            if self._out_bytes >= BATCH:
                self._send()
        self._send()
        if self._reading_paused and not self._leaving:
            self._reading_paused = False
            self._transport.resume_reading()

    def _go_on(self) -> None:
        try:
            self._serve()
        except NbdProtocolError:
            self.drop()

    def _send(self) -> None:
        if self._out and self._transport is not None:
            out, self._out, self._out_bytes = self._out, [], 0
            self._transport.writelines(out)

    # -- commands ------------------------------------------------------------------------------------------------------

    def _execute(self, command: Command) -> None:
        kind = command.command
        if kind == NBD_CMD_DISC:
            self._leaving = True
            if not self._flushes:
                self._send()
                self._transport.close()
            return
        if command.error:
            self._reply_error(command, command.error, command.reason)
            return
        try:
            if kind == NBD_CMD_READ:
                self._read(command)
                return
            if kind == NBD_CMD_WRITE:
                assert command.payload is not None
                self._export.write(command.offset, command.payload)
            elif kind in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
                self._export.zero(command.offset, command.length, not command.flags & NBD_CMD_FLAG_NO_HOLE)
        except OSError as error:
            self._reply_os_error(command, error)
            return
        durable = kind == NBD_CMD_FLUSH or (command.flags & NBD_CMD_FLAG_FUA and kind != NBD_CMD_CACHE)
        if durable and not self._export.volatile:
            task = self._loop.create_task(self._flush(command))
            self._flushes.add(task)
            task.add_done_callback(self._flushed)
        else:
            self._reply_done(command)

    def _read(self, command: Command) -> None:
        offset, length, cookie = command.offset, command.length, command.cookie
        if not self._structured:
            data = self._export.read(offset, length)
            self._reply(simple_reply(cookie), data)
            return
        stop = offset + length
        extents = [(length, False)] if command.flags & NBD_CMD_FLAG_DF else self._export.extents(offset, length)
        for size, hole in extents:
            done = offset + size == stop
            if hole:
                self._reply(hole_chunk(cookie, offset, size, done))
            else:
                data = self._export.read(offset, size)
                self._reply(data_chunk(cookie, offset, size, done), data)
            offset += size

    async def _flush(self, command: Command) -> None:
        try:
            await self._loop.run_in_executor(None, self._export.flush)
        except OSError as error:
            self._reply_os_error(command, error)
        else:
            self._reply_done(command)

    def _flushed(self, task: asyncio.Task[None]) -> None:
        self._flushes.discard(task)
        if self._transport is None:
            if not self._flushes and not self.closed.done():
                self.closed.set_result(None)
            return
        self._send()
        if not self._leaving:
            self._go_on()
        elif not self._flushes:
            self._transport.close()

    # -- replies -------------------------------------------------------------------------------------------------------

    def _reply(self, head: bytes, data: bytes | memoryview | None = None) -> None:
        self._out.append(head)
        self._out_bytes += len(head)
        if data is not None:
            self._out.append(data)
            self._out_bytes += len(data)

    def _reply_done(self, command: Command) -> None:
        self._reply(none_chunk(command.cookie) if self._structured else simple_reply(command.cookie))

    def _reply_os_error(self, command: Command, error: OSError) -> None:
        self._reply_error(command, ERRNO_TO_WIRE.get(error.errno or 0, NBD_EIO), error.strerror or str(error))

    def _reply_error(self, command: Command, error: int, text: str) -> None:
        if self._structured:
            name = COMMAND_NAMES.get(command.command, str(command.command))
            self._reply(error_chunk(command.cookie, error, f"{name}: {text}"))
        else:
            self._reply(simple_reply(command.cookie, error))


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise OSError(errno.EADDRINUSE, "exists and is no socket", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server listens there", path)
