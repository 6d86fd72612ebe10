"""The server's side of fixed newstyle negotiation, without I/O: bytes in, bytes to send, and in the end the chosen export.

Written like `handshake.py`: one generator, each `yield n` asks for the next n bytes. Options that we do not know are answered
with NBD_REP_ERR_UNSUP and their data is thrown away. Source: doc/proto.md, "Fixed newstyle negotiation" and "Option types".
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias

from ustack.nbd.constants import (
    IHAVEOPT,
    MAX_STRING,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP,
    NBD_REP_INFO,
    NBD_REP_SERVER,
    NBDMAGIC,
    OPTION_REPLY_MAGIC,
)
from ustack.nbd.errors import NbdProtocolError, decode_name

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from ustack.nbd.export_info import ExportInfo

MAX_OPTION: Final = 64 << 10
"""Bytes of option data that are looked at."""
MAX_DISCARD: Final = 1 << 20
"""Bytes of option data that are read and thrown away before we answer NBD_REP_ERR_TOO_BIG. Beyond, the client is dropped."""
MAX_OPTIONS: Final = 1024
"""Options in one negotiation. A client that haggles longer is no customer."""
GREETING: Final = struct.pack(">QQH", NBDMAGIC, IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_UNUSED_ZEROES: Final = bytes(124)
_Steps: TypeAlias = "Generator[int, bytes, None]"


class ServerHandshake:
    """Negotiates with one client. Feed it with `receive_data`, send `data_to_send`.

    When `done`, `chosen` is the export that the client goes on with, as it was told, or None if it left with NBD_OPT_ABORT;
    `rest` has the bytes that came behind the last option: the first requests. NbdProtocolError means: drop the client.
    """

    __slots__ = (
        "_buffer",
        "_discard",
        "_exports",
        "_needed",
        "_no_zeroes",
        "_out",
        "_program",
        "chosen",
        "done",
        "rest",
        "structured",
    )

    def __init__(self, exports: Mapping[str, ExportInfo]) -> None:
        """`exports` by the names that clients may use. The empty name stands for the default export; it is listed only when
        alone."""
        self._exports = exports
        self._buffer = bytearray()
        self._out = bytearray(GREETING)
        self._discard = 0
        self._no_zeroes = False
        self.chosen: ExportInfo | None = None
        self.done = False
        self.rest = b""
        self.structured = False
        self._program = self._negotiate()
        self._needed = next(self._program)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the client."""
        self._buffer += data
        try:
            while True:
                dropped = min(self._discard, len(self._buffer))
                if dropped:
                    del self._buffer[:dropped]
                    self._discard -= dropped
                if self._discard or len(self._buffer) < self._needed:
                    return
                piece = bytes(self._buffer[: self._needed])
                del self._buffer[: self._needed]
                self._needed = self._program.send(piece)
        except StopIteration:
            self.done = True
            self.rest = bytes(self._buffer)
            self._buffer.clear()

    def data_to_send(self) -> bytes:
        """Bytes for the client since the last call; the greeting at first."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def _negotiate(self) -> _Steps:
        (flags,) = struct.unpack(">I", (yield 4))
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            raise NbdProtocolError(f"client sets unknown flags {flags:#x}")
        self._no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        for _ in range(MAX_OPTIONS):
            magic, option, length = _OPTION.unpack((yield _OPTION.size))
            if magic != IHAVEOPT:
                raise NbdProtocolError(f"option magic is {magic:#018x}")
            if option == NBD_OPT_EXPORT_NAME:
                if length > MAX_STRING:
                    raise NbdProtocolError(f"export name of {length} bytes")
                self._export_name(decode_name((yield length) if length else b"", "export name"))
                return
            if length > MAX_OPTION or option not in _KNOWN:
                if length > MAX_DISCARD:
                    raise NbdProtocolError(f"option {option} with {length} bytes")
                self._discard = length
                known = option in _KNOWN
                self._reply(option, NBD_REP_ERR_TOO_BIG if known else NBD_REP_ERR_UNSUP)
                continue
            data = (yield length) if length else b""
            if option == NBD_OPT_ABORT:
                self._reply(option, NBD_REP_ACK)
                return
            if option == NBD_OPT_LIST:
                self._list(data)
            elif option == NBD_OPT_STRUCTURED_REPLY:
                self._structured_reply(data)
            elif self._info_or_go(option, data) and option == NBD_OPT_GO:
                return
        raise NbdProtocolError(f"client has sent {MAX_OPTIONS} options and is still not content")

    def _export_name(self, name: str) -> None:
        info = self._find(name)
        if info is None:
            raise NbdProtocolError(
                f"client wants export {name!r}, which does not exist, and NBD_OPT_EXPORT_NAME has no way to say so"
            )
        self._out += struct.pack(">QH", info.size, info.flags)
        if not self._no_zeroes:
            self._out += _UNUSED_ZEROES
        self.chosen = info

    def _list(self, data: bytes) -> None:
        if data:
            self._reply(NBD_OPT_LIST, NBD_REP_ERR_INVALID, b"NBD_OPT_LIST has no data")
            return
        for name, info in self._exports.items():
            if name or len(self._exports) == 1:
                encoded = name.encode()
                text = (info.description or "").encode()[:MAX_STRING]
                self._reply(NBD_OPT_LIST, NBD_REP_SERVER, struct.pack(">I", len(encoded)) + encoded + text)
        self._reply(NBD_OPT_LIST, NBD_REP_ACK)

    def _structured_reply(self, data: bytes) -> None:
        if data or self.structured:
            text = b"NBD_OPT_STRUCTURED_REPLY has no data" if data else b"structured replies are negotiated already"
            self._reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_INVALID, text)
            return
        self.structured = True
        self._reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK)

    def _info_or_go(self, option: int, data: bytes) -> bool:
        """Answer NBD_OPT_INFO and NBD_OPT_GO, which have the same form; tells whether there is such an export."""
        length = int.from_bytes(data[:4], "big")
        count = int.from_bytes(data[4 + length : 6 + length], "big")
        if len(data) < 6 or length > MAX_STRING or len(data) != 6 + length + 2 * count:
            self._reply(option, NBD_REP_ERR_INVALID, b"lengths in the option do not add up")
            return False
        try:
            name = decode_name(data[4 : 4 + length], "export name")
        except NbdProtocolError as error:
            self._reply(option, NBD_REP_ERR_INVALID, str(error.strerror).encode())
            return False
        info = self._find(name)
        if info is None:
            self._reply(option, NBD_REP_ERR_UNKNOWN, f"no export named {name!r}".encode()[:MAX_STRING])
            return False
        wanted = struct.unpack_from(f">{count}H", data, 6 + length)
        self._reply(option, NBD_REP_INFO, struct.pack(">HQH", NBD_INFO_EXPORT, info.size, info.flags))
        if NBD_INFO_NAME in wanted:
            self._reply(option, NBD_REP_INFO, struct.pack(">H", NBD_INFO_NAME) + info.name.encode())
        if NBD_INFO_DESCRIPTION in wanted and info.description:
            text = info.description.encode()[:MAX_STRING]
            self._reply(option, NBD_REP_INFO, struct.pack(">H", NBD_INFO_DESCRIPTION) + text)
        if NBD_INFO_BLOCK_SIZE in wanted:
            sizes = (info.minimum_block, info.preferred_block, info.maximum_payload)
            self._reply(option, NBD_REP_INFO, struct.pack(">HIII", NBD_INFO_BLOCK_SIZE, *sizes))
        self._reply(option, NBD_REP_ACK)
        if option == NBD_OPT_GO:
            self.chosen = info
        return True

    def _find(self, name: str) -> ExportInfo | None:
        info = self._exports.get(name)
        if info is None or self.structured:
            return info
        return replace(info, flags=info.flags & ~NBD_FLAG_SEND_DF)  # DF is about chunks, which there are none of

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._out += _REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data))
        self._out += data


_KNOWN: Final = frozenset((NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY))
