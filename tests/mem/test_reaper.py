"""The reaper: at once when it is woken, not more often than it may, and until pages are no longer short."""

from __future__ import annotations

from random import Random

from pools.arena import Arena
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from pools.nta import NtaPool
from ustack.drops import Drops
from ustack.env import Env
from ustack.mem.reaper import REAP_INTERVAL, Reaper
from ustack.mib import Mib
from ustack.skb import SkbMemory
from ustack.timers import Timers


class CountingPool(NtaPool):
    """Counts how often it is reaped."""

    times = 0

    def reap(self) -> int:
        """Reap."""
        self.times += 1
        return super().reap()


def test_it_reaps_until_pages_are_no_longer_short() -> None:
    pool = CountingPool(PageAllocator(Arena(256), min_pages=32))
    timers = Timers(0.0)
    reaper = Reaper(Env(timers, SkbMemory(pool), Drops(), Mib(), Random(1)))
    owner = pool.pages.owner_id("somebody else")
    super(CountingPool, pool).reap()
    taken = []
    while not pool.pages.under_pressure:
        taken.append(pool.pages.alloc(0, ATOMIC, owner))
    reaper.wake()
    reaper.wake()
    assert pool.times == 1
    timers.run(REAP_INTERVAL)
    assert pool.times == 2
    pool.pages.free_bulk(taken)
    timers.run(2 * REAP_INTERVAL)
    assert pool.times == 3
    assert timers.next_deadline() > 1e9, "that was the last"
    reaper.wake()
    assert pool.times == 3, "too soon"
    timers.run(3 * REAP_INTERVAL)
    assert pool.times == 4
    reaper.close()
