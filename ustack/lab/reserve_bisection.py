"""How small may the reserve be? Found by trying, for each pool and each kind of ring, and compared with what is worked out.

Claim 46 (Andrew Morton, 2006): for some amount of reserved memory the system cannot deadlock any more. Two amounts are looked
for. `lives` is the smallest with which all work is done, however slowly. `serves` is the smallest with which no allocation for
the disk's connection is ever refused, so that all requests that may be in flight are, whatever is lost on the wire: that is
what the reserve is made for, and what `Stack(reserve="auto")` must never be below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ustack.lab.pressed import Pressed, Work
from ustack.link.device import FEATURE_CSUM
from ustack.link.simwire import Impairments
from ustack.mem.reserve import Demand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

POOLS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "kmalloc": ("kmalloc", {}),
    "nta": ("nta", {}),
    "srog": ("srog", {}),
    "srog, fallback": ("srog", {"role": "fallback"}),
    "page_per_object": ("page_per_object", {}),
    "page_frag": ("page_frag", {}),
}
"""Every pool, by name and options."""

DEPTH: Final = 16
REQUEST_SIZE: Final = 16 << 10
DISK_SIZE: Final = 2 << 20
REQUESTS: Final = 300
CROWD: Final = 30
MEMORY: Final = 8 << 20
_DEMAND: Final = Demand(DEPTH, REQUEST_SIZE)

LIMIT: Final = 10.0
"""Virtual seconds after which a run counts as standing still."""

WIRES: Final = (
    Impairments(delay=0.001),
    Impairments(delay=0.001, loss=0.02),
    Impairments(delay=0.001, jitter=0.002, loss=0.01, duplicate=0.01),
)


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
    """What one run came to: whether all work was done, and how many allocations were refused that may use the reserve."""

    done: bool
    refused: int


def worked_out(pool: str, linear: bool) -> int:
    """Pages that are worked out for the demand of these runs."""
    with_nobody = _pressed(0, pool, linear, Impairments())
    try:
        demand = with_nobody.stack.reserve.claim("bisection", _DEMAND)
        assert demand is not None
        return demand.pages + with_nobody.stack.reserve.ring_pages()
    finally:
        with_nobody.close()


def _pressed(seed: int, pool: str, linear: bool, wire: Impairments) -> Pressed:
    name, options = POOLS[pool]
    return Pressed(
        seed, memory=MEMORY, pool=name, pool_options=options, linear=linear, features=FEATURE_CSUM, mtu=1500, wire=wire
    )


def run(seed: int, pool: str, linear: bool, pages: int, *, reads: float, wire: Impairments) -> Run:
    """Work on a disk with a reserve of `pages`, while a crowd holds everything else."""
    pressed = _pressed(seed, pool, linear, wire)

    async def story() -> None:
        await pressed.serve(DISK_SIZE)
        disk = await pressed.attach(DEPTH, REQUEST_SIZE)
        pressed.stack.pages.set_min_pages(pages)
        await pressed.crowd(CROWD)
        work = Work(pressed, disk, depth=DEPTH, request_size=REQUEST_SIZE, size=DISK_SIZE, reads=reads)
        await work.do(REQUESTS)

    done = pressed.run(story, LIMIT)
    refused = pressed.stack.pages.reserve_failures
    pressed.close()
    return Run(done, refused)


def bisect(pool: str, linear: bool, seeds: Iterable[int], enough: Callable[[Run], bool], most: int) -> int:
    """The smallest reserve, in pages, up to `most`, with which every run is `enough`; `most` + 1 when none is."""
    seeds = list(seeds)

    def does(pages: int) -> bool:
        return all(
            enough(run(seed, pool, linear, pages, reads=reads, wire=wire))
            for seed in seeds
            for reads in (1.0, 0.0, 0.5)
            for wire in WIRES
        )

    low, high = 0, most + 1
    while low < high:
        middle = (low + high) // 2
        if does(middle):
            high = middle
        else:
            low = middle + 1
    return low


def find(pool: str, linear: bool, seeds: Iterable[int]) -> Found:
    """Both amounts for one pool and one kind of ring."""
    seeds = list(seeds)
    most = worked_out(pool, linear)
    serves = bisect(pool, linear, seeds, lambda each: each.done and not each.refused, most)
    return Found(pool, linear, most, serves, bisect(pool, linear, seeds, lambda each: each.done, most))
