"""The server's side of the transmission phase, without I/O.

Bytes arrive through `get_buffer` and `buffer_updated`; `next_command` gives the commands one by one, so that a server that has
enough to do simply stops asking. The payload of a write goes straight into the memory that `destination` names. A command that
breaks a rule comes with the error to answer it with, its payload read and thrown away, and the stream stays in step. Source:
doc/proto.md, "Transmission", and the server's duties scattered through "Request types" and "Error values".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ustack.nbd.constants import (
    COMMAND_NAMES,
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
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EPERM,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)
from ustack.nbd.errors import NbdProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.nbd.export_info import ExportInfo

RECEIVE_BUFFER: Final = 64 << 10
"""Bytes read at once when requests are small."""
DIRECT_MIN: Final = 32 << 10
"""Bytes of payload still to come from which on they are read straight into their destination."""
MAX_DISCARD: Final = 64 << 20
"""Bytes of payload of a refused write that are read and thrown away. A client that sends more in one request is dropped."""

_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
_HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")
_REQUEST_SIZE: Final = _REQUEST.size

_FLAGS_OF: Final[dict[int, int]] = {
    NBD_CMD_READ: NBD_CMD_FLAG_DF | NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA,
    NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
    NBD_CMD_CACHE: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE,
}
"""Flags that each command takes. FUA goes with all of them, since clients are known to set it everywhere."""


class Command:
    """A request from the client. `error` is 0, or the NBD error value that it must be answered with, and `reason` says why."""

    __slots__ = ("command", "cookie", "error", "flags", "length", "offset", "payload", "reason")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.error = 0
        self.reason = ""
        self.payload: memoryview | None = None
        """The data of a write, complete, in the memory that `destination` gave."""


class ServerTransmission:
    """Commands in, for one connection; the functions below make the replies. NbdProtocolError means: drop the client."""

    __slots__ = (
        "_buffer",
        "_current",
        "_destination",
        "_direct",
        "_end",
        "_info",
        "_pos",
        "_ready",
        "_remaining",
        "_target",
        "_view",
    )

    def __init__(self, info: ExportInfo, destination: Callable[[int, int], memoryview]) -> None:
        """`info` is what was negotiated; `destination(offset, length)` gives the memory for the payload of a valid write."""
        self._info = info
        self._buffer = bytearray(RECEIVE_BUFFER)
        self._view = memoryview(self._buffer)
        self._pos = 0
        self._end = 0
        self._destination = destination
        # The write whose payload is arriving. While it does, the receive buffer is empty.
        self._current: Command | None = None
        self._target: memoryview | None = None
        self._remaining = 0
        self._ready: Command | None = None
        self._direct = False

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes from the client go. Call only after `next_command` has returned None."""
        if self._target is not None and self._remaining >= DIRECT_MIN:
            self._direct = True
            return self._target
        self._direct = False
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` bytes have arrived in the last buffer."""
        if self._direct:
            self._direct = False
            self._consumed(nbytes)
        else:
            self._end += nbytes

    def next_command(self) -> Command | None:
        """The next complete command, or None when more bytes are needed."""
        while True:
            if self._current is not None and self._pos < self._end:
                size = min(self._end - self._pos, self._remaining)
                if self._target is not None:
                    self._target[:size] = self._view[self._pos : self._pos + size]
                self._pos += size
                self._consumed(size)
            if self._ready is not None:
                command, self._ready = self._ready, None
                return command
            left = self._end - self._pos
            if self._current is not None or left < _REQUEST_SIZE:
                if left and self._pos:
                    self._buffer[:left] = self._buffer[self._pos : self._end]
                self._pos = 0
                self._end = left
                return None
            command = self._parse()
            if command.command != NBD_CMD_WRITE or not command.length:
                return command
            self._current = command
            self._remaining = command.length
            if command.error:
                if command.length > MAX_DISCARD:
                    raise NbdProtocolError(f"write of {command.length} bytes, more than we are willing to skip")
                self._target = None
            else:
                command.payload = self._target = self._destination(command.offset, command.length)

    def _consumed(self, nbytes: int) -> None:
        self._remaining -= nbytes
        if not self._remaining:
            self._ready, self._current, self._target = self._current, None, None
        elif self._target is not None:
            self._target = self._target[nbytes:]

    def _parse(self) -> Command:
        magic, flags, kind, cookie, offset, length = _REQUEST.unpack_from(self._buffer, self._pos)
        self._pos += _REQUEST_SIZE
        if magic != NBD_REQUEST_MAGIC:
            raise NbdProtocolError(f"request magic is {magic:#010x}")
        command = Command(kind, flags, cookie, offset, length)
        self._judge(command)
        return command

    def _judge(self, command: Command) -> None:
        """Find what is wrong with a command, and the error for it ("Error values")."""
        kind, info = command.command, self._info
        beyond = command.offset + command.length > info.size
        if kind == NBD_CMD_DISC:
            return
        allowed = _FLAGS_OF.get(kind)
        if allowed is None:
            command.error, command.reason = NBD_EINVAL, f"unknown command {kind}"
        elif command.flags & ~allowed or (command.flags & NBD_CMD_FLAG_DF and not info.can_df):
            command.error, command.reason = NBD_EINVAL, f"flags {command.flags:#x} do not go with {COMMAND_NAMES[kind]}"
        elif kind == NBD_CMD_FLUSH:
            if command.offset or command.length:
                command.error, command.reason = NBD_EINVAL, "flush with an offset or a length"
        elif info.read_only and kind in (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
            command.error, command.reason = NBD_EPERM, "the export is read-only"
        elif kind in (NBD_CMD_READ, NBD_CMD_WRITE) and command.length > info.maximum_payload:
            command.error, command.reason = NBD_EINVAL, f"{command.length} bytes are more than {info.maximum_payload}"
        elif beyond:
            command.error = NBD_ENOSPC if kind in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES) else NBD_EINVAL
            command.reason = f"bytes {command.offset} to {command.offset + command.length} of {info.size}"
        elif (command.offset | command.length) & (info.minimum_block - 1):
            command.error, command.reason = NBD_EINVAL, f"blocks have {info.minimum_block} bytes"
        elif not command.length:
            command.error, command.reason = NBD_EINVAL, "length is 0"


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply; the data of a read without structured replies follows it."""
    return _SIMPLE.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)


def data_chunk(cookie: int, offset: int, length: int, done: bool) -> bytes:
    """The head of a NBD_REPLY_TYPE_OFFSET_DATA chunk; `length` bytes of data follow it."""
    return _DATA_CHUNK.pack(
        NBD_STRUCTURED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE if done else 0, NBD_REPLY_TYPE_OFFSET_DATA, cookie, length + 8, offset
    )


def hole_chunk(cookie: int, offset: int, length: int, done: bool) -> bytes:
    """A NBD_REPLY_TYPE_OFFSET_HOLE chunk: `length` bytes at `offset` are zero."""
    return _HOLE_CHUNK.pack(
        NBD_STRUCTURED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE if done else 0, NBD_REPLY_TYPE_OFFSET_HOLE, cookie, 12, offset, length
    )


def none_chunk(cookie: int) -> bytes:
    """A NBD_REPLY_TYPE_NONE chunk, the end of a reply."""
    return _CHUNK.pack(NBD_STRUCTURED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, 0)


def error_chunk(cookie: int, error: int, text: str) -> bytes:
    """A NBD_REPLY_TYPE_ERROR chunk that ends the reply, with a text for humans."""
    message = text.encode()[:1024]
    head = _CHUNK.pack(NBD_STRUCTURED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, cookie, 6 + len(message))
    return head + struct.pack(">IH", error, len(message)) + message
