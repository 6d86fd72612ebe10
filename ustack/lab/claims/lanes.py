"""Claims 27, 37 and 38: what it costs that memory belongs to a CPU. A lane stands for one."""

from __future__ import annotations

from random import Random

from pools.arena import Arena
from pools.base import NULL
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from pools.kmalloc import KmallocPool
from pools.nta import V1, V2, NtaPool
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim
from ustack.lab.trace import Replay, Step, make_pool
from ustack.lab.traffic import MTU_FRAME, churn, mtu_and_ack


@claim(
    27,
    "EP",
    "SLAB cannot defragment by design: the objects of a page sit in the caches of different CPUs",
    prior="true until the reaper has come; seconds and pages are the result",
)
def arrays_hold_pages(terms: Terms) -> Outcome:
    """Everything is freed, in four lanes at random: pages held at once, while the periodic reaper comes, and after a reap."""
    random = Random(terms.seed)
    lanes, objects = 4, terms.size(6000, 60000)
    pool = make_pool("kmalloc", lanes=lanes)
    assert isinstance(pool, KmallocPool)
    live = [pool.alloc(64, ATOMIC, n % lanes) for n in range(objects)]
    peak = pool.held_pages()
    random.shuffle(live)
    for addr in live:
        pool.free(addr, 64, random.randrange(lanes))
    held = pool.held_pages()
    seconds = 0.0
    course: dict[str, Figure] = {"0": held}
    while pool.held_pages() > held / 10:
        seconds += 2.0
        pool.reap_tick(seconds)
        if seconds % 10 == 0:
            course[f"{seconds:.0f}"] = pool.held_pages()
    late = pool.held_pages()
    pool.reap()
    return Outcome(
        "partly" if held > peak / 10 and pool.held_pages() == 0 else "false" if held <= peak / 10 else "true",
        f"All of {objects} objects are free, and {held} of {peak} pages are held. The reaper that comes every two seconds "
        f"needs "
        f"{seconds:.0f} s to get nine tenths of them ({late} are left); emptying the arrays of all lanes gives every page "
        f"back at once.",
        {"peak": peak, "held": held, "seconds": seconds, "held by second": course, "after a reap": pool.held_pages()},
    )


@claim(
    37,
    "EP",
    "Objects are never freed on another CPU than their own",
    prior="true, and what waits for its owner can starve it",
)
def remote_frees(terms: Terms) -> Outcome:
    """One lane receives, another one reads and frees; now and then the first frees something too, or never."""
    packets = terms.size(2000, 6000)
    trace = churn("remote", mtu_and_ack, packets=packets, live=100, seed=terms.seed, lane=0, free_lane=1)
    parked: dict[str, Figure] = {}
    peaks: dict[str, int] = {}
    pages: dict[str, int] = {}
    for name, every, faithful in (
        ("frees one in ten", 10, False),
        ("never frees", 0, False),
        ("never frees, as posted", 0, True),
    ):
        pool = make_pool("nta", lanes=2, version=V2, faithful=faithful)
        assert isinstance(pool, NtaPool)
        run = Replay(pool)
        most = total = frees = 0
        for step in trace.steps:
            if not step.size:
                frees += 1
                run.free(step.packet, 0 if every and frees % every == 0 else 1)
            else:
                run.step(step)
            now = pool.parked_bytes()
            total += now
            most = max(most, now)
        peaks[name], pages[name] = most, pool.held_pages()
        rate = sum(size for size in _charges(run, trace.steps)) / len(trace.steps)
        parked[name] = {
            "parked at most": most,
            "mean wait, steps": total / len(trace.steps) / rate,
            "pages held": pages[name],
            "failures": run.failures,
        }
    starves = pages["never frees, as posted"] > 2 * pages["never frees"]
    return Outcome(
        "partly" if starves else "true",
        f"True of the addresses. What waits for its owner meanwhile is at most {peaks['frees one in ten'] / 1024:.0f} KiB if "
        f"that lane "
        f"frees one packet in ten, {peaks['never frees'] / 1024:.0f} KiB if it never frees; as posted it is never fetched "
        f"then, and "
        f"the pool grows to {pages['never frees, as posted']} pages where {pages['never frees']} do.",
        parked,
    )


def _charges(run: Replay, steps: tuple[Step, ...]) -> list[int]:
    return [run.pool.charge(0, step.size) + run.pool.head_charge for step in steps if step.size]


@claim(
    38,
    "PZ",
    "With memory owned by CPUs a limit on the reserve is hard to keep",
    prior="violations without a list that all lanes share",
)
def reserve_of_another_lane(_: Terms) -> Outcome:
    """One lane has used up its own, the other has all of its own free: does a critical allocation succeed in the first?"""
    regions = 16
    version = V1._replace(initial_regions=regions)
    posted = make_pool("nta", 1024, lanes=2, version=version, faithful=True)
    while posted.alloc(MTU_FRAME, ATOMIC, 0) != NULL:
        pass
    refused = posted.alloc(MTU_FRAME, MEMALLOC, 0) == NULL
    idle = 0
    while posted.alloc(MTU_FRAME, ATOMIC, 1) != NULL:
        idle += 1
    corrected = NtaPool(PageAllocator(Arena(1024), min_pages=64), lanes=2, version=version)
    while corrected.alloc(MTU_FRAME, ATOMIC, 0) != NULL:
        pass
    served = 0
    for number in range(32):
        served += corrected.alloc(MTU_FRAME, MEMALLOC, number % 2) != NULL
    return Outcome(
        "true" if refused and idle and served == 32 else "partly" if refused else "false",
        f"As posted, a critical packet is refused in a lane that has nothing left while another lane has room for {idle}. "
        f"With a "
        f"reserve that all lanes share, {served} of 32 critical packets are served, in either lane.",
        {"refused as posted": float(refused), "room in the other lane": idle, "served from a shared reserve": served},
    )
