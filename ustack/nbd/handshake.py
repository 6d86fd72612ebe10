"""The client's side of fixed newstyle negotiation, without I/O: bytes in, events out, bytes to send.

The negotiation is written as one generator that reads like the specification's S: and C: lines; each `yield n` asks for exactly
the next n bytes, so it does not matter in what pieces they arrive. After every call send what `data_to_send` returns. Source:
doc/proto.md, "Fixed newstyle negotiation" and "Option types".

TLS is demanded or not used: with `tls`, a server that has none is refused, and whatever it says in the clear behind its
acknowledgment of NBD_OPT_STARTTLS is fatal. Extended headers, structured replies and metadata contexts are asked for in this
order, and done without where they are refused. Left out: oldstyle servers.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from ustack.nbd.constants import (
    BASE_ALLOCATION,
    IHAVEOPT,
    MAX_STRING,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_UNSUP,
    NBD_REP_FLAG_ERROR,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION_NAMES,
    OPTION_REPLY_MAGIC,
)
from ustack.nbd.errors import NbdNotFixedError, NbdOptionError, NbdProtocolError, decode_message, decode_name
from ustack.nbd.export_info import ExportInfo, check_block_sizes, check_size

MAX_REPLY: Final = 4 + 2 * MAX_STRING
"""Bytes of data in an option reply. The longest that we know is NBD_REP_SERVER: a length, a name and a description."""
MAX_REPLIES: Final = 64
"""Replies to one option other than NBD_OPT_LIST; a server that goes on longer never means to end."""
MAX_EXPORTS: Final = 10_000
"""Exports taken from one NBD_OPT_LIST."""
_UNUSED_ZEROES: Final = 124

_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")


class Purpose(enum.Enum):
    """Why we talk to the server."""

    GO = "go"
    """Use the export: ends in the transmission phase."""
    INFO = "info"
    """Ask about one export and leave."""
    LIST = "list"
    """Ask for all exports, then about each, and leave."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What to ask the server for; it may refuse each. Without structured replies nothing else is asked for.

    `meta_contexts` are queries for metadata contexts, as in NBD_OPT_SET_META_CONTEXT: a name such as `base:allocation`, or what
    the context's own specification allows.
    """

    structured_replies: bool = True
    extended_headers: bool = True
    meta_contexts: Sequence[str] = (BASE_ALLOCATION,)

    def __post_init__(self) -> None:
        for query in self.meta_contexts:
            if len(query.encode()) > MAX_STRING or "\0" in query:
                raise ValueError(f"a metadata context has at most {MAX_STRING} bytes of UTF-8 and no NUL")


@dataclass(frozen=True, slots=True)
class ExportListed:
    """The server has an export of this name (NBD_REP_SERVER)."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class ExportDescribed:
    """Answer to NBD_OPT_INFO."""

    info: ExportInfo


@dataclass(frozen=True, slots=True)
class ContextsListed:
    """Answer to NBD_OPT_LIST_META_CONTEXT: the contexts that the export has."""

    export: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OptionRefused:
    """The server said no to an option that we can do without, and negotiation goes on."""

    error: NbdOptionError


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The transmission phase begins. Every later byte is for `ClientTransmission`."""

    info: ExportInfo
    structured_replies: bool
    extended_headers: bool = False
    contexts: Mapping[str, int] = field(default_factory=dict)
    """The metadata contexts that were selected, with the numbers that stand for them on this connection."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """Negotiation ended by us with NBD_OPT_ABORT: all questions are answered, close the connection."""


@dataclass(frozen=True, slots=True)
class TlsBegins:
    """NBD_OPT_STARTTLS was acknowledged. What `data_to_send` has from now on goes through TLS, and so must what is received."""


Event: TypeAlias = TlsBegins | ExportListed | ExportDescribed | ContextsListed | OptionRefused | Negotiated | Aborted
_Steps: TypeAlias = Generator[int, bytes, None]


_NO_PREFERENCE: Final = Wishes()


class ClientHandshake:
    """Negotiates one connection. Feed it with `receive_data`; it raises NbdProtocolError when the server breaks the protocol
    and NbdOptionError when it refuses what `purpose` cannot do without. After an error, send `data_to_send` and close."""

    __slots__ = (
        "_buffer",
        "_events",
        "_finished",
        "_needed",
        "_out",
        "_program",
        "_tls",
        "_tls_begins",
        "_wishes",
        "contexts",
        "export",
        "extended",
        "fixed",
        "purpose",
        "structured",
        "waiting_for",
    )

    def __init__(
        self, export: str = "", purpose: Purpose = Purpose.GO, *, tls: bool = False, wishes: Wishes = _NO_PREFERENCE
    ) -> None:
        """`export` is the name to ask for, at most 4096 bytes in UTF-8, without NUL; raises ValueError otherwise. `tls` demands
        TLS."""
        if len(export.encode()) > MAX_STRING or "\0" in export:
            raise ValueError("an NBD export name has at most 4096 bytes of UTF-8 and no NUL")
        self.export = export
        self.purpose = purpose
        self.structured = False
        """Replies come in chunks: structured replies or extended headers were negotiated."""
        self.extended = False
        self.fixed = False
        """The server speaks fixed newstyle, so options can be refused."""
        self.contexts: dict[str, int] = {}
        self._wishes = wishes
        self._buffer = bytearray()
        self._events: list[Event] = []
        self._out = bytearray()
        self._finished = False
        self._tls = tls
        self._tls_begins = False
        self.waiting_for = "the greeting"
        self._program = self._negotiate()
        self._needed = next(self._program)

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take bytes from the server and return what they mean, oldest first."""
        if self._finished:
            raise NbdProtocolError(f"server sent {len(data)} bytes after the end of the negotiation")
        self._buffer += data
        try:
            while len(self._buffer) >= self._needed:
                piece = bytes(self._buffer[: self._needed])
                del self._buffer[: self._needed]
                self._needed = self._program.send(piece)
                if self._tls_begins:
                    self._tls_begins = False
                    if self._buffer:
                        # Who can insert plaintext would have it taken for what came through TLS (CVE-2021-3716 of nbdkit).
                        self._out.clear()
                        text = f"server sent {len(self._buffer)} bytes in the clear where TLS begins"
                        raise NbdProtocolError(text)
                    break
        except StopIteration:
            self._finished = True
        except OSError as error:
            self._finished = True
            if isinstance(error, NbdOptionError):
                self._send_option(NBD_OPT_ABORT)  # a refusal is no breach: leave politely ("soft disconnect")
            raise
        if self._finished and self._buffer:
            raise NbdProtocolError(f"server sent {len(self._buffer)} bytes before it was asked for anything")
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> bytes:
        """Bytes for the server since the last call."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def end_of_stream(self) -> OSError:
        """The error that describes a connection which ended here: ConnectionResetError that names what was awaited."""
        hint = "; probably it has no such export" if self.waiting_for == "the answer to NBD_OPT_EXPORT_NAME" else ""
        return OSError(errno.ECONNRESET, f"server closed the connection while we waited for {self.waiting_for}{hint}")

    # -- the negotiation, top to bottom ------------------------------------------------------------------------------------

    def _negotiate(self) -> _Steps:
        greeting = yield 16
        magic, version = struct.unpack(">QQ", greeting)
        if magic != NBDMAGIC:
            raise NbdProtocolError(f"not an NBD server: it greets with {greeting!r}")
        if version == OLDSTYLE_MAGIC:
            raise NbdProtocolError("server speaks only oldstyle negotiation, which is obsolete since 2011")
        if version != IHAVEOPT:
            raise NbdProtocolError(f"unknown style of negotiation {version:#018x}")
        (flags,) = struct.unpack(">H", (yield 2))
        self.fixed = fixed = bool(flags & NBD_FLAG_FIXED_NEWSTYLE)
        no_zeroes = bool(flags & NBD_FLAG_NO_ZEROES)
        self._out += struct.pack(">I", (NBD_FLAG_C_FIXED_NEWSTYLE if fixed else 0) | (NBD_FLAG_C_NO_ZEROES if no_zeroes else 0))
        if self._tls:
            if not fixed:
                raise NbdProtocolError("server does not speak fixed newstyle, so it has no TLS, which is demanded")
            yield from self._start_tls()
        if not fixed:
            if self.purpose is not Purpose.GO:
                raise NbdNotFixedError("server does not speak fixed newstyle: it can neither list nor describe exports")
            yield from self._export_name(no_zeroes)
            return
        if self._wishes.structured_replies:
            yield from self._replies_in_chunks()
        if self.purpose is Purpose.LIST:
            yield from self._list()
            self._abort()
            return
        if self.purpose is Purpose.INFO:
            info = yield from self._info_or_go(NBD_OPT_INFO, self.export)
            self._events.append(ExportDescribed(info))
            yield from self._list_contexts(self.export)
            self._abort()
            return
        if self.structured and self._wishes.meta_contexts:
            yield from self._set_contexts(self._wishes.meta_contexts)
        try:
            info = yield from self._info_or_go(NBD_OPT_GO, self.export)
        except NbdOptionError as error:
            # Only "I do not know this option" may lead to the old option, which cannot report errors; any other refusal is
            # final. After extended headers it is not allowed at all.
            if error.reply != NBD_REP_ERR_UNSUP or self.extended:
                raise
            self._refused(error)
            yield from self._export_name(no_zeroes)
            return
        self._begin(info)

    def _start_tls(self) -> _Steps:
        self._send_option(NBD_OPT_STARTTLS)
        reply, data = yield from self._reply(NBD_OPT_STARTTLS)
        if reply & NBD_REP_FLAG_ERROR:
            raise NbdOptionError(NBD_OPT_STARTTLS, reply, decode_message(data))
        self._expect_ack(NBD_OPT_STARTTLS, reply, data)
        self._events.append(TlsBegins())
        self._tls_begins = True

    def _replies_in_chunks(self) -> _Steps:
        if self._wishes.extended_headers:
            self.extended = self.structured = yield from self._ask_for(NBD_OPT_EXTENDED_HEADERS)
        if not self.extended:
            self.structured = yield from self._ask_for(NBD_OPT_STRUCTURED_REPLY)

    def _ask_for(self, option: int) -> Generator[int, bytes, bool]:
        self._send_option(option)
        reply, data = yield from self._reply(option)
        if reply & NBD_REP_FLAG_ERROR:
            self._refused(NbdOptionError(option, reply, decode_message(data)))
            return False
        self._expect_ack(option, reply, data)
        return True

    def _set_contexts(self, queries: Sequence[str]) -> _Steps:
        try:
            found = yield from self._contexts(NBD_OPT_SET_META_CONTEXT, self.export, queries)
        except NbdOptionError as error:
            self._refused(error)
            return
        for name, number in found:
            if name in self.contexts or number in self.contexts.values():
                raise NbdProtocolError(f"metadata context {name!r} or its number {number} was given twice")
            self.contexts[name] = number

    def _list_contexts(self, export: str) -> _Steps:
        if not self.structured:
            return
        try:
            found = yield from self._contexts(NBD_OPT_LIST_META_CONTEXT, export, ())
        except NbdOptionError as error:
            self._refused(error)
        else:
            self._events.append(ContextsListed(export, tuple(name for name, _ in found)))

    def _contexts(self, option: int, export: str, queries: Sequence[str]) -> Generator[int, bytes, list[tuple[str, int]]]:
        """Ask for metadata contexts: the name and number of each that the server has."""
        strings = [each.encode() for each in (export, *queries)]
        pieces = [struct.pack(f">I{len(each)}s", len(each), each) for each in strings]
        self._send_option(option, b"".join((pieces[0], struct.pack(">I", len(queries)), *pieces[1:])))
        found: list[tuple[str, int]] = []
        for _ in range(MAX_REPLIES):
            reply, data = yield from self._reply(option)
            if reply & NBD_REP_FLAG_ERROR:
                raise NbdOptionError(option, reply, decode_message(data))
            if reply != NBD_REP_META_CONTEXT:
                self._expect_ack(option, reply, data)
                return found
            if len(data) < 5:
                raise NbdProtocolError(f"NBD_REP_META_CONTEXT of {len(data)} bytes")
            found.append((decode_name(data[4:], "metadata context"), int.from_bytes(data[:4], "big")))
        raise NbdProtocolError(f"more than {MAX_REPLIES} replies to {OPTION_NAMES[option]}")

    def _begin(self, info: ExportInfo) -> None:
        self._events.append(Negotiated(info, self.structured, self.extended, self.contexts))

    def _info_or_go(self, option: int, export: str) -> Generator[int, bytes, ExportInfo]:
        name = export.encode()
        wanted = (NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE)
        self._send_option(option, struct.pack(f">I{len(name)}sH{len(wanted)}H", len(name), name, len(wanted), *wanted))
        size = -1
        info = ExportInfo(export, 0)
        for _ in range(MAX_REPLIES):
            reply, data = yield from self._reply(option)
            if reply & NBD_REP_FLAG_ERROR:
                raise NbdOptionError(option, reply, decode_message(data))
            if reply != NBD_REP_INFO:
                self._expect_ack(option, reply, data)
                if size < 0:
                    raise NbdProtocolError(f"{OPTION_NAMES[option]} acknowledged without NBD_INFO_EXPORT")
                return info
            if len(data) < 2:
                raise NbdProtocolError(f"NBD_REP_INFO of {len(data)} bytes")
            kind = int.from_bytes(data[:2], "big")
            if kind == NBD_INFO_EXPORT:
                _, size, flags = _unpack(_INFO_EXPORT, data, "NBD_INFO_EXPORT")
                check_size(size)
                info = replace(info, size=size, flags=flags)
            elif kind == NBD_INFO_BLOCK_SIZE:
                _, minimum, preferred, maximum = _unpack(_INFO_BLOCK_SIZE, data, "NBD_INFO_BLOCK_SIZE")
                info = replace(
                    info,
                    minimum_block=minimum,
                    preferred_block=preferred,
                    maximum_payload=check_block_sizes(minimum, preferred, maximum),
                    block_sizes_advertised=True,
                )
            elif kind == NBD_INFO_NAME:
                info = replace(info, canonical_name=decode_name(data[2:], "NBD_INFO_NAME"))
            elif kind == NBD_INFO_DESCRIPTION:
                info = replace(info, description=decode_message(data[2:]))
        raise NbdProtocolError(f"more than {MAX_REPLIES} replies to {OPTION_NAMES[option]}")

    def _export_name(self, no_zeroes: bool) -> _Steps:
        self._send_option(NBD_OPT_EXPORT_NAME, self.export.encode())
        self.waiting_for = "the answer to NBD_OPT_EXPORT_NAME"
        size, flags = struct.unpack(">QH", (yield 10))
        check_size(size)
        if not no_zeroes:
            yield _UNUSED_ZEROES
        self._begin(ExportInfo(self.export, size, flags))

    def _list(self) -> _Steps:
        self._send_option(NBD_OPT_LIST)
        names: list[str] = []
        while True:
            reply, data = yield from self._reply(NBD_OPT_LIST)
            if reply & NBD_REP_FLAG_ERROR:
                raise NbdOptionError(NBD_OPT_LIST, reply, decode_message(data))
            if reply != NBD_REP_SERVER:
                self._expect_ack(NBD_OPT_LIST, reply, data)
                break
            if len(names) == MAX_EXPORTS:
                raise NbdProtocolError(f"server lists more than {MAX_EXPORTS} exports")
            length = int.from_bytes(data[:4], "big")
            if len(data) < 4 or length > len(data) - 4:
                raise NbdProtocolError("NBD_REP_SERVER is shorter than the name in it")
            names.append(decode_name(data[4 : 4 + length], "export name"))
            self._events.append(ExportListed(names[-1], decode_message(data[4 + length :])))
        for name in names:
            try:
                info = yield from self._info_or_go(NBD_OPT_INFO, name)
                self._events.append(ExportDescribed(info))
                yield from self._list_contexts(name)
            except NbdOptionError as error:
                self._refused(error)
                if error.reply == NBD_REP_ERR_UNSUP:
                    break

    def _abort(self) -> None:
        # Some servers acknowledge, others (nbd-server) just close; our questions are answered, so there is nothing to wait for.
        self._send_option(NBD_OPT_ABORT)
        self._events.append(Aborted())

    # -- words of the language -----------------------------------------------------------------------------------------------

    def _send_option(self, option: int, data: bytes = b"") -> None:
        self._out += _OPTION.pack(IHAVEOPT, option, len(data))
        self._out += data

    def _reply(self, option: int) -> Generator[int, bytes, tuple[int, bytes]]:
        """One option reply: its type and data."""
        self.waiting_for = f"the answer to {OPTION_NAMES[option]}"
        magic, answered, reply, length = _REPLY.unpack((yield _REPLY.size))
        if magic != OPTION_REPLY_MAGIC:
            raise NbdProtocolError(f"option reply magic is {magic:#018x}")
        if answered != option:
            raise NbdProtocolError(f"reply to option {answered} while {OPTION_NAMES[option]} is open")
        if length > MAX_REPLY:
            raise NbdProtocolError(f"reply of {length} bytes to {OPTION_NAMES[option]}; the longest allowed is {MAX_REPLY}")
        data = (yield length) if length else b""
        if reply in (NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD):
            # No option can succeed any more, so a refusal of even an optional one is final.
            raise NbdOptionError(option, reply, decode_message(data))
        return reply, data

    def _refused(self, error: NbdOptionError) -> None:
        self._events.append(OptionRefused(error))

    @staticmethod
    def _expect_ack(option: int, reply: int, data: bytes) -> None:
        if reply != NBD_REP_ACK:
            raise NbdProtocolError(f"unexpected reply type {reply} to {OPTION_NAMES[option]}")
        if data:
            raise NbdProtocolError(f"NBD_REP_ACK to {OPTION_NAMES[option]} carries {len(data)} bytes")


def _unpack(layout: struct.Struct, data: bytes, what: str) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise NbdProtocolError(f"{what} of {len(data)} bytes instead of {layout.size}")
    return layout.unpack(data)
