"""Receive rings: a frame can be read where it lies and kept from any byte on; whole pages leave without a copy."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pools.arena import PAGE_SIZE
from pools.base import NULL
from pools.gfp import ATOMIC, MEMALLOC
from tests.net.host import make_env
from ustack.link.rxring import HEADER_BUFFER, LINEAR_RING_FRAMES, LinearRing, PagedRing, RxRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.skb import SkbMemory

MAX_FRAME = 65549
RINGS = pytest.mark.parametrize("kind", [PagedRing, LinearRing])


def bytes_of(length: int) -> bytes:
    """A frame in which every place looks different."""
    return bytes((n * 7 + (n >> 8)) & 0xFF for n in range(length))


@RINGS
def test_any_part_of_any_frame_is_read_and_kept_as_it_came(kind: Callable[[SkbMemory, int], RxRing]) -> None:
    memory = make_env(4096).memory
    ring = kind(memory, MAX_FRAME)

    @settings(deadline=None, max_examples=200)
    @given(st.integers(1, MAX_FRAME), st.floats(0, 1), st.floats(0, 1))
    @example(HEADER_BUFFER, 0.0, 1.0)
    @example(HEADER_BUFFER + 1, 0.0, 1.0)
    @example(MAX_FRAME, 0.0, 1.0)
    @example(MAX_FRAME, 1.0, 1.0)
    def check(length: int, where: float, how_much: float) -> None:
        data = bytes_of(length)
        assert ring.ready()
        ring.fill(data)
        frame = ring.frame
        offset = int(where * (length - 1))
        part = max(int(how_much * (length - offset)), 1)
        assert bytes(frame.head[: min(length, HEADER_BUFFER)]) == data[:HEADER_BUFFER]
        assert b"".join(frame.views(offset, part)) == data[offset : offset + part]
        assert frame.tobytes(offset, part) == data[offset : offset + part]
        skb = frame.keep(offset, part, ATOMIC)
        assert skb is not None
        ring.ready()
        ring.fill(bytes(length))  # the next frame must not touch what was kept
        assert skb.len == part
        assert skb.tobytes() == data[offset : offset + part]
        assert skb.truesize >= part
        skb.free()

    check()
    ring.close()


def test_a_small_frame_leaves_every_page_in_the_ring() -> None:
    memory = make_env().memory
    ring = PagedRing(memory, MAX_FRAME)
    posted = memory.pages.pages_by_owner()["rx ring"]
    ring.fill(bytes_of(HEADER_BUFFER))
    skb = ring.frame.keep(14, HEADER_BUFFER - 14, ATOMIC)
    assert skb is not None
    assert not skb.pfns
    assert memory.pages.pages_by_owner()["rx ring"] == posted
    skb.free()
    ring.close()


def test_the_pages_of_a_large_frame_leave_with_it_and_others_take_their_place() -> None:
    memory = make_env().memory
    ring = PagedRing(memory, MAX_FRAME)
    posted = memory.pages.pages_by_owner()["rx ring"]
    ring.fill(bytes_of(HEADER_BUFFER + 3 * PAGE_SIZE + 1))
    skb = ring.frame.keep(66, HEADER_BUFFER + 3 * PAGE_SIZE + 1 - 66, ATOMIC)
    assert skb is not None
    assert len(skb.pfns) == 4
    assert memory.pages.pages_by_owner()["rx ring"] == posted
    assert memory.pages.pages_by_owner()["skb frags"] == 4
    assert skb.truesize > 4 * PAGE_SIZE, "a page counts whole, however little of it is used"
    skb.free()
    ring.close()


def exhaust(memory: SkbMemory) -> list[int]:
    """Take every page above the reserve."""
    memory.pool.reap()
    taken: list[int] = []
    while pfns := memory.pages.alloc_bulk(1, ATOMIC, memory.frag_owner):
        taken += pfns
    return taken


@pytest.mark.parametrize("length", [100, HEADER_BUFFER, MAX_FRAME])
def test_without_memory_a_paged_frame_cannot_be_kept_and_the_ring_stays_full(length: int) -> None:
    memory = make_env().memory
    ring = PagedRing(memory, MAX_FRAME)
    taken = exhaust(memory)
    ring.fill(bytes_of(length))
    assert ring.frame.keep(0, length, ATOMIC) is None
    assert ring.ready()
    assert ring.frame.tobytes(0, length) == bytes_of(length)
    memory.pages.free_bulk(taken)
    skb = ring.frame.keep(0, length, ATOMIC)
    assert skb is not None
    assert not skb.pfmemalloc
    skb.free()
    ring.close()


def test_what_a_memalloc_socket_keeps_from_the_reserve_is_marked() -> None:
    memory = make_env().memory
    ring = PagedRing(memory, MAX_FRAME)
    taken = exhaust(memory)
    ring.fill(bytes_of(10000))
    skb = ring.frame.keep(0, 10000, MEMALLOC)
    assert skb is not None
    assert skb.pfmemalloc
    skb.free()
    memory.pages.free_bulk(taken)
    ring.close()


def test_a_kept_linear_frame_takes_its_buffer_and_another_is_posted() -> None:
    memory = make_env().memory
    ring = LinearRing(memory, 1514)
    first = ring.frame.head
    ring.fill(bytes_of(1514))
    skb = ring.frame.keep(14, 1500, ATOMIC)
    assert skb is not None
    assert skb.truesize >= 1514, "the whole buffer counts"
    assert ring.ready()
    assert ring.frame.head is not first
    skb.free()
    ring.close()


def test_a_linear_ring_takes_from_the_reserve_only_in_an_emergency() -> None:
    memory = make_env(1024).memory
    ring = LinearRing(memory, 1514)
    taken = exhaust(memory)
    assert not ring.frame.pfmemalloc
    ring.emergency = True
    kept = []
    for _ in range(LINEAR_RING_FRAMES + 1):
        assert ring.ready()
        ring.fill(bytes_of(60))
        kept.append(ring.frame.keep(0, 60, MEMALLOC))
    assert ring.ready()
    assert ring.frame.pfmemalloc, "what lands here is in the reserve, and the drop rule decides about it"
    for skb in kept:
        assert skb is not None
        skb.free()
    memory.pages.free_bulk(taken)
    assert ring.ready()
    assert not ring.frame.pfmemalloc, "when there is memory again, ordinary sockets receive again"
    ring.close()


@RINGS
@pytest.mark.parametrize("left", [0, 1])
def test_a_ring_that_finds_no_memory_is_refused_and_leaves_nothing(kind: Callable[[SkbMemory, int], RxRing], left: int) -> None:
    memory = make_env().memory
    taken = exhaust(memory)
    for _ in range(left):
        memory.pages.free_bulk([taken.pop()])
    with pytest.raises(OSError, match="receive ring") as refused:
        kind(memory, MAX_FRAME)
    assert refused.value.errno == errno.ENOMEM
    memory.pages.free_bulk(taken)


@RINGS
def test_a_device_reads_behind_a_header_of_its_own(kind: Callable[..., RxRing]) -> None:
    memory = make_env(4096).memory
    prefix = bytearray(10)
    ring = kind(memory, MAX_FRAME, prefix)
    assert ring.iov[0] is prefix
    assert sum(map(len, ring.iov[1:])) >= MAX_FRAME
    ring.fill(bytes_of(5000))
    assert ring.frame.tobytes(0, 5000) == bytes_of(5000)
    assert prefix == bytes(10)
    ring.close()


@RINGS
@pytest.mark.parametrize("sniffer_first", [True, False])
def test_what_is_pinned_is_the_whole_frame_whatever_part_of_it_was_kept(
    kind: Callable[[SkbMemory, int], RxRing], sniffer_first: bool
) -> None:
    memory = make_env(4096).memory
    ring = kind(memory, MAX_FRAME)
    ring.ready()

    @settings(deadline=None, max_examples=200)
    @given(st.integers(1, MAX_FRAME), st.floats(0, 1), st.floats(0, 1), st.booleans())
    @example(MAX_FRAME, 0.0, 1.0, True)
    @example(MAX_FRAME, 0.5, 0.25, True)
    @example(MAX_FRAME, 0.5, 0.25, False)
    @example(HEADER_BUFFER + PAGE_SIZE, 0.0, 1.0, True)
    def check(length: int, where: float, how_much: float, keep: bool) -> None:
        data = bytes_of(length)
        assert ring.ready()
        ring.fill(data)
        offset = int(where * (length - 1))
        part = max(int(how_much * (length - offset)), 1)
        ring.begin_pin()
        skb = ring.frame.keep(offset, part, ATOMIC) if keep else None
        pin = ring.end_pin()
        assert pin is not None
        ring.ready()
        ring.fill(bytes(length))  # the next frame must touch neither
        ring.begin_pin()
        again = ring.end_pin()
        assert again is not None
        ring.ready()
        ring.fill(b"\xff" * length)
        if skb is not None:
            assert skb.tobytes() == data[offset : offset + part]
            if not sniffer_first:
                skb.free()
        assert b"".join(memory.mem[addr : addr + size] for addr, size in pin.runs) == data
        assert b"".join(memory.mem[addr : addr + size] for addr, size in again.runs) == bytes(length)
        assert pin.put()
        assert again.put()
        if skb is not None and sniffer_first:
            assert skb.tobytes() == data[offset : offset + part]
            skb.free()

    check()
    ring.close()


@RINGS
def test_without_ordinary_memory_nothing_is_pinned_and_the_frame_is_kept_all_the_same(
    kind: Callable[[SkbMemory, int], RxRing],
) -> None:
    memory = make_env(4096).memory
    ring = kind(memory, 9018)
    assert ring.ready()
    data = bytes_of(9018)
    ring.fill(data)
    ring.begin_pin()
    skb = ring.frame.keep(0, 9018, ATOMIC)
    assert skb is not None
    memory.pool.reap()
    hog = memory.pages.owner_id("hog")
    hogged = memory.pages.alloc_bulk(memory.pages.free_pages, MEMALLOC, hog)
    size = 2048 if kind is PagedRing else 9018
    taken = []
    while (addr := memory.pool.alloc(size, ATOMIC, 0)) != NULL:
        taken.append(addr)  # what the pool had left
    reserve_allocs = memory.pages.reserve_allocs
    pin = ring.end_pin()
    if kind is PagedRing:
        assert pin is None
    else:
        assert pin is not None, "the clone was made before memory was short"
        assert pin.put() is True
    assert memory.pages.reserve_allocs == reserve_allocs
    assert skb.tobytes() == data
    skb.free()
    for addr in taken:
        memory.pool.free(addr, size, 0)
    memory.pages.free_bulk(hogged)
    ring.close()
