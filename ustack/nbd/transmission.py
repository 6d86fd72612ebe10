"""The client's side of the transmission phase, without I/O.

`submit` gives the bytes of a request to send. Replies come back through `get_buffer` and `buffer_updated`, the pair that
asyncio.BufferedProtocol wants: small replies are parsed out of one receive buffer, many to a read; the bulk of a large one is
read straight into the memory that the caller gave, so that nobody copies it. Simple and structured replies arrive in any order,
chunks of different replies interleaved; with extended headers there are no simple ones. Source: doc/proto.md, "Transmission"
and "Structured reply types"; branch extension-ext-header.

Trust ends here. A reply that no request asked for, data that overlaps, leaves gaps or lies outside of the request, and
everything else that the specification calls a violation raises NbdProtocolError, after which the connection must be dropped.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from ustack.nbd.block_status import check_status_size, parse_status
from ustack.nbd.constants import (
    COMMAND_NAMES,
    MAX_STRING,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_EINVAL,
    NBD_EXTENDED_REPLY_MAGIC,
    NBD_EXTENDED_REQUEST_MAGIC,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
)
from ustack.nbd.errors import NbdProtocolError, decode_message

if TYPE_CHECKING:
    from array import array
    from collections.abc import Mapping

RECEIVE_BUFFER: Final = 64 << 10
"""Bytes read at once when replies are small. Fifteen 4 KiB replies fit."""
DIRECT_MIN: Final = 32 << 10
"""Bytes of one payload still to come from which on it is read straight into its destination. Below, a copy is cheaper than the
additional system call that reading exactly to the end of the payload costs."""
MAX_ERROR_CHUNK: Final = 64 << 10
"""Bytes of payload of an error chunk of a type that we do not know. Known ones are shorter: a message has at most 4096."""
MAX_EXTENTS: Final = 65536
"""Disjoint pieces of one read that we keep track of: a 32 MiB read in sectors of 512 bytes, every second one missing."""

_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
_STATUS_PAYLOAD: Final = struct.Struct(">QI")
_EXTENDED_CHUNK: Final = struct.Struct(">IHHQQQ")
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_OFFSET: Final = struct.Struct(">Q")
_SIMPLE_SIZE: Final = _SIMPLE.size
_CHUNK_SIZE: Final = _CHUNK.size
_EXTENDED_CHUNK_SIZE: Final = _EXTENDED_CHUNK.size
_ZEROES: Final = bytes(64 << 10)


class Request:
    """A command in flight and, when it is complete, its outcome.

    `offset` and `length` are bytes on the export. `view` is the destination of a read; None makes the parser throw its data
    away. `context` is the metadata context that a block status is asked for. After completion `error` is 0 or the NBD error
    value that the server sent, `message` its text, `error_at` the offset on the export where it happened, if that was said
    (NBD_REPLY_TYPE_ERROR_OFFSET), else -1.
    """

    __slots__ = (
        "command",
        "context",
        "cookie",
        "error",
        "error_at",
        "extents",
        "filled",
        "flags",
        "length",
        "message",
        "offset",
        "status",
        "view",
    )

    def __init__(self, command: int, flags: int, offset: int, length: int, view: memoryview | None = None) -> None:
        self.command = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.view = view
        self.cookie = 0
        self.error = 0
        self.message = ""
        self.filled = 0
        # Sorted (start, end) of what has arrived, merged where it arrives in order; None as long as nothing has.
        self.extents: list[tuple[int, int]] | None = None
        self.context: str | None = None
        self.error_at = -1
        self.status: dict[str, array[int]] | None = None
        """Answer to NBD_CMD_BLOCK_STATUS: for each context its (length, flags) pairs, one after the other."""

    def valid_bytes(self) -> int:
        """How many bytes at the start of the view are good. After an error without a place none are: it voids all data."""
        if not self.error:
            return self.length
        if self.error_at < 0 or not self.extents or self.extents[0][0]:
            return 0
        return min(self.error_at - self.offset, self.extents[0][1])

    def __repr__(self) -> str:
        return (
            f"{COMMAND_NAMES.get(self.command, self.command)}(offset={self.offset}, length={self.length}, cookie={self.cookie})"
        )


R = TypeVar("R", bound=Request)


class ClientTransmission(Generic[R]):
    """Requests out, replies in, for one connection. Requests may be of a subclass of `Request` that carries the caller's own
    things.

    `in_flight` maps cookies to requests, oldest first. Cookies are never used twice on a connection, so a late or doubled reply
    is always recognised. `completed` has the requests that are answered, in the order of their last reply; the caller takes
    them out. `received` counts the bytes that came.
    """

    __slots__ = (
        "_buffer",
        "_chunk_done",
        "_collected",
        "_contexts",
        "_current",
        "_direct",
        "_end",
        "_extended",
        "_names",
        "_next_cookie",
        "_remaining",
        "_structured",
        "_target",
        "_view",
        "completed",
        "in_flight",
        "received",
    )

    def __init__(
        self, structured_replies: bool, extended_headers: bool = False, contexts: Mapping[str, int] | None = None
    ) -> None:
        """What was negotiated. `contexts` are the metadata contexts with the numbers that the server gave them."""
        self._structured = structured_replies or extended_headers
        self._extended = extended_headers
        self._contexts = dict(contexts or {})
        self._names = {number: name for name, number in self._contexts.items()}
        self._next_cookie = 1
        self.in_flight: dict[int, R] = {}
        self.completed: list[R] = []
        self.received = 0
        self._buffer = bytearray(RECEIVE_BUFFER)
        self._view = memoryview(self._buffer)
        self._end = 0  # bytes of an unfinished header or error chunk at the start of the buffer
        # The payload that is arriving: whose it is, where it goes (None: nowhere), and how much is still to come.
        # While there is one, the receive buffer is empty.
        self._current: R | None = None
        self._target: memoryview | None = None
        self._remaining = 0
        self._chunk_done = False
        self._direct = False
        # The payload of a block status chunk, as far as it has come.
        self._collected: bytearray | None = None

    def submit(self, request: R) -> bytes:
        """Give the request a cookie, remember it, and return its header. The data of a write must follow right behind. Offsets
        must fit 64 bits, lengths 32, or 64 with extended headers."""
        cookie = self._next_cookie
        self._next_cookie = cookie + 1
        request.cookie = cookie
        # It may have been in flight on a connection that was lost amid the reply.
        request.error = request.filled = 0
        request.error_at = -1
        request.extents = None
        request.status = None
        self.in_flight[cookie] = request
        if not self._extended:
            return _REQUEST.pack(NBD_REQUEST_MAGIC, request.flags, request.command, cookie, request.offset, request.length)
        flags, command, length = request.flags, request.command, request.length
        magic = NBD_EXTENDED_REQUEST_MAGIC
        if command == NBD_CMD_WRITE:
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN
        elif flags & NBD_CMD_FLAG_PAYLOAD_LEN:
            # A block status of one context among several: which one is said in a payload.
            assert request.context is not None
            payload = _STATUS_PAYLOAD.pack(length, self._contexts[request.context])
            return _EXTENDED_REQUEST.pack(magic, flags, command, cookie, request.offset, len(payload)) + payload
        return _EXTENDED_REQUEST.pack(magic, flags, command, cookie, request.offset, length)

    def disconnect(self) -> bytes:
        """NBD_CMD_DISC. Nothing may be sent after it and no reply comes."""
        if self._extended:
            return _EXTENDED_REQUEST.pack(NBD_EXTENDED_REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0)
        return _REQUEST.pack(NBD_REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0)

    def abandon(self, request: R) -> None:
        """The caller does not want the data any more: its memory is not touched again. The request stays in flight."""
        request.view = None
        if self._current is request:
            self._target = None

    def end(self) -> list[R]:
        """No more bytes will come: gives back what is unanswered, oldest first, and touches its memory no more."""
        unanswered = list(self.in_flight.values())
        self.in_flight.clear()
        self._current = self._target = self._collected = None
        return unanswered

    # -- replies -------------------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes from the server go. Follow with `buffer_updated` before anything else.

        A transport that has `sizehint` bytes at hand gets room for all of them: the receive buffer, when they reach beyond the
        payload that is arriving. Only then does our own stack copy a frame straight from its ring; otherwise it needs packet
        memory, which may be short.
        """
        target = self._target
        if target is not None and self._remaining >= DIRECT_MIN and sizehint <= self._remaining:
            self._direct = True
            return target
        self._direct = False
        return self._view[self._end :] if self._end else self._view

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` bytes have arrived in the last buffer. Requests that they complete are appended to `completed`, also when an
        NbdProtocolError ends the parsing behind them."""
        self.received += nbytes
        if self._direct:
            self._direct = False
            self._remaining -= nbytes
            if self._target is not None:
                self._target = self._target[nbytes:]
            if not self._remaining:
                self._end_of_payload()
            return
        buffer = self._buffer
        end = self._end + nbytes
        pos = 0
        if self._remaining:
            pos = self._payload(0, end)
        pos = self._extended_replies(pos, end) if self._extended else self._replies(pos, end)
        # What is left is the start of a header or of a small payload. It moves to the front; a large payload never waits here.
        left = end - pos
        if pos and left:
            buffer[:left] = buffer[pos:end]
        self._end = left

    def _replies(self, pos: int, end: int) -> int:
        """Handle the replies that are there; returns where the first unfinished one starts."""
        buffer = self._buffer
        while end - pos >= _SIMPLE_SIZE:
            if end - pos >= _CHUNK_SIZE:
                magic, flags, kind, cookie, length = _CHUNK.unpack_from(buffer, pos)
                if magic == NBD_STRUCTURED_REPLY_MAGIC:
                    if not self._structured:
                        raise NbdProtocolError("structured reply, which was not negotiated")
                    used = self._on_chunk(self._request_of(cookie), flags, kind, length, pos + _CHUNK_SIZE, end)
                    if used < 0:
                        break
                    pos = used
                    continue
            magic, error, cookie = _SIMPLE.unpack_from(buffer, pos)
            if magic == NBD_SIMPLE_REPLY_MAGIC:
                pos = self._on_simple(error, cookie, pos + _SIMPLE_SIZE, end)
            elif magic == NBD_STRUCTURED_REPLY_MAGIC:
                break
            else:
                raise NbdProtocolError(f"reply magic is {magic:#010x}")
        return pos

    def _extended_replies(self, pos: int, end: int) -> int:
        """The same with extended headers, where every reply is a chunk."""
        while end - pos >= _EXTENDED_CHUNK_SIZE:
            magic, flags, kind, cookie, offset, length = _EXTENDED_CHUNK.unpack_from(self._buffer, pos)
            if magic != NBD_EXTENDED_REPLY_MAGIC:
                raise NbdProtocolError(f"reply magic is {magic:#010x} after extended headers were negotiated")
            request = self._request_of(cookie)
            if offset != request.offset:
                raise NbdProtocolError(f"reply with offset {offset} to {request!r}")
            used = self._on_chunk(request, flags, kind, length, pos + _EXTENDED_CHUNK_SIZE, end)
            if used < 0:
                break
            pos = used
        return pos

    def _request_of(self, cookie: int) -> R:
        request = self.in_flight.get(cookie)
        if request is None:
            raise NbdProtocolError(f"reply with cookie {cookie:#x}, which is no request of ours")
        return request

    def _on_simple(self, error: int, cookie: int, pos: int, end: int) -> int:
        request = self._request_of(cookie)
        if request.command == NBD_CMD_READ:
            if self._structured:
                raise NbdProtocolError(f"simple reply to {request!r} after structured replies were negotiated")
            if not error:
                self._chunk_done = True
                return self._begin_payload(request, 0, request.length, pos, end)
        elif request.error or request.status is not None:
            raise NbdProtocolError(f"simple reply amid the chunks of a structured reply to {request!r}")
        elif request.command == NBD_CMD_BLOCK_STATUS and not error:
            raise NbdProtocolError(f"simple reply to {request!r} without any status")
        request.error = error
        self._complete(request)
        return pos

    def _on_chunk(self, request: R, flags: int, kind: int, length: int, pos: int, end: int) -> int:
        """Handle the chunk whose payload starts at `pos`; returns where the next message starts, or -1 for 'more bytes
        needed'."""
        done = bool(flags & NBD_REPLY_FLAG_DONE)
        if kind == NBD_REPLY_TYPE_OFFSET_DATA:
            if length < 9 or request.command != NBD_CMD_READ:
                raise NbdProtocolError(f"NBD_REPLY_TYPE_OFFSET_DATA of {length} bytes in reply to {request!r}")
            if end - pos < 8:
                return -1
            (offset,) = _OFFSET.unpack_from(self._buffer, pos)
            self._claim(request, offset, length - 8)
            self._chunk_done = done
            return self._begin_payload(request, offset - request.offset, length - 8, pos + 8, end)
        if kind == NBD_REPLY_TYPE_NONE:
            if length or not done:
                raise NbdProtocolError(f"NBD_REPLY_TYPE_NONE with {length} bytes and flags {flags:#x}")
        elif kind == NBD_REPLY_TYPE_OFFSET_HOLE:
            if length != _HOLE.size or request.command != NBD_CMD_READ:
                raise NbdProtocolError(f"NBD_REPLY_TYPE_OFFSET_HOLE of {length} bytes in reply to {request!r}")
            if end - pos < length:
                return -1
            offset, hole = _HOLE.unpack_from(self._buffer, pos)
            if not hole:
                raise NbdProtocolError("NBD_REPLY_TYPE_OFFSET_HOLE of no bytes")
            self._claim(request, offset, hole)
            _fill_zeroes(request, offset - request.offset, hole)
        elif kind & NBD_REPLY_TYPE_FLAG_ERROR:
            if length > MAX_ERROR_CHUNK - _CHUNK_SIZE:
                raise NbdProtocolError(f"error chunk of type {kind:#06x} with {length} bytes")
            if end - pos < length:
                return -1
            self._on_error(request, kind, length, pos)
        elif kind == (NBD_REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else NBD_REPLY_TYPE_BLOCK_STATUS):
            if request.command != NBD_CMD_BLOCK_STATUS:
                raise NbdProtocolError(f"block status in reply to {request!r}")
            check_status_size(length, self._extended)
            # Kept as it comes: what a server only promises to send takes no memory.
            self._collected = bytearray()
            self._chunk_done = done
            self._current, self._target, self._remaining = request, None, length
            return self._payload(pos, end)
        else:
            raise NbdProtocolError(f"chunk of unknown type {kind} in reply to {request!r}")
        if done:
            self._end_of_reply(request)
        return pos + length

    def _on_error(self, request: R, kind: int, length: int, pos: int) -> None:
        tail = 8 if kind == NBD_REPLY_TYPE_ERROR_OFFSET else 0
        if length < _ERROR.size + tail:
            raise NbdProtocolError(f"error chunk of type {kind:#06x} with only {length} bytes")
        error, message_length = _ERROR.unpack_from(self._buffer, pos)
        known = kind in (NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET)
        if message_length > length - _ERROR.size - tail or message_length > MAX_STRING:
            raise NbdProtocolError(f"error message of {message_length} bytes in a chunk of {length}")
        if known and not error:
            raise NbdProtocolError("error chunk without an error")
        if tail:
            (offset,) = _OFFSET.unpack_from(self._buffer, pos + length - tail)
            if not request.offset <= offset < request.offset + max(request.length, 1):
                raise NbdProtocolError(f"error at offset {offset}, outside of {request!r}")
            if not request.error or 0 <= offset < request.error_at:
                request.error_at = offset
        else:
            request.error_at = -1
        if not request.error:
            # The first one counts. Of a type from the future we know only that the request has failed.
            request.error = error or NBD_EINVAL
            text = pos + _ERROR.size
            request.message = decode_message(self._buffer[text : text + message_length])

    def _claim(self, request: R, offset: int, length: int) -> None:
        """Note that a content chunk covers this part of a read; refuse it if it may not."""
        start = offset - request.offset
        stop = start + length
        if start < 0 or stop > request.length:
            raise NbdProtocolError(f"data for bytes {offset} to {offset + length}, outside of {request!r}")
        request.filled += length
        extents = request.extents
        if extents is None:
            request.extents = [(start, stop)]
            return
        if request.flags & NBD_CMD_FLAG_DF:
            raise NbdProtocolError(f"second content chunk in reply to {request!r} with NBD_CMD_FLAG_DF")
        at = bisect_left(extents, (start, stop))
        if (at and extents[at - 1][1] > start) or (at < len(extents) and extents[at][0] < stop):
            raise NbdProtocolError(f"data for bytes {offset} to {offset + length} of {request!r} came twice")
        if at and extents[at - 1][1] == start:
            extents[at - 1] = (extents[at - 1][0], stop)
        elif len(extents) < MAX_EXTENTS:
            extents.insert(at, (start, stop))
        else:
            raise NbdProtocolError(f"reply to {request!r} comes in more than {MAX_EXTENTS} scattered pieces")

    # -- payload -------------------------------------------------------------------------------------------------------------

    def _begin_payload(self, request: R, start: int, length: int, pos: int, end: int) -> int:
        view = request.view
        if end - pos >= length:
            # The usual small read: all of it is here already.
            if view is not None:
                view[start : start + length] = self._view[pos : pos + length]
            if self._chunk_done:
                self._end_of_reply(request)
            return pos + length
        self._current = request
        self._remaining = length
        self._target = None if view is None else view[start : start + length]
        return self._payload(pos, end)

    def _payload(self, pos: int, end: int) -> int:
        """Move what the receive buffer has of the current payload to its destination."""
        size = min(end - pos, self._remaining)
        target = self._target
        if target is not None:
            target[:size] = self._view[pos : pos + size]
            self._target = target[size:]
        elif self._collected is not None:
            self._collected += self._view[pos : pos + size]
        self._remaining -= size
        if not self._remaining:
            self._end_of_payload()
        return pos + size

    def _end_of_payload(self) -> None:
        request = self._current
        assert request is not None
        self._current = None
        self._target = None
        if self._collected is not None:
            collected, self._collected = self._collected, None
            self._on_status(request, collected)
        if self._chunk_done:
            self._end_of_reply(request)

    def _on_status(self, request: R, payload: bytearray) -> None:
        only_one = bool(request.flags & NBD_CMD_FLAG_REQ_ONE)
        number, pairs = parse_status(payload, self._extended, request.length, only_one)
        name = self._names.get(number)
        if name is None:
            raise NbdProtocolError(f"block status of context {number}, which was not negotiated")
        if request.status is None:
            request.status = {}
        elif name in request.status:
            raise NbdProtocolError(f"block status of {name!r} came twice in reply to {request!r}")
        request.status[name] = pairs

    def _end_of_reply(self, request: R) -> None:
        if self._structured and not request.error:
            if request.command == NBD_CMD_READ:
                if request.filled != request.length:
                    raise NbdProtocolError(f"reply to {request!r} ends after {request.filled} bytes")
            elif request.command == NBD_CMD_BLOCK_STATUS and (not request.status or request.context not in request.status):
                raise NbdProtocolError(f"reply to {request!r} ends without a status of {request.context!r}")
        self._complete(request)

    def _complete(self, request: R) -> None:
        del self.in_flight[request.cookie]
        self.completed.append(request)


def _fill_zeroes(request: Request, start: int, length: int) -> None:
    view = request.view
    if view is None:
        return
    stop = start + length
    while start < stop:
        size = min(stop - start, len(_ZEROES))
        view[start : start + size] = _ZEROES[:size] if size < len(_ZEROES) else _ZEROES
        start += size
