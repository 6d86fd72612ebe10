"""The client's transmission phase: every reply, in any order and in any pieces, and every way to get it wrong."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd import wire
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.transmission import DIRECT_MIN, MAX_EXTENTS, ClientTransmission, Request

Transmission = ClientTransmission[Request]


def feed(transmission: Transmission, stream: bytes) -> None:
    """Hand the stream to the parser as a transport does: as much as each buffer takes."""
    while stream:
        buffer = transmission.get_buffer(-1)
        size = min(len(buffer), len(stream))
        buffer[:size] = stream[:size]
        transmission.buffer_updated(size)
        stream = stream[size:]


def read(transmission: Transmission, offset: int, length: int, flags: int = 0) -> tuple[Request, bytearray]:
    """A read in flight and its memory, which is not zero at first."""
    memory = bytearray(b"\xaa" * length)
    request = Request(wire.READ, flags, offset, length, memoryview(memory))
    transmission.submit(request)
    return request, memory


def send(transmission: Transmission, command: int, offset: int = 0, length: int = 0) -> Request:
    """Another request in flight."""
    request = Request(command, 0, offset, length)
    transmission.submit(request)
    return request


def test_requests_look_as_the_specification_says_and_have_cookies_of_their_own() -> None:
    transmission = Transmission(True)
    sent = [transmission.submit(Request(command, 1, 0x1122334455667788, 0x99)) for command in (0, 1, 3, 4, 5, 6)]
    assert sent == [
        wire.request(command, cookie, 0x1122334455667788, 0x99, 1) for cookie, command in enumerate((0, 1, 3, 4, 5, 6), 1)
    ]
    assert transmission.disconnect() == wire.request(wire.DISC, 0)


def test_simple_replies_complete_in_the_order_of_the_server() -> None:
    transmission = Transmission(False)
    first, one = read(transmission, 0, 4)
    second, two = read(transmission, 8, 4)
    flush = send(transmission, wire.CMD_FLUSH)
    feed(transmission, wire.simple(3) + wire.simple(2, 0, b"wxyz") + wire.simple(1, 5))
    assert transmission.completed == [flush, second, first]
    assert (flush.error, second.error, first.error) == (0, 0, 5)
    assert [bytes(one), bytes(two)] == [b"\xaa" * 4, b"wxyz"]
    assert transmission.in_flight == {}


def test_chunks_of_two_reads_interleave_and_holes_are_filled_with_zeroes() -> None:
    transmission = Transmission(True)
    a, one = read(transmission, 100, 12)
    b, two = read(transmission, 0, 4)
    write = send(transmission, wire.WRITE, 0, 4)
    feed(
        transmission,
        wire.data(1, 108, b"IJKL")
        + wire.data(2, 0, b"ab")
        + wire.hole(1, 104, 4)
        + wire.simple(3)
        + wire.data(2, 2, b"cd", wire.DONE)
        + wire.data(1, 100, b"ABCD")
        + wire.none(1),
    )
    assert transmission.completed == [write, b, a]
    assert [bytes(one), bytes(two)] == [b"ABCD\0\0\0\0IJKL", b"abcd"]
    assert not a.error + b.error + write.error


def test_a_large_payload_is_received_in_the_callers_memory() -> None:
    transmission = Transmission(True)
    request, memory = read(transmission, 0, 1 << 20)
    content = bytes(range(256)) * 4096
    feed(transmission, wire.data(1, 0, content, wire.DONE)[:100])
    place = transmission.get_buffer(-1)
    assert len(place) == (1 << 20) - 72
    place[:5] = b"here!"
    assert memory[72:77] == b"here!"
    feed(transmission, content[72:])
    assert transmission.completed == [request]
    assert memory == content


def test_the_end_of_a_payload_and_the_replies_behind_it_come_in_one_read() -> None:
    transmission = Transmission(True)
    read(transmission, 0, DIRECT_MIN + 1000)
    feed(transmission, wire.data(1, 0, b"x" * (DIRECT_MIN + 1000), wire.DONE)[: DIRECT_MIN // 2])
    assert len(transmission.get_buffer(-1)) == 64 << 10


def test_a_frame_that_reaches_beyond_its_payload_has_room_as_a_whole() -> None:
    """Or the stack would have to keep it in packet memory, of which there may be none."""
    transmission = Transmission(False)
    length = 2 * DIRECT_MIN
    request, memory = read(transmission, 0, length)
    flush = send(transmission, wire.CMD_FLUSH)
    data = bytes(range(256)) * (length // 256)
    stream = wire.simple(1, 0, data) + wire.simple(2)
    first = len(stream) - DIRECT_MIN - 1000
    feed(transmission, stream[:first])
    rest = stream[first:]
    buffer = transmission.get_buffer(len(rest))
    assert len(buffer) >= len(rest)
    buffer[: len(rest)] = rest
    transmission.buffer_updated(len(rest))
    assert transmission.completed == [request, flush]
    assert memory == data


def test_a_hole_larger_than_any_buffer() -> None:
    transmission = Transmission(True)
    _, memory = read(transmission, 0, 1 << 20)
    feed(transmission, wire.hole(1, 0, 1 << 20, wire.DONE))
    assert memory == bytes(1 << 20)


def test_an_error_chunk_fails_its_request_with_the_servers_words() -> None:
    transmission = Transmission(True)
    request, _ = read(transmission, 0, 8)
    write = send(transmission, wire.WRITE, 4, 4)
    stream = (
        wire.data(1, 0, b"abcd")
        + wire.error(1, 5, b"bad sector", 0, offset=4)
        + wire.error(1, 22, b"later")
        + wire.error(2, 28)
    )
    feed(transmission, stream)
    assert [(r.error, r.message) for r in transmission.completed] == [(5, "bad sector"), (28, "")]
    assert transmission.completed == [request, write]


def test_an_error_chunk_of_the_future_fails_only_its_request() -> None:
    transmission = Transmission(True)
    request, _ = read(transmission, 0, 4)
    other, memory = read(transmission, 0, 4)
    future = wire.chunk(0x8FFF, 1, struct.pack(">IH", 0, 2) + b"hm" + bytes(100), wire.DONE)
    feed(transmission, future + wire.data(2, 0, b"fine", wire.DONE))
    assert (request.error, request.message, other.error) == (22, "hm", 0)
    assert memory == b"fine"


@pytest.mark.parametrize("length", [4, DIRECT_MIN * 2])
def test_an_abandoned_read_never_touches_its_memory_again(length: int) -> None:
    transmission = Transmission(True)
    request, memory = read(transmission, 0, length)
    reply = wire.data(1, 0, b"x" * length, wire.DONE)
    feed(transmission, reply[:30])
    kept = bytes(memory)
    transmission.abandon(request)
    other, content = read(transmission, 0, 4)
    feed(transmission, reply[30:] + wire.data(2, 0, b"next", wire.DONE))
    assert memory == kept
    assert transmission.completed == [request, other]
    assert content == b"next"


def test_what_was_complete_before_the_error_is_delivered() -> None:
    transmission = Transmission(True)
    request, _ = read(transmission, 0, 4)
    with pytest.raises(NbdProtocolError):
        feed(transmission, wire.data(1, 0, b"good", wire.DONE) + b"garbage garbage garbage")
    assert transmission.completed == [request]


BROKEN = {
    "reply magic": bytes(16),
    "no request of ours": wire.simple(99),
    "cookie 0x63": wire.chunk(0, 99, flags=wire.DONE),
    "simple reply to NBD_CMD_READ": wire.simple(1, 0, b"12345678"),
    "NBD_REPLY_TYPE_NONE with 1": wire.chunk(0, 1, b"x", wire.DONE),
    "NBD_REPLY_TYPE_NONE with 0": wire.chunk(0, 1),
    "ends after 0 bytes": wire.none(1),
    "ends after 4 bytes": wire.data(1, 100, b"abcd", wire.DONE),
    "OFFSET_DATA of 8 bytes": wire.data(1, 100, b""),
    "OFFSET_HOLE of 11": wire.chunk(2, 1, bytes(11)),
    "OFFSET_HOLE of no": wire.hole(1, 100, 0),
    "bytes 99 to 100, outside": wire.data(1, 99, b"a"),
    "bytes 107 to 109, outside": wire.data(1, 107, b"ab"),
    "bytes 100 to 4294967395, outside": wire.hole(1, 100, 0xFFFFFFFF),
    "bytes 102 to 105 .* came twice": wire.data(1, 104, b"efgh") + wire.data(1, 102, b"cde"),
    "bytes 100 to 102 .* came twice": wire.hole(1, 100, 4) + wire.data(1, 100, b"cd"),
    "bytes 103 to 104 .* came twice": wire.data(1, 100, b"abcd") + wire.data(1, 103, b"d"),
    "OFFSET_DATA of 12 bytes in reply to NBD_CMD_WRITE": wire.data(2, 0, b"abcd"),
    "OFFSET_HOLE of 12 bytes in reply to NBD_CMD_WRITE": wire.hole(2, 0, 4),
    "chunk of unknown type 3": wire.chunk(3, 1),
    "block status in reply to NBD_CMD_READ": wire.chunk(5, 1, bytes(12)),
    "chunk of unknown type 6": wire.chunk(6, 1, bytes(12)),
    "with only 5 bytes": wire.chunk(0x8001, 1, bytes(5)),
    "with only 13 bytes": wire.chunk(0x8002, 1, bytes(13)),
    "error message of 9 bytes": wire.chunk(0x8001, 1, b"\0\0\0\5\0\x09tooshort"),
    "error message of 4097": wire.error(1, 5, b"x" * 4097),
    "error chunk without an error": wire.error(1, 0),
    "error at offset 108": wire.error(1, 5, offset=108),
    "error chunk of type 0x8001 with 16777216": wire.chunk(0x8001, 1, bytes(100))[:16] + b"\1\0\0\0",
    "simple reply amid": wire.error(2, 5, b"", 0) + wire.simple(2),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_server_that_breaks_the_protocol_is_told_apart_by_the_message(complaint: str) -> None:
    transmission = Transmission(True)
    read(transmission, 100, 8)
    send(transmission, wire.WRITE, 0, 8)
    with pytest.raises(NbdProtocolError, match=complaint):
        feed(transmission, BROKEN[complaint] + bytes(16))


def test_a_second_content_chunk_breaks_the_promise_of_df() -> None:
    transmission = Transmission(True)
    read(transmission, 0, 8, flags=4)
    with pytest.raises(NbdProtocolError, match="NBD_CMD_FLAG_DF"):
        feed(transmission, wire.data(1, 0, b"abcd") + wire.data(1, 4, b"efgh", wire.DONE))


def test_structured_replies_need_to_be_negotiated() -> None:
    transmission = Transmission(False)
    read(transmission, 0, 8)
    with pytest.raises(NbdProtocolError, match="not negotiated"):
        feed(transmission, wire.none(1))


def test_a_doubled_reply_is_not_taken_for_the_next_request() -> None:
    transmission = Transmission(True)
    send(transmission, wire.CMD_FLUSH)
    feed(transmission, wire.none(1))
    send(transmission, wire.CMD_FLUSH)
    with pytest.raises(NbdProtocolError, match="no request of ours"):
        feed(transmission, wire.none(1))


def test_a_reply_in_crumbs_cannot_grow_our_memory_for_ever() -> None:
    transmission = Transmission(True)
    read(transmission, 0, 32 << 20)
    with pytest.raises(NbdProtocolError, match="scattered"):
        for offset in range(0, 4 * MAX_EXTENTS, 2):
            feed(transmission, wire.data(1, offset, b"x"))


def conversation() -> tuple[Transmission, bytes, list[bytearray]]:
    """Requests of every kind in flight, and a stream with replies of every kind to them."""
    transmission = Transmission(True)
    memories = [read(transmission, offset, 40_000)[1] for offset in (0, 40_000, 80_000)]
    for command in (wire.WRITE, wire.CMD_FLUSH, wire.CMD_TRIM, wire.WRITE_ZEROES, wire.CMD_CACHE):
        send(transmission, command, 0, 100)
    stream = (
        wire.data(2, 40_000, bytes(range(200)) * 100)
        + wire.simple(4)
        + wire.hole(1, 20_000, 20_000)
        + wire.data(3, 80_000, b"z" * 40_000)
        + wire.none(5)
        + wire.data(1, 0, b"a" * 20_000, wire.DONE)
        + wire.error(6, 28, b"no room")
        + wire.error(3, 5, b"", 0, offset=90_000)
        + wire.hole(2, 60_000, 20_000, wire.DONE)
        + wire.none(3)
        + wire.simple(7, 22)
        + wire.none(8)
    )
    return transmission, stream, memories


WHOLE = conversation()
feed(WHOLE[0], WHOLE[1])


@given(st.lists(st.integers(1, len(WHOLE[1])), max_size=40))
def test_it_does_not_matter_in_what_pieces_the_stream_arrives(cuts: list[int]) -> None:
    transmission, stream, memories = conversation()
    for piece in wire.pieces(stream, cuts):
        feed(transmission, piece)
    outcome = [(r.cookie, r.error, r.message) for r in transmission.completed]
    assert outcome == [(r.cookie, r.error, r.message) for r in WHOLE[0].completed]
    assert outcome == [(4, 0, ""), (5, 0, ""), (1, 0, ""), (6, 28, "no room"), (2, 0, ""), (3, 5, ""), (7, 22, ""), (8, 0, "")]
    assert memories == WHOLE[2]


HEADERS = [n for n in range(len(WHOLE[1])) if WHOLE[1][n : n + 4] in (b"\x66\x8e\x33\xef", b"\x67\x44\x66\x98")]


@given(
    st.lists(st.tuples(st.sampled_from(HEADERS), st.integers(0, 40), st.integers(0, 255)), min_size=1, max_size=5),
    st.lists(st.integers(1, len(WHOLE[1])), max_size=5),
)
def test_a_mutated_stream_gives_a_clean_error_or_other_replies(changes: list[tuple[int, int, int]], cuts: list[int]) -> None:
    transmission, stream, memories = conversation()
    mutated = bytearray(stream)
    for header, place, value in changes:
        mutated[min(header + place, len(mutated) - 1)] = value
    try:
        for piece in wire.pieces(bytes(mutated), cuts):
            feed(transmission, piece)
    except NbdProtocolError:
        pass
    assert all(len(memory) == 40_000 for memory in memories)
    assert len({r.cookie for r in transmission.completed} | set(transmission.in_flight)) == 8
