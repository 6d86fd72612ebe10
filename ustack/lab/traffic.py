"""Traffic for traces: who sends what, how long it lives, in which lane and for which socket. The same seed gives the same.

One packet arrives at each tick. How long it lives is drawn from an exponential distribution, so that about as many packets are
alive as the mean lifetime has ticks; a long-lived packet, one that waits in the queue of a socket that nobody reads, stays to
the end.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING, Final

from ustack.lab.trace import Step, Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    Sizes = Callable[[Random], int]

SHINFO: Final = 320
"""Bytes of `struct skb_shared_info` at the end of the data of every packet, on a 64-bit kernel of those years."""

MTU_FRAME: Final = 1514 + SHINFO
ACK_FRAME: Final = 66 + SHINFO
JUMBO_FRAME: Final = 9018 + SHINFO

GRAINS: Final = (19, 37, 79)
"""The sizes, in grains, of the counter-test that Zijlstra proposed: they have no common factor."""


def mtu_and_ack(random: Random) -> int:
    """A bulk transfer: two full Ethernet frames for each ACK, with timestamps."""
    return MTU_FRAME if random.random() < 2 / 3 else ACK_FRAME


def jumbo(_: Random) -> int:
    """Frames of 9018 bytes and nothing else."""
    return JUMBO_FRAME


def odd(random: Random) -> int:
    """What local sockets carry: any size from 64 bytes to 16 KiB, each octave as often as the others."""
    return int(2 ** random.uniform(6, 14)) + SHINFO


def grains(random: Random) -> int:
    """19, 37 and 79 grains of 64 bytes, each as often as the others."""
    return 64 * random.choice(GRAINS)


def churn(
    name: str,
    sizes: Sizes,
    *,
    packets: int,
    live: int,
    seed: int,
    sockets: int = 8,
    lane: int = 0,
    free_lane: int = 0,
    long_lived: float = 0.0,
    heads: bool = True,
) -> Trace:
    """Steady traffic of `packets` packets with about `live` alive at any time. The share `long_lived` stays to the end.

    Packets come in on `lane` and are freed on `free_lane`.
    """
    random = Random(seed)
    steps: list[Step] = []
    ends: list[tuple[float, int]] = []
    for now in range(packets):
        while ends and ends[0][0] <= now:
            steps.append(Step(heappop(ends)[1], 0, free_lane))
        steps.append(Step(now, sizes(random), lane, random.randrange(sockets)))
        lives = random.expovariate(1 / live)
        if random.random() >= long_lived:
            heappush(ends, (now + 1 + lives, now))
    return Trace(name, tuple(steps), heads)


def burst(name: str, sizes: Sizes, *, packets: int, left: int, seed: int, sockets: int = 8, heads: bool = True) -> Trace:
    """A burst of `packets` packets, and then all but `left` of them are freed, in random order."""
    random = Random(seed)
    steps = [Step(packet, sizes(random), 0, random.randrange(sockets)) for packet in range(packets)]
    freed = random.sample(range(packets), packets - left)
    return Trace(name, (*steps, *(Step(packet, 0) for packet in freed)), heads)


def standing(name: str, sizes: Sizes, *, packets: int, seed: int, sockets: int = 8, heads: bool = True) -> Trace:
    """Low churn: `packets` packets arrive, and now and then one goes and another one comes."""
    random = Random(seed)
    steps = [Step(packet, sizes(random), 0, random.randrange(sockets)) for packet in range(packets)]
    live = list(range(packets))
    for packet in range(packets, packets + packets // 10):
        place = random.randrange(len(live))
        steps.append(Step(live[place], 0))
        steps.append(Step(packet, sizes(random), 0, random.randrange(sockets)))
        live[place] = packet
    return Trace(name, tuple(steps), heads)


def workloads(seed: int, *, packets: int = 3000, live: int = 400) -> dict[str, Trace]:
    """The traces on which every pool is compared, by name."""
    return {
        trace.name: trace
        for trace in (
            churn("mtu+ack", mtu_and_ack, packets=packets, live=live, seed=seed),
            churn("jumbo", jumbo, packets=packets, live=live, seed=seed),
            churn("odd", odd, packets=packets, live=live, seed=seed),
            churn("grains", grains, packets=packets, live=live, seed=seed, heads=False),
            churn("long-lived", mtu_and_ack, packets=packets, live=live, seed=seed, long_lived=0.02),
            replace(churn("sent", mtu_and_ack, packets=packets, live=live, seed=seed), clones=True),
            burst("burst", mtu_and_ack, packets=packets // 2, left=packets // 200, seed=seed),
            standing("standing", mtu_and_ack, packets=live, seed=seed),
        )
    }
