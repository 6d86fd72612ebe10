"""NBD messages built by hand from the specification, so that the tests do not believe our own constants and encoders."""

from __future__ import annotations

import struct

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"
HAS_FLAGS, READ_ONLY, FLUSH, FUA, TRIM, ZEROES, DF, MULTI, CACHE = 1, 2, 4, 8, 32, 64, 128, 256, 1024
ALL_FLAGS = HAS_FLAGS | FLUSH | FUA | TRIM | ZEROES | DF | MULTI | CACHE
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED, LIST_CONTEXTS, SET_CONTEXTS, EXTENDED = 1, 2, 3, 6, 7, 8, 9, 10, 11
ACK, SERVER, REP_INFO, CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG = (2**31 + n for n in range(1, 10))
READ, WRITE, DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
DONE = 1


def option(number: int, data: bytes = b"") -> bytes:
    """C: an option."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info_data(name: str, *wanted: int) -> bytes:
    """The data of NBD_OPT_INFO and NBD_OPT_GO."""
    encoded = name.encode()
    return struct.pack(f">I{len(encoded)}sH{len(wanted)}H", len(encoded), encoded, len(wanted), *wanted)


def contexts_data(name: str, *queries: str) -> bytes:
    """The data of NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT."""
    pieces = [struct.pack(">I", len(each.encode())) + each.encode() for each in (name, *queries)]
    return pieces[0] + struct.pack(">I", len(queries)) + b"".join(pieces[1:])


def context(number: int, ident: int, name: str) -> bytes:
    """S: NBD_REP_META_CONTEXT to option `number`."""
    return reply(number, CONTEXT, struct.pack(">I", ident) + name.encode())


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """S: an option reply."""
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", number, kind, len(data)) + data


def info_export(number: int, size: int, flags: int = ALL_FLAGS) -> bytes:
    """S: NBD_INFO_EXPORT."""
    return reply(number, REP_INFO, struct.pack(">HQH", 0, size, flags))


def info_blocks(number: int, minimum: int, preferred: int, maximum: int) -> bytes:
    """S: NBD_INFO_BLOCK_SIZE."""
    return reply(number, REP_INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))


def chunks_offered(*, structured: bool = True, extended: bool = False, contexts: dict[str, int] | None = None) -> bytes:
    """S: the answers to what comes before NBD_OPT_GO: extended headers, structured replies, metadata contexts."""
    answers = reply(EXTENDED, ACK) if extended else reply(EXTENDED, UNSUP) + reply(STRUCTURED, ACK if structured else UNSUP)
    if structured or extended:
        answers += b"".join(context(SET_CONTEXTS, ident, name) for name, ident in (contexts or {}).items())
        answers += reply(SET_CONTEXTS, ACK)
    return answers


def chunks_without_contexts() -> bytes:
    """S: the answers to extended headers, which it has not, and structured replies, which it has."""
    return reply(EXTENDED, UNSUP) + reply(STRUCTURED, ACK)


def asked(name: str = "", *, extended: bool = False, structured: bool = True) -> bytes:
    """C: everything from the flags to NBD_OPT_GO."""
    return (
        b"\0\0\0\x03"
        + option(EXTENDED)
        + (b"" if extended else option(STRUCTURED))
        + (option(SET_CONTEXTS, contexts_data(name, "base:allocation")) if structured or extended else b"")
        + option(GO, info_data(name, 1, 2, 3))
    )


def negotiation(
    size: int,
    flags: int = ALL_FLAGS,
    *,
    structured: bool = True,
    blocks: tuple[int, int, int] | None = None,
    extended: bool = False,
    contexts: dict[str, int] | None = None,
) -> bytes:
    """S: everything from the greeting to the end of NBD_OPT_GO."""
    return (
        GREETING
        + chunks_offered(structured=structured, extended=extended, contexts=contexts)
        + info_export(GO, size, flags)
        + (info_blocks(GO, *blocks) if blocks else b"")
        + reply(GO, ACK)
    )


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    """C: a request."""
    return bytes.fromhex("25609513") + struct.pack(">HHQQI", flags, command, cookie, offset, length) + payload


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    """S: a simple reply."""
    return bytes.fromhex("67446698") + struct.pack(">IQ", error, cookie) + data


def chunk(kind: int, cookie: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """S: a structured reply chunk."""
    return bytes.fromhex("668e33ef") + struct.pack(">HHQI", flags, kind, cookie, len(payload)) + payload


def none(cookie: int) -> bytes:
    """S: NBD_REPLY_TYPE_NONE."""
    return chunk(0, cookie, flags=DONE)


def data(cookie: int, offset: int, content: bytes, flags: int = 0) -> bytes:
    """S: NBD_REPLY_TYPE_OFFSET_DATA."""
    return chunk(1, cookie, struct.pack(">Q", offset) + content, flags)


def hole(cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """S: NBD_REPLY_TYPE_OFFSET_HOLE."""
    return chunk(2, cookie, struct.pack(">QI", offset, length), flags)


def error(cookie: int, code: int, text: bytes = b"", flags: int = DONE, offset: int | None = None) -> bytes:
    """S: NBD_REPLY_TYPE_ERROR, or ERROR_OFFSET with an offset."""
    payload = struct.pack(">IH", code, len(text)) + text
    if offset is None:
        return chunk(0x8001, cookie, payload, flags)
    return chunk(0x8002, cookie, payload + struct.pack(">Q", offset), flags)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    """`stream` cut at these places."""
    places = sorted({cut for cut in cuts if 0 < cut < len(stream)})
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


def extended_request(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
) -> bytes:
    """C: a request with an extended header."""
    return bytes.fromhex("21e41c71") + struct.pack(">HHQQQ", flags, command, cookie, offset, length) + payload


def extended_chunk(kind: int, cookie: int, offset: int, payload: bytes = b"", flags: int = DONE) -> bytes:
    """S: a chunk with an extended header; `offset` is the request's."""
    return bytes.fromhex("6e8a278c") + struct.pack(">HHQQQ", flags, kind, cookie, offset, len(payload)) + payload


def status_payload(ident: int, *extents: tuple[int, int]) -> bytes:
    """The payload of NBD_REPLY_TYPE_BLOCK_STATUS."""
    return struct.pack(">I", ident) + b"".join(struct.pack(">II", *each) for each in extents)


def wide_status_payload(ident: int, *extents: tuple[int, int]) -> bytes:
    """The payload of NBD_REPLY_TYPE_BLOCK_STATUS_EXT."""
    return struct.pack(">II", ident, len(extents)) + b"".join(struct.pack(">QQ", *each) for each in extents)
