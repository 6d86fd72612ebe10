"""Extended headers, meta contexts, block status, block sizes and TLS at the server, byte by byte."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd import wire
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.server_handshake import MAX_UNSENT, Offer, ServerHandshake, TlsPolicy
from ustack.nbd.server_replies import HeaderStyle, ReplyEncoder
from ustack.nbd.server_transmission import MAX_STATUS_PAYLOAD, Command, ServerTransmission

STARTTLS, LIST_CONTEXTS, SET_CONTEXTS, EXTENDED = 5, 9, 10, 11
EXT_HEADER_REQD = 2**31 + 10
REP_CONTEXT = 4
BLOCK_STATUS = 7
STATUS_PAYLOAD = 1 << 12
PAYLOAD_LEN, REQ_ONE = 1 << 5, 1 << 3
EINVAL = 22
FIXED = b"\0\0\0\x03"

DISK = ExportInfo("disk", 1 << 40, wire.ALL_FLAGS)
PICKY = ExportInfo("picky", 1 << 20, wire.ALL_FLAGS, minimum_block=4096)
CONTEXTS = ("base:allocation", "x:one", "x:two")
OFFERS = {"": Offer(DISK, CONTEXTS), "disk": Offer(DISK, CONTEXTS), "picky": Offer(PICKY)}


def query(name: str, *queries: str) -> bytes:
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    strings = [struct.pack(">I", len(each)) + each.encode() for each in (name, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


def refusals(sent: bytes) -> list[tuple[int, int, bytes]]:
    """(option, kind, data) of the option replies in `sent`."""
    found = []
    while sent:
        _, number, kind, length = struct.unpack_from(">QIII", sent)
        found.append((number, kind, sent[20 : 20 + length]))
        sent = sent[20 + length :]
    return found


def negotiate(*options: bytes, tls: TlsPolicy = TlsPolicy.OFF) -> tuple[ServerHandshake, list[tuple[int, int, bytes]]]:
    """What a client that sends these options, one after the other, gets."""
    handshake = ServerHandshake(OFFERS, tls)
    handshake.data_to_send()
    handshake.receive_data(FIXED)
    found = []
    for option in options:
        handshake.receive_data(option)
        found += refusals(handshake.data_to_send())
    return handshake, found


def kinds(found: list[tuple[int, int, bytes]]) -> list[tuple[int, int]]:
    """Without the data."""
    return [(number, kind) for number, kind, _ in found]


# -- negotiation -------------------------------------------------------------------------------------------------------------


def test_extended_headers_count_more_than_structured_replies() -> None:
    handshake, found = negotiate(
        wire.option(wire.STRUCTURED),
        wire.option(EXTENDED, b"x"),
        wire.option(EXTENDED),
        wire.option(EXTENDED),
        wire.option(wire.STRUCTURED),
        wire.option(wire.GO, wire.info_data("disk")),
    )
    assert kinds(found[:5]) == [
        (wire.STRUCTURED, wire.ACK),
        (EXTENDED, wire.INVALID),
        (EXTENDED, wire.ACK),
        (EXTENDED, wire.INVALID),
        (wire.STRUCTURED, EXT_HEADER_REQD),
    ]
    assert handshake.extended
    assert handshake.structured


def test_after_extended_headers_export_name_is_no_way_out() -> None:
    with pytest.raises(NbdProtocolError):
        negotiate(wire.option(EXTENDED), wire.option(wire.EXPORT_NAME, b"disk"))


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], [0, 1, 2], []),
        (["base:allocation"], [0], [0]),
        (["x:two", "base:allocation", "x:two", "y:", "x:three"], [0, 2], [0, 2]),
        (["x:"], [1, 2], []),
        (["", ":", "base"], [], []),
    ],
)
def test_contexts_are_listed_by_namespace_and_selected_by_name(
    queries: list[str], listed: list[int], selected: list[int]
) -> None:
    handshake, found = negotiate(
        wire.option(wire.STRUCTURED),
        wire.option(LIST_CONTEXTS, query("disk", *queries)),
        wire.option(SET_CONTEXTS, query("disk", *queries)),
        wire.option(wire.GO, wire.info_data("disk")),
    )
    assert [data[4:].decode() for number, kind, data in found if (number, kind) == (LIST_CONTEXTS, REP_CONTEXT)] == [
        CONTEXTS[number] for number in listed
    ]
    said = {data[:4]: data[4:].decode() for number, kind, data in found if (number, kind) == (SET_CONTEXTS, REP_CONTEXT)}
    assert said == {struct.pack(">I", number): CONTEXTS[number] for number in selected}
    assert handshake.contexts == tuple(selected)


def test_a_selection_ends_with_the_next_with_another_export_and_with_a_mistake() -> None:
    base = query("disk", "base:allocation")
    go = wire.option(wire.GO, wire.info_data("disk"))
    selected = wire.option(wire.STRUCTURED), wire.option(SET_CONTEXTS, base)
    assert negotiate(*selected, go)[0].contexts == (0,)
    assert negotiate(*selected, wire.option(SET_CONTEXTS, query("disk", "x:one")), go)[0].contexts == (1,)
    for spoiler in (query("disk"), query("nix", "x:one"), base + b"?", base[:-1], b"", b"\0\0\0\4disk\xff\xff\xff\xff"):
        assert negotiate(*selected, wire.option(SET_CONTEXTS, spoiler), go)[0].contexts == ()
    other = wire.option(wire.GO, wire.info_data("", 3))
    assert negotiate(*selected, other)[0].contexts == ()
    _, found = negotiate(wire.option(SET_CONTEXTS, base), wire.option(LIST_CONTEXTS, query("nix")))
    assert kinds(found) == [(SET_CONTEXTS, wire.INVALID), (LIST_CONTEXTS, wire.UNKNOWN)]


@pytest.mark.parametrize("selected", [True, False])
def test_payload_of_block_status_is_offered_with_extended_headers_and_contexts(selected: bool) -> None:
    options = [wire.option(EXTENDED), wire.option(SET_CONTEXTS, query("disk", *["x:one"] * selected))]
    handshake, _ = negotiate(*options, wire.option(wire.GO, wire.info_data("disk")))
    assert handshake.chosen is not None
    assert bool(handshake.chosen.flags & STATUS_PAYLOAD) == selected
    plain, _ = negotiate(wire.option(wire.STRUCTURED), options[1], wire.option(wire.GO, wire.info_data("disk")))
    assert plain.chosen is not None
    assert not plain.chosen.flags & STATUS_PAYLOAD


def test_who_does_not_ask_for_the_block_sizes_of_a_picky_export_does_not_get_it() -> None:
    go, asking = wire.info_data("picky"), wire.info_data("picky", 3)
    handshake, found = negotiate(wire.option(wire.GO, go), wire.option(wire.GO, asking))
    assert kinds(found)[0] == (wire.GO, wire.BLOCK_SIZE_REQD)
    assert handshake.done
    handshake, found = negotiate(wire.option(wire.INFO, asking), wire.option(wire.GO, go))
    assert handshake.chosen == PICKY_WITHOUT_DF


def test_payloads_of_the_default_size_are_taken_from_who_does_not_know_better() -> None:
    assert {asked: chosen_maximum(*asked) for asked in ((), (3,))} == {(): 32 << 20, (3,): 1 << 20}


def chosen_maximum(*asked: int) -> int:
    """Bytes that a client that asks for these infos may send."""
    handshake = ServerHandshake({"": Offer(ExportInfo("", 1 << 30, maximum_payload=1 << 20))})
    handshake.receive_data(FIXED + wire.option(wire.GO, wire.info_data("", *asked)))
    assert handshake.chosen is not None
    return handshake.chosen.maximum_payload


PICKY_WITHOUT_DF = ExportInfo("picky", 1 << 20, wire.ALL_FLAGS & ~wire.DF, minimum_block=4096)


# -- TLS ---------------------------------------------------------------------------------------------------------------------


def test_where_tls_is_required_nothing_else_is_answered() -> None:
    handshake, found = negotiate(
        wire.option(wire.LIST),
        wire.option(77, bytes(100)),
        wire.option(wire.STRUCTURED),
        wire.option(wire.GO, wire.info_data("disk")),
        wire.option(LIST_CONTEXTS, query("disk")),
        wire.option(STARTTLS, b"x"),
        wire.option(STARTTLS),
        tls=TlsPolicy.REQUIRE,
    )
    assert {kind for _, kind, _ in found[:5]} == {wire.TLS_REQD}
    assert kinds(found[5:]) == [(STARTTLS, wire.INVALID), (STARTTLS, wire.ACK)]
    assert handshake.starts_tls
    with pytest.raises(NbdProtocolError):
        negotiate(wire.option(wire.EXPORT_NAME, b"disk"), tls=TlsPolicy.REQUIRE)
    assert negotiate(wire.option(wire.ABORT), tls=TlsPolicy.REQUIRE)[0].done


def test_what_was_negotiated_in_the_clear_counts_no_more() -> None:
    handshake, _ = negotiate(
        wire.option(EXTENDED),
        wire.option(SET_CONTEXTS, query("disk", "x:one")),
        wire.option(wire.INFO, wire.info_data("picky", 3)),
        wire.option(STARTTLS),
        tls=TlsPolicy.ON,
    )
    handshake.tls_begun()
    handshake.receive_data(wire.option(STARTTLS) + wire.option(wire.GO, wire.info_data("picky")))
    assert kinds(refusals(handshake.data_to_send())) == [(STARTTLS, wire.POLICY), (wire.GO, wire.BLOCK_SIZE_REQD)]
    handshake.receive_data(wire.option(wire.GO, wire.info_data("disk")))
    assert (handshake.extended, handshake.structured, handshake.contexts) == (False, False, ())


@pytest.mark.parametrize("injected", [wire.option(wire.STRUCTURED), b"I", b"\x16\x03\x01"])
def test_words_in_the_clear_behind_starttls_end_the_connection(injected: bytes) -> None:
    with pytest.raises(NbdProtocolError, match="in the clear"):
        negotiate(wire.option(STARTTLS) + injected, tls=TlsPolicy.ON)
    with pytest.raises(NbdProtocolError, match="in the clear"):
        negotiate(wire.option(STARTTLS), injected, tls=TlsPolicy.ON)


def test_a_client_that_wants_endless_lists_is_dropped() -> None:
    offers = {f"{n:0100}": Offer(ExportInfo(f"{n:0100}", 1, description="x" * 4000)) for n in range(100)}
    handshake = ServerHandshake(offers)
    handshake.receive_data(FIXED + wire.option(wire.LIST))
    assert len(handshake.data_to_send()) > 400_000
    with pytest.raises(NbdProtocolError, match="at once"):
        handshake.receive_data(wire.option(wire.LIST) * 200)
    assert len(handshake.data_to_send()) < 2 * MAX_UNSENT


OPTIONS = b"".join(
    [
        wire.option(EXTENDED),
        wire.option(LIST_CONTEXTS, query("disk", "base:", "x:one")),
        wire.option(SET_CONTEXTS, query("disk", "base:allocation")),
        wire.option(wire.INFO, wire.info_data("picky", 3)),
        wire.option(wire.GO, wire.info_data("disk", 3)),
    ]
)


@given(st.lists(st.tuples(st.integers(0, len(OPTIONS) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(OPTIONS)))
def test_mutated_options_never_do_more_than_end_the_connection(changes: list[tuple[int, int]], cut: int) -> None:
    stream = bytearray(OPTIONS)
    for place, value in changes:
        stream[place] = value
    handshake = ServerHandshake(OFFERS)
    with contextlib.suppress(NbdProtocolError):
        for piece in (FIXED, stream[:cut], stream[cut:]):
            if not handshake.done:
                handshake.receive_data(piece)
    assert len(handshake.data_to_send()) <= 2 * MAX_UNSENT
    assert set(handshake.contexts) <= {0, 1, 2}


# -- commands ----------------------------------------------------------------------------------------------------------------


def request(command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    """C: a request with extended headers."""
    return bytes.fromhex("21e41c71") + struct.pack(">HHQQQ", flags, command, cookie, offset, length) + payload


def status(cookie: int, offset: int, length: int, *contexts: int) -> bytes:
    """C: a block status with its payload."""
    payload = struct.pack(f">Q{len(contexts)}I", length, *contexts)
    return request(BLOCK_STATUS, cookie, offset, len(payload), PAYLOAD_LEN, payload)


class Peer:
    """A server in the transmission phase with extended headers; the payloads of writes go to `memory`."""

    def __init__(self, *, contexts: tuple[int, ...] = (0, 2), flags: int = wire.ALL_FLAGS | STATUS_PAYLOAD) -> None:
        self.memory = bytearray(1 << 16)
        info = ExportInfo("", 1 << 40, flags)
        self.transmission = ServerTransmission(
            info, lambda _, length: memoryview(self.memory)[:length], extended=True, contexts=contexts
        )

    def feed(self, stream: bytes) -> list[Command]:
        """The commands in the stream."""
        found = []
        while stream:
            buffer = self.transmission.get_buffer()
            size = min(len(buffer), len(stream))
            buffer[:size] = stream[:size]
            self.transmission.buffer_updated(size)
            stream = stream[size:]
            while (command := self.transmission.next_command()) is not None:
                found.append(command)
        return found


def test_lengths_have_64_bits_and_writes_have_their_payload_with_or_without_the_flag() -> None:
    peer = Peer()
    zeroes, with_flag, without, read, goodbye = peer.feed(
        request(wire.WRITE_ZEROES, 1, 1 << 20, 1 << 39)
        + request(wire.WRITE, 2, 0, 5, PAYLOAD_LEN, b"first")
        + request(wire.WRITE, 3, 0, 4, 0, b"next")
        + request(wire.READ, 4, (1 << 40) - 1, 1)
        + request(wire.DISC, 5, flags=PAYLOAD_LEN)
    )
    assert (zeroes.error, zeroes.length) == (0, 1 << 39)
    assert (with_flag.error, without.error, read.error) == (0, 0, 0)
    assert peer.memory[:5] == b"nextt"
    assert goodbye.command == wire.DISC


@pytest.mark.parametrize(
    ("stream", "contexts"),
    [
        (request(BLOCK_STATUS, 1, 4096, 1 << 39), (0, 2)),
        (request(BLOCK_STATUS, 1, 4096, 512, REQ_ONE), (0, 2)),
        (status(1, 4096, 1 << 39, 2), (2,)),
        (status(1, 4096, 512, 2, 0), (2, 0)),
    ],
)
def test_block_status_is_about_the_selected_contexts_or_those_that_it_names(stream: bytes, contexts: tuple[int, ...]) -> None:
    (command,) = Peer().feed(stream)
    assert (command.error, command.contexts, command.offset) == (0, contexts, 4096)
    assert command.length in (512, 1 << 39)


@pytest.mark.parametrize(
    "stream",
    [
        status(1, 0, 512, 1),
        status(1, 0, 512),
        status(1, 0, 512, 0, 0),
        status(1, 0, 0, 0),
        status(1, 0, (1 << 40) + 1, 0),
        request(BLOCK_STATUS, 1, 0, 7, PAYLOAD_LEN, b"7 bytes"),
        request(BLOCK_STATUS, 1, 0, 0, PAYLOAD_LEN),
        request(BLOCK_STATUS, 1, 0, MAX_STATUS_PAYLOAD + 4, PAYLOAD_LEN, bytes(MAX_STATUS_PAYLOAD + 4)),
        request(BLOCK_STATUS, 1, 0, 512, 1 << 9),
        request(wire.READ, 1, 0, 512, PAYLOAD_LEN, bytes(512)),
        request(wire.CMD_FLUSH, 1, 0, 3, PAYLOAD_LEN, b"abc"),
        request(99, 1, 0, 100_000, PAYLOAD_LEN, bytes(100_000)),
        request(wire.WRITE, 1, 1 << 40, 3, PAYLOAD_LEN, b"abc"),
        request(wire.READ, 1, 0, 1 << 33),
        request(wire.CMD_TRIM, 1, 1, (1 << 64) - 1),
    ],
)
def test_after_a_refusal_the_stream_is_in_step(stream: bytes) -> None:
    refused, good = Peer().feed(stream + request(wire.READ, 2, 0, 512))
    assert refused.error
    assert (good.cookie, good.error) == (2, 0)


def test_block_status_needs_a_context_and_its_payload_an_offer() -> None:
    (command,) = Peer(contexts=()).feed(request(BLOCK_STATUS, 1, 0, 512))
    assert command.error == EINVAL
    (command,) = Peer(flags=wire.ALL_FLAGS).feed(status(1, 0, 512, 0))
    assert command.error == EINVAL


@pytest.mark.parametrize("flag", [wire.FLUSH, wire.TRIM, wire.ZEROES, wire.CACHE, wire.FUA])
def test_what_is_not_offered_is_refused(flag: int) -> None:
    stream = {
        wire.FLUSH: request(wire.CMD_FLUSH, 1),
        wire.TRIM: request(wire.CMD_TRIM, 1, 0, 512),
        wire.ZEROES: request(wire.WRITE_ZEROES, 1, 0, 512),
        wire.CACHE: request(wire.CMD_CACHE, 1, 0, 512),
        wire.FUA: request(wire.WRITE, 1, 0, 3, 1, b"abc"),
    }[flag]
    assert Peer().feed(stream)[0].error == 0
    assert Peer(flags=wire.ALL_FLAGS & ~flag).feed(stream)[0].error == EINVAL


def test_a_compact_request_amid_extended_ones_ends_the_connection() -> None:
    with pytest.raises(NbdProtocolError, match="magic"):
        Peer().feed(wire.request(wire.READ, 1, 0, 512) + bytes(4))


COMMANDS = (
    request(wire.WRITE, 1, 0, 40_000, PAYLOAD_LEN, bytes(range(250)) * 160)
    + status(2, 0, 512, 2)
    + request(wire.READ, 3, 0, 10)
    + request(wire.DISC, 4)
)


@given(st.lists(st.integers(1, len(COMMANDS)), max_size=20))
def test_it_does_not_matter_in_what_pieces_extended_requests_arrive(cuts: list[int]) -> None:
    peer = Peer()
    commands = [command for piece in wire.pieces(COMMANDS, cuts) for command in peer.feed(piece)]
    assert [(c.cookie, c.error, c.contexts) for c in commands] == [(1, 0, ()), (2, 0, (2,)), (3, 0, ()), (4, 0, ())]
    assert peer.memory[:40_000] == bytes(range(250)) * 160
    assert not peer.transmission.amid_message


@given(st.binary(max_size=200), st.integers(0, len(COMMANDS)))
def test_mutated_requests_end_in_a_protocol_error_or_a_refusal(inserted: bytes, place: int) -> None:
    with contextlib.suppress(NbdProtocolError):
        Peer().feed(COMMANDS[:place] + inserted + COMMANDS[place + len(inserted) :])


# -- replies -----------------------------------------------------------------------------------------------------------------


def chunk(kind: int, cookie: int, offset: int, payload: bytes = b"", flags: int = wire.DONE) -> bytes:
    """S: a chunk with an extended header."""
    return bytes.fromhex("6e8a278c") + struct.pack(">HHQQQ", flags, kind, cookie, offset, len(payload)) + payload


def test_extended_replies_repeat_the_offset_of_the_request() -> None:
    encoder = ReplyEncoder(HeaderStyle.EXTENDED)
    assert encoder.done(7, 4096) == chunk(0, 7, 4096)
    assert encoder.error(7, 4096, 28, "full") == chunk(0x8001, 7, 4096, struct.pack(">IH", 28, 4) + b"full")
    assert encoder.data(7, 4096, 5000, 3, False) + b"abc" == chunk(1, 7, 4096, struct.pack(">Q", 5000) + b"abc", 0)
    assert encoder.hole(7, 4096, 5000, 512, True) == chunk(2, 7, 4096, struct.pack(">QI", 5000, 512))


def test_block_status_has_32_or_64_bits() -> None:
    extents = [(65536, 3), (512, 0)]
    narrow = ReplyEncoder(HeaderStyle.STRUCTURED).block_status(7, 4096, 2, extents, True)
    assert narrow == wire.chunk(5, 7, struct.pack(">IIIII", 2, 65536, 3, 512, 0), wire.DONE)
    wide = ReplyEncoder(HeaderStyle.EXTENDED).block_status(7, 4096, 2, [(1 << 40, 3), (512, 0)], False)
    assert wide == chunk(6, 7, 4096, struct.pack(">IIQQQQ", 2, 2, 1 << 40, 3, 512, 0), 0)


def test_a_long_error_text_is_cut_between_characters() -> None:
    message = ReplyEncoder(HeaderStyle.STRUCTURED).error(7, 0, 5, "\u00fc" * 2000)[26:]
    assert len(message) == 1024
    assert message.decode() == "\u00fc" * 512
    odd = ReplyEncoder(HeaderStyle.STRUCTURED).error(7, 0, 5, "x" + "\u00fc" * 2000)[26:]
    assert len(odd.decode()) == 512
