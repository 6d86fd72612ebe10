"""How small may the reserve be? Found by trying, for each pool and each kind of ring, and compared with what is worked out.

Claim 46 (Andrew Morton, 2006): for some amount of reserved memory the system cannot deadlock any more. Two amounts are looked
for. `lives` is the smallest with which all work is done, however slowly. `serves` is the smallest with which nothing of the
disk's connection ever waits for memory: no allocation is refused and no request held back, so that all requests that may be in
flight are, whatever is lost on the wire. That is what the reserve is made for, and what `Stack(reserve="auto")` must never be
below.

Two moments are the worst, and both happen here: all requests are writes that nobody has acknowledged, and the answers to all
come behind a segment that is lost. The second needs an unlucky wire (`FirstOfBurstLost`), chance alone hardly ever comes to it.
Again and again the disk's address is forgotten as well (`ip neigh flush`), so that frames wait until ARP has an answer.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pools.arena import PAGE_SHIFT
from pools.base import by_name
from ustack.lab.pressed import NBD_PORT, Pressed, TakenRing, Work
from ustack.link.device import FEATURE_CSUM
from ustack.link.simwire import Impairments
from ustack.mem.reserve import Demand
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.reserve_size import Link, budget, ring_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ustack.link.simwire import WireFrame

POOLS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "kmalloc": ("kmalloc", {}),
    "nta": ("nta", {}),
    "srog": ("srog", {}),
    "srog, fallback": ("srog", {"role": "fallback"}),
    "page_per_object": ("page_per_object", {}),
    "page_frag": ("page_frag", {}),
}
"""Every pool, by name and options."""

DEMAND: Final = Demand(16, 16 << 10)
"""Requests in flight, and the bytes of each, unless told otherwise."""

ROUNDS: Final = 18
REQUESTS_MIN: Final = 60
"""Requests of a run, for each that may be in flight, and at least."""

CROWD: Final = 30
MTU: Final = 1500

MEMORY: Final = 8 << 20
SHARE: Final = 4
"""Packet memory in bytes, at least, and in parts of which the reserve is one."""

FORGET: Final = 0.05
"""Virtual seconds after which the disk's address is forgotten."""

BULK: Final = 1000
"""Bytes from which on a frame is one of a burst."""

LIMIT: Final = 10.0
"""Virtual seconds after which a run counts as standing still."""

GOOD_WIRE: Final = Impairments(delay=0.001)
BAD_WIRE: Final = Impairments(delay=0.001, jitter=0.002, loss=0.01, duplicate=0.01)

BURSTS: Final = 8
"""Every so many bursts one loses its first segment: the congestion window has grown to all answers by then."""

RUNS: Final = ((1.0, GOOD_WIRE), (0.0, GOOD_WIRE), (0.5, BAD_WIRE))
"""What each seed is run with: the share of reads, and the wire."""


class FirstOfBurstLost:
    """A wire that loses the first segment of every eighth burst from the disk: all answers behind it wait for it."""

    def __init__(self, pressed: Pressed) -> None:
        self._world = pressed.world
        self._send = pressed.peer_device.wire
        self._last = 0.0
        self._bursts = 0
        pressed.peer_device.wire = self.send

    def send(self, frame: WireFrame) -> None:
        """A frame from the disk's side."""
        now = self._world.now
        if len(frame.data) > BULK and int.from_bytes(frame.data[34:36], "big") == NBD_PORT:
            burst = now > self._last
            self._last = now
            self._bursts += burst
            if burst and self._bursts % BURSTS == 0:
                return
        assert self._send is not None
        self._send(frame)


class Found(NamedTuple):
    """Pages: what was worked out, and the smallest reserves that were found to do."""

    pool: str
    linear: bool
    worked_out: int
    serves: int
    lives: int

    @property
    def ratio(self) -> float:
        """How much more is worked out than is needed; 1 or more, and no more than 2."""
        return self.worked_out / self.serves


class Run(NamedTuple):
    """What one run came to: whether all work was done, how many allocations were refused that may use the reserve, and how
    often a request was held back.
    """

    done: bool
    refused: int
    throttled: int

    @property
    def served(self) -> bool:
        """Whether nothing of the disk's connection waited for memory."""
        return self.done and not self.refused and not self.throttled


def worked_out(pool: str, linear: bool, demand: Demand = DEMAND) -> int:
    """Pages that are worked out for `demand`."""
    name, options = POOLS[pool]
    make_pool = partial(by_name(name), **options)
    link = Link(MTU, linear)
    limits = TcpConfig()
    found = budget(make_pool, demand, link, sndbuf_max=limits.wmem_max, rcvbuf_max=limits.rmem_max)
    return found.pages + ring_pages(make_pool, link)


def run(
    seed: int,
    pool: str,
    linear: bool,
    pages: int,
    *,
    reads: float,
    wire: Impairments,
    requests: int | None = None,
    demand: Demand = DEMAND,
) -> Run:
    """Do so many `requests` on a disk with a reserve of `pages`, while a crowd holds everything else."""
    depth, size = demand.queue_depth, demand.request_size
    disk_size = 8 * depth * size
    name, options = POOLS[pool]
    memory = max(MEMORY, SHARE * worked_out(pool, linear, demand) << PAGE_SHIFT)
    pressed = Pressed(
        seed, memory=memory, pool=name, pool_options=options, linear=linear, features=FEATURE_CSUM, mtu=MTU, wire=wire
    )
    FirstOfBurstLost(pressed)

    async def story() -> None:
        await pressed.serve(disk_size)
        disk = await pressed.attach(depth, size)
        pressed.stack.pages.set_min_pages(pages)
        await pressed.crowd(CROWD)
        ring = pressed.device.ring
        pressed.take_pages()
        if isinstance(ring, TakenRing):
            ring.take_along()
        work = Work(pressed, disk, depth=depth, request_size=size, size=disk_size, reads=reads)
        forgetful = asyncio.get_running_loop().create_task(_forget(pressed))
        await work.do(requests or max(ROUNDS * depth, REQUESTS_MIN))
        forgetful.cancel()

    done = pressed.run(story, LIMIT)
    result = Run(done, pressed.stack.pages.reserve_failures, pressed.stack.reserve.throttled)
    pressed.close()
    return result


async def _forget(pressed: Pressed) -> None:
    """Forget the disk's address again and again."""
    while True:
        await asyncio.sleep(FORGET)
        pressed.stack.interfaces[0].neighbours.close()


def all_runs(seeds: Iterable[int], pool: str, linear: bool, pages: int, demand: Demand = DEMAND) -> Iterator[Run]:
    """Every run of every seed with a reserve of `pages`."""
    return (run(seed, pool, linear, pages, reads=reads, wire=wire, demand=demand) for seed in seeds for reads, wire in RUNS)


def bisect(
    pool: str, linear: bool, seeds: Iterable[int], enough: Callable[[Run], bool], most: int, demand: Demand = DEMAND
) -> int:
    """The smallest reserve, in pages, up to `most`, with which every run is `enough`; `most` + 1 when none is."""
    seeds = list(seeds)

    def does(pages: int) -> bool:
        return all(enough(each) for each in all_runs(seeds, pool, linear, pages, demand))

    low, high = 0, most + 1
    while low < high:
        middle = (low + high) // 2
        if does(middle):
            high = middle
        else:
            low = middle + 1
    return low


def find(pool: str, linear: bool, seeds: Iterable[int], demand: Demand = DEMAND) -> Found:
    """Both amounts for one pool and one kind of ring."""
    seeds = list(seeds)
    most = worked_out(pool, linear, demand)
    serves = bisect(pool, linear, seeds, lambda each: each.served, most, demand)
    return Found(pool, linear, most, serves, bisect(pool, linear, seeds, lambda each: each.done, most, demand))
