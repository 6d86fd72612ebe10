"""Replies of a server, in the form that was negotiated: simple, structured, or with extended headers.

A read's reply is simple only where nothing else was negotiated; with chunks, every reply is made of chunks. Source:
doc/proto.md, "Simple reply message", "Structured reply chunk message", "Structured reply types", and extension-ext-header.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

from ustack.nbd.constants import (
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MESSAGE: Final = 1024
"""Bytes of the text of an error."""

_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_EXTENDED: Final = struct.Struct(">IHHQQQ")
_OFFSET: Final = struct.Struct(">Q")
_HOLE: Final = struct.Struct(">QI")


class HeaderStyle(enum.IntEnum):
    """Which headers the requests and replies of a connection have."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class ReplyEncoder:
    """Makes the bytes of replies. `offset` is always that of the request, which extended headers repeat."""

    __slots__ = ("_extended", "chunks")

    def __init__(self, style: HeaderStyle) -> None:
        self.chunks = style != HeaderStyle.SIMPLE
        """Replies are made of chunks."""
        self._extended = style == HeaderStyle.EXTENDED

    def _chunk(self, kind: int, cookie: int, offset: int, length: int, done: bool) -> bytes:
        flags = NBD_REPLY_FLAG_DONE if done else 0
        if self._extended:
            return _EXTENDED.pack(NBD_EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
        return _CHUNK.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def done(self, cookie: int, offset: int) -> bytes:
        """The command was carried out. Before the data of a read that has no chunks, too."""
        if self.chunks:
            return self._chunk(NBD_REPLY_TYPE_NONE, cookie, offset, 0, True)
        return _SIMPLE.pack(NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """It was not, with an NBD error value and, in a chunk, a text for humans."""
        if not self.chunks:
            return _SIMPLE.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)
        message = text.encode()[:MAX_MESSAGE].decode(errors="ignore").encode()  # never half a character
        head = self._chunk(NBD_REPLY_TYPE_ERROR, cookie, offset, 6 + len(message), True)
        return head + struct.pack(">IH", error, len(message)) + message

    def data(self, cookie: int, offset: int, at: int, length: int, done: bool) -> bytes:
        """Before `length` bytes of a read, from offset `at` on; `done` with the last chunk."""
        return self._chunk(NBD_REPLY_TYPE_OFFSET_DATA, cookie, offset, length + 8, done) + _OFFSET.pack(at)

    def hole(self, cookie: int, offset: int, at: int, length: int, done: bool) -> bytes:
        """`length` bytes of a read, from offset `at` on, are zero."""
        return self._chunk(NBD_REPLY_TYPE_OFFSET_HOLE, cookie, offset, 12, done) + _HOLE.pack(at, length)

    def block_status(self, cookie: int, offset: int, context: int, extents: Sequence[tuple[int, int]], done: bool) -> bytes:
        """What a meta context says of consecutive extents, each (bytes, flags); at least one."""
        if self._extended:
            head = self._chunk(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, cookie, offset, 8 + 16 * len(extents), done)
            flat = [number for extent in extents for number in extent]
            return head + struct.pack(f">II{len(flat)}Q", context, len(extents), *flat)
        head = self._chunk(NBD_REPLY_TYPE_BLOCK_STATUS, cookie, offset, 4 + 8 * len(extents), done)
        flat = [number for extent in extents for number in extent]
        return head + struct.pack(f">I{len(flat)}I", context, *flat)
