"""Sniffers see every frame as it was on the wire, copy none, and can hold no more of the stack's memory than their share."""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import pytest

from pools.base import names as pool_names
from tests.sim.network import Network, Talker
from ustack.drops import DropReason
from ustack.link.descriptor_ring import INCOMING, NOT_DROPPED, OUTGOING, Descriptor, RingReader, shared_fds
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LinearRing, PagedRing, RxRing
from ustack.link.sniffer import SNAPLEN_MAX, SNIFFERS_MAX, cut
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.link.sniffer import Sniffer
    from ustack.skb import SkbMemory

    Ring = Callable[[SkbMemory, int], RxRing]

LIMIT = 1 << 20


class Reader:
    """A process that sniffs `stack`, in this one."""

    def __init__(self, stack: Stack, snaplen: int = SNAPLEN_MAX) -> None:
        self.stack = stack
        self.sniffer: Sniffer = stack.sniffers.add(snaplen=snaplen)
        fds = [os.dup(fd) for fd in shared_fds(stack.arena, self.sniffer.ring)]
        self.ring = RingReader(fds, stack.arena.size, self.sniffer.ring.slots)
        self.frames: list[tuple[Descriptor, bytes]] = []

    def read(self, release: bool = True) -> None:
        """Take what there is."""
        try:
            for each in self.ring.read():
                self.frames.append((each, b"".join(self.ring.pieces(each))))
        except BlockingIOError:
            pass
        if release:
            self.ring.release(self.ring.number)

    def directed(self, direction: int) -> list[bytes]:
        """The frames of one direction."""
        return [data for each, data in self.frames if each.direction == direction]

    def close(self) -> None:
        """The process ends."""
        self.stack.sniffers.remove(self.sniffer)
        self.ring.close()


def network(ring: Ring = PagedRing, seed: int = 1, **options: object) -> Network:
    """Two stacks of whose memory up to `LIMIT` bytes may be sniffed."""
    tso = FEATURE_CSUM | FEATURE_TSO if ring is PagedRing else FEATURE_CSUM
    net = Network(seed, features=tso, ring=ring, capture=LIMIT, **options)  # type: ignore[arg-type]
    net.world.run(5.0)  # until all addresses have been announced
    return net


def transfer(net: Network, size: int = 300_000, each_step: Callable[[], None] | None = None, port: int = 80) -> bytes:
    """Send `size` bytes from the client to the server and some back; returns what the server got."""
    talkers: list[Talker] = []
    net.listen(port, on_accept=lambda conn: talkers.append(Talker(conn, b"answer" * 50)))
    sender = Talker(net.connect(port), bytes(n * 7 & 0xFF for n in range(size)))
    for _ in range(20_000):
        if sender.finished and talkers and talkers[0].finished:
            break
        if not net.world.step():
            break
        if each_step is not None:
            each_step()
    assert sender.finished
    return bytes(talkers[0].incoming)


@pytest.fixture
def wires() -> Iterator[list[Network]]:
    made: list[Network] = []
    yield made
    for each in made:
        each.close()


@pytest.mark.parametrize("pool", pool_names())
@pytest.mark.parametrize("ring", [PagedRing, LinearRing])
def test_what_is_sniffed_is_what_was_on_the_wire(wires: list[Network], ring: Ring, pool: str) -> None:
    net = network(ring, pool=pool)
    wires.append(net)
    on_wire: dict[int, list[bytes]] = {INCOMING: [], OUTGOING: []}
    net.wire.there.tap = lambda _, data: on_wire[INCOMING].append(data)
    net.wire.back.tap = lambda _, data: on_wire[OUTGOING].append(data)
    reader = Reader(net.server)
    transfer(net, each_step=reader.read)
    reader.read()
    assert len(reader.frames) >= 10
    assert reader.sniffer.missed == 0
    assert reader.directed(OUTGOING) == on_wire[OUTGOING]
    assert reader.directed(INCOMING) == on_wire[INCOMING]
    assert {each.reason for each, _ in reader.frames} == {NOT_DROPPED}
    reader.close()


def test_payload_of_bulk_transfers_is_copied_in_neither_direction(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    readers = [Reader(net.client), Reader(net.server)]

    def read() -> None:
        for each in readers:
            each.read()

    transfer(net, each_step=read)
    for stack in net.stacks:
        sniffed = stack.sniffers
        assert sniffed.referenced > 290_000
        assert sniffed.copied < 20_000, "headers, and the short answer"
    for each in readers:
        each.close()


def test_a_frame_stays_as_it_was_until_it_is_released(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    reader = Reader(net.server)
    assert transfer(net, 100_000)
    reader.read(release=False)
    first = [data for _, data in reader.frames]
    transfer(net, 100_000, port=81)  # over the same ring and pool
    again = [b"".join(reader.ring.pieces(each)) for each, _ in reader.frames]
    assert again == first
    reader.close()


def test_a_sniffer_that_never_reads_pins_no_more_than_its_share_and_costs_nobody_a_byte(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    reader = Reader(net.server)
    peak = 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, net.server.sniffers.pinned)

    assert len(transfer(net, 2_000_000, each_step=look)) == 2_000_000
    assert 0 < peak <= LIMIT
    assert reader.sniffer.missed > 0
    assert net.server.sniffers.misses == reader.sniffer.missed
    reader.close()
    assert net.server.sniffers.pinned == 0
    assert net.server.pages.pages_by_owner().get("sniffed", 0) == 0


def test_a_sniffer_that_writes_nonsense_hurts_only_itself(wires: list[Network], seed: int) -> None:
    net = network(seed=seed)
    wires.append(net)
    random = Random(seed)
    liar, honest = Reader(net.server), Reader(net.server)
    honest_sent: list[bytes] = []
    net.wire.back.tap = lambda _, data: honest_sent.append(data)

    def lie() -> None:
        honest.read()
        liar.read(release=False)
        liar.ring.release(
            random.choice((0, liar.ring.number, liar.ring.number + 1, random.getrandbits(64), random.randrange(50)))
        )
        assert net.server.sniffers.pinned <= LIMIT

    assert len(transfer(net, 1_000_000, each_step=lie)) == 1_000_000
    honest.read()
    assert honest.sniffer.missed == 0
    assert honest.directed(OUTGOING) == honest_sent
    liar.close()
    honest.close()
    assert net.server.sniffers.pinned == 0


def test_two_sniffers_share_the_limit_and_one_that_sleeps_does_not_take_it_all(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    asleep, awake = Reader(net.server), Reader(net.server)
    transfer(net, 1_000_000, each_step=awake.read)
    assert asleep.sniffer.missed > 0
    assert awake.sniffer.missed == 0
    assert asleep.sniffer.pinned <= LIMIT // 2
    asleep.close()
    awake.close()
    assert net.server.sniffers.pinned == 0


def test_while_memory_is_short_frames_are_missed_and_the_reserve_is_left_alone(wires: list[Network]) -> None:
    net = network(reserve=1 << 20)
    wires.append(net)
    stack = net.server
    reader = Reader(stack)
    owner = stack.pages.owner_id("hog")
    hogged = [*stack.pages.alloc_bulk(stack.pages.free_pages - stack.pages.min_pages, 0, owner)]
    assert stack.pages.under_pressure
    taken = stack.pages.reserve_allocs
    net.connect(port=81)
    net.world.run(5.0)
    assert reader.sniffer.missed > 0
    assert stack.sniffers.pinned == 0
    assert stack.pages.reserve_allocs == taken
    stack.pages.free_bulk(hogged)
    reader.close()


def test_a_dropped_frame_says_why(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    net.connect(port=81)
    net.world.run(1.0)
    reader = Reader(net.server)
    assert net.devices[0].transmit(b"\2\0\0\0\0\2" + b"\2\0\0\0\0\1" + b"\x12\x34" + bytes(46), ())
    net.world.run(1.0)
    reader.read()
    assert [DropReason(each.reason) for each, _ in reader.frames] == [DropReason.UNHANDLED_PROTO]
    net.server.ip.path(bytes((10, 0, 0, 1))).send(17, 0, [b"x" * 600], 600)
    net.wire.unplug()
    net.server.ip.path(bytes((10, 0, 0, 1))).send(17, 0, [b"x" * 600], 600)
    reader.read()
    sent, refused = (each for each, _ in reader.frames[-2:])
    assert sent.reason == NOT_DROPPED
    assert refused.reason == DropReason.TX_DEVICE
    reader.close()


def test_an_answer_that_is_sent_at_once_comes_after_its_question(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    reader = Reader(net.server)
    net.connect(port=81)
    net.world.run(1.0)
    reader.read()
    arps = [each.direction for each, data in reader.frames if data[12:14] == b"\x08\x06"]
    assert OUTGOING in arps
    assert arps[arps.index(OUTGOING) - 1] == INCOMING
    reader.close()


def test_compaction_leaves_what_is_sniffed_where_it_is(wires: list[Network]) -> None:
    net = network(LinearRing)
    wires.append(net)
    reader = Reader(net.server)
    accepted = net.listen()
    Talker(net.connect(), b"x" * 30_000)
    net.world.run(2.0)
    reader.read(release=False)
    before = [data for _, data in reader.frames]
    net.server.compact()
    assert [b"".join(reader.ring.pieces(each)) for each, _ in reader.frames] == before
    assert len(accepted[0].recv(100_000)) == 30_000
    reader.close()


def test_a_short_snaplen_pins_and_shows_only_the_start(wires: list[Network]) -> None:
    net = network()
    wires.append(net)
    reader = Reader(net.server, snaplen=96)
    transfer(net, each_step=reader.read)
    assert max(each.captured for each, _ in reader.frames) == 96
    assert max(each.length for each, _ in reader.frames) > 60_000
    reader.close()


def test_cut_takes_from_the_front() -> None:
    runs = [(0, 10), (100, 10)]
    assert cut(runs, 15) == [(0, 10), (100, 5)]
    assert cut(runs, 10) == [(0, 10)]
    assert cut(runs, 0) == []


def test_there_are_so_many_sniffers_and_no_more() -> None:
    stack = Stack(memory=1 << 20, capture=1 << 16)
    for _ in range(SNIFFERS_MAX):
        stack.sniffers.add()
    with pytest.raises(OSError, match="captures are running already"):
        stack.sniffers.add()
    stack.close()
    assert len(stack.sniffers) == 0


def test_private_memory_is_not_sniffed() -> None:
    stack = Stack(memory=1 << 20)
    with pytest.raises(OSError, match="private"):
        stack.sniffers.add()
    stack.close()
