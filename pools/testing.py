"""What every pool must do, as tests that run on any pool, also on one from elsewhere.

    from pools.testing import PoolConformance, machine

    class TestMyPool(PoolConformance):
        def make_pool(self, pages):
            return MyPool(pages)

    TestMyPoolMachine = machine(MyPool, lanes=2).TestCase

`PoolConformance` has the rules one by one, for pytest. `machine` makes a Hypothesis state machine that mixes everything at
random, with other users taking pages away, and `soak` does the same from a plain seed, faster and for as long as wanted.
All three drive the pool through a `Ledger`, which writes into every byte that it was given, knows what is alive, and checks
every answer.

Needs Hypothesis, which the extra `test` installs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from random import Random
from typing import TYPE_CHECKING, ClassVar, Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pools.arena import PAGE_SHIFT, Arena
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC, NOMEMALLOC

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    MakePool = Callable[[PageAllocator], Pool]

ARENA_PAGES: Final = 256
RESERVE_PAGES: Final = 32
"""The arena and the `min` watermark of a `Ledger`, in pages: small, so that running out is part of every test."""

GFPS: Final = (ATOMIC, MEMALLOC, MEMALLOC | NOMEMALLOC)


class Chunk:
    """A live object: `size` bytes at `addr`, filled with the byte `tag`. `packet`: all chunks of its packet."""

    __slots__ = ("addr", "head", "packet", "size", "tag")

    def __init__(self, addr: int, size: int, tag: int, *, head: bool) -> None:
        self.addr = addr
        self.size = size
        self.tag = tag
        self.head = head
        self.packet: list[Chunk] = [self]

    def __repr__(self) -> str:
        return f"<{'head' if self.head else 'data'} {self.addr:#x}+{self.size}>"


class WatchedPages(PageAllocator):
    """A page allocator that remembers which pages were taken from the reserve and have not been free since."""

    __slots__ = ("from_reserve",)

    def __init__(self, arena: Arena, *, min_pages: int) -> None:
        super().__init__(arena, min_pages=min_pages)
        self.from_reserve: set[int] = set()

    def alloc(self, order: int, gfp: int, owner: int) -> int:
        """As the page allocator does."""
        pfn = super().alloc(order, gfp, owner)
        self._note(range(pfn, pfn + (1 << order)) if pfn >= 0 else ())
        return pfn

    def alloc_bulk(self, count: int, gfp: int, owner: int) -> Sequence[int]:
        """As the page allocator does."""
        pfns = super().alloc_bulk(count, gfp, owner)
        self._note(pfns)
        return pfns

    def _note(self, pfns: Sequence[int]) -> None:
        if self.pfmemalloc:
            self.from_reserve.update(pfns)
        else:
            self.from_reserve.difference_update(pfns)


class Ledger:
    """A pool, on an arena of its own, and the truth about what it gave out.

    Every method asks the pool for something and raises `AssertionError` if the answer breaks a rule of the contract. `hog` is
    everybody else who uses pages.
    """

    def __init__(
        self, make_pool: MakePool, *, pages: int = ARENA_PAGES, min_pages: int = RESERVE_PAGES, chunk_bytes: int = 1 << 17
    ) -> None:
        self.arena = Arena(pages)
        self.pages = WatchedPages(self.arena, min_pages=min_pages)
        self.pool = make_pool(self.pages)
        self.chunk_bytes = min(chunk_bytes, self.pool.max_size)
        self.chunks: dict[int, Chunk] = {}
        self.freed: list[Chunk] = []  # the last few, for double frees
        self.hogged: list[int] = []
        self._hog = self.pages.owner_id("hog")
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._allocs = 0
        self._frees = 0
        self._requested = 0
        self._charged = 0

    # What a user of the pool does

    def alloc(self, size: int, gfp: int = ATOMIC, cpu: int = 0, beside: Chunk | None = None) -> Chunk | None:
        """Allocate data, in the packet of the chunk `beside` if there is one."""
        before = self.pages.free_pages
        addr = self.pool.alloc(size, gfp, cpu, NULL if beside is None else beside.addr)
        return self._allocated(addr, size, gfp, before, beside, head=False)

    def alloc_head(self, gfp: int = ATOMIC, cpu: int = 0, beside: Chunk | None = None) -> Chunk | None:
        """Allocate a head, in the packet of the chunk `beside` if there is one."""
        before = self.pages.free_pages
        addr = self.pool.alloc_head(gfp, cpu, NULL if beside is None else beside.addr)
        return self._allocated(addr, SKB_HEAD_SIZE, gfp, before, beside, head=True)

    def free(self, chunk: Chunk, cpu: int = 0, *, name_group: bool = False) -> None:
        """Free a chunk, naming another one of its packet as the group if asked to and if there is one."""
        content = bytes(self.arena.mem[chunk.addr : chunk.addr + chunk.size])
        assert content == bytes((chunk.tag,)) * chunk.size, f"{chunk} was overwritten while it was allocated"
        self._charged -= self._charge(chunk)
        chunk.packet.remove(chunk)
        group = chunk.packet[0].addr if name_group and chunk.packet else NULL
        if chunk.head:
            self.pool.free_head(chunk.addr, cpu, group)
        else:
            self.pool.free(chunk.addr, chunk.size, cpu, group)
        self._frees += 1
        self._requested -= chunk.size
        del self.chunks[chunk.addr]
        del self._starts[bisect_left(self._starts, chunk.addr)]
        del self._ends[bisect_left(self._ends, chunk.addr + chunk.size)]
        self.freed = [*self.freed[-7:], chunk]

    def link(self, one: Chunk, other: Chunk) -> None:
        """Join two packets."""
        if one.packet is other.packet:
            return
        self.pool.link(one.addr, other.addr)
        one.packet.extend(other.packet)
        for chunk in other.packet:
            chunk.packet = one.packet

    def compact(self, movable: Collection[Chunk]) -> int:
        """Compact the pool; it may move these chunks. Returns the pages that it gave back."""
        before = self.pages.free_pages
        given_back = self.pool.compact(frozenset(chunk.addr for chunk in movable), self._moved)
        assert given_back == self.pages.free_pages - before, f"{given_back} pages counted as given back"
        return given_back

    def _moved(self, old: int, new: int) -> None:
        chunk = self.chunks.pop(old)
        del self._starts[bisect_left(self._starts, old)]
        del self._ends[bisect_left(self._ends, old + chunk.size)]
        position = bisect_right(self._starts, new)
        assert position == bisect_right(self._ends, new), f"{chunk} was moved to {new:#x}, into a live chunk"
        assert position == bisect_left(self._starts, new + chunk.size), f"{chunk} was moved to {new:#x}, into a live chunk"
        chunk.addr = new
        self.chunks[new] = chunk
        insort(self._starts, new)
        insort(self._ends, new + chunk.size)

    def hog(self, count: int) -> None:
        """Let other users take up to `count` pages; they leave the reserve alone."""
        for _ in range(count):
            pfn = self.pages.alloc(0, ATOMIC, self._hog)
            if pfn < 0:
                break
            self.hogged.append(pfn)

    def unhog(self, count: int) -> None:
        """Let other users give up to `count` pages back."""
        for _ in range(min(count, len(self.hogged))):
            self.pages.free(self.hogged.pop(), 0)

    def free_twice(self, chunk: Chunk, cpu: int = 0) -> None:
        """Free a chunk that was freed before, unless its memory is in use again: the pool must refuse and be as it was."""
        if bisect_right(self._starts, chunk.addr) != bisect_right(self._ends, chunk.addr):
            return
        held = self.pool.held_pages()
        try:
            if chunk.head:
                self.pool.free_head(chunk.addr, cpu)
            else:
                self.pool.free(chunk.addr, chunk.size, cpu)
        except DoubleFree:
            assert self.pool.held_pages() == held, "a refused double free changed the pool"
            self.check()
            return
        raise AssertionError(f"{chunk} could be freed twice")

    # What must be so

    def check(self) -> None:
        """The accounts: what the pool says, what the pages say, and what we know are the same."""
        stats = self.pool.stats
        assert (stats.allocs, stats.frees) == (self._allocs, self._frees), "allocations or frees miscounted"
        assert stats.requested == self._requested, f"{stats.requested} bytes requested, should be {self._requested}"
        assert stats.charged == self._charged, f"{stats.charged} bytes charged, should be {self._charged}"
        assert stats.requested_peak >= stats.requested
        assert stats.charged_peak >= stats.charged
        used = self.pages.pages - self.pages.free_pages - len(self.hogged)
        held = self.pool.held_pages()
        run = self.pool.largest_free_run()
        assert 0 <= run <= held << PAGE_SHIFT, f"a free run of {run} bytes on {held} pages"
        assert held == used, f"{held} pages held by the pool's account, {used} by the page allocator's"

    def check_deeply(self) -> None:
        """The accounts, and the pool's and the page allocator's own checks."""
        self.check()
        self.pool.check()
        self.pages.check()

    def close(self) -> None:
        """Free everything, in address order: every page must be back."""
        for chunk in [self.chunks[start] for start in self._starts]:
            self.free(chunk)
        self.unhog(len(self.hogged))
        self.pool.reap()
        self.check_deeply()
        assert self.pool.held_pages() == 0, f"{self.pool.held_pages()} pages held although nothing is allocated"
        assert self.pages.free_pages == self.pages.pages
        assert (self.pool.stats.requested, self.pool.stats.charged) == (0, 0)
        self.arena.close()

    def _charge(self, chunk: Chunk) -> int:
        charge = self.pool.head_charge if chunk.head else self.pool.charge(chunk.addr, chunk.size)
        assert charge >= chunk.size, f"{chunk} is charged {charge} bytes"
        return charge

    def _allocated(self, addr: int, size: int, gfp: int, before: int, beside: Chunk | None, *, head: bool) -> Chunk | None:
        if addr == NULL:
            return None
        end = addr + size
        assert 0 <= addr < end <= self.arena.size, f"{size} bytes at {addr:#x} are not in the arena"
        position = bisect_right(self._starts, addr)
        assert position == bisect_right(self._ends, addr), f"{size} bytes at {addr:#x} begin in a live chunk"
        assert position == bisect_left(self._starts, end), f"{size} bytes at {addr:#x} reach into a live chunk"
        if gfp & NOMEMALLOC or not gfp & MEMALLOC:
            assert not self.pool.pfmemalloc, "an ordinary allocation is marked pfmemalloc"
            after = self.pages.free_pages
            assert after >= min(before, self.pages.min_pages), f"an ordinary allocation left {after} of {before} pages free"
            if after < self.pages.min_pages:
                reserved = self.pages.from_reserve.intersection(range(addr >> PAGE_SHIFT, ((end - 1) >> PAGE_SHIFT) + 1))
                assert not reserved, f"an ordinary allocation lies on the pages {reserved} of the reserve"
        chunk = Chunk(addr, size, self._allocs % 255 + 1, head=head)
        self.arena.mem[addr:end] = bytes((chunk.tag,)) * size
        if beside is not None:
            chunk.packet = beside.packet
            chunk.packet.append(chunk)
        self.chunks[addr] = chunk
        insort(self._starts, addr)
        insort(self._ends, end)
        self._allocs += 1
        self._requested += size
        self._charged += self._charge(chunk)
        return chunk


def soak(make_pool: MakePool, *, operations: int, seed: int, lanes: int = 1, check_every: int = 1000) -> Ledger:
    """Random operations on a pool for as long as wanted, the same ones for the same seed; returns the closed ledger.

    Sizes are spread evenly over the powers of two. Pressure comes and goes. Raises `AssertionError` with what broke.
    """
    random = Random(seed)
    ledger = Ledger(make_pool)
    live: list[Chunk] = []
    bits = ledger.chunk_bytes.bit_length() - 1
    for step in range(operations):
        choice = random.random()
        cpu = random.randrange(lanes)
        if choice < 0.49 + 0.02 * (step // 5000 % 2):
            beside = random.choice(live) if live and random.random() < 0.4 else None
            gfp = random.choice(GFPS)
            if random.random() < 0.3:
                chunk = ledger.alloc_head(gfp, cpu, beside)
            else:
                chunk = ledger.alloc(min(ledger.chunk_bytes, int(2 ** random.uniform(0, bits))), gfp, cpu, beside)
            if chunk is not None:
                live.append(chunk)
        elif choice < 0.985 and live:
            place = random.randrange(len(live))
            live[place], live[-1] = live[-1], live[place]
            ledger.free(live.pop(), cpu, name_group=random.random() < 0.5)
        elif choice < 0.99:
            ledger.hog(random.randrange(64))
        elif choice < 0.995:
            ledger.unhog(random.randrange(64))
        elif choice < 0.998 and ledger.freed:
            ledger.free_twice(random.choice(ledger.freed), cpu)
        elif choice < 0.9985:
            ledger.compact([chunk for chunk in live if random.random() < 0.9])
        elif len(live) > 1:
            ledger.link(random.choice(live), random.choice(live))
        if step % check_every == 0:
            ledger.check_deeply()
    ledger.close()
    return ledger


class PoolConformance:
    """The rules one by one, for pytest: subclass it under a name that begins with `Test` and define `make_pool`.

    `lanes` is how many values of `cpu` the pool was made for.
    """

    lanes: ClassVar[int] = 1

    def make_pool(self, pages: PageAllocator) -> Pool:
        """A new pool of the kind under test on these pages."""
        raise NotImplementedError

    def ledger(self) -> Ledger:
        """A new pool under test."""
        return Ledger(self.make_pool)

    def test_a_new_pool_serves_every_size_up_to_its_largest(self) -> None:
        """1 byte, what is around powers of two, and `max_size` itself; each is charged at least what was asked for."""
        ledger = self.ledger()
        largest = ledger.pool.max_size
        sizes = {1, largest, *(min(largest, (1 << bit) + more) for bit in range(5, 18) for more in (-1, 0, 1))}
        for size in sorted(sizes):
            chunk = ledger.alloc(size, MEMALLOC)
            assert chunk is not None, f"a new pool has no {size} bytes"
            ledger.free(chunk)
        ledger.close()

    def test_sizes_that_can_never_be_served_give_null(self) -> None:
        """No exception, and a failure counted."""
        ledger = self.ledger()
        for size in (0, -1, ledger.pool.max_size + 1, 1 << 40):
            assert ledger.alloc(size) is None
        assert ledger.pool.stats.failures == 4
        ledger.close()

    def test_plenty_of_memory_needs_no_reserve(self) -> None:
        """Even who may use the reserve gets ordinary memory while there is some."""
        ledger = self.ledger()
        chunk = ledger.alloc(1500, MEMALLOC)
        head = ledger.alloc_head(MEMALLOC, 0, chunk)
        assert chunk is not None
        assert head is not None
        assert not ledger.pool.pfmemalloc
        ledger.close()

    def test_running_out_gives_null_and_leaves_the_reserve(self) -> None:
        """Ordinary allocations stop at the watermark; those that may use the reserve go on, marked, down to the last page."""
        ledger = self.ledger()
        while ledger.alloc(1500) is not None:
            pass
        assert ledger.pages.free_pages >= RESERVE_PAGES
        assert ledger.alloc(1500, MEMALLOC | NOMEMALLOC) is None
        marked = 0
        while ledger.alloc(1500, MEMALLOC) is not None:
            marked += ledger.pool.pfmemalloc
        assert marked >= RESERVE_PAGES // 4
        assert ledger.pages.free_pages < RESERVE_PAGES
        ledger.check_deeply()
        ledger.close()

    def test_the_reserve_is_whole_again_as_soon_as_its_users_have_freed(self) -> None:
        """Without reaping: nobody else must be able to get in between."""
        ledger = self.ledger()
        while ledger.alloc(1500) is not None:
            pass
        free = ledger.pages.free_pages
        borrowed = []
        while (chunk := ledger.alloc(1500, MEMALLOC)) is not None:
            if ledger.pool.pfmemalloc:
                borrowed.append(chunk)
        for chunk in borrowed:
            ledger.free(chunk)
        assert ledger.pages.free_pages >= min(free, RESERVE_PAGES)
        assert ledger.alloc(1500) is None or ledger.pages.free_pages >= RESERVE_PAGES
        ledger.close()

    def test_a_double_free_is_an_exception_and_changes_nothing(self) -> None:
        """Of data and of heads; with the page still in use by a neighbour, and with nothing else alive."""
        ledger = self.ledger()
        neighbour = ledger.alloc(100)
        data = ledger.alloc(100, ATOMIC, 0, neighbour)
        head = ledger.alloc_head(ATOMIC, 0, neighbour)
        for chunk in (data, head, neighbour):
            assert chunk is not None
            ledger.free(chunk)
            ledger.free_twice(chunk)
        ledger.close()

    def test_every_order_of_freeing_a_packet_gives_all_pages_back(self) -> None:
        """Data, head, a clone's head and more data: 24 orders, with and without a group named."""
        from itertools import permutations

        for order in permutations(range(4)):
            for name_group in (False, True):
                ledger = self.ledger()
                data = ledger.alloc(700)
                packet = [
                    data,
                    ledger.alloc_head(ATOMIC, 0, data),
                    ledger.alloc_head(ATOMIC, 0, data),
                    ledger.alloc(5000 if ledger.pool.max_size >= 5000 else 500, ATOMIC, 0, data),
                ]
                for index in order:
                    chunk = packet[index]
                    assert chunk is not None
                    ledger.free(chunk, name_group=name_group)
                ledger.close()

    def test_linked_packets_can_be_freed_by_either_group(self) -> None:
        """What pskb_expand_head does to a packet with clones: new data, reachable from the old."""
        ledger = self.ledger()
        old = ledger.alloc(300)
        new = ledger.alloc(3000)
        clone = ledger.alloc_head(ATOMIC, 0, old)
        assert old is not None
        assert new is not None
        assert clone is not None
        ledger.link(old, new)
        more = ledger.alloc(200, ATOMIC, 0, new)
        assert more is not None
        for chunk in (old, clone, new, more):
            ledger.free(chunk, name_group=True)
        ledger.close()

    def test_lanes_may_free_what_other_lanes_allocated(self) -> None:
        """Allocated in one lane and freed in the next, round and round, with less memory than the traffic."""
        ledger = self.ledger()
        live: list[Chunk] = []
        for turn in range(2000):
            chunk = ledger.alloc(1500, ATOMIC, turn % self.lanes)
            assert chunk is not None, f"out of memory in turn {turn} with {len(live)} packets alive"
            live.append(chunk)
            if len(live) > 40:
                ledger.free(live.pop(0), (turn + 1) % self.lanes)
        ledger.check_deeply()
        ledger.close()

    def test_compacting_keeps_what_may_not_move_and_every_byte(self) -> None:
        """A burst of which a third stays, all of it movable but every tenth chunk."""
        ledger = self.ledger()
        chunks: list[Chunk] = []
        while len(chunks) < 300 and (chunk := ledger.alloc(200 + 50 * (len(chunks) % 3))) is not None:
            chunks.append(chunk)
        for index, chunk in enumerate(chunks):
            if index % 3:
                ledger.free(chunk)
        kept = chunks[::3]
        fixed = [(chunk, chunk.addr) for chunk in kept[::10]]
        ledger.compact([chunk for index, chunk in enumerate(kept) if index % 10])
        assert all(chunk.addr == addr for chunk, addr in fixed)
        ledger.check_deeply()
        ledger.close()

    def test_soak(self) -> None:
        """20,000 random operations."""
        soak(self.make_pool, operations=20_000, seed=2006, lanes=self.lanes)


def machine(make_pool: MakePool, *, lanes: int = 1) -> type[RuleBasedStateMachine]:
    """A Hypothesis state machine for pools made by `make_pool`. Its `TestCase` is for pytest and unittest."""

    class PoolMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.ledger = Ledger(make_pool)
            self.live: list[Chunk] = []

        def pick(self, choice: int) -> Chunk | None:
            """A live chunk, or none: the choice is a number, so that Hypothesis can shrink it."""
            return self.live[choice % len(self.live)] if choice and self.live else None

        @rule(
            size=st.integers(1, 9216) | st.integers(1, 1 << 17),
            gfp=st.sampled_from(GFPS),
            cpu=st.integers(0, lanes - 1),
            beside=st.integers(0, 20),
        )
        def alloc(self, size: int, gfp: int, cpu: int, beside: int) -> None:
            chunk = self.ledger.alloc(min(size, self.ledger.chunk_bytes), gfp, cpu, self.pick(beside))
            if chunk is not None:
                self.live.append(chunk)

        @rule(gfp=st.sampled_from(GFPS), cpu=st.integers(0, lanes - 1), beside=st.integers(0, 20))
        def alloc_head(self, gfp: int, cpu: int, beside: int) -> None:
            chunk = self.ledger.alloc_head(gfp, cpu, self.pick(beside))
            if chunk is not None:
                self.live.append(chunk)

        @precondition(lambda self: self.live)
        @rule(which=st.integers(0, 1000), cpu=st.integers(0, lanes - 1), name_group=st.booleans())
        def free(self, which: int, cpu: int, name_group: bool) -> None:
            self.ledger.free(self.live.pop(which % len(self.live)), cpu, name_group=name_group)

        @precondition(lambda self: self.ledger.freed)
        @rule(which=st.integers(0, 7), cpu=st.integers(0, lanes - 1))
        def free_twice(self, which: int, cpu: int) -> None:
            self.ledger.free_twice(self.ledger.freed[which % len(self.ledger.freed)], cpu)

        @precondition(lambda self: len(self.live) > 1)
        @rule(one=st.integers(1, 20), other=st.integers(1, 20))
        def link(self, one: int, other: int) -> None:
            self.ledger.link(self.live[one % len(self.live)], self.live[other % len(self.live)])

        @rule(count=st.integers(1, ARENA_PAGES))
        def others_take_pages(self, count: int) -> None:
            self.ledger.hog(count)

        @rule(count=st.integers(1, ARENA_PAGES))
        def others_give_pages_back(self, count: int) -> None:
            self.ledger.unhog(count)

        @rule(fixed=st.integers(0, 5))
        def compact(self, fixed: int) -> None:
            self.ledger.compact(self.live[fixed:])

        @rule()
        def reap(self) -> None:
            before = self.ledger.pages.free_pages
            assert self.ledger.pool.reap() == self.ledger.pages.free_pages - before

        @invariant()
        def accounts_agree(self) -> None:
            self.ledger.check_deeply()

        def teardown(self) -> None:
            self.ledger.close()

    PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
    return PoolMachine
