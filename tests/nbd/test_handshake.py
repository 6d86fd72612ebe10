"""The client's negotiation, byte by byte: what it sends, what it makes of the answers, what it refuses."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd import wire
from ustack.nbd.errors import NbdOptionError, NbdProtocolError
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.handshake import (
    Aborted,
    ClientHandshake,
    ContextsListed,
    Event,
    ExportDescribed,
    ExportListed,
    Negotiated,
    OptionRefused,
    Purpose,
    Wishes,
)

GIB = 1 << 30


def negotiated(handshake: ClientHandshake, stream: bytes) -> ExportInfo:
    """Feed the stream; the last event must be the start of the transmission phase."""
    last = handshake.receive_data(stream)[-1]
    assert isinstance(last, Negotiated)
    return last.info


def test_each_step_sends_exactly_what_the_specification_says() -> None:
    handshake = ClientHandshake("disk")
    assert handshake.data_to_send() == b""
    assert handshake.receive_data(wire.GREETING) == []
    assert handshake.data_to_send() == b"\0\0\0\x03" + wire.option(wire.EXTENDED)
    handshake.receive_data(wire.reply(wire.EXTENDED, wire.UNSUP))
    assert handshake.data_to_send() == wire.option(wire.STRUCTURED)
    assert handshake.receive_data(wire.reply(wire.STRUCTURED, wire.ACK)) == []
    assert handshake.data_to_send() == wire.option(wire.SET_CONTEXTS, wire.contexts_data("disk", "base:allocation"))
    assert handshake.receive_data(wire.reply(wire.SET_CONTEXTS, wire.ACK)) == []
    assert handshake.data_to_send() == wire.option(wire.GO, wire.info_data("disk", 1, 2, 3))
    handshake.receive_data(wire.info_export(wire.GO, GIB))
    assert handshake.data_to_send() == b""
    assert handshake.receive_data(wire.reply(wire.GO, wire.ACK)) == [Negotiated(ExportInfo("disk", GIB, wire.ALL_FLAGS), True)]
    assert handshake.data_to_send() == b""


def test_all_that_the_server_tells_about_the_export_is_kept_and_unknown_infos_are_skipped() -> None:
    info = negotiated(
        ClientHandshake("x"),
        wire.GREETING
        + wire.chunks_offered()
        + wire.reply(wire.GO, wire.REP_INFO, b"\0\x01the real name")
        + wire.reply(wire.GO, wire.REP_INFO, b"\0\x02a description\x1b[31m")
        + wire.reply(wire.GO, wire.REP_INFO, b"\x12\x34whatever")
        + wire.info_blocks(wire.GO, 512, 65536, 1 << 20)
        + wire.info_export(wire.GO, GIB, 0xF001 | wire.READ_ONLY)
        + wire.reply(wire.GO, wire.ACK),
    )
    assert (info.canonical_name, info.description) == ("the real name", "a description\ufffd[31m")
    assert (info.minimum_block, info.preferred_block, info.maximum_payload) == (512, 65536, 1 << 20)
    assert info.read_only
    assert not info.can_flush
    assert info.size == GIB


@pytest.mark.parametrize(("maximum", "payload"), [(0xFFFFFFFF, 32 << 20), (1 << 28, 32 << 20), (4096, 4096)])
def test_the_largest_payload_is_the_servers_but_never_more_than_32_mib(maximum: int, payload: int) -> None:
    assert negotiated(ClientHandshake(), wire.negotiation(GIB, blocks=(4096, 4096, maximum))).maximum_payload == payload


@pytest.mark.parametrize(
    "blocks", [(0, 4096, 4096), (3, 4096, 4096), (4096, 512, 65536), (1, 4095, 65536), (4096, 4096, 512), (512, 512, 700)]
)
def test_block_sizes_that_no_request_could_keep_are_a_protocol_error(blocks: tuple[int, int, int]) -> None:
    with pytest.raises(NbdProtocolError, match="block size"):
        ClientHandshake().receive_data(wire.negotiation(GIB, blocks=blocks))


def test_structured_replies_are_done_without_when_the_server_has_none() -> None:
    handshake = ClientHandshake()
    *refused, last = handshake.receive_data(wire.negotiation(GIB, structured=False))
    assert [event.error.reply for event in refused if isinstance(event, OptionRefused)] == [wire.UNSUP, wire.UNSUP]
    assert isinstance(last, Negotiated)
    assert not last.structured_replies


@pytest.mark.parametrize("zeroes", [False, True])
def test_a_server_that_does_not_know_go_is_asked_with_export_name(zeroes: bool) -> None:
    handshake = ClientHandshake("old")
    greeting = b"NBDMAGICIHAVEOPT" + (b"\0\x01" if zeroes else b"\0\x03")
    handshake.receive_data(greeting + wire.chunks_offered(structured=False) + wire.reply(wire.GO, wire.UNSUP, b"what?"))
    assert handshake.data_to_send().endswith(wire.option(wire.EXPORT_NAME, b"old"))
    answer = GIB.to_bytes(8, "big") + b"\0\x01" + (bytes(124) if zeroes else b"")
    assert handshake.receive_data(answer[:-1]) == []
    assert handshake.receive_data(answer[-1:]) == [Negotiated(ExportInfo("old", GIB, 1), False)]


def test_a_server_of_plain_newstyle_gets_export_name_and_nothing_else() -> None:
    handshake = ClientHandshake("old")
    handshake.receive_data(b"NBDMAGICIHAVEOPT\0\0")
    assert handshake.data_to_send() == b"\0\0\0\0" + wire.option(wire.EXPORT_NAME, b"old")


@pytest.mark.parametrize(
    ("code", "number"),
    [
        (wire.POLICY, errno.EACCES),
        (wire.INVALID, errno.EINVAL),
        (wire.PLATFORM, errno.ENOTSUP),
        (wire.TLS_REQD, errno.EACCES),
        (wire.UNKNOWN, errno.ENOENT),
        (wire.SHUTDOWN, errno.ESHUTDOWN),
        (wire.BLOCK_SIZE_REQD, errno.EINVAL),
        (wire.TOO_BIG, errno.EINVAL),
        (2**31 + 99, errno.EINVAL),
    ],
)
def test_any_other_refusal_of_go_is_final_keeps_its_text_and_ends_politely(code: int, number: int) -> None:
    handshake = ClientHandshake("disk")
    handshake.receive_data(wire.GREETING + wire.chunks_offered())
    handshake.data_to_send()
    with pytest.raises(NbdOptionError, match=r"NBD_OPT_GO.*because I say so") as caught:
        handshake.receive_data(wire.reply(wire.GO, code, b"because I say so"))
    assert (caught.value.errno, caught.value.reply, caught.value.text) == (number, code, "because I say so")
    assert handshake.data_to_send() == wire.option(wire.ABORT)


@pytest.mark.parametrize("code", [wire.TLS_REQD, wire.SHUTDOWN])
def test_a_refusal_that_leaves_no_hope_is_final_even_for_an_optional_option(code: int) -> None:
    handshake = ClientHandshake()
    with pytest.raises(NbdOptionError):
        handshake.receive_data(wire.GREETING + wire.reply(wire.EXTENDED, code))
    assert handshake.data_to_send().endswith(wire.option(wire.ABORT))


LISTING = (
    wire.GREETING
    + wire.chunks_without_contexts()
    + wire.reply(wire.LIST, wire.SERVER, b"\0\0\0\x01afirst")
    + wire.reply(wire.LIST, wire.SERVER, b"\0\0\0\x01b")
    + wire.reply(wire.LIST, wire.ACK)
    + wire.info_export(wire.INFO, GIB)
    + wire.reply(wire.INFO, wire.ACK)
    + wire.context(wire.LIST_CONTEXTS, 0, "base:allocation")
    + wire.reply(wire.LIST_CONTEXTS, wire.ACK)
    + wire.reply(wire.INFO, wire.POLICY)
)


@given(st.lists(st.integers(1, len(LISTING)), max_size=20))
def test_a_list_names_the_exports_and_describes_those_that_it_can(cuts: list[int]) -> None:
    handshake = ClientHandshake(purpose=Purpose.LIST)
    events: list[Event] = [event for piece in wire.pieces(LISTING, cuts) for event in handshake.receive_data(piece)]
    assert isinstance(events.pop(0), OptionRefused)
    assert events[:4] == [
        ExportListed("a", "first"),
        ExportListed("b", ""),
        ExportDescribed(ExportInfo("a", GIB, wire.ALL_FLAGS)),
        ContextsListed("a", ("base:allocation",)),
    ]
    assert isinstance(events[4], OptionRefused)
    assert events[5] == Aborted()
    assert handshake.data_to_send().endswith(wire.option(wire.INFO, wire.info_data("b", 1, 2, 3)) + wire.option(wire.ABORT))


def test_info_asks_and_leaves() -> None:
    handshake = ClientHandshake("a", Purpose.INFO)
    answers = wire.chunks_without_contexts() + wire.info_export(wire.INFO, 5) + wire.reply(wire.INFO, wire.ACK)
    events = handshake.receive_data(wire.GREETING + answers + wire.reply(wire.LIST_CONTEXTS, wire.ACK))
    assert events[1:] == [ExportDescribed(ExportInfo("a", 5, wire.ALL_FLAGS)), ContextsListed("a", ()), Aborted()]


BROKEN = {
    "not an NBD server": b"SSH-2.0-OpenSSH_9.2",
    "only oldstyle": b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(136),
    "unknown style of": b"NBDMAGIC" + b"IHAVEOPX" + b"\0\3",
    "option reply magic is": wire.GREETING + bytes(20),
    "reply to option 3 while": wire.GREETING + wire.reply(wire.LIST, wire.ACK),
    "longest allowed": wire.GREETING + bytes.fromhex("0003e889045565a9") + b"\0\0\0\x0b\0\0\0\x01\xff\xff\xff\xff",
    "carries 1 bytes": wire.GREETING + wire.reply(wire.EXTENDED, wire.ACK, b"!"),
    "unexpected reply type": wire.GREETING + wire.reply(wire.EXTENDED, wire.SERVER),
    "without NBD_INFO_EXPORT": wire.GREETING + wire.chunks_offered() + wire.reply(wire.GO, wire.ACK),
    "NBD_INFO_EXPORT of 5": wire.GREETING + wire.chunks_offered() + wire.reply(wire.GO, wire.REP_INFO, b"\0\0abc"),
    "NBD_REP_INFO of 1": wire.GREETING + wire.chunks_offered() + wire.reply(wire.GO, wire.REP_INFO, b"\0"),
    "does not fit 63 bits": wire.negotiation(1 << 63),
    "not UTF-8": wire.GREETING + wire.chunks_offered() + wire.reply(wire.GO, wire.REP_INFO, b"\0\x01\xff"),
    "contains NUL": wire.GREETING + wire.chunks_offered() + wire.reply(wire.GO, wire.REP_INFO, b"\0\x01a\0b"),
    "a string has at most": wire.GREETING + wire.chunks_offered() + wire.reply(wire.GO, wire.REP_INFO, b"\0\x01" + b"a" * 4097),
    "more than 64 replies": wire.GREETING + wire.chunks_offered() + wire.info_export(wire.GO, 1) * 65,
    "NBD_REP_META_CONTEXT of 4": wire.GREETING
    + wire.chunks_without_contexts()
    + wire.reply(wire.SET_CONTEXTS, wire.CONTEXT, bytes(4)),
    "context 'b' or its number 7 was given twice": wire.GREETING + wire.chunks_offered(contexts={"a": 7, "b": 7}),
    "64 replies to NBD_OPT_SET_META_CONTEXT": wire.GREETING
    + wire.chunks_without_contexts()
    + b"".join(wire.context(wire.SET_CONTEXTS, n, f"x:{n}") for n in range(65)),
    "before it was asked": wire.negotiation(GIB) + b"?",
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_server_that_breaks_the_protocol_is_told_apart_by_the_message(complaint: str) -> None:
    with pytest.raises(NbdProtocolError, match=complaint) as caught:
        ClientHandshake().receive_data(BROKEN[complaint])
    assert caught.value.errno == errno.EPROTO


def test_a_list_without_end_is_cut_off() -> None:
    handshake = ClientHandshake(purpose=Purpose.LIST)
    handshake.receive_data(wire.GREETING + wire.chunks_without_contexts())
    entries = wire.reply(wire.LIST, wire.SERVER, b"\0\0\0\x01a") * 1000
    for _ in range(10):
        handshake.receive_data(entries)
    with pytest.raises(NbdProtocolError, match="more than 10000 exports"):
        handshake.receive_data(entries)


def test_a_list_entry_shorter_than_its_name_is_a_protocol_error() -> None:
    handshake = ClientHandshake(purpose=Purpose.LIST)
    entry = wire.reply(wire.LIST, wire.SERVER, b"\0\0\0\x09abc")
    with pytest.raises(NbdProtocolError, match="shorter than the name"):
        handshake.receive_data(wire.GREETING + wire.chunks_without_contexts() + entry)


@pytest.mark.parametrize("name", ["a" * 4097, "ä" * 2049, "a\0b"])
def test_an_export_name_that_no_server_may_take_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="export name"):
        ClientHandshake(name)


def test_the_end_of_the_stream_says_what_was_awaited() -> None:
    handshake = ClientHandshake()
    assert "the greeting" in str(handshake.end_of_stream())
    handshake.receive_data(b"NBDMAGICIHAVEOPT\0\0")
    assert "no such export" in str(handshake.end_of_stream())
    assert isinstance(handshake.end_of_stream(), ConnectionResetError)


SESSION = (
    wire.GREETING
    + wire.reply(wire.EXTENDED, wire.UNSUP, b"never heard")
    + wire.reply(wire.STRUCTURED, wire.UNSUP, b"no")
    + wire.info_blocks(wire.GO, 1, 4096, 1 << 20)
    + wire.info_export(wire.GO, GIB)
    + wire.reply(wire.GO, wire.REP_INFO, b"\0\x02disk")
    + wire.reply(wire.GO, wire.ACK)
)


@given(st.lists(st.integers(1, len(SESSION)), max_size=30))
def test_it_does_not_matter_in_what_pieces_the_stream_arrives(cuts: list[int]) -> None:
    handshake = ClientHandshake("disk")
    refused, _, last = [event for piece in wire.pieces(SESSION, cuts) for event in handshake.receive_data(piece)]
    assert isinstance(refused, OptionRefused)
    assert last == Negotiated(
        ExportInfo("disk", GIB, wire.ALL_FLAGS, "disk", None, 1, 4096, 1 << 20, True), structured_replies=False
    )


@given(
    st.sampled_from(list(Purpose)),
    st.lists(st.tuples(st.integers(0, len(SESSION) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(SESSION)),
    st.binary(max_size=40),
)
def test_a_mutated_stream_gives_a_clean_error_or_another_valid_negotiation(
    purpose: Purpose, changes: list[tuple[int, int]], cut: int, inserted: bytes
) -> None:
    stream = bytearray(SESSION)
    for place, value in changes:
        stream[place] = value
    stream[cut:cut] = inserted
    handshake = ClientHandshake("disk", purpose)
    try:
        for piece in wire.pieces(bytes(stream), [cut]):
            handshake.receive_data(piece)
    except (NbdProtocolError, NbdOptionError):
        with pytest.raises(NbdProtocolError):
            handshake.receive_data(b"more")


def test_with_extended_headers_nobody_asks_for_structured_replies_and_contexts_have_numbers() -> None:
    handshake = ClientHandshake("disk", wishes=Wishes(meta_contexts=("base:allocation", "qemu:dirty-bitmap:b")))
    contexts = {"base:allocation": 3, "qemu:dirty-bitmap:b": 0}
    last = handshake.receive_data(wire.negotiation(GIB, extended=True, contexts=contexts))[-1]
    assert last == Negotiated(ExportInfo("disk", GIB, wire.ALL_FLAGS), True, True, contexts)
    asked = wire.contexts_data("disk", "base:allocation", "qemu:dirty-bitmap:b")
    assert handshake.data_to_send().startswith(
        b"\0\0\0\x03" + wire.option(wire.EXTENDED) + wire.option(wire.SET_CONTEXTS, asked)
    )


def test_after_extended_headers_there_is_no_way_back_to_export_name() -> None:
    handshake = ClientHandshake("disk")
    handshake.receive_data(wire.GREETING + wire.chunks_offered(extended=True))
    with pytest.raises(NbdOptionError, match="NBD_OPT_GO refused"):
        handshake.receive_data(wire.reply(wire.GO, wire.UNSUP))


@pytest.mark.parametrize(
    ("wishes", "asked"),
    [
        (Wishes(structured_replies=False), [wire.GO]),
        (Wishes(extended_headers=False), [wire.STRUCTURED, wire.SET_CONTEXTS, wire.GO]),
        (Wishes(extended_headers=False, meta_contexts=()), [wire.STRUCTURED, wire.GO]),
    ],
)
def test_what_is_not_wished_for_is_not_asked_for(wishes: Wishes, asked: list[int]) -> None:
    handshake = ClientHandshake(wishes=wishes)
    handshake.receive_data(wire.GREETING)
    options = []
    for option in asked:
        options.append(int.from_bytes(handshake.data_to_send()[-4096:].rpartition(b"IHAVEOPT")[2][:4], "big"))
        handshake.receive_data(wire.reply(option, wire.ACK) if option != wire.GO else b"")
    assert options == asked


def test_contexts_that_are_refused_are_done_without() -> None:
    handshake = ClientHandshake()
    stream = wire.GREETING + wire.chunks_without_contexts() + wire.reply(wire.SET_CONTEXTS, wire.POLICY, b"no")
    assert negotiated(handshake, stream + wire.info_export(wire.GO, GIB) + wire.reply(wire.GO, wire.ACK)).size == GIB
    assert handshake.contexts == {}
