"""The server's side of the protocol, byte by byte, with clients that behave and clients that do not."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd import wire
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.server_handshake import Offer, ServerHandshake
from ustack.nbd.server_replies import HeaderStyle, ReplyEncoder
from ustack.nbd.server_transmission import MAX_DISCARD, Command, ServerTransmission

GIB = 1 << 30
DISK = ExportInfo("disk", GIB, wire.ALL_FLAGS, "my disk")
READ_ONLY = ExportInfo("ro", 4096, wire.HAS_FLAGS | wire.READ_ONLY | wire.DF)
CONTEXTS = ("base:allocation", "x:one", "x:two")
OFFERS = {"": Offer(DISK, CONTEXTS), "disk": Offer(DISK, CONTEXTS), "ro": Offer(READ_ONLY)}
FIXED = b"\0\0\0\x03"


def answers(stream: bytes) -> tuple[ServerHandshake, bytes]:
    """What the server sends, without the greeting, to a client that sends this."""
    handshake = ServerHandshake(OFFERS)
    assert handshake.data_to_send() == wire.GREETING
    handshake.receive_data(stream)
    return handshake, handshake.data_to_send()


def go_reply(number: int, info: ExportInfo, flags: int) -> bytes:
    """What INFO and GO are answered with when nothing special is asked for."""
    return wire.info_export(number, info.size, flags) + wire.reply(number, wire.ACK)


def test_go_answers_what_was_asked_for_and_hands_over_the_first_requests() -> None:
    handshake, sent = answers(
        FIXED + wire.option(wire.STRUCTURED) + wire.option(wire.GO, wire.info_data("disk", 1, 2, 3, 99)) + b"first request"
    )
    assert sent == (
        wire.reply(wire.STRUCTURED, wire.ACK)
        + wire.info_export(wire.GO, GIB)
        + wire.reply(wire.GO, wire.REP_INFO, b"\0\x01disk")
        + wire.reply(wire.GO, wire.REP_INFO, b"\0\x02my disk")
        + wire.info_blocks(wire.GO, 1, 4096, 32 << 20)
        + wire.reply(wire.GO, wire.ACK)
    )
    assert handshake.done
    assert handshake.structured
    assert handshake.chosen == DISK
    assert handshake.rest == b"first request"


def test_df_is_offered_only_with_structured_replies() -> None:
    handshake, sent = answers(FIXED + wire.option(wire.GO, wire.info_data("")))
    assert sent == go_reply(wire.GO, DISK, wire.ALL_FLAGS & ~wire.DF)
    assert handshake.chosen is not None
    assert not handshake.chosen.can_df


@pytest.mark.parametrize(("flags", "tail"), [(FIXED, b""), (b"\0\0\0\x01", bytes(124)), (b"\0\0\0\0", bytes(124))])
def test_export_name_ends_with_zeroes_unless_the_client_declined_them(flags: bytes, tail: bytes) -> None:
    handshake, sent = answers(flags + wire.option(wire.EXPORT_NAME, b"ro"))
    assert sent == struct.pack(">QH", 4096, 3) + tail
    assert handshake.done


def test_options_are_refused_one_by_one_and_the_client_may_go_on() -> None:
    handshake, sent = answers(
        FIXED
        + wire.option(77, b"x" * 100_000)
        + wire.option(5)
        + wire.option(wire.LIST, b"x")
        + wire.option(wire.STRUCTURED, b"x")
        + wire.option(wire.STRUCTURED)
        + wire.option(wire.STRUCTURED)
        + wire.option(wire.GO, wire.info_data("nix"))
        + wire.option(wire.GO, b"\xff\xff\xff\xff\0\0")
        + wire.option(wire.GO, wire.info_data("disk") + b"?")
        + wire.option(wire.GO, b"\0\0\0\x01\xff\0\0")
        + wire.option(wire.GO, bytes(70_000))
        + wire.option(wire.INFO, wire.info_data("ro"))
        + wire.option(wire.ABORT, b"bye")
    )
    refusals = []
    while sent:
        _, number, kind, length = struct.unpack_from(">QIII", sent)
        refusals.append((number, kind))
        sent = sent[20 + length :]
    assert refusals == [
        (77, wire.UNSUP),
        (5, wire.POLICY),
        (wire.LIST, wire.INVALID),
        (wire.STRUCTURED, wire.INVALID),
        (wire.STRUCTURED, wire.ACK),
        (wire.STRUCTURED, wire.INVALID),
        (wire.GO, wire.UNKNOWN),
        (wire.GO, wire.INVALID),
        (wire.GO, wire.INVALID),
        (wire.GO, wire.INVALID),
        (wire.GO, wire.TOO_BIG),
        (wire.INFO, wire.REP_INFO),
        (wire.INFO, wire.ACK),
        (wire.ABORT, wire.ACK),
    ]
    assert handshake.done
    assert handshake.chosen is None


def test_list_has_every_named_export() -> None:
    _, sent = answers(FIXED + wire.option(wire.LIST))
    assert sent == (
        wire.reply(wire.LIST, wire.SERVER, b"\0\0\0\x04diskmy disk")
        + wire.reply(wire.LIST, wire.SERVER, b"\0\0\0\x02ro")
        + wire.reply(wire.LIST, wire.ACK)
    )


@pytest.mark.parametrize(
    "stream",
    [
        b"\0\0\0\x07",
        FIXED + bytes(16),
        FIXED + wire.option(wire.EXPORT_NAME, b"nix"),
        FIXED + wire.option(wire.EXPORT_NAME, b"\xff"),
        FIXED + wire.option(wire.EXPORT_NAME, bytes(5000)),
        FIXED + b"IHAVEOPT\0\0\0\x4d\xff\xff\xff\xff",
        FIXED + wire.option(wire.LIST) * 1025,
    ],
    ids=["unknown flags", "magic", "no such export", "not UTF-8", "long name", "endless data", "endless options"],
)
def test_clients_that_cannot_be_answered_are_dropped(stream: bytes) -> None:
    with pytest.raises(NbdProtocolError):
        answers(stream)


HAGGLING = (
    FIXED + wire.option(9, b"?" * 50) + wire.option(wire.STRUCTURED) + wire.option(wire.GO, wire.info_data("disk", 3)) + b"rest"
)


@given(st.lists(st.integers(1, len(HAGGLING)), max_size=20))
def test_it_does_not_matter_in_what_pieces_the_options_arrive(cuts: list[int]) -> None:
    handshake = ServerHandshake(OFFERS)
    rest = b""
    for piece in wire.pieces(HAGGLING, cuts):
        if handshake.done:
            rest += piece
        else:
            handshake.receive_data(piece)
    assert handshake.rest + rest == b"rest"
    assert handshake.data_to_send() == wire.GREETING + answers(HAGGLING)[1]


@given(st.binary(max_size=60), st.integers(0, len(HAGGLING)))
def test_mutated_options_end_in_a_protocol_error_or_an_answer(inserted: bytes, place: int) -> None:
    with contextlib.suppress(NbdProtocolError):
        answers(HAGGLING[:place] + inserted + HAGGLING[place + len(inserted) :])


class Peer:
    """A server in the transmission phase with a disk of 64 KiB."""

    def __init__(self, flags: int = wire.ALL_FLAGS, minimum: int = 1) -> None:
        self.disk = bytearray(65536)
        info = ExportInfo("", len(self.disk), flags, minimum_block=minimum, maximum_payload=32768)
        self.transmission = ServerTransmission(info, lambda offset, length: memoryview(self.disk)[offset : offset + length])

    def feed(self, stream: bytes) -> list[Command]:
        """The commands in the stream."""
        found = []
        while stream:
            buffer = self.transmission.get_buffer(-1)
            size = min(len(buffer), len(stream))
            buffer[:size] = stream[:size]
            self.transmission.buffer_updated(size)
            stream = stream[size:]
            while (command := self.transmission.next_command()) is not None:
                found.append(command)
        return found


def test_commands_come_out_as_they_went_in_and_writes_are_in_place() -> None:
    peer = Peer()
    commands = peer.feed(
        wire.request(wire.READ, 1, 0, 4096, flags=4)
        + wire.request(wire.WRITE, 2, 100, 5, flags=1, payload=b"hello")
        + wire.request(wire.WRITE, 3, 200, 32768, payload=b"x" * 32768)
        + wire.request(wire.CMD_FLUSH, 4)
        + wire.request(wire.CMD_TRIM, 5, 0, 65536)
        + wire.request(wire.WRITE_ZEROES, 6, 0, 65536, flags=3)
        + wire.request(wire.CMD_CACHE, 7, 0, 10)
        + wire.request(wire.DISC, 0)
    )
    assert [(c.command, c.cookie, c.flags, c.error) for c in commands] == [
        (wire.READ, 1, 4, 0),
        (wire.WRITE, 2, 1, 0),
        (wire.WRITE, 3, 0, 0),
        (wire.CMD_FLUSH, 4, 0, 0),
        (wire.CMD_TRIM, 5, 0, 0),
        (wire.WRITE_ZEROES, 6, 3, 0),
        (wire.CMD_CACHE, 7, 0, 0),
        (wire.DISC, 0, 0, 0),
    ]
    assert peer.disk[100:105] == b"hello"
    assert peer.disk[200:32968] == b"x" * 32768


EPERM, EINVAL, ENOSPC = 1, 22, 28


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (wire.request(wire.READ, 1, 65535, 2), EINVAL),
        (wire.request(wire.READ, 1, 2**64 - 1, 2), EINVAL),
        (wire.request(wire.READ, 1, 0, 32769), EINVAL),
        (wire.request(wire.READ, 1, 0, 0), EINVAL),
        (wire.request(wire.READ, 1, 0, 1, flags=2), EINVAL),
        (wire.request(wire.WRITE, 1, 65535, 2, payload=b"ab"), ENOSPC),
        (wire.request(wire.WRITE, 1, 0, 2, flags=4, payload=b"ab"), EINVAL),
        (wire.request(wire.WRITE, 1, 0, 40000, payload=bytes(40000)), EINVAL),
        (wire.request(wire.WRITE, 1, 0, 0), EINVAL),
        (wire.request(wire.CMD_TRIM, 1, 65536, 1), EINVAL),
        (wire.request(wire.WRITE_ZEROES, 1, 65536, 1), ENOSPC),
        (wire.request(wire.CMD_FLUSH, 1, 1, 0), EINVAL),
        (wire.request(7, 1, 0, 512), EINVAL),
        (wire.request(99, 1, 0, 512), EINVAL),
    ],
)
def test_after_every_refused_command_the_stream_is_still_in_step(stream: bytes, error: int) -> None:
    refused, good = Peer().feed(stream + wire.request(wire.READ, 2, 0, 512))
    assert (refused.cookie, refused.error) == (1, error)
    assert (good.cookie, good.error) == (2, 0)


@pytest.mark.parametrize("command", [wire.WRITE, wire.CMD_TRIM, wire.WRITE_ZEROES])
def test_a_read_only_export_refuses_changes(command: int) -> None:
    peer = Peer(wire.HAS_FLAGS | wire.READ_ONLY)
    refused, good = peer.feed(
        wire.request(command, 1, 0, 4) + (b"data" if command == wire.WRITE else b"") + wire.request(0, 2, 0, 1)
    )
    assert (refused.error, good.error) == (EPERM, 0)
    assert peer.disk == bytes(65536)


def test_misaligned_requests_are_refused() -> None:
    offset, length, good = Peer(minimum=512).feed(
        wire.request(wire.READ, 1, 100, 512) + wire.request(wire.READ, 2, 512, 100) + wire.request(wire.READ, 3, 512, 512)
    )
    assert (offset.error, length.error, good.error) == (EINVAL, EINVAL, 0)


@pytest.mark.parametrize(
    "stream", [bytes(28), wire.request(wire.WRITE, 1, 0, MAX_DISCARD + 1)], ids=["magic", "payload beyond patience"]
)
def test_clients_out_of_step_are_dropped(stream: bytes) -> None:
    with pytest.raises(NbdProtocolError):
        Peer().feed(stream)


COMMANDS = (
    wire.request(wire.WRITE, 1, 0, 30000, payload=bytes(range(250)) * 120)
    + wire.request(wire.READ, 2, 0, 10)
    + wire.request(wire.WRITE, 3, 70000, 3, payload=b"no!")
    + wire.request(wire.WRITE, 4, 30000, 2, payload=b"ok")
    + wire.request(wire.DISC, 0)
)


@given(st.lists(st.integers(1, len(COMMANDS)), max_size=20))
def test_it_does_not_matter_in_what_pieces_the_commands_arrive(cuts: list[int]) -> None:
    peer = Peer()
    commands = [command for piece in wire.pieces(COMMANDS, cuts) for command in peer.feed(piece)]
    assert [(c.cookie, c.error) for c in commands] == [(1, 0), (2, 0), (3, ENOSPC), (4, 0), (0, 0)]
    assert peer.disk[:30002] == bytes(range(250)) * 120 + b"ok"


@given(st.lists(st.tuples(st.integers(0, len(COMMANDS) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_commands_end_in_a_protocol_error_or_a_refusal(changes: list[tuple[int, int]]) -> None:
    stream = bytearray(COMMANDS)
    for place, value in changes:
        stream[place] = value
    with contextlib.suppress(NbdProtocolError):
        Peer().feed(bytes(stream))


def test_replies_look_as_the_specification_says() -> None:
    simple, structured = ReplyEncoder(HeaderStyle.SIMPLE), ReplyEncoder(HeaderStyle.STRUCTURED)
    assert simple.error(7, 4096, 5, "why") == wire.simple(7, 5)
    assert simple.done(7, 4096) == wire.simple(7)
    assert structured.data(7, 0, 4096, 3, False) + b"abc" == wire.data(7, 4096, b"abc")
    assert structured.data(7, 0, 4096, 3, True) + b"abc" == wire.data(7, 4096, b"abc", wire.DONE)
    assert structured.hole(7, 0, 4096, 512, True) == wire.hole(7, 4096, 512, wire.DONE)
    assert structured.done(7, 0) == wire.none(7)
    assert structured.error(7, 0, 28, "full") == wire.error(7, 28, b"full")
