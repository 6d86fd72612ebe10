"""Collapsing: the same bytes in less memory, however much of it there is to work with."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from pools.arena import PAGE_SIZE
from pools.base import by_name, names
from pools.gfp import ATOMIC, MEMALLOC
from pools.page_per_object import PagePerObjectPool
from tests.transport.tcp.test_queues import HEADERS, STREAM, Arrivals, make_memory
from ustack.link.rxring import LinearRing, PagedRing
from ustack.transport.tcp.collapse import collapse_in_order, collapse_out_of_order

if TYPE_CHECKING:
    from ustack.link.rxring import RxRing
    from ustack.skb import SkbMemory

JUMBO = 9014


def jumbo_ring(memory: SkbMemory, _: int) -> RxRing:
    """Whole-frame buffers of 16 KiB, however short the frames: the way of 2006."""
    return LinearRing(memory, JUMBO)


def page_ring(memory: SkbMemory, _: int) -> RxRing:
    """Whole-frame buffers of a page."""
    return LinearRing(memory, PAGE_SIZE)


def waiting(arrivals: Arrivals) -> bytes:
    """What the reader would get."""
    return b"".join(skb.tobytes() for skb in arrivals.queue.queue)


def arrive_in_order(arrivals: Arrivals, sizes: list[int]) -> None:
    for size in sizes:
        assert arrivals.arrive(arrivals.rcv_nxt, arrivals.rcv_nxt + size)


def hoard(memory: SkbMemory, leave: int) -> list[int]:
    """Somebody else takes all free pages but `leave`."""
    owner = memory.pages.owner_id("somebody else")
    count = memory.pages.free_pages - memory.pages.min_pages - leave
    return [memory.pages.alloc(0, ATOMIC, owner) for _ in range(count)]


def test_short_frames_in_long_buffers_are_copied_into_pages() -> None:
    arrivals = Arrivals(jumbo_ring, pages=2048)
    arrive_in_order(arrivals, [1460] * 10)
    assert arrivals.queue.truesize == 10 * (16384 + 256)
    assert collapse_in_order(arrivals.queue, ATOMIC) == 6
    assert [skb.len for skb in arrivals.queue.queue] == [4096, 4096, 4096, 2312]
    assert arrivals.queue.truesize == 4 * (4096 + 256)
    assert waiting(arrivals) == STREAM[:14600]
    arrivals.check()
    arrivals.close()


def test_what_is_well_filled_is_left_alone() -> None:
    arrivals = Arrivals(PagedRing)
    arrive_in_order(arrivals, [1460] * 10)
    before = list(arrivals.queue.queue)
    assert collapse_in_order(arrivals.queue, ATOMIC) == 0
    assert list(arrivals.queue.queue) == before
    arrivals.close()


def test_a_copy_that_would_save_nothing_is_not_made() -> None:
    arrivals = Arrivals(PagedRing)
    arrive_in_order(arrivals, [10])
    before = arrivals.queue.truesize
    assert collapse_in_order(arrivals.queue, ATOMIC) == 0
    assert arrivals.queue.truesize == before
    arrivals.close()


def test_only_what_is_new_is_looked_at_again() -> None:
    arrivals = Arrivals(jumbo_ring, pages=2048)
    arrive_in_order(arrivals, [1460] * 6)
    collapse_in_order(arrivals.queue, ATOMIC)
    settled = arrivals.queue.settled_seq
    assert settled == 8192
    assert collapse_in_order(arrivals.queue, ATOMIC) == 0
    arrive_in_order(arrivals, [1460] * 6)
    collapse_in_order(arrivals.queue, ATOMIC)
    assert waiting(arrivals) == STREAM[: 12 * 1460]
    assert arrivals.queue.settled_seq > settled
    arrivals.close()


def test_ranges_beyond_a_hole_are_collapsed_each_by_itself() -> None:
    arrivals = Arrivals(jumbo_ring, pages=2048)
    for start in (2000, 3460, 4920, 10_000, 11_460):
        arrivals.arrive(start, start + 1460)
    blocks = arrivals.queue.sack_blocks(4)
    assert collapse_out_of_order(arrivals.queue, ATOMIC) == 2
    assert [(skb.seq, skb.end_seq) for skb in arrivals.queue.ofo] == [(2000, 6096), (6096, 6380), (10_000, 12_920)]
    assert arrivals.queue.sack_blocks(4) == blocks
    arrivals.check()
    arrivals.arrive(0, 2000)
    assert arrivals.rcv_nxt == 6380
    assert waiting(arrivals) == STREAM[:6380]
    arrivals.close()


def test_nothing_new_beyond_a_hole_is_not_looked_at() -> None:
    arrivals = Arrivals(jumbo_ring, pages=2048)
    arrivals.arrive(2000, 3460)
    collapse_out_of_order(arrivals.queue, ATOMIC)
    assert not arrivals.queue.ofo_changed
    arrivals.arrive(3460, 4920)
    assert arrivals.queue.ofo_changed
    arrivals.close()


def test_memory_for_one_copy_is_enough_to_begin() -> None:
    """What has been copied is freed before the next page is asked for."""
    arrivals = Arrivals(page_ring, pages=2048, pool=PagePerObjectPool)
    arrive_in_order(arrivals, [1460] * 20)
    assert arrivals.queue.truesize == 20 * (4096 + 4096)
    taken = hoard(arrivals.memory, leave=2)
    assert collapse_in_order(arrivals.queue, ATOMIC) == 12
    assert arrivals.queue.truesize == 8 * (4096 + 4096)
    assert waiting(arrivals) == STREAM[: 20 * 1460]
    arrivals.check()
    arrivals.memory.pages.free_bulk(taken)
    arrivals.close()


def test_the_reserve_is_not_for_an_ordinary_socket_s_copies() -> None:
    arrivals = Arrivals(jumbo_ring, pages=2048)
    arrive_in_order(arrivals, [1460] * 20)
    taken = hoard(arrivals.memory, leave=0)
    pages = arrivals.memory.pages
    reserve = pages.free_pages
    assert reserve == pages.min_pages > 0
    assert collapse_in_order(arrivals.queue, ATOMIC) == 0
    assert pages.free_pages == reserve
    assert pages.reserve_allocs == 0
    assert arrivals.queue.settled_seq == 0, "it is tried again when there is memory"
    assert collapse_in_order(arrivals.queue, MEMALLOC) > 0
    assert waiting(arrivals) == STREAM[: 20 * 1460]
    pages.free_bulk(taken)
    arrivals.close()


@pytest.mark.parametrize("pool", names())
@pytest.mark.parametrize("ring", [PagedRing, page_ring], ids=["paged", "linear"])
def test_the_stream_stays_the_same_in_every_pool(pool: str, ring: type[RxRing], seed: int) -> None:
    random = Random(seed)
    arrivals = Arrivals(ring, pages=2048, pool=by_name(pool))
    queue = arrivals.queue
    read = bytearray()
    taken: list[int] = []
    for _ in range(60):
        what = random.random()
        if what < 0.6:
            start = arrivals.rcv_nxt + random.choice((0, 0, 0, 700, 3000, 9000))
            arrivals.arrive(start, start + random.choice((1, 90, 600, 1200, 1460)))
        elif what < 0.75:
            before = queue.truesize
            collapse_in_order(queue, ATOMIC)
            collapse_out_of_order(queue, ATOMIC)
            assert queue.truesize <= before
        elif what < 0.9:
            target = bytearray(random.choice((1, 100, 5000)))
            read += target[: queue.read_into(memoryview(target))]
        elif taken:
            arrivals.memory.pages.free_bulk(taken)
            taken = []
        else:
            taken = hoard(arrivals.memory, leave=random.choice((0, 1, 5)))
        arrivals.check()
        assert bytes(read) + waiting(arrivals) == STREAM[: arrivals.rcv_nxt]
    arrivals.memory.pages.free_bulk(taken)
    arrivals.close()


def test_pages_that_have_been_read_are_given_back() -> None:
    """A slow reader must not be charged for what it has read of a super-frame."""
    memory = make_memory()
    arrivals = Arrivals(lambda memory, _: PagedRing(memory, 65549), memory=memory)
    arrivals.arrive(0, 65000)
    queue = arrivals.queue
    whole = queue.truesize
    assert whole >= 65000
    free = memory.pages.free_pages
    target = bytearray(1000)
    for n in range(1, 65):
        assert queue.read_into(memoryview(target)) == 1000
        assert target == STREAM[(n - 1) * 1000 : n * 1000]
        in_pages = max(n * 1000 - (2048 - HEADERS), 0)
        assert queue.truesize == whole - in_pages // PAGE_SIZE * PAGE_SIZE
        assert memory.pages.free_pages == free + in_pages // PAGE_SIZE
        arrivals.check()
    arrivals.close()


def test_a_clone_keeps_the_pages_that_have_been_read() -> None:
    memory = make_memory()
    skb = memory.alloc_paged(4, ATOMIC)
    assert skb is not None
    skb.append(memoryview(STREAM[: 4 * PAGE_SIZE]))
    twin = memory.clone(skb, ATOMIC)
    assert twin is not None
    skb.pull(2 * PAGE_SIZE)
    skb.release_front()
    assert twin.tobytes() == STREAM[: 4 * PAGE_SIZE]
    assert skb.truesize == twin.truesize
    skb.free()
    twin.free()


def test_pages_of_out_of_order_data_that_came_again_are_given_back() -> None:
    memory = make_memory()
    arrivals = Arrivals(lambda memory, _: PagedRing(memory, 65549), memory=memory)
    arrivals.arrive(1000, 61_000)
    queue = arrivals.queue
    whole = queue.ofo_account.bytes
    arrivals.arrive(0, 40_000)
    in_pages = 39_000 - (2048 - HEADERS)
    assert queue.queue[1].truesize == whole - in_pages // PAGE_SIZE * PAGE_SIZE
    assert waiting(arrivals) == STREAM[:61_000]
    arrivals.check()
    arrivals.close()
