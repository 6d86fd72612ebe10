"""The server's side of fixed newstyle negotiation, without I/O: bytes in, bytes to send, and in the end the chosen export.

Written like `handshake.py`: one generator, each `yield n` asks for the next n bytes. Options that we do not know are answered
with NBD_REP_ERR_UNSUP and their data is thrown away. Source: doc/proto.md, "Fixed newstyle negotiation", "Option types" and
"TLS support" (modes NOTLS, SELECTIVETLS, FORCEDTLS), with the branch extension-ext-header.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from ustack.nbd.constants import (
    DEFAULT_MAXIMUM_PAYLOAD,
    IHAVEOPT,
    MAX_STRING,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD,
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
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK,
    NBD_REP_ERR_BLOCK_SIZE_REQD,
    NBD_REP_ERR_EXT_HEADER_REQD,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    NBDMAGIC,
    OPTION_NAMES,
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
MAX_UNSENT: Final = 1 << 20
"""Bytes of replies to options that came in one read, after which no further one of them is answered: who wants so much has to
wait for it."""
COMMON_BLOCK: Final = 512
"""Bytes that requests of clients without any knowledge are multiples of ("Block size constraints")."""
GREETING: Final = struct.pack(">QQH", NBDMAGIC, IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_UNUSED_ZEROES: Final = bytes(124)
_Steps: TypeAlias = "Generator[int, bytes, None]"


class TlsPolicy(enum.Enum):
    """What a server does about TLS: the specification's NOTLS, SELECTIVETLS (who asks has it) and FORCEDTLS."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"


class Offer(NamedTuple):
    """An export as it is offered: what is said of it, and the names of its meta contexts, whose numbers are their places."""

    info: ExportInfo
    contexts: tuple[str, ...] = ()


class ServerHandshake:
    """Negotiates with one client. Feed it with `receive_data`, send `data_to_send`.

    When `done`, `chosen` is the export that the client goes on with, as it was told, or None if it left with NBD_OPT_ABORT;
    `contexts` are the numbers of the meta contexts that it has selected, and `rest` has the bytes that came behind the last
    option: the first requests. When `starts_tls` has become true, nothing more is said in the clear: send what there is to
    send, begin TLS, and call `tls_begun`. NbdProtocolError means: drop the client.
    """

    __slots__ = (
        "_block_sizes_known",
        "_buffer",
        "_discard",
        "_needed",
        "_no_zeroes",
        "_offers",
        "_out",
        "_program",
        "_selected_for",
        "_tls",
        "chosen",
        "contexts",
        "done",
        "extended",
        "rest",
        "starts_tls",
        "structured",
    )

    def __init__(self, offers: Mapping[str, Offer], tls: TlsPolicy = TlsPolicy.OFF) -> None:
        """`offers` by the names that clients may use. The empty name stands for the default export; it is listed only when
        alone."""
        self._offers = offers
        self._tls = tls
        self._buffer = bytearray()
        self._out = bytearray(GREETING)
        self._discard = 0
        self._no_zeroes = False
        self._block_sizes_known: set[str] = set()
        self._selected_for = ""
        self.chosen: ExportInfo | None = None
        self.contexts: tuple[int, ...] = ()
        self.done = False
        self.rest = b""
        self.structured = False
        """Replies come in chunks: structured replies or extended headers are negotiated."""
        self.extended = False
        self.starts_tls = False
        self._program = self._negotiate()
        self._needed = next(self._program)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the client."""
        self._buffer += data
        try:
            while True:
                if self.starts_tls and self._buffer:
                    # Whoever sends on before TLS has begun puts words into the mouth of the one who speaks then.
                    raise NbdProtocolError("client goes on in the clear where TLS begins")
                dropped = min(self._discard, len(self._buffer))
                if dropped:
                    del self._buffer[:dropped]
                    self._discard -= dropped
                if self._discard or len(self._buffer) < self._needed:
                    return
                piece = bytes(self._buffer[: self._needed])
                del self._buffer[: self._needed]
                if len(self._out) > MAX_UNSENT:
                    raise NbdProtocolError(f"client asks for more than {MAX_UNSENT} bytes of answers at once")
                self._needed = self._program.send(piece)
        except StopIteration:
            self.done = True
            self.rest = bytes(self._buffer)
            self._buffer.clear()

    def data_to_send(self) -> bytes:
        """Bytes for the client since the last call; the greeting at first."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def tls_begun(self) -> None:
        """What comes now comes through TLS. What was negotiated before counts no more."""
        self.starts_tls = False
        self._tls = TlsPolicy.OFF
        self.structured = self.extended = False
        self.contexts = ()
        self._block_sizes_known.clear()

    # -- the option phase ----------------------------------------------------------------------------------------------------

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
            refusal = self._refusal(option, length)
            if refusal:
                if length > MAX_DISCARD:
                    raise NbdProtocolError(f"option {option} with {length} bytes")
                self._discard = length
                self._reply(option, refusal)
                continue
            data = (yield length) if length else b""
            if option == NBD_OPT_ABORT:
                self._reply(option, NBD_REP_ACK)
                return
            if option in (NBD_OPT_INFO, NBD_OPT_GO):
                if self._info_or_go(option, data) and option == NBD_OPT_GO:
                    return
            elif option in (NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT):
                self._meta_context(option, data)
            elif data:
                self._reply(option, NBD_REP_ERR_INVALID, f"{OPTION_NAMES[option]} has no data".encode())
            elif option == NBD_OPT_LIST:
                self._list()
            elif option == NBD_OPT_STARTTLS:
                self._reply(option, NBD_REP_ACK)
                self.starts_tls = True
            else:
                self._headers(option)
        raise NbdProtocolError(f"client has sent {MAX_OPTIONS} options and is still not content")

    def _refusal(self, option: int, length: int) -> int:
        """The reply for an option that is not even looked at; 0 for one that is."""
        if self._tls is TlsPolicy.REQUIRE and option not in (NBD_OPT_STARTTLS, NBD_OPT_ABORT):
            return NBD_REP_ERR_TLS_REQD
        if option not in _KNOWN:
            return NBD_REP_ERR_UNSUP
        if option == NBD_OPT_STARTTLS and self._tls is TlsPolicy.OFF:
            return NBD_REP_ERR_POLICY  # also when TLS is there already: there is no TLS inside of TLS
        return NBD_REP_ERR_TOO_BIG if length > MAX_OPTION else 0

    def _export_name(self, name: str) -> None:
        # This option can be answered with nothing but yes. What does not fit ends the connection.
        if self._tls is TlsPolicy.REQUIRE:
            raise NbdProtocolError("client wants an export without TLS, which is required")
        if self.extended:
            raise NbdProtocolError("client ends negotiation with NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")
        info = self._find(name)
        if info is None:
            raise NbdProtocolError(
                f"client wants export {name!r}, which does not exist, and NBD_OPT_EXPORT_NAME has no way to say so"
            )
        self._out += struct.pack(">QH", info.size, info.flags)
        if not self._no_zeroes:
            self._out += _UNUSED_ZEROES
        self._choose(name, info)

    def _list(self) -> None:
        for name, offer in self._offers.items():
            if name or len(self._offers) == 1:
                encoded = name.encode()
                text = (offer.info.description or "").encode()[:MAX_STRING]
                self._reply(NBD_OPT_LIST, NBD_REP_SERVER, struct.pack(">I", len(encoded)) + encoded + text)
        self._reply(NBD_OPT_LIST, NBD_REP_ACK)

    def _headers(self, option: int) -> None:
        """NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS, the stronger of which counts."""
        if option == NBD_OPT_STRUCTURED_REPLY and self.extended:
            self._reply(option, NBD_REP_ERR_EXT_HEADER_REQD, b"extended headers are negotiated already")
        elif self.extended or (self.structured and option == NBD_OPT_STRUCTURED_REPLY):
            self._reply(option, NBD_REP_ERR_INVALID, f"{OPTION_NAMES[option]} is negotiated already".encode())
        else:
            self.structured = True
            self.extended = option == NBD_OPT_EXTENDED_HEADERS
            self._reply(option, NBD_REP_ACK)

    def _info_or_go(self, option: int, data: bytes) -> bool:
        """Answer NBD_OPT_INFO and NBD_OPT_GO, which have the same form; tells whether they got what they asked for."""
        length = int.from_bytes(data[:4], "big")
        count = int.from_bytes(data[4 + length : 6 + length], "big")
        if len(data) < 6 or length > MAX_STRING or len(data) != 6 + length + 2 * count:
            self._reply(option, NBD_REP_ERR_INVALID, b"lengths in the option do not add up")
            return False
        name = self._name(option, data[4 : 4 + length])
        if name is None:
            return False
        info = self._find(name, described=option == NBD_OPT_INFO)
        assert info is not None
        wanted = struct.unpack_from(f">{count}H", data, 6 + length)
        if NBD_INFO_BLOCK_SIZE in wanted:
            self._block_sizes_known.add(name)
        elif option == NBD_OPT_GO and _is_picky(info) and name not in self._block_sizes_known:
            # Who asks promises to obey.
            self._reply(option, NBD_REP_ERR_BLOCK_SIZE_REQD, f"blocks have {info.minimum_block} bytes".encode())
            return False
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
            self._choose(name, info)
        return True

    def _meta_context(self, option: int, data: bytes) -> None:
        """List the contexts that the queries match, or select them."""
        selecting = option == NBD_OPT_SET_META_CONTEXT
        if selecting:
            self.contexts = ()  # whatever comes of this one, the ones before count no more
        if selecting and not self.structured:
            self._reply(option, NBD_REP_ERR_INVALID, b"structured replies or extended headers come first")
            return
        queries = _queries(data)
        if queries is None:
            self._reply(option, NBD_REP_ERR_INVALID, b"lengths in the option do not add up")
            return
        name = self._name(option, queries[0])
        if name is None:
            return
        wanted = set(queries[1:])
        found = []
        for number, context in enumerate(self._offers[name].contexts):
            namespace = context[: context.index(":") + 1].encode()
            if context.encode() in wanted or (not selecting and (not wanted or namespace in wanted)):
                found.append(number)
                encoded = struct.pack(">I", number if selecting else 0) + context.encode()
                self._reply(option, NBD_REP_META_CONTEXT, encoded)
        if selecting:
            self.contexts = tuple(found)
            self._selected_for = name
        self._reply(option, NBD_REP_ACK)

    # -- exports -------------------------------------------------------------------------------------------------------------

    def _name(self, option: int, data: bytes) -> str | None:
        """The export that an option names; None when it was refused, because there is none or it cannot be one."""
        try:
            name = decode_name(data, "export name")
        except NbdProtocolError as error:
            self._reply(option, NBD_REP_ERR_INVALID, str(error.strerror).encode())
            return None
        if name not in self._offers:
            self._reply(option, NBD_REP_ERR_UNKNOWN, f"no export named {name!r}".encode()[:MAX_STRING])
            return None
        return name

    def _find(self, name: str, described: bool = False) -> ExportInfo | None:
        """An export with the flags that go with what is negotiated; `described` says that it is not about to be used."""
        offer = self._offers.get(name)
        if offer is None:
            return None
        flags = offer.info.flags
        if not self.structured:
            flags &= ~NBD_FLAG_SEND_DF  # DF is about chunks, which there are none of
        selected = self.contexts and self._selected_for == name
        if self.extended and offer.contexts and (described or selected):
            flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD
        return offer.info if flags == offer.info.flags else replace(offer.info, flags=flags)

    def _choose(self, name: str, info: ExportInfo) -> None:
        self.chosen = info if name in self._block_sizes_known else without_limit(info)
        if self._selected_for != name:
            self.contexts = ()  # they were selected for another export

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._out += _REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data))
        self._out += data


def without_limit(info: ExportInfo) -> ExportInfo:
    """An export for a client that does not know its block sizes: payloads of the default size are taken then, since every
    export can do them in parts."""
    if info.maximum_payload >= DEFAULT_MAXIMUM_PAYLOAD:
        return info
    return replace(info, maximum_payload=DEFAULT_MAXIMUM_PAYLOAD)


def _is_picky(info: ExportInfo) -> bool:
    """A client that asks for no block sizes would have every request refused ("Block size constraints")."""
    return info.minimum_block > COMMON_BLOCK


def _queries(data: bytes) -> list[bytes] | None:
    """The strings of NBD_OPT_LIST_META_CONTEXT: the export's name and the queries; None when their lengths do not add up."""
    strings: list[bytes] = []
    at, left = 0, 1
    while left:
        if len(data) < at + 4:
            return None
        length = int.from_bytes(data[at : at + 4], "big")
        at += 4 + length
        if length > MAX_STRING or len(data) < at:
            return None
        strings.append(data[at - length : at])
        left -= 1
        if len(strings) == 1:
            left = int.from_bytes(data[at : at + 4], "big")
            if len(data) < at + 4:
                return None
            at += 4
    return strings if at == len(data) else None


_KNOWN: Final = frozenset(OPTION_NAMES) - {NBD_OPT_EXPORT_NAME}
"""Options that are understood; NBD_OPT_EXPORT_NAME, which is answered differently from all others, is apart."""
