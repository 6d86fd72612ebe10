"""The queues of a connection: bytes in are bytes out, and what they cost is charged exactly."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pools.arena import Arena
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from pools.kmalloc import KmallocPool
from tests import leaks
from ustack.link.rxring import LinearRing, PagedRing
from ustack.mem.protocol import ProtocolMemory
from ustack.mem.socket import SocketMemory
from ustack.skb import Account, SkbMemory
from ustack.transport.tcp.receive_queue import ReceiveQueue
from ustack.transport.tcp.send_queue import SendQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from pools.base import Pool
    from ustack.link.rxring import RxFrame, RxRing

STREAM = Random(7).randbytes(200_000)
HEADERS = 54


def make_memory(pages: int = 1024, pool: type[Pool] = KmallocPool) -> SkbMemory:
    memory = SkbMemory(leaks.watch_pool(pool(PageAllocator(Arena(pages)))))
    leaks.watch(lambda: [f"{memory.live} skbs"] if memory.live else [])
    return memory


def make_charges(memory: SkbMemory) -> SocketMemory:
    """A socket of a protocol without limits."""
    protocol = ProtocolMemory(memory.pages, (1 << 30, 1 << 30, 1 << 30), 4096, 4096, lambda _: None)
    charges = SocketMemory(protocol, Account("receive"), Account("out of order"), Account("send"))

    def findings() -> list[str]:
        charges.leave()
        return [f"{protocol.allocated} pages, {charges.forward_alloc} bytes"] if protocol.allocated else []

    leaks.watch(findings)
    return charges


class Arrivals:
    """A receive queue and the ring from which it is filled; the stream begins at 0."""

    def __init__(
        self,
        ring: Callable[[SkbMemory, int], RxRing] = PagedRing,
        pages: int = 1024,
        pool: type[Pool] = KmallocPool,
        memory: SkbMemory | None = None,
    ) -> None:
        self.memory = memory or make_memory(pages, pool)
        self.ring = ring(self.memory, 1514)
        self.queue = ReceiveQueue(self.memory, make_charges(self.memory), 0)
        self.rcv_nxt = 0

    def arrive(self, seq: int, end: int) -> bool | None:
        """The bytes `seq .. end` arrive; handled as `input` does it."""
        queue = self.queue
        assert self.ring.ready()
        self.ring.fill(bytes(HEADERS) + STREAM[seq:end])
        frame: RxFrame = self.ring.frame
        if seq > self.rcv_nxt:
            return queue.put_out_of_order(frame, HEADERS, seq, end, ATOMIC)
        if end <= self.rcv_nxt:
            return None
        cut = self.rcv_nxt - seq
        if not queue.put(frame, HEADERS + cut, end - seq - cut, self.rcv_nxt, ATOMIC):
            return False
        self.rcv_nxt = queue.advance(end)
        return True

    def check(self) -> None:
        queue = self.queue
        assert queue.account.bytes == sum(skb.truesize for skb in queue.queue)
        assert queue.ofo_account.bytes == sum(skb.truesize for skb in queue.ofo)
        at = self.rcv_nxt
        for skb in queue.ofo:
            assert skb.seq > self.rcv_nxt
            assert skb.seq >= at
            assert skb.tobytes() == STREAM[skb.seq : skb.end_seq]
            at = skb.end_seq

    def close(self) -> None:
        self.queue.clear()
        self.ring.close()
        assert self.queue.truesize == 0


@pytest.mark.parametrize("ring", [PagedRing, LinearRing])
def test_short_segments_beyond_a_hole_share_buffers(ring: Callable[[SkbMemory, int], RxRing]) -> None:
    """Or a peer could make every byte cost a head, a buffer and a place in the queue (CVE-2018-5390)."""
    arrivals = Arrivals(ring)
    for seq in range(1000, 9000):
        arrivals.arrive(seq, seq + 1)
    queue = arrivals.queue
    assert len(queue.ofo) <= 4
    assert queue.ofo_account.bytes <= 4 * (4096 + 256)
    assert queue.sack_blocks(4) == [(1000, 9000)]
    arrivals.check()
    arrivals.arrive(0, 1000)
    assert arrivals.rcv_nxt == 9000
    arrivals.close()


@pytest.mark.parametrize("ring", [PagedRing, LinearRing])
@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 1460)), max_size=60),
    reads=st.lists(st.integers(1, 5000), max_size=60),
)
def test_any_order_of_overlapping_segments_gives_the_stream(
    ring: Callable[[SkbMemory, int], RxRing], pieces: list[tuple[int, int]], reads: list[int]
) -> None:
    arrivals = Arrivals(ring)
    queue = arrivals.queue
    got = bytearray()
    known: set[int] = set()
    for number, (seq, length) in enumerate(pieces):
        arrivals.arrive(seq, seq + length)
        known.update(range(seq, seq + length))
        assert arrivals.rcv_nxt == next(at for at in range(30_000) if at not in known)
        ahead = {at for skb in queue.ofo for at in range(skb.seq, skb.end_seq)}
        assert ahead == {at for at in known if at > arrivals.rcv_nxt}
        arrivals.check()
        if number < len(reads) and (available := queue.available(arrivals.rcv_nxt)):
            got += queue.read(reads[number], available)
            assert queue.copied_seq == len(got)
            arrivals.check()
    while available := queue.available(arrivals.rcv_nxt):
        got += queue.read(1000, available)
    assert bytes(got) == STREAM[: arrivals.rcv_nxt]
    arrivals.close()


@given(pieces=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 500)), min_size=1, max_size=30))
@settings(deadline=None)
def test_sack_blocks_are_what_is_there_the_latest_first(pieces: list[tuple[int, int]]) -> None:
    """RFC 2018, section 4."""
    arrivals = Arrivals()
    known: set[int] = set()
    for seq, length in pieces:
        arrivals.arrive(seq, seq + length)
        known.update(range(seq, seq + length))
        blocks = arrivals.queue.sack_blocks(4)
        assert blocks
        assert blocks[0][0] <= seq < blocks[0][1]
        assert len(set(blocks)) == len(blocks)
        for left, right in blocks:
            assert known.issuperset(range(left, right))
            assert left - 1 not in known
            assert right not in known
    arrivals.close()


def test_small_segments_share_a_buffer() -> None:
    arrivals = Arrivals()
    for at in range(500):
        arrivals.arrive(at, at + 1)
    assert arrivals.queue.truesize < 3 * 4096 + 2048
    arrivals.close()


def test_peeking_takes_nothing() -> None:
    arrivals = Arrivals()
    arrivals.arrive(0, 1000)
    arrivals.arrive(1000, 2400)
    target = bytearray(2000)
    for _ in range(2):
        assert arrivals.queue.read_into(memoryview(target), peek=True) == 2000
        assert bytes(target) == STREAM[:2000]
    assert arrivals.queue.available(arrivals.rcv_nxt) == 2400
    arrivals.close()


def test_giving_up_out_of_order_data_gives_its_charge_back() -> None:
    arrivals = Arrivals()
    for seq in range(100, 3000, 200):
        arrivals.arrive(seq, seq + 100)
    assert arrivals.queue.prune_out_of_order(0, 1 << 20) == 15
    assert arrivals.queue.ofo_account.bytes == 0
    assert arrivals.queue.sack_blocks(4) == []
    arrivals.close()


def test_without_memory_nothing_is_kept_and_nothing_charged() -> None:
    arrivals = Arrivals(pages=80)
    pages = arrivals.memory.pages
    owner = pages.owner_id("somebody else")
    taken: list[int] = []
    while got := pages.alloc_bulk(1, ATOMIC, owner):
        taken += got
    at = 0
    while arrivals.ring.ready() and at < 100_000 and arrivals.arrive(at, at + 1400):
        at += 1400
    arrivals.check()
    assert arrivals.rcv_nxt == at
    pages.free_bulk(taken)
    arrivals.close()


# -- sending --


@settings(deadline=None, max_examples=60)
@given(
    writes=st.lists(st.integers(1, 40_000), min_size=1, max_size=12),
    looks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 65_000)), max_size=12),
    acks=st.lists(st.floats(0, 1), max_size=12),
)
def test_any_part_of_what_was_written_can_be_sent(writes: list[int], looks: list[tuple[float, int]], acks: list[float]) -> None:
    memory = make_memory()
    charges = make_charges(memory)
    account = charges.send
    queue = SendQueue(memory, charges, 1000)
    written = una = 0
    for number, length in enumerate(writes):
        taken = queue.append(memoryview(STREAM)[written : min(written + length, len(STREAM))], 1 << 20, ATOMIC)
        written += taken
        assert queue.end == 1000 + written
        assert account.bytes == sum(skb.truesize for skb in queue._skbs)
        if number < len(looks) and written > una:
            place, most = looks[number]
            seq = una + int(place * (written - una - 1))
            size = min(most, written - seq)
            assert b"".join(queue.views(1000 + seq, size)) == STREAM[seq : seq + size]
        if number < len(acks):
            una += int(acks[number] * (written - una))
            queue.release(1000 + una)
            assert queue.start == 1000 + una
            assert not queue._skbs or queue._skbs[0].end_seq > 1000 + una
    queue.release(1000 + written)
    assert account.bytes == 0
    queue.clear()


def test_the_send_limit_is_by_truesize() -> None:
    memory = make_memory()
    charges = make_charges(memory)
    account = charges.send
    queue = SendQueue(memory, charges, 0)
    taken = queue.append(memoryview(bytes(1 << 20)), 100_000, ATOMIC)
    assert 0 < taken < 1 << 20
    assert 100_000 <= account.bytes <= 100_000 + 70_000
    assert queue.append(memoryview(b"x"), 100_000, ATOMIC) in (0, 1)
    queue.clear()
    assert account.bytes == 0


def test_small_writes_share_a_buffer() -> None:
    memory = make_memory()
    charges = make_charges(memory)
    account = charges.send
    queue = SendQueue(memory, charges, 0)
    for _ in range(400):
        assert queue.append(memoryview(b"x"), 1 << 20, ATOMIC) == 1
    assert account.bytes < 2048
    queue.clear()


def test_without_memory_only_part_is_taken() -> None:
    memory = make_memory(pages=64)
    queue = SendQueue(memory, make_charges(memory), 0)
    taken = queue.append(memoryview(STREAM), 1 << 30, ATOMIC)
    assert taken <= 64 * 4096
    more = queue.append(memoryview(bytes(1 << 20)), 1 << 30, ATOMIC)
    assert more < 1 << 20
    assert b"".join(queue.views(0, taken)) == STREAM[:taken]
    queue.clear()
