"""Extended headers and block status: on the wire, hostile, and with qemu-nbd and nbdkit."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd import wire
from tests.nbd.servers import MIB, scripted
from tests.nbd.test_interop import activated, nbdkit, run
from tests.nbd.test_transmission import feed
from tests.needs import extended_qemu_nbd
from ustack import nbd
from ustack.nbd.block_status import Extent, append_extents, parse_status
from ustack.nbd.client import NbdClient
from ustack.nbd.errors import NbdProtocolError
from ustack.nbd.transmission import ClientTransmission, Request

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.nbd.test_interop import Running

Transmission = ClientTransmission[Request]
CONTEXTS = {"base:allocation": 5, "qemu:allocation-depth": 0}


def asking(extended: bool, length: int = 4096, flags: int = 0) -> tuple[Transmission, Request]:
    """A block status of base:allocation in flight, at offset 1024."""
    transmission = Transmission(True, extended, CONTEXTS)
    request = Request(wire.BLOCK_STATUS, flags, 1024, length)
    request.context = "base:allocation"
    transmission.submit(request)
    return transmission, request


# -- extended headers ----------------------------------------------------------------------------------------------------------


def test_extended_requests_say_what_is_payload_and_what_is_effect() -> None:
    transmission = Transmission(True, True, CONTEXTS)
    status = Request(wire.BLOCK_STATUS, 32, 64, 1 << 40)
    status.context = "base:allocation"
    sent = [transmission.submit(r) for r in (Request(wire.WRITE, 1, 8, 16), Request(wire.WRITE_ZEROES, 0, 1, 1 << 40), status)]
    assert sent == [
        wire.extended_request(wire.WRITE, 1, 8, 16, 1 | 32),
        wire.extended_request(wire.WRITE_ZEROES, 2, 1, 1 << 40),
        wire.extended_request(
            wire.BLOCK_STATUS, 3, 64, 12, 32, (1 << 40).to_bytes(8, "big") + CONTEXTS["base:allocation"].to_bytes(4, "big")
        ),
    ]
    assert transmission.disconnect() == wire.extended_request(wire.DISC, 0)


def extended_conversation() -> tuple[Transmission, bytes, list[bytearray]]:
    """Reads, a write and a block status in flight under extended headers, and a stream that answers them all."""
    transmission = Transmission(True, True, CONTEXTS)
    memories = [bytearray(b"\xaa" * 40_000) for _ in range(2)]
    for number, memory in enumerate(memories):
        transmission.submit(Request(wire.READ, 0, 40_000 * number, 40_000, memoryview(memory)))
    transmission.submit(Request(wire.WRITE, 0, 7, 100))
    status = Request(wire.BLOCK_STATUS, 0, 0, 1 << 36)
    status.context = "base:allocation"
    transmission.submit(status)
    stream = (
        wire.extended_chunk(1, 2, 40_000, (40_000).to_bytes(8, "big") + b"b" * 39_000, 0)
        + wire.extended_chunk(0, 3, 7)
        + wire.extended_chunk(6, 4, 0, wire.wide_status_payload(5, (1 << 35, 0), (1 << 35, 3)), 0)
        + wire.extended_chunk(2, 2, 40_000, (79_000).to_bytes(8, "big") + (1000).to_bytes(4, "big"))
        + wire.extended_chunk(6, 4, 0, wire.wide_status_payload(0, (1 << 40, 1)), 0)
        + wire.extended_chunk(0x8002, 1, 0, b"\0\0\0\5\0\2ow" + (9).to_bytes(8, "big"))
        + wire.extended_chunk(0, 4, 0)
    )
    return transmission, stream, memories


@given(st.lists(st.integers(1, len(extended_conversation()[1])), max_size=30))
def test_extended_replies_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    transmission, stream, memories = extended_conversation()
    for piece in wire.pieces(stream, cuts):
        feed(transmission, piece)
    assert [(r.cookie, r.error, r.message) for r in transmission.completed] == [
        (3, 0, ""),
        (2, 0, ""),
        (1, 5, "ow"),
        (4, 0, ""),
    ]
    assert memories[1] == b"b" * 39_000 + bytes(1000)
    status = transmission.completed[3].status
    assert status is not None
    assert {name: list(pairs) for name, pairs in status.items()} == {
        "base:allocation": [1 << 35, 0, 1 << 35, 3],
        "qemu:allocation-depth": [1 << 40, 1],
    }


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=6),
    st.lists(st.integers(1, 41_000), max_size=4),
)
def test_a_mutated_extended_stream_gives_a_clean_error_or_other_replies(
    changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    transmission, stream, memories = extended_conversation()
    # The interesting bytes: not those within the bulk of the data.
    places = [*range(40), *range(39_040, len(stream))]
    mutated = bytearray(stream)
    for place, value in changes:
        mutated[places[place % len(places)]] = value
    try:
        for piece in wire.pieces(bytes(mutated), cuts):
            feed(transmission, piece)
    except NbdProtocolError:
        pass
    assert [len(memory) for memory in memories] == [40_000, 40_000]
    assert len({r.cookie for r in transmission.completed} | set(transmission.in_flight)) == 4


BROKEN_EXTENDED = {
    "after extended headers were negotiated": wire.simple(1) + bytes(16),
    "reply with offset 1025 to": wire.extended_chunk(0, 1, 1025),
    "no request of ours": wire.extended_chunk(0, 9, 1024),
    "chunk of unknown type 5": wire.extended_chunk(5, 1, 1024, wire.status_payload(5, (4096, 0))),
    "chunk of 24 bytes: it has 1 to": wire.extended_chunk(6, 1, 1024, wire.wide_status_payload(5, (1, 1)))[:24]
    + (8).to_bytes(8, "big"),
    "chunk of 17179869184 bytes": wire.extended_chunk(6, 1, 1024)[:24] + (1 << 34).to_bytes(8, "big"),
    "speaks of 2 extents and has 1": wire.extended_chunk(6, 1, 1024, b"\0\0\0\5\0\0\0\2" + bytes(7) + b"\1" + bytes(8)),
    "ends without a status": wire.extended_chunk(0, 1, 1024),
    "an extent of no bytes": wire.extended_chunk(6, 1, 1024, wire.wide_status_payload(5, (0, 1))),
}


@pytest.mark.parametrize("complaint", BROKEN_EXTENDED)
def test_a_server_that_breaks_extended_headers_is_told_apart_by_the_message(complaint: str) -> None:
    transmission, _ = asking(True)
    message = "chunk of 8 bytes: it has 1 to" if "24 bytes" in complaint else complaint
    with pytest.raises(NbdProtocolError, match=message):
        feed(transmission, BROKEN_EXTENDED[complaint])


# -- block status --------------------------------------------------------------------------------------------------------------


def test_the_last_extent_may_reach_beyond_the_question_and_other_contexts_come_along() -> None:
    transmission, request = asking(False)
    first = wire.chunk(5, 1, wire.status_payload(0, (1 << 31, 1)))
    feed(transmission, first + wire.chunk(5, 1, wire.status_payload(5, (512, 3), (1 << 31, 0)), wire.DONE))
    assert transmission.completed == [request]
    assert request.status is not None
    assert list(request.status["base:allocation"]) == [512, 3, 1 << 31, 0]


BROKEN_STATUS = {
    "context 6, which was not negotiated": (wire.status_payload(6, (4096, 0)), 0),
    "an extent of no bytes": (wire.status_payload(5, (512, 0), (0, 1), (512, 0)), 0),
    "3 extents, 5120 bytes, where 4096": (wire.status_payload(5, (512, 0), (3584, 1), (1024, 0)), 0),
    "2 extents, 1024 bytes, where 4096": (wire.status_payload(5, (512, 0), (512, 1)), 8),
    "1 extents, 4097 bytes, where 4096": (wire.status_payload(5, (4097, 0)), 8),
    "block status chunk of 4 bytes": (wire.status_payload(5), 0),
    "block status chunk of 13 bytes": (wire.status_payload(5, (1, 1)) + b"?", 0),
    "ends without a status of 'base:allocation'": (wire.status_payload(0, (4096, 0)), 0),
}


@pytest.mark.parametrize("complaint", BROKEN_STATUS)
def test_a_status_that_cannot_be_is_a_protocol_error(complaint: str) -> None:
    payload, flags = BROKEN_STATUS[complaint]
    transmission, _ = asking(False, flags=flags)
    with pytest.raises(NbdProtocolError, match=complaint):
        feed(transmission, wire.chunk(5, 1, payload, wire.DONE))


def test_a_status_of_one_context_comes_once_and_never_in_a_simple_reply() -> None:
    transmission, _ = asking(False)
    chunk = wire.chunk(5, 1, wire.status_payload(5, (4096, 0)))
    with pytest.raises(NbdProtocolError, match="came twice"):
        feed(transmission, chunk + chunk)
    for reply in (chunk + wire.simple(1), wire.simple(1)):
        transmission, _ = asking(False)
        with pytest.raises(NbdProtocolError, match="simple reply"):
            feed(transmission, reply)


def test_a_large_status_that_never_comes_takes_no_memory() -> None:
    transmission, _ = asking(False, 1 << 30)
    feed(transmission, wire.chunk(5, 1)[:16] + (4 + (8 << 20)).to_bytes(4, "big") + bytes(100))
    assert transmission._collected is not None
    assert len(transmission._collected) == 100


PAIRS = st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, 3)), min_size=1, max_size=50)


@given(PAIRS, st.booleans(), st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_extents_cover_what_was_asked_and_neighbours_differ(
    pairs: list[tuple[int, int]], wide: bool, offset: int, beyond: int
) -> None:
    asked = sum(length for length, _ in pairs[:-1]) + min(pairs[-1][0], beyond)
    payload = wire.wide_status_payload(9, *pairs) if wide else wire.status_payload(9, *pairs)
    context, flat = parse_status(bytearray(payload), wide, asked, False)
    assert context == 9
    extents: list[Extent] = []
    assert append_extents(extents, flat, offset, offset + asked) == offset + asked
    assert sum(extent.length for extent in extents) == asked
    assert extents[0].offset == offset
    for one, two in pairwise(extents):
        assert one.offset + one.length == two.offset
        assert one.flags != two.flags


async def test_the_client_asks_again_where_the_server_stopped_and_joins_what_belongs_together() -> None:
    answers = (
        wire.chunk(5, 1, wire.status_payload(1, (1024, 3), (1024, 0)), wire.DONE),
        wire.chunk(5, 2, wire.status_payload(1, (1024, 0)), wire.DONE),
        wire.chunk(5, 3, wire.status_payload(1, (1 << 20, 3)), wire.DONE),
    )
    go = len(wire.asked())
    opening = wire.negotiation(8192, contexts={"base:allocation": 1})[18:]
    async with (
        scripted(wire.GREETING, 20, opening, go - 20, 28, answers[0], 28, answers[1], 28, answers[2], 28) as (connector, heard),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        assert disk.can_block_status
        assert await disk.block_status(4096, 512) == [Extent(512, 1024, 3), Extent(1536, 2048, 0), Extent(3584, 1024, 3)]
    assert bytes(heard[go : go + 84]) == (
        wire.request(wire.BLOCK_STATUS, 1, 512, 4096)
        + wire.request(wire.BLOCK_STATUS, 2, 2560, 2048)
        + wire.request(wire.BLOCK_STATUS, 3, 3584, 1024)
    )


async def test_a_context_that_was_not_negotiated_is_not_asked_for() -> None:
    opening = wire.negotiation(MIB)[18:]
    async with (
        scripted(wire.GREETING, 20, opening, len(wire.asked()) - 20, 28) as (connector, _),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        assert not disk.can_block_status
        with pytest.raises(OSError, match="'base:allocation'") as caught:
            await disk.block_status(512, 0)
        assert caught.value.errno == errno.EOPNOTSUPP


# -- with real servers ---------------------------------------------------------------------------------------------------------


def qemu(folder: Path, *arguments: str, program: str = "qemu-nbd") -> AbstractAsyncContextManager[Running]:
    """qemu-nbd."""
    return activated(folder, program, "-t", "-e", "4", *arguments)


@pytest.mark.e2e
@pytest.mark.parametrize("extended", [False, True])
async def test_holes_of_a_file_are_seen_through_qemu_nbd(extended: bool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(6 << 30)
        file.seek(5 << 30)
        file.write(random.Random(1).randbytes(MIB))
    program = extended_qemu_nbd() if extended else "qemu-nbd"
    options = ("-A", "-f", "raw", str(image))
    contexts = ["base:allocation", "qemu:allocation-depth"]
    async with qemu(tmp_path, *options, program=program) as (uri, _), nbd.connect(uri, meta_contexts=contexts) as disk:
        assert disk.extended_headers == extended
        assert disk.meta_contexts == set(contexts)
        hole, data, tail = await disk.block_status(6 << 30, 0)
        assert (hole.is_zero, hole.is_hole, data.is_zero, tail.is_zero) == (True, True, False, True)
        assert (data.offset, data.length) == (5 << 30, MIB)
        assert (tail.offset, tail.offset + tail.length) == ((5 << 30) + MIB, 6 << 30)
        (one,) = await disk.block_status(1 << 20, 0, one=True)
        assert (one.offset, one.length, one.flags) == (0, 1 << 20, hole.flags)
        depth = await disk.block_status(2 * MIB, 5 << 30, "qemu:allocation-depth")
        assert sum(extent.length for extent in depth) == 2 * MIB
        # The same through everything else that the connection can do.
        await disk.zero(3 << 30, 0)
        await disk.pwrite(b"here", 12345, fua=True)
        await disk.trim(1 << 30, 3 << 30)
        await disk.flush()
        assert await disk.pread(20 * MIB, 0) == bytes(12345) + b"here" + bytes(20 * MIB - 12349)
        assert await disk.pread(MIB, 5 << 30) == random.Random(1).randbytes(MIB)


@pytest.mark.e2e
@pytest.mark.parametrize("extended", [False, True])
async def test_a_dirty_bitmap_says_what_was_written(extended: bool, tmp_path: Path) -> None:
    image = str(tmp_path / "image.qcow2")
    await run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    await run("qemu-img", "bitmap", "--add", image, "since-monday")
    await run("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", image)
    program = extended_qemu_nbd() if extended else "qemu-nbd"
    context = "qemu:dirty-bitmap:since-monday"
    serve = qemu(tmp_path, "-f", "qcow2", "-r", "-B", "since-monday", image, program=program)
    async with serve as (uri, _), nbd.connect(uri, meta_contexts=["base:allocation", context]) as disk:
        dirty = await disk.block_status(8 * MIB, 0, context)
        assert dirty == [Extent(0, MIB, 0), Extent(MIB, 65536, 1), Extent(MIB + 65536, 7 * MIB - 65536, 0)]
        listed = await nbd.list_exports(uri)
        assert set(listed[0].contexts) == {"base:allocation", context}


@pytest.mark.e2e
async def test_nbdkit_tells_its_holes_and_fast_zeroes(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, "memory", "4M") as (uri, _), nbd.connect(uri) as disk:
        await disk.pwrite(b"x" * 65536, MIB)
        extents = await disk.block_status(4 * MIB, 0)
        assert [(e.offset, e.length, e.is_zero) for e in extents] == [
            (0, MIB, True),
            (MIB, 65536, False),
            (MIB + 65536, 3 * MIB - 65536, True),
        ]
        assert disk.can_fast_zero
        await disk.zero(65536, MIB, fast=True)
        assert await disk.pread(65536, MIB) == bytes(65536)
