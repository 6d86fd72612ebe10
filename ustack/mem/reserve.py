"""The reserve: pages under the `min` watermark, which only memalloc sockets may use, and who those are.

The rule has three parts, and none is enough alone. An allocation takes from the reserve only after the ordinary way failed,
and only on behalf of a memalloc socket (the page allocator and the pool see to that). A frame that lies in the reserve is for
memalloc sockets, and is dropped when it turns out to be for another (the drop rule; the transports see to that). And receive
buffers come from the reserve only while there is a memalloc socket at all, which is what is kept here.

Source: Zijlstra's network reserve of 2006 and Linux 3.6 (sk_set_memalloc, sk_memalloc_socks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.link.rxring import LinearRing

if TYPE_CHECKING:
    from ustack.env import Env
    from ustack.link.device import Device


class Reserve:
    """Counts memalloc sockets and lets posted receive buffers come from the reserve while there are any."""

    __slots__ = ("_env", "_rings", "sockets")

    def __init__(self, env: Env) -> None:
        self._env = env
        self._rings: list[LinearRing] = []
        self.sockets = 0

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
