"""Claim 36: whether one allocator makes a server faster than another. Times, so they are of this machine."""

from __future__ import annotations

from statistics import median
from time import perf_counter_ns, process_time
from typing import Final

from pools.arena import Arena
from pools.base import by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim
from ustack.lab.pressed import OURS, Pressed

POOLS: Final = ("kmalloc", "nta")
PORT: Final = 80
RESPONSE: Final = bytes(8192)
ROUNDS: Final = 5


def _requests_per_second(pool: str, seed: int, requests: int) -> tuple[float, int]:
    """Requests that a server on our stack answers in a second of CPU time, both ends and the wire included, and "
    "allocations for
    each of them. A connection for each request, as with HTTP/1.0.
    """
    pressed = Pressed(seed, memory=4 << 20, pool=pool, reserve=0)

    async def story() -> None:
        async def answer(reader: object, writer: object) -> None:
            await reader.readuntil(b"\r\n\r\n")  # type: ignore[attr-defined]
            writer.write(RESPONSE)  # type: ignore[attr-defined]
            writer.close()  # type: ignore[attr-defined]

        await pressed.stack.start_server(answer, None, PORT)
        for _ in range(requests):
            reader, writer = await pressed.peer.open_connection(OURS, PORT)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            assert len(await reader.read()) == len(RESPONSE)
            writer.close()

    started = process_time()
    pressed.run(story, 10_000.0)
    taken = process_time() - started
    allocations = pressed.stack.pool.stats.allocs
    pressed.close()
    return requests / taken, allocations // requests


def _nanoseconds(pool: str) -> float:
    """Of one allocation and its free, with others alive."""
    made = by_name(pool)(PageAllocator(Arena(1024)))
    for _ in range(100):
        made.alloc(1834, ATOMIC)
    times = []
    for _ in range(200):
        begun = perf_counter_ns()
        for _ in range(20):
            made.free(made.alloc(1834, ATOMIC), 1834)
        times.append((perf_counter_ns() - begun) / 20)
    return median(times)


@claim(
    36,
    "EP",
    "A web server on NTA answers more requests than on SLAB: over 2300 in a second instead of 1600 to 1800",
    prior="in Python the allocator's share is drowned by the interpreter",
    timed=True,
)
def requests_per_second(terms: Terms) -> Outcome:
    """The same requests on either pool, in turns; and what an allocation costs."""
    requests = terms.size(60, 400)
    rates: dict[str, list[float]] = {pool: [] for pool in POOLS}
    allocations = dict.fromkeys(POOLS, 0)
    for round_ in range(ROUNDS):
        for pool in POOLS:
            rate, allocations[pool] = _requests_per_second(pool, terms.seed + round_, requests)
            rates[pool].append(rate)
    ratio = median(rates["nta"]) / median(rates["kmalloc"])
    cost = {pool: _nanoseconds(pool) for pool in POOLS}
    share = {pool: cost[pool] * allocations[pool] * median(rates[pool]) / 1e9 for pool in POOLS}
    figures: dict[str, Figure] = {
        "requests per second": {pool: median(rates[pool]) for pool in POOLS},
        "nanoseconds of an allocation and its free": dict(cost),
        "allocations for a request": {pool: float(allocations[pool]) for pool in POOLS},
        "share of the time": dict(share),
    }
    return Outcome(
        "true" if ratio > 1.25 else "false",
        f"NTA answers {ratio:.2f} times the requests of kmalloc. A request takes {allocations['kmalloc']} allocations, "
        f"which are "
        f"{share['kmalloc']:.1%} of its time with kmalloc and {share['nta']:.1%} with NTA: one costs "
        f"{cost['kmalloc']:.0f} and "
        f"{cost['nta']:.0f} ns.",
        figures,
    )
