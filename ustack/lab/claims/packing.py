"""Claims 16 to 22, 30 and 40: how much of the memory that a pool holds is of use to anybody."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SIZE
from pools.base import NULL, Pool
from pools.gfp import ATOMIC
from pools.kmalloc import KmallocPool
from pools.nta import V1, V2
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim
from ustack.lab.trace import Replay, make_pool, replay
from ustack.lab.traffic import JUMBO_FRAME, MTU_FRAME, SHINFO, burst, churn, grains, jumbo, mtu_and_ack, odd, standing

if TYPE_CHECKING:
    from ustack.lab.trace import Trace
    from ustack.lab.traffic import Sizes

GROWING_V1: Final = V1._replace(initial_regions=1, grows=True)
LEAN_V2: Final = V2._replace(initial_regions=1)
"""Both versions of NTA with one region to begin with: what is compared is the packing, not what was taken in advance."""

MIB: Final = 1 << 20


@claim(
    16,
    "PZ",
    "Memory that is allocated in advance is wasted while it is idle",
    prior="version 1 has 15.95 MiB idle for each CPU, version 2 256 KiB",
)
def idle_memory(terms: Terms) -> Outcome:
    """What each version of NTA holds before the first packet, and what ordinary traffic needs at its peak."""
    first = make_pool("nta", lanes=1, version=V1, faithful=True).held_pages() * PAGE_SIZE
    second = make_pool("nta", lanes=1, version=V2, faithful=True).held_pages() * PAGE_SIZE
    trace = churn("mtu+ack", mtu_and_ack, packets=terms.size(3000, 30000), live=400, seed=terms.seed)
    need = replay(trace, "nta", lanes=1, version=LEAN_V2).peak.pages * PAGE_SIZE
    wasteful = first > 4 * need
    return Outcome(
        "partly" if wasteful and second <= need else "true" if wasteful else "false",
        f"Version 1 takes {first / MIB:.2f} MiB for each lane at once ({V1.initial_regions * 16384 / MIB:.2f} without "
        f"descriptors), "
        f"version 2 {second / 1024:.0f} KiB. 400 packets of a "
        f"bulk transfer "
        f"need {need / 1024:.0f} KiB.",
        {"version 1": first, "version 2": second, "needed by 400 packets": need},
    )


@claim(17, "PZ", "SLAB packs about PAGE/size objects on a page: 59 of 64 bytes", prior="59, that is 92% payload")
def objects_on_a_page(_: Terms) -> Outcome:
    """Fill one page."""
    pool = make_pool("kmalloc", 64, lanes=1)
    count = 0
    while pool.held_pages() <= 1:
        pool.alloc(64, ATOMIC)
        count += 1
    count -= 1
    payload = count * 64 / PAGE_SIZE
    return Outcome(
        "true" if count == 59 else "false", f"{count} objects of 64 bytes on a page: {payload:.1%} of it.", {"objects": count}
    )


class Cache(NamedTuple):
    """A cache as /proc/slabinfo shows it, with the pages that its objects would need at least."""

    active: int
    objects: int
    pages: int
    needed: int

    @property
    def in_use(self) -> float:
        """The utilisation that was quoted in the thread: active objects of all."""
        return self.active / self.objects


def cache_after(trace: Trace, size: int, until_active: int = 0) -> Cache:
    """The cache of `size` bytes after a trace, or at the first moment in the end when only so many objects are active."""
    pool = make_pool("kmalloc", lanes=1)
    assert isinstance(pool, KmallocPool)
    cache = next(cache for cache in pool.caches() if cache.size == size)
    run = Replay(pool, heads=False)
    at_most = 0
    for step in trace.steps:
        run.step(step)
        at_most = max(at_most, len(run.live))
        # An object that waits in the array of a lane counts as active, as in the kernel.
        if not step.size and len(run.live) < at_most and len(run.live) + len(cache.arrays[0].entry) <= until_active:
            break
    active = len(run.live) + len(cache.arrays[0].entry)
    return Cache(active, cache.slabs * cache.num, cache.held_pages(), -(-active // cache.num))


def of_size(size: int) -> Sizes:
    """Traffic of one size."""
    return lambda _: size


@claim(
    18,
    "EP/PZ",
    "size-64 in use: 4239 of 9558 objects, says one; 4497 of 4602, says the other",
    prior="both are real: the same cache, and its history decides. 44.4% on 162 pages, 97.7% on 78",
)
def the_same_cache_twice(terms: Terms) -> Outcome:
    """A burst that drains at random to half, and a population that has hardly changed, on the same cache."""
    drained = cache_after(burst("burst", of_size(64), packets=9500, left=4000, seed=terms.seed, heads=False), 64, 4239)
    quiet = cache_after(burst("ripple", of_size(64), packets=4590, left=4300, seed=terms.seed, heads=False), 64, 4497)
    both = abs(drained.in_use - 4239 / 9558) < 0.01 and abs(quiet.in_use - 4497 / 4602) < 0.015
    return Outcome(
        "true" if both else "false",
        f"After a burst that drained at random {drained.active} of {drained.objects} ({drained.in_use:.1%}) on "
        f"{drained.pages} pages, of "
        f"which {drained.needed} are needed; when little has changed {quiet.active} of {quiet.objects} ({quiet.in_use:.1%}) on "
        f"{quiet.pages} pages, of which {quiet.needed} are needed.",
        {"burst": _as_figures(drained), "hardly changed": _as_figures(quiet)},
    )


def _as_figures(cache: Cache) -> dict[str, Figure]:
    return {"active": cache.active, "objects": cache.objects, "pages": cache.pages, "pages needed": cache.needed}


@claim(19, "EP", "size-32: 1170 of 1232 objects in use, size-128: 663 of 780", prior="95.0% and 85.0%")
def two_more_caches(terms: Terms) -> Outcome:
    """The same for the other two caches that were quoted: what history gives these figures?"""
    small = cache_after(standing("standing", of_size(32), packets=1160, seed=terms.seed, heads=False), 32)
    large = cache_after(burst("burst", of_size(128), packets=760, left=500, seed=terms.seed, heads=False), 128, 663)
    both = abs(small.in_use - 1170 / 1232) < 0.02 and abs(large.in_use - 663 / 780) < 0.01
    return Outcome(
        "true" if both else "false",
        f"size-32: {small.active} of {small.objects} ({small.in_use:.1%}) on {small.pages} pages, of which {small.needed} are "
        f"needed: "
        f"it cannot be better. size-128: {large.active} of {large.objects} ({large.in_use:.1%}) on {large.pages} pages, of "
        f"which "
        f"{large.needed} are needed: a small burst has been and gone.",
        {"size-32": _as_figures(small), "size-128": _as_figures(large)},
    )


@claim(20, "EP", "kmalloc rounds as the page allocator does (implied)", prior="false; kmalloc sits on caches")
def rounding_of_kmalloc(terms: Terms) -> Outcome:
    """What both charge for the same packets."""
    charged: dict[str, Figure] = {}
    ratios = []
    for name, sizes in (("mtu+ack", mtu_and_ack), ("odd", odd), ("jumbo", jumbo)):
        trace = churn(name, sizes, packets=terms.size(2000, 20000), live=300, seed=terms.seed)
        caches = replay(trace, "kmalloc").mean.charged
        blocks = replay(trace, "page_per_object", max_order=3).mean.charged
        ratios.append(caches / blocks)
        charged[name] = caches / blocks
    return Outcome(
        "true" if min(ratios) > 0.95 else "false" if ratios[0] < 0.8 else "partly",
        f"Of what blocks of pages would be charged, kmalloc is charged {ratios[0]:.0%} for a bulk transfer, {ratios[1]:.0%} "
        f"for odd "
        f"sizes and {ratios[2]:.0%} for jumbo frames, where both go by powers of two.",
        {"kmalloc to pages": charged},
    )


def charge_of(pool: Pool, size: int) -> int:
    """What the pool charges for an object of that size."""
    addr = pool.alloc(size, ATOMIC)
    assert addr != NULL
    charge = pool.charge(addr, size)
    pool.free(addr, size)
    return charge


@claim(
    21,
    "EP",
    "The overhead of powers of two is extreme for jumbo frames and for the odd sizes of local sockets",
    prior="9018 + 320: powers of two waste 7046, NTA 6, pages 2950; 1514 + 320: 214 and 22",
)
def overhead_by_size(_terms: Terms) -> Outcome:
    """The charge for each size from 1 to 32 KiB less 320, with the 320 bytes of `skb_shared_info`."""
    caches, chunks = make_pool("kmalloc", 512, lanes=1), make_pool("nta", 512, lanes=1)
    frames: dict[str, Figure] = {}
    lost: dict[int, tuple[int, int, int]] = {}
    for frame in (MTU_FRAME, JUMBO_FRAME, 4096 + SHINFO):
        lost[frame] = (charge_of(caches, frame) - frame, charge_of(chunks, frame) - frame, -frame % PAGE_SIZE)
        frames[str(frame)] = {"powers of two": lost[frame][0], "nta": lost[frame][1], "pages": lost[frame][2]}
    sizes = range(SHINFO + 128, 32769, 117)  # no multiple of a grain more often than others
    by_size: dict[str, Figure] = {
        "size": list(sizes),
        "powers of two": [charge_of(caches, size) / size - 1 for size in sizes],
        "nta": [charge_of(chunks, size) / size - 1 for size in sizes],
        "pages": [-size % PAGE_SIZE / size for size in sizes],
    }
    exact = lost[JUMBO_FRAME] == (7046, 6, 2950) and lost[MTU_FRAME] == (214, 22, 2262)
    (two, grain, page), (two_mtu, grain_mtu, _), worst = lost[JUMBO_FRAME], lost[MTU_FRAME], lost[4096 + SHINFO][0]
    return Outcome(
        "true" if exact and two > 0.5 * JUMBO_FRAME else "partly",
        f"A jumbo frame of 9338 bytes loses {two} to powers of two, {grain} to grains of 64 and {page} to pages; an Ethernet "
        f"frame "
        f"of 1834 loses {two_mtu} and {grain_mtu}. The worst are exact powers of two with 320 on top: {worst} lost for 4416.",
        {"bytes lost": frames, "overhead by size": by_size},
    )


@claim(
    22,
    "EP",
    "NTA wastes less than powers of two for jumbo frames, all in all",
    prior="inside the chunk, yes; with regions of 16 KiB 43% is lost between chunks, about what powers of two lose",
)
def jumbo_all_in_all(terms: Terms) -> Outcome:
    """The same jumbo frames on kmalloc and on both region sizes: pages held against bytes wanted."""
    trace = churn("jumbo", jumbo, packets=terms.size(1500, 15000), live=150, seed=terms.seed)
    results = {
        "kmalloc": replay(trace, "kmalloc", lanes=1),
        "nta, 16 KiB regions": replay(trace, "nta", lanes=1, version=GROWING_V1),
        "nta, 32 KiB regions": replay(trace, "nta", lanes=1, version=LEAN_V2),
    }
    waste: dict[str, Figure] = {name: result.mean.waste for name, result in results.items()}
    peak: dict[str, Figure] = {name: result.peak.waste for name, result in results.items()}
    pages: dict[str, Figure] = {name: result.peak.pages for name, result in results.items()}
    kmalloc, first, second = (result.peak.waste for result in results.values())
    better = second < kmalloc - 0.08
    return Outcome(
        "partly" if better and first > kmalloc - 0.08 else "true" if better else "false",
        f"At the peak, of the pages held is wasted: kmalloc {kmalloc:.1%}, NTA with regions of 16 KiB {first:.1%}, with 32 KiB "
        f"{second:.1%}. The size of the region decides.",
        {"waste, mean": waste, "waste at the peak": peak, "pages at the peak": pages},
    )


@claim(
    30,
    "PZ",
    "The buddy allocator for small objects wastes much inside and nothing between",
    prior="true",
)
def buddy_for_small_objects(terms: Terms) -> Outcome:
    """A page for each object, on ordinary traffic."""
    trace = churn("mtu+ack", mtu_and_ack, packets=terms.size(3000, 30000), live=400, seed=terms.seed)
    mean = replay(trace, "page_per_object").mean
    return Outcome(
        "true" if mean.internal > 0.5 and abs(mean.external) < 1e-9 else "false",
        f"{mean.internal:.1%} is lost inside the pages, {abs(mean.external):.1%} between them.",
        {"internal": mean.internal, "external": mean.external},
    )


def fullness(pool: Pool, sizes: Sizes, *, failures: int, seed: int) -> tuple[float, float]:
    """How full of requested bytes the arena is when an allocation fails: the mean and the least of so many failures.

    After a failure packets are freed at random until the request fits. Dropping the request instead would let the arena fill up
    with small packets.
    """
    random = Random(seed)
    live: list[tuple[int, int]] = []
    full: list[float] = []
    while len(full) < failures:
        size = sizes(random)
        addr = pool.alloc(size, ATOMIC)
        if addr == NULL:
            full.append(pool.stats.requested / pool.pages.arena.size)
        while addr == NULL:
            place = random.randrange(len(live))
            live[place], live[-1] = live[-1], live[place]
            pool.free(*live.pop())
            addr = pool.alloc(size, ATOMIC)
        live.append((addr, size))
    settled = full[len(full) // 5 :]
    return sum(settled) / len(settled), min(settled)


def any_grains(random: Random) -> int:
    """1 to 128 grains of 64 bytes, each as often as the others."""
    return 64 * random.randint(1, 128)


@claim(
    40,
    "PZ",
    "With pointers that stay fixed, fragmentation cannot be avoided: try 19, 37 and 79 grains",
    prior="89 to 95% full at failures",
)
def no_common_factor(terms: Terms) -> Outcome:
    """The test that was proposed and that nobody ran, and the same for other sizes and pools."""
    failures = terms.size(1000, 10000)
    pages = 514  # 64 regions of 32 KiB, and two pages of descriptors
    nta: dict[str, Figure] = {}
    by: dict[str, tuple[float, float]] = {}
    for name, sizes in (("19, 37, 79", grains), ("1 to 128", any_grains), ("mtu+ack", mtu_and_ack), ("jumbo", jumbo)):
        version = V2._replace(initial_regions=64, grows=False)
        by[name] = fullness(make_pool("nta", pages, lanes=1, version=version), sizes, failures=failures, seed=terms.seed)
        nta[name] = {"mean": by[name][0], "least": by[name][1]}
    others: dict[str, Figure] = {}
    for name, options in (("kmalloc", {"lanes": 1}), ("page_frag", {"lanes": 1}), ("srog", {})):
        mean, least = fullness(make_pool(name, pages, **options), grains, failures=failures // 4, seed=terms.seed)
        others[name] = {"mean": mean, "least": least}
    mean, least = by["19, 37, 79"]
    return Outcome(
        "true" if mean < 0.97 else "false",
        f"NTA is {mean:.1%} full when a request fails, {least:.1%} at worst; with 1 to 128 grains {by['1 to 128'][0]:.1%}, "
        f"with a bulk "
        f"transfer {by['mtu+ack'][0]:.1%}, with jumbo frames {by['jumbo'][0]:.1%}.",
        {"nta": nta, "19, 37, 79 on the others": others},
    )
