"""What every layer is handed: the clock, the packet memory, the counters and a source of randomness. What `struct net` is to
the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from ustack.drops import Drops
    from ustack.mib import Mib
    from ustack.skb import SkbMemory
    from ustack.timers import Timers


class Env:
    """One stack's surroundings, shared by all its layers.

    `random` decides ports, secrets and identifiers: seed it to repeat a run. `batching` is true while the stack processes a
    batch, which ends with a flush; work that is left for a flush at any other time calls `want_flush`, and `kick` is who sees
    to it.
    """

    __slots__ = ("batching", "drops", "kick", "memory", "mib", "random", "timers")

    def __init__(self, timers: Timers, memory: SkbMemory, drops: Drops, mib: Mib, random: Random) -> None:
        self.timers = timers
        self.memory = memory
        self.drops = drops
        self.mib = mib
        self.random = random
        self.batching = False
        self.kick: Callable[[], None] | None = None

    def want_flush(self) -> None:
        """Something waits for the next flush."""
        if not self.batching and self.kick is not None:
            self.kick()
