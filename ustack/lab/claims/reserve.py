"""Claim 46: whether there is an amount of reserved memory with which nothing can deadlock, and how large it is."""

from __future__ import annotations

from typing import Final

from ustack.lab.claims.registry import Figure, Outcome, Terms, claim
from ustack.lab.reserve_bisection import run, worked_out
from ustack.link.simwire import Impairments

POOLS: Final = ("kmalloc",)
WIRE: Final = Impairments(delay=0.001, loss=0.01)
REQUESTS: Final = 100


@claim(
    46,
    "AKPM",
    "With enough of min_free_kbytes the machine cannot deadlock",
    prior="true; how much is enough is worth knowing, since nobody in the thread did",
)
def enough_is_enough(terms: Terms) -> Outcome:
    """The smallest reserve with which the work is done, by bisection, and what is worked out from the requests in flight.

    `ustack pressure reserve` does so at length, for every pool and both rings.
    """
    figures: dict[str, Figure] = {}
    holds = True
    for pool in POOLS:
        most = worked_out(pool, False)

        def is_done(pages: int, pool: str = pool) -> bool:
            return run(terms.seed, pool, False, pages, reads=0.5, wire=WIRE, requests=REQUESTS).done

        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            if is_done(middle):
                high = middle
            else:
                low = middle + 1
        served = run(terms.seed, pool, False, most, reads=0.5, wire=WIRE, requests=REQUESTS).served
        holds = holds and served and 0 < low < most
        figures[pool] = {"pages that do": float(low), "pages that are worked out": float(most)}
    least = ", ".join(f"{_pages(figures[pool], 'pages that do'):.0f} ({pool})" for pool in POOLS)
    computed = ", ".join(f"{_pages(figures[pool], 'pages that are worked out'):.0f}" for pool in POOLS)
    return Outcome(
        "true" if holds else "false",
        f"With none it stands still. Pages of reserve with which all work is done at last: {least}. Worked out from 16 "
        f"requests of "
        f"16 KiB in flight, so that none of them ever waits for memory: {computed}.",
        figures,
    )


def _pages(figures: Figure, name: str) -> float:
    assert isinstance(figures, dict)
    pages = figures[name]
    assert isinstance(pages, float)
    return pages
