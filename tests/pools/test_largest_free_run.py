"""The largest free run that each pool reports, after the same three objects and one free."""

from __future__ import annotations

import pytest

from pools.arena import PAGE_SIZE, Arena
from pools.base import by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from tests import leaks


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("kmalloc", 2048),  # the object that was freed; the other one of its slab
        ("nta", 32768),  # a region that nobody has touched yet
        ("page_frag", 32768 - 3 * 1856),  # below the three fragments: what is freed above them is lost until all are
        ("page_per_object", 0),
        ("srog", PAGE_SIZE - 48 - 1848),  # the page of one of the others: that of the freed one is gone
    ],
)
def test_largest_free_run(name: str, run: int) -> None:
    pool = leaks.watch_pool(by_name(name)(PageAllocator(Arena(512), min_pages=0)))
    assert pool.largest_free_run() <= pool.held_pages() * PAGE_SIZE
    live = [pool.alloc(1834, ATOMIC) for _ in range(3)]
    pool.free(live.pop(1), 1834)
    assert pool.largest_free_run() == run
    for addr in live:
        pool.free(addr, 1834)
