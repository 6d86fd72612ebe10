"""The size-class adviser: which classes a `kmalloc` pool should have besides its own, for traffic that has been recorded.

"One could add a frequently used size class after profiling", said one side in 2006; "profiling does not scale", said the other.
This does it, exactly: of all sets of at most `count` classes it finds one with the least cost.

What a class costs is less plain than it looks. An object of 1856 bytes is smaller than one of 2048, but a page has room for two
of either. So there are two costs to choose from: `page_share`, what an object keeps others from using, and its size, which is
what it is charged.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from pools.arena import PAGE_SIZE
from pools.kmalloc import SIZES
from pools.slab import object_size, slab_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Advice(NamedTuple):
    """Classes to add, by ascending size, and the cost in bytes of all live objects without them and with them."""

    classes: tuple[int, ...]
    before: float
    after: float


@cache
def page_share(size: int) -> float:
    """Bytes of pages that one object of a class of `size` bytes takes when its slabs are full, bookkeeping included."""
    layout = slab_layout(size)
    total: float = PAGE_SIZE << layout.order
    if layout.off_slab:
        total += page_share(next(general for general in SIZES if general >= layout.management))
    return total / layout.num


def cost_of(live: Mapping[int, float], classes: Sequence[int], cost: Callable[[int], float] = page_share) -> float:
    """Bytes that the objects `live` (requested size: how many, on average) take in those classes, given by ascending size."""
    return sum(count * cost(next(size for size in classes if size >= request)) for request, count in live.items())


def advise(
    live: Mapping[int, float], count: int, *, classes: Sequence[int] = SIZES, cost: Callable[[int], float] = page_share
) -> Advice:
    """The best `count` classes, or fewer if more would not help, to add to `classes` (ascending) for the objects `live`.

    `live` maps a requested size to the number of such objects alive, on average or at the peak. Requests over the largest class
    are left out of account, since nothing can be done for them. Only sizes that occur, in whole cache lines, are considered.
    """
    live = {size: number for size, number in live.items() if number and size <= classes[-1]}
    sizes = sorted({*classes, *(object_size(size) for size in live)})
    given = set(classes)
    # numbers[n]: objects that fit the n smallest sizes
    waiting = dict.fromkeys(sizes, 0.0)
    for size, number in live.items():
        waiting[object_size(size)] += number
    numbers = [0.0]
    for size in sizes:
        numbers.append(numbers[-1] + waiting[size])
    # best[n][extra]: the least cost of the objects that fit the n smallest sizes, if the n-th is a class and `extra` were
    # added, and these classes. A step goes from one class to the next and must not jump over one that is given.
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for place, size in enumerate(sizes):
        each = cost(size)
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        added = 0 if size in given else 1
        for below in range(place, -1, -1):
            step = (numbers[place + 1] - numbers[below]) * each
            for extra, (total, chosen) in best[below].items():
                if extra + added <= count and (extra + added not in found or total + step < found[extra + added][0]):
                    found[extra + added] = (total + step, (*chosen, size) if added else chosen)
            if below and sizes[below - 1] in given:
                break
        best.append(found)
    ends = best[-1]
    before = ends[0][0]
    after, chosen = min(ends.values(), key=lambda end: (end[0], len(end[1])))
    return Advice(chosen, before, after)
