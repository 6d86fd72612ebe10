"""The reserve: pages under the `min` watermark, which only memalloc sockets may use; who those are, and how much they need.

The rule has three parts, and none is enough alone. An allocation takes from the reserve only after the ordinary way failed,
and only on behalf of a memalloc socket (the page allocator and the pool see to that). A frame that lies in the reserve is for
memalloc sockets, and is dropped when it turns out to be for another (the drop rule; the layers see to that). And receive
buffers come from the reserve only while there is a memalloc socket at all, which is what is kept here.

Its size is the sum of what its users need, `Demand` by `Demand`, or fixed. Either way what one socket may queue is bounded by
it, so that its window promises nothing that the reserve could not hold.

Source: Zijlstra's network reserve of 2006 and Linux 3.6 (sk_set_memalloc, sk_memalloc_socks).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SHIFT
from pools.buddy import default_min_pages
from ustack.link.rxring import LinearRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.env import Env
    from ustack.link.device import Device

SHARE_MAX: Final = 2
"""The reserve is at most one part in so many of the arena: ordinary traffic must get on as well."""


class Demand(NamedTuple):
    """What memalloc connections are used for: requests in flight at once on one, bytes of data of a request, and how many
    connections there are at a time.
    """

    queue_depth: int
    request_size: int
    connections: int = 1


class Budget(NamedTuple):
    """What one connection may use: `sndbuf` and `rcvbuf`, in bytes of truesize, and `pages` of reserve that hold either."""

    sndbuf: int
    rcvbuf: int
    pages: int


class Reserve:
    """The memalloc sockets of a stack, and their demands.

    `fixed` is the size in pages; None has it follow the demands, as `budget_of` works them out, beside `ring_pages()` for the
    receive rings. `throttled` counts how often a new request had to wait for memory.
    """

    __slots__ = ("_budget_of", "_claims", "_env", "_fixed", "_rings", "_rings_hold", "ring_pages", "sockets", "throttled")

    def __init__(
        self, env: Env, fixed: int | None, budget_of: Callable[[Demand], Budget], ring_pages: Callable[[], int]
    ) -> None:
        self._env = env
        self._fixed = fixed
        self._budget_of = budget_of
        self.ring_pages = ring_pages
        self._claims: dict[object, tuple[Demand, Budget]] = {}
        self._rings: list[LinearRing] = []
        self._rings_hold = 0
        self.sockets = 0
        self.throttled = 0

    def watch(self, device: Device) -> None:
        """Post buffers for `device` by the rule. A paged ring needs none: it allocates for a frame once its owner is known."""
        ring = device.ring
        if isinstance(ring, LinearRing):
            self._rings.append(ring)
            ring.emergency = self.sockets > 0

    def set_memalloc(self) -> None:
        """A socket became a memalloc socket (sk_set_memalloc)."""
        self.sockets += 1
        self._apply()

    def clear_memalloc(self) -> None:
        """A memalloc socket is gone, or an ordinary one again (sk_clear_memalloc)."""
        self.sockets -= 1
        self._apply()

    def _apply(self) -> None:
        for ring in self._rings:
            ring.emergency = self.sockets > 0

    # -- its size --

    def may_begin(self) -> bool:
        """Whether a new request may begin: more than half of the reserve is free (as throttle_direct_reclaim has it), without
        what the linear rings hold of it for ever.
        """
        pages = self._env.memory.pages
        if pages.free_pages * 2 > pages.min_pages - self._rings_hold:
            return True
        self.throttled += 1
        return False

    def claim(self, user: object, demand: Demand) -> Budget | None:
        """`user` needs memory for `demand` from now on, until `release`, instead of what it claimed before; returns what a
        connection may use, or None where there is no reserve.

        Raises OSError ENOMEM when the reserve would be more than half of the arena.
        """
        if self._fixed == 0:
            return None
        budget = self._budget_of(demand)
        before = self._claims.get(user)
        self._claims[user] = demand, budget
        if self._fixed is None:
            try:
                self.resize()
            except OSError:
                self._give_back(user, before)
                raise
            return budget
        rings = self.ring_pages()
        self._rings_hold = min(rings, self._fixed // 2)
        connections = sum(demand.connections for demand, _ in self._claims.values())
        most = max(self._fixed - rings, 1) // connections << PAGE_SHIFT
        return Budget(min(budget.sndbuf, most), min(budget.rcvbuf, most), min(budget.pages, self._fixed))

    def release(self, user: object) -> None:
        """`user` needs nothing any more."""
        if user in self._claims:
            self._give_back(user, None)
            self.resize()

    def _give_back(self, user: object, before: tuple[Demand, Budget] | None) -> None:
        if before is None:
            del self._claims[user]
        else:
            self._claims[user] = before

    def fix(self, pages: int | None) -> None:
        """Have so many pages from now on, or (None) what the demands add up to. Raises OSError ENOMEM, as `claim`."""
        self._fixed = pages
        self.resize()

    def resize(self) -> None:
        """Make the reserve as large as it must be now. Raises OSError ENOMEM when that is more than half of the arena."""
        pages = self._env.memory.pages
        wanted = self._fixed
        if wanted is None:
            least = default_min_pages(pages.pages)
            wanted = sum(demand.connections * budget.pages for demand, budget in self._claims.values())
            if wanted:
                self._rings_hold = self.ring_pages()
                wanted += self._rings_hold
            if wanted > max(pages.pages // SHARE_MAX, least):
                raise OSError(
                    errno.ENOMEM,
                    f"a reserve of {wanted << PAGE_SHIFT} bytes is more than half of the packet memory of "
                    f"{pages.pages << PAGE_SHIFT} bytes: have more memory, or fewer or smaller requests in flight",
                )
            wanted = max(wanted, least)
        if wanted != pages.min_pages:
            pages.set_min_pages(wanted)
