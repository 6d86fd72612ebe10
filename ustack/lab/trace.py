"""Traces of packet memory, and the replayer: the same allocations and frees on any pool.

Both sides of the dispute of 2006 showed figures of the allocator that they had at hand. A trace is what they did not have: a
fixed list of what is allocated and freed, in which lane and for which socket, so that what differs is the allocator. A packet
is data and, unless the trace says otherwise, a head; data is allocated first and freed last, as in the kernel.

The replayer counts what is asked for (R), what the pool charges (C) and the pages that it holds (P). What is lost inside
objects is 1 - R/C, what is lost between them is 1 - C/(4096 P). A pool that charges whole pages has all its losses inside.

As text a trace is a line for each step, `+ packet size lane socket` or `- packet lane`, after a line that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SIZE, Arena
from pools.base import NULL, Pool, by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC

if TYPE_CHECKING:
    from collections.abc import Iterable

ARENA_PAGES: Final = 8192
"""Pages of the arena of a replay, unless told otherwise: more than any quick trace needs."""

MAGIC: Final = "ustack-trace-1"


class Step(NamedTuple):
    """One step: `packet` is allocated with `size` bytes of data for `socket`, or freed if `size` is 0; by the lane `lane`."""

    packet: int
    size: int
    lane: int = 0
    socket: int = 0


@dataclass(frozen=True)
class Trace:
    """Steps with a name, which is one word. `heads`: each packet has a head; `clones`: and a clone as well, as what the kernel
    sends has, so that it takes two heads. What is not freed is alive at the end.
    """

    name: str
    steps: tuple[Step, ...]
    heads: bool = True
    clones: bool = False

    def dumps(self) -> str:
        """The trace as text."""
        lines = [f"{MAGIC} {self.name} {'clones' if self.clones else 'heads' if self.heads else 'data'}"]
        for packet, size, lane, socket in self.steps:
            lines.append(f"+ {packet} {size} {lane} {socket}" if size else f"- {packet} {lane}")
        return "\n".join(lines) + "\n"

    def live_sizes(self) -> dict[int, float]:
        """How many packets of each data size are alive, on average over the steps. This is what the class adviser wants."""
        born: dict[int, tuple[int, int]] = {}
        total: dict[int, int] = {}
        for now, step in enumerate(self.steps):
            if step.size:
                born[step.packet] = (now, step.size)
            else:
                since, size = born.pop(step.packet)
                total[size] = total.get(size, 0) + now - since
        for since, size in born.values():
            total[size] = total.get(size, 0) + len(self.steps) - since
        return {size: steps / len(self.steps) for size, steps in sorted(total.items())}


def loads(text: str) -> Trace:
    """Read a trace. Raises `ValueError` with the number of the line that is wrong."""
    lines = text.splitlines()
    title = lines[0].split() if lines else []
    if len(title) != 3 or title[0] != MAGIC or title[2] not in ("heads", "data", "clones"):
        raise ValueError(f"line 1: a trace begins with '{MAGIC} NAME heads', '{MAGIC} NAME data' or '{MAGIC} NAME clones'")
    steps = []
    live: set[int] = set()
    for number, line in enumerate(lines[1:], 2):
        sign, *rest = line.split() or [""]
        try:
            values = [int(word) for word in rest]
        except ValueError:
            values = []
        if sign == "+" and len(values) == 4 and values[1] > 0 and values[2] >= 0 and values[0] not in live:
            live.add(values[0])
            steps.append(Step(*values))
        elif sign == "-" and len(values) == 2 and values[1] >= 0 and values[0] in live:
            live.remove(values[0])
            steps.append(Step(values[0], 0, values[1]))
        else:
            raise ValueError(f"line {number}: {line!r} is neither '+ packet size lane socket' nor '- packet lane' of one alive")
    return Trace(title[1], tuple(steps), heads=title[2] != "data", clones=title[2] == "clones")


def make_pool(name: str, pages: int = ARENA_PAGES, **options: object) -> Pool:
    """A pool on an arena of its own, without a reserve. `options` are those of the pool's class."""
    return by_name(name)(PageAllocator(Arena(pages), min_pages=0), **options)


@dataclass(frozen=True)
class Figures:
    """Bytes requested and charged, and pages held: at one moment, or on average."""

    requested: float
    charged: float
    pages: float

    @property
    def internal(self) -> float:
        """The share of what is charged that nobody asked for."""
        return 1 - self.requested / self.charged if self.charged else 0.0

    @property
    def external(self) -> float:
        """The share of the pages that is charged to nobody. Negative if the pool charges more than it holds."""
        return 1 - self.charged / (self.pages * PAGE_SIZE) if self.pages else 0.0

    @property
    def waste(self) -> float:
        """The share of the pages that nobody asked for: both together."""
        return 1 - self.requested / (self.pages * PAGE_SIZE) if self.pages else 0.0


@dataclass(frozen=True)
class Result:
    """A replay. `peak` is the moment with the most pages (of several: the most charged); `mean` is over all steps;
    `end` is after the last.

    `failures`: packets that were dropped because their data or head was refused. `largest_free_run`: bytes, at the end.
    """

    peak: Figures
    mean: Figures
    end: Figures
    failures: int
    largest_free_run: int


class LivePacket(NamedTuple):
    """A packet in a pool. `head` is `NULL` if it has none; `clone` is the head of its clone, `NULL` where that is in one piece
    with its own.
    """

    addr: int
    size: int
    socket: int
    head: int
    clone: int = NULL
    pair: bool = False


@dataclass
class Replay:
    """Packets on `pool`. `live` are those alive, by number, oldest first; `failures` counts those that were refused."""

    pool: Pool
    heads: bool = True
    clones: bool = False
    live: dict[int, LivePacket] = field(default_factory=dict)
    failures: int = 0

    def alloc(self, packet: int, size: int, lane: int = 0, socket: int = 0) -> LivePacket | None:
        """Allocate a packet: all of it, or nothing and count a failure."""
        pool = self.pool
        addr = pool.alloc(size, ATOMIC, lane)
        if addr == NULL:
            self.failures += 1
            return None
        made = self._with_heads(LivePacket(addr, size, socket, NULL), lane)
        if made is None:
            pool.free(addr, size, lane)
            self.failures += 1
            return None
        self.live[packet] = made
        return made

    def _with_heads(self, packet: LivePacket, lane: int) -> LivePacket | None:
        pool, addr = self.pool, packet.addr
        if not self.heads:
            return packet
        if self.clones:
            failures = pool.stats.failures
            pair = pool.alloc_fclone(ATOMIC, lane, addr)
            if pair != NULL:
                return packet._replace(head=pair, pair=True)
            pool.stats.failures = failures  # the pool has no pairs: two heads do as well
        head = pool.alloc_head(ATOMIC, lane, addr)
        if head == NULL or not self.clones:
            return packet._replace(head=head) if head != NULL else None
        clone = pool.alloc_head(ATOMIC, lane, addr)
        if clone == NULL:
            pool.free_head(head, lane, addr)
            return None
        return packet._replace(head=head, clone=clone)

    def free(self, packet: int, lane: int = 0) -> None:
        """Free a packet; one that was refused is none of ours."""
        gone = self.live.pop(packet, None)
        if gone is None:
            return
        if gone.pair:
            self.pool.free_fclone(gone.head, lane, gone.addr)
        else:
            for head in (gone.clone, gone.head):
                if head != NULL:
                    self.pool.free_head(head, lane, gone.addr)
        self.pool.free(gone.addr, gone.size, lane)

    def step(self, step: Step) -> None:
        """Do one step of a trace."""
        if step.size:
            self.alloc(step.packet, step.size, step.lane, step.socket)
        else:
            self.free(step.packet, step.lane)

    def now(self) -> Figures:
        """The figures of this moment."""
        return Figures(self.pool.stats.requested, self.pool.stats.charged, self.pool.held_pages())

    def run(self, steps: Iterable[Step]) -> Result:
        """Do all the steps, and tell what they took."""
        pages, stats = self.pool.pages, self.pool.stats
        # The arena is the pool's alone: what is not free is held. The pool adds up its caches to say the same.
        in_use = pages.pages - pages.free_pages
        assert in_use == self.pool.held_pages()
        requested = charged = held = count = 0
        peak = (stats.requested, stats.charged, in_use)
        for step in steps:
            self.step(step)
            in_use = pages.pages - pages.free_pages
            if in_use > peak[2] or (in_use == peak[2] and stats.charged > peak[1]):
                peak = (stats.requested, stats.charged, in_use)
            requested += stats.requested
            charged += stats.charged
            held += in_use
            count += 1
        count = count or 1
        return Result(
            peak=Figures(*peak),
            mean=Figures(requested / count, charged / count, held / count),
            end=self.now(),
            failures=self.failures,
            largest_free_run=self.pool.largest_free_run(),
        )

    def clear(self) -> None:
        """Free every packet."""
        for packet in list(self.live):
            self.free(packet)


def replay(trace: Trace, name: str, pages: int = ARENA_PAGES, **options: object) -> Result:
    """Replay a trace on a new pool of that name."""
    return Replay(make_pool(name, pages, **options), trace.heads, trace.clones).run(trace.steps)
