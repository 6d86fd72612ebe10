"""What every layer is handed: the clock, the packet memory, the counters and a source of randomness. What `struct net` is to the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

    from ustack.drops import Drops
    from ustack.mib import Mib
    from ustack.skb import SkbMemory
    from ustack.timers import Timers


class Env:
    """One stack's surroundings, shared by all its layers. `random` decides ports, ISNs' secret and identifiers: seed it to repeat a run."""

    __slots__ = ("drops", "memory", "mib", "random", "timers")

    def __init__(self, timers: Timers, memory: SkbMemory, drops: Drops, mib: Mib, random: Random) -> None:
        self.timers = timers
        self.memory = memory
        self.drops = drops
        self.mib = mib
        self.random = random
