"""Claims 23, 24, 28, 29, 31, 32, 39 and 42: getting pages in one piece, and getting them back."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SHIFT, PAGE_SIZE, Arena
from pools.base import NULL, by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from pools.kmalloc import KmallocPool
from pools.nta import V2
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim, shares
from ustack.lab.trace import Replay, make_pool
from ustack.lab.traffic import JUMBO_FRAME, MTU_FRAME, SHINFO, burst, churn, mtu_and_ack

if TYPE_CHECKING:
    from ustack.lab.trace import Trace

HEADER_BUFFER: Final = 256 + SHINFO
"""The linear part of a frame that is split: its headers, and `skb_shared_info`."""

RING_BUFFER: Final = 16384 + SHINFO
"""What e1000_alloc_rx_buffers() asked for, for frames of 9 KB."""


def broken_arena(pages: int, free: float, random: Random) -> PageAllocator:
    """An arena that others have filled page by page and left, at random places, to the share `free`."""
    allocator = PageAllocator(Arena(pages), min_pages=0)
    taken = allocator.alloc_bulk(pages, ATOMIC, allocator.owner_id("others"))
    for pfn in random.sample(taken, round(pages * free)):
        allocator.free(pfn, 0)
    return allocator


@claim(
    23,
    "PZ",
    "e1000 with packet split needs no memory of high order for jumbo frames",
    prior="true for packet split, false for the plain path",
)
def packet_split(_: Terms) -> Outcome:
    """Jumbo frames into an arena of which every other page is free: as a header and three pages, and in one piece."""
    frames = 40
    got = {}
    high: dict[str, int] = {}
    for path in ("split", "plain"):
        allocator = PageAllocator(Arena(1024), min_pages=0)
        taken = allocator.alloc_bulk(1024, ATOMIC, allocator.owner_id("others"))
        for pfn in taken[::2]:
            allocator.free(pfn, 0)
        pool = KmallocPool(allocator, lanes=1)
        owner = allocator.owner_id("frags")
        got[path] = 0
        for _frame in range(frames):
            if path == "split":
                got[path] += pool.alloc(HEADER_BUFFER, ATOMIC) != NULL and bool(allocator.alloc_bulk(3, ATOMIC, owner))
            else:
                got[path] += pool.alloc(RING_BUFFER, ATOMIC) != NULL
        high[path] = sum(allocator.failures[1:])
    return Outcome(
        "true" if got["split"] == frames and not high["split"] else "false",
        f"With half of the memory free and no two pages together, packet split receives {got['split']} of {frames} frames and "
        f"asks for "
        f"nothing larger than a page; the plain path receives {got['plain']}.",
        {"received": dict(got), "requests of high order refused": dict(high)},
    )


@claim(24, "PZ", "To rely on pages in one piece is unsound", prior="true")
def pieces_of_broken_memory(terms: Terms) -> Outcome:
    """How much of the free memory can be had in blocks of order 0, 1, 2 and 3, by the share that is free."""
    random = Random(terms.seed)
    pages = terms.size(4096, 32768)
    had: dict[str, Figure] = {}
    at: dict[tuple[int, float], float] = {}
    levels = (0.1, 0.25, 0.5, 0.75, 0.9)
    for order in (0, 1, 2, 3):
        for free in levels:
            allocator = broken_arena(pages, free, random)
            owner, before = allocator.owner_id("ours"), allocator.free_pages
            while allocator.alloc(order, ATOMIC, owner) != NULL:
                pass
            at[order, free] = 1 - allocator.free_pages / before
        had[f"order {order}"] = {f"{free:.0%} free": at[order, free] for free in levels}
    return Outcome(
        "true" if at[0, 0.5] == 1 and at[3, 0.5] < 0.1 else "partly" if at[3, 0.5] < 0.5 else "false",
        f"With half of the pages free at random places, {at[0, 0.5]:.0%} of the free memory can be had in single pages, "
        f"{at[2, 0.5]:.1%} in blocks of four and {at[3, 0.5]:.2%} in blocks of eight; with three quarters free "
        f"{at[2, 0.75]:.0%} "
        f"and {at[3, 0.75]:.0%}.",
        had,
    )


def compact(run: Replay) -> None:
    """Compact the pool. Every packet may be moved: its number is the handle that finds it again."""
    numbers = {packet.addr: number for number, packet in run.live.items()}

    def moved(old: int, new: int) -> None:
        number = numbers.pop(old)
        numbers[new] = number
        run.live[number] = run.live[number]._replace(addr=new)

    run.pool.compact(frozenset(numbers), moved)


@claim(
    28,
    "PZ",
    "SLAB never needs coalescing; compaction would help",
    prior="saves what is held and not needed: 90 of 162 pages in the case of claim 18",
)
def compaction(terms: Terms) -> Outcome:
    """The drained burst of claim 18, and one of Ethernet frames, compacted by handle."""
    figures: dict[str, Figure] = {}
    saved: list[tuple[int, int, int]] = []
    for size, packets, left in ((64, 9558, 4239), (MTU_FRAME, 600, 200)):
        run = Replay(make_pool("kmalloc", lanes=1), heads=False)
        run.run(burst("burst", lambda _, size=size: size, packets=packets, left=left, seed=terms.seed, heads=False).steps)  # type: ignore[misc]
        mem = run.pool.pages.arena.mem
        for number, packet in run.live.items():
            mem[packet.addr : packet.addr + 4] = number.to_bytes(4, "big")
        run.pool.reap()
        held = run.pool.held_pages()
        compact(run)
        assert all(mem[packet.addr : packet.addr + 4] == number.to_bytes(4, "big") for number, packet in run.live.items())
        run.pool.check()
        fresh = Replay(make_pool("kmalloc", lanes=1), heads=False)
        for number in range(left):
            fresh.alloc(number, size)
        fresh.pool.reap()
        saved.append((held, run.pool.held_pages(), fresh.pool.held_pages()))
        figures[str(size)] = {"held": held, "after compaction": saved[-1][1], "needed": saved[-1][2]}
        run.clear()
    (held, after, needed), (frames, frames_after, frames_needed) = saved
    most = held - after > 0.9 * (held - needed) and frames - frames_after > 0.9 * (frames - frames_needed)
    return Outcome(
        "true" if most else "partly" if after < held else "false",
        f"Of {held} pages with objects of 64 bytes {after} are left after compaction, {needed} are needed; of {frames} with "
        f"Ethernet "
        f"frames {frames_after}, {frames_needed} are needed: the bookkeeping of the slabs does not move.",
        figures,
    )


def come_back(name: str, trace: Trace, **options: object) -> float:
    """The share of the pages of the peak, less those that are needed from the start, that is back after a trace and a reap."""
    pool = make_pool(name, 16384, **options)
    run = Replay(pool, trace.heads)
    peak = run.run(trace.steps).peak.pages
    pool.reap()
    return 1 - pool.held_pages() / peak


@claim(
    29,
    "PZ",
    "The real problem of SLAB is to get pages back from it",
    prior="after a burst of which 1% stays, SROG gives all back, SLAB few pages, NTA none",
)
def pages_that_come_back(terms: Terms) -> Outcome:
    """A burst, of which 99% is freed at random."""
    packets = terms.size(2000, 8000)
    traces = {
        "packets": burst("packets", mtu_and_ack, packets=packets, left=packets // 100, seed=terms.seed),
        "64 bytes": burst("small", lambda _: 64, packets=packets * 4, left=packets // 25, seed=terms.seed, heads=False),
    }
    back: dict[str, dict[str, Figure]] = {}
    by: dict[tuple[str, str], float] = {}
    for kind, trace in traces.items():
        for name in ("kmalloc", "nta", "nta as posted", "page_frag", "srog", "page_per_object"):
            if name == "nta as posted":
                by[kind, name] = come_back("nta", trace, faithful=True)
            elif kind == "64 bytes" and name in ("srog", "page_per_object"):
                continue  # a page for each: nothing to learn
            else:
                by[kind, name] = come_back(name, trace)
            back.setdefault(kind, {})[name] = by[kind, name]
    slab, small, srog = by["packets", "kmalloc"], by["64 bytes", "kmalloc"], by["packets", "srog"]
    contradicts = ""
    if slab > 0.5 and by["packets", "nta"] > 0:
        contradicts = (
            f"of packets SLAB gives back {slab:.0%}, for few of them share a page, and corrected NTA "
            f"{by['packets', 'nta']:.0%}; "
            "it is small objects that hold pages, and nobody kept those in NTA"
        )
    return Outcome(
        "true" if srog > 0.95 and slab < 0.5 else "partly" if small < 0.7 else "false",
        f"After a burst of packets come back: {shares(back['packets'])}. Of objects of 64 bytes: {shares(back['64 bytes'])}.",
        {kind: dict(named) for kind, named in back.items()},
        contradicts,
    )


@claim(
    31,
    "EP",
    "The cache of packet heads suffers too: what follows on the same page may be somebody else's",
    prior="small",
)
def heads_of_others(terms: Terms) -> Outcome:
    """Short- and long-lived packets: who shares a page of heads, and what the survivors hold when the others are gone."""
    packets = terms.size(3000, 20000)
    pool = make_pool("kmalloc", 16384)
    assert isinstance(pool, KmallocPool)
    run = Replay(pool)
    run.run(churn("mixed", mtu_and_ack, packets=packets, live=500, long_lived=0.02, seed=terms.seed).steps)
    owners: dict[int, set[int]] = {}
    for packet in run.live.values():
        owners.setdefault(packet.head >> PAGE_SHIFT, set()).add(packet.socket)
    shared = sum(len(sockets) > 1 for sockets in owners.values()) / len(owners)
    stays = burst("drain", mtu_and_ack, packets=packets, left=packets // 50, seed=terms.seed)
    run.clear()
    pool.reap()
    run.run(stays.steps)
    pool.reap()
    heads = next(cache for cache in pool.caches() if cache.name == "skbuff_head_cache")
    needed = -(-heads.live_objects() // heads.num)
    waste = heads.held_pages() - needed
    others = pool.held_pages() - heads.held_pages()
    return Outcome(
        "true" if shared > 0.5 and waste > needed else "false",
        f"{shared:.0%} of the pages with heads have heads of several sockets. When 2% of a burst stay, their heads hold "
        f"{heads.held_pages()} pages where {needed} would do; their data hold {others}.",
        {"shared": shared, "head pages held": heads.held_pages(), "needed": needed, "data pages held": others},
        f"not small: the heads of the survivors hold {heads.held_pages() / needed:.0f} times what they need"
        if heads.held_pages() > 4 * needed
        else "",
    )


def left_in_one_piece(name: str, trace: Trace, ends: set[int], pages: int) -> tuple[float, int]:
    """After a trace and the end of its short-lived packets: the share of the free pages in blocks of 32 KiB and more, and the
    pages that the survivors hold.
    """
    allocator = PageAllocator(Arena(pages), min_pages=0)
    pool = by_name(name)(allocator)
    run = Replay(pool, trace.heads)
    run.run(trace.steps)
    for packet in list(run.live):
        if packet in ends:
            run.free(packet)
    pool.reap()
    blocks = allocator.buddyinfo()
    large = sum(count << order for order, count in enumerate(blocks) if order >= 3)
    return large / allocator.free_pages, pool.held_pages()


@claim(
    32,
    "PZ",
    "SROG cannot add to external fragmentation, since its groups are short-lived",
    prior="true as long as no packet waits in a queue; one that does pins its page",
)
def fragmentation_of_pages(terms: Terms) -> Outcome:
    """A soak with and without packets that stay. Then all others end: what has the page allocator in one piece?"""
    packets = terms.size(4000, 40000)
    figures: dict[str, Figure] = {}
    by: dict[tuple[str, float], float] = {}
    pages_held: dict[str, int] = {}
    for long_lived in (0.0, 0.01, 0.05):
        trace = churn("soak", mtu_and_ack, packets=packets, live=700, long_lived=long_lived, seed=terms.seed)
        random = Random(terms.seed)
        freed = {step.packet for step in trace.steps if not step.size}
        alive = [step.packet for step in trace.steps if step.size and step.packet not in freed]
        stay = set(random.sample(alive, round(packets * long_lived)))
        of_this: dict[str, Figure] = {}
        for name in ("kmalloc", "nta", "srog"):
            by[name, long_lived], held = left_in_one_piece(name, trace, set(alive) - stay, terms.size(2048, 8192))
            pages_held[name] = held
            of_this[name] = {"free memory in 32 KiB and more": by[name, long_lived], "pages held": held}
        figures[f"{long_lived:.0%} stay"] = of_this
    clean = by["srog", 0.0] == 1.0
    pinned = by["srog", 0.05] < 0.95
    return Outcome(
        "partly" if clean and pinned else "true" if clean else "false",
        f"When all packets are gone, {by['srog', 0.0]:.0%} of the memory is in blocks of 32 KiB and more again. When 5 % "
        f"stay: srog "
        f"{by['srog', 0.05]:.0%} of what is free, with {pages_held['srog']} pages held; kmalloc {by['kmalloc', 0.05]:.0%} and "
        f"{pages_held['kmalloc']}; nta, which holds whole regions, {by['nta', 0.05]:.0%} and {pages_held['nta']}.",
        figures,
    )


@claim(
    39,
    "EP",
    "NTA defragments itself: chunks of short-lived packets heal",
    prior="heals if nothing stays; the curve by the share of long-lived packets is the result",
)
def self_defragmentation(terms: Terms) -> Outcome:
    """After traffic of which a share stays, how many jumbo frames fit in what is free, of those that would if it were whole."""
    regions = 64
    healed: dict[str, Figure] = {}
    by: dict[float, float] = {}
    for long_lived in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2):
        version = V2._replace(initial_regions=regions, grows=False)
        pool = make_pool("nta", regions * 8 + 2, lanes=1, version=version)
        run = Replay(pool)
        # The same number stays in the end, whatever the share: with a smaller one the traffic goes on for longer.
        stay = 60
        packets = round(stay / long_lived) if long_lived else 4000
        trace = churn("mixed", mtu_and_ack, packets=packets, live=500, long_lived=long_lived, seed=terms.seed)
        gone = {step.packet for step in trace.steps if not step.size}
        run.run(trace.steps)
        survivors = sorted(run.live, reverse=True)
        # What is alive now and not long-lived ends as well. The youngest may be either; the oldest have stayed.
        keep = set(survivors[-stay:]) if long_lived else set()
        for packet in survivors:
            if packet not in keep:
                run.free(packet)
        free = regions * 8 * PAGE_SIZE - pool.stats.charged
        fit = 0
        while pool.alloc(JUMBO_FRAME, ATOMIC) != NULL:
            fit += 1
        by[long_lived] = fit / (free * 3 // (8 * PAGE_SIZE))
        healed[f"{long_lived:.0%}"] = by[long_lived]
        assert gone.isdisjoint(keep)
    return Outcome(
        "partly" if by[0.0] > 0.99 and min(by.values()) < 0.9 else "true" if by[0.0] > 0.99 else "false",
        f"If nothing stays, all of it heals: {by[0.0]:.0%} of the jumbo frames fit that could. With 60 packets left, "
        f"{by[0.2]:.0%} do when one in five stayed, {by[0.05]:.0%} when one in twenty did and {by[0.01]:.0%} when one in a "
        f"hundred did.",
        {"jumbo frames that fit, by share that stays": healed},
    )


@claim(42, "PZ", "SROG cannot be the main allocator until drivers use fragments for jumbo frames", prior="true")
def srog_for_everything(terms: Terms) -> Outcome:
    """Jumbo frames on SROG in broken memory: in one piece, and as a header and three pages."""
    random = Random(terms.seed)
    linear: dict[str, Figure] = {}
    frags: dict[str, Figure] = {}
    at: dict[float, tuple[float, float]] = {}
    for free in (0.25, 0.5, 0.75):
        got = [0.0, 0.0]
        for kind in (0, 1):
            allocator = broken_arena(terms.size(4096, 16384), free, random)
            pool = by_name("srog")(allocator)
            owner = allocator.owner_id("frags")
            frames = allocator.free_pages // 8  # four pages each: half of what is free
            for _ in range(frames):
                if kind == 0:
                    got[kind] += pool.alloc(JUMBO_FRAME, ATOMIC) != NULL
                else:
                    got[kind] += pool.alloc(HEADER_BUFFER, ATOMIC) != NULL and bool(allocator.alloc_bulk(3, ATOMIC, owner))
            got[kind] /= frames
        at[free] = got[0], got[1]
        linear[f"{free:.0%} free"], frags[f"{free:.0%} free"] = at[free]
    return Outcome(
        "true" if at[0.5][0] < 0.5 and at[0.5][1] == 1 else "partly" if at[0.5][0] < 1 else "false",
        f"With half of the memory free, and jumbo frames for half of that, {at[0.5][0]:.0%} of them are received in one piece "
        f"and "
        f"{at[0.5][1]:.0%} as fragments; with a quarter free {at[0.25][0]:.1%} and {at[0.25][1]:.0%}.",
        {"in one piece": linear, "as fragments": frags},
    )
