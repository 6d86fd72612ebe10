"""The server's side of the transmission phase, without I/O.

Bytes arrive through `get_buffer` and `buffer_updated`; `next_command` gives the commands one by one, so that a server that has
enough to do simply stops asking. The payload of a write goes straight into the memory that `destination` names. A command that
breaks a rule comes with the error to answer it with, its payload read and thrown away, and the stream stays in step. Source:
doc/proto.md, "Transmission", and the server's duties scattered through "Request types" and "Error values"; extended headers:
its branch extension-ext-header.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ustack.nbd.constants import (
    COMMAND_NAMES,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_EINVAL,
    NBD_ENOSPC,
    NBD_EPERM,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REQUEST_MAGIC,
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
MAX_STATUS_PAYLOAD: Final = 8 + 4 * 64
"""Bytes of the payload of a block status request: enough for more contexts than exports have."""

_REQUEST: Final = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")

_FLAGS_OF: Final[dict[int, int]] = {
    NBD_CMD_READ: NBD_CMD_FLAG_DF | NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA,
    NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
    NBD_CMD_CACHE: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE,
}
"""Flags that each command takes. FUA goes with all of them, since clients are known to set it everywhere."""

_NEEDS: Final[dict[int, int]] = {
    NBD_CMD_FLUSH: NBD_FLAG_SEND_FLUSH,
    NBD_CMD_TRIM: NBD_FLAG_SEND_TRIM,
    NBD_CMD_CACHE: NBD_FLAG_SEND_CACHE,
    NBD_CMD_WRITE_ZEROES: NBD_FLAG_SEND_WRITE_ZEROES,
}
"""Transmission flags without which a command is not offered. A read-only export's other refusal comes first."""

_CHANGES: Final = frozenset((NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES))


class Command:
    """A request from the client. `error` is 0, or the NBD error value that it must be answered with, and `reason` says why.

    `offset` and `length` are the bytes of the export that it is about. `payload` is the data of a write, complete, in the
    memory that `destination` gave. `contexts` are the numbers of the meta contexts that a block status is wanted of.
    """

    __slots__ = ("command", "contexts", "cookie", "error", "flags", "length", "offset", "payload", "reason")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.error = 0
        self.reason = ""
        self.payload: memoryview | None = None
        self.contexts: tuple[int, ...] = ()


class ServerTransmission:
    """Commands in, for one connection. NbdProtocolError means: drop the client."""

    __slots__ = (
        "_buffer",
        "_contexts",
        "_current",
        "_destination",
        "_direct",
        "_end",
        "_header",
        "_info",
        "_magic",
        "_pos",
        "_ready",
        "_remaining",
        "_target",
        "_view",
        "received",
    )

    def __init__(
        self,
        info: ExportInfo,
        destination: Callable[[int, int], memoryview],
        *,
        extended: bool = False,
        contexts: tuple[int, ...] = (),
    ) -> None:
        """`info` is what was negotiated, `contexts` the meta contexts that were selected, `extended` says that requests have
        extended headers. `destination(offset, length)` gives the memory for the payload of a valid write."""
        self._info = info
        self._header = _EXTENDED_REQUEST if extended else _REQUEST
        self._magic = NBD_EXTENDED_REQUEST_MAGIC if extended else NBD_REQUEST_MAGIC
        self._contexts = contexts
        self._buffer = bytearray(RECEIVE_BUFFER)
        self._view = memoryview(self._buffer)
        self._pos = 0
        self._end = 0
        self._destination = destination
        # The request whose payload is arriving. While it does, the receive buffer is empty.
        self._current: Command | None = None
        self._target: memoryview | None = None
        self._remaining = 0
        self._ready: Command | None = None
        self._direct = False
        self.received = 0
        """Bytes that have come."""

    @property
    def amid_message(self) -> bool:
        """A request has begun to arrive, and its end is still to come."""
        return self._current is not None or self._end > self._pos

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes from the client go. Call only after `next_command` has returned None."""
        if self._target is not None and self._remaining >= DIRECT_MIN:
            self._direct = True
            return self._target
        self._direct = False
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` bytes have arrived in the last buffer."""
        self.received += nbytes
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
            if self._current is not None or left < self._header.size:
                if left and self._pos:
                    self._buffer[:left] = self._buffer[self._pos : self._end]
                self._pos = 0
                self._end = left
                return None
            command, payload = self._parse()
            if not payload:
                return command
            self._current = command
            self._remaining = payload
            if not command.error:
                if command.command == NBD_CMD_WRITE:
                    command.payload = self._target = self._destination(command.offset, payload)
                else:
                    command.payload = self._target = memoryview(bytearray(payload))
            elif payload > MAX_DISCARD:
                raise NbdProtocolError(f"request with {payload} bytes, more than we are willing to skip")

    def _consumed(self, nbytes: int) -> None:
        self._remaining -= nbytes
        if not self._remaining:
            command, self._current, self._target = self._current, None, None
            assert command is not None
            if command.command == NBD_CMD_BLOCK_STATUS and not command.error:
                self._select(command)
            self._ready = command
        elif self._target is not None:
            self._target = self._target[nbytes:]

    def _parse(self) -> tuple[Command, int]:
        """The request whose header has come, and the bytes of payload that follow it."""
        magic, flags, kind, cookie, offset, length = self._header.unpack_from(self._buffer, self._pos)
        self._pos += self._header.size
        if magic != self._magic:
            raise NbdProtocolError(f"request magic is {magic:#010x}")
        command = Command(kind, flags, cookie, offset, length)
        payload = 0
        if kind == NBD_CMD_WRITE:
            payload = length
            if self._magic == NBD_EXTENDED_REQUEST_MAGIC:
                # Without the flag a client breaks a rule, but it is plain what it means.
                command.flags &= ~NBD_CMD_FLAG_PAYLOAD_LEN
        elif self._magic == NBD_EXTENDED_REQUEST_MAGIC and flags & NBD_CMD_FLAG_PAYLOAD_LEN and kind != NBD_CMD_DISC:
            payload = length
            if kind == NBD_CMD_BLOCK_STATUS and self._info.flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD:
                if payload > MAX_STATUS_PAYLOAD or payload < 8 or payload % 4:
                    _refuse(command, NBD_EINVAL, f"block status with a payload of {payload} bytes")
                return command, payload  # the rest is judged when the payload has come
        self._judge(command)
        return command, payload

    def _select(self, command: Command) -> None:
        """Read the payload of a block status: how many bytes it is about, and which of the selected contexts."""
        assert command.payload is not None
        command.length = int.from_bytes(command.payload[:8], "big")
        wanted = command.payload[8:]
        numbers = tuple(int.from_bytes(wanted[at : at + 4], "big") for at in range(0, len(wanted), 4))
        command.payload = None
        command.flags &= ~NBD_CMD_FLAG_PAYLOAD_LEN
        self._judge(command)
        if not command.error:
            command.contexts = numbers
            if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(self._contexts):
                _refuse(command, NBD_EINVAL, f"block status of contexts {numbers}; selected are {self._contexts}")

    def _judge(self, command: Command) -> None:
        """Find what is wrong with a command, and the error for it ("Error values")."""
        kind, info = command.command, self._info
        if kind == NBD_CMD_DISC:
            return
        allowed = _FLAGS_OF.get(kind)
        if allowed is None:
            _refuse(command, NBD_EINVAL, f"unknown command {kind}")
        elif info.read_only and kind in _CHANGES:
            _refuse(command, NBD_EPERM, "the export is read-only")
        elif info.flags & _NEEDS.get(kind, 0) != _NEEDS.get(kind, 0):
            _refuse(command, NBD_EINVAL, f"{COMMAND_NAMES[kind]} is not offered")
        elif command.flags and (command.flags & ~allowed or not self._offers(kind, command.flags)):
            _refuse(command, NBD_EINVAL, f"flags {command.flags:#x} do not go with {COMMAND_NAMES[kind]}")
        elif kind == NBD_CMD_FLUSH:
            if command.offset or command.length:
                _refuse(command, NBD_EINVAL, "flush with an offset or a length")
        elif kind in (NBD_CMD_READ, NBD_CMD_WRITE) and command.length > info.maximum_payload:
            _refuse(command, NBD_EINVAL, f"{command.length} bytes are more than {info.maximum_payload}")
        elif command.offset + command.length > info.size:
            writes = kind in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
            text = f"bytes {command.offset} to {command.offset + command.length} of {info.size}"
            _refuse(command, NBD_ENOSPC if writes else NBD_EINVAL, text)
        elif (command.offset | command.length) & (info.minimum_block - 1):
            _refuse(command, NBD_EINVAL, f"blocks have {info.minimum_block} bytes")
        elif not command.length:
            _refuse(command, NBD_EINVAL, "length is 0")
        elif kind == NBD_CMD_BLOCK_STATUS:
            command.contexts = self._contexts
            if not self._contexts:
                _refuse(command, NBD_EINVAL, "no meta context was selected")

    def _offers(self, kind: int, flags: int) -> bool:
        """Whether the flags that need an offer have one. FUA promises something only where something is changed."""
        info = self._info
        return (
            (info.can_df or not flags & NBD_CMD_FLAG_DF)
            and (info.can_fast_zero or not flags & NBD_CMD_FLAG_FAST_ZERO)
            and (info.can_fua or not flags & NBD_CMD_FLAG_FUA or kind not in _CHANGES)
        )


def _refuse(command: Command, error: int, reason: str) -> None:
    command.error, command.reason = error, reason
