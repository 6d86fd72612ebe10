"""How much memory all sockets of a protocol may hold together (tcp_mem, udp_mem), and the pressure between their thresholds.

Memory is taken in pages. Each socket takes whole pages from its protocol ahead of need and charges its skbs against them
(`SocketMemory.forward_alloc`); what it does not need any more goes back. So the figure moves once a page, not once a packet.

The rules are those of Linux (net/core/sock.c, __sk_mem_raise_allocated):

* at most `low` pages: granted, and pressure ends;
* above `pressure`: pressure begins;
* above `high`: refused;
* between: granted without pressure; under pressure only to a socket whose fair share is not used up, which is so while
  `high` > number of sockets * pages of this one. A protocol that knows no pressure (UDP) refuses here;
* whatever of this holds, a socket that has less than its guaranteed minimum in that direction gets more.

Linux looks at the protocol's figure alone. Here packet memory is one arena, with watermarks of its own, and a protocol is
under pressure as well from the moment that free pages fall below `low` until they are back at `high` (pools/buddy.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable

    from pools.buddy import PageAllocator

GROWTH_MIN: Final = 131072
"""Bytes up to which the limits of a socket may grow however little memory there is."""

Limits = tuple[int, int, int]
"""Pages: low, pressure, high."""


def limits_for(pages: PageAllocator, limits: Limits, eighths: int) -> Limits:
    """`limits` with what is 0 put in.

    `high` is by default so many eighths of the memory that ordinary sockets can use: of the arena without what the watermarks
    keep free. `low` is half and `pressure` two thirds of `high`, the proportions of Linux (tcp_init_mem: 4.68, 6.25 and 9.37 %
    of low memory, which sockets share there with everything else; the arena is packet memory and nothing else).
    """
    low, pressure, high = limits
    high = high or max((pages.pages - pages.high_pages) * eighths // 8, 1)
    pressure = max(min(pressure or high * 2 // 3, high), 1)
    return max(min(low or high // 2, pressure), 1), pressure, high  # of no pages pressure would never end


def pages_of(nbytes: int) -> int:
    """A limit in bytes as whole pages, which is none only for 0."""
    return max(nbytes >> PAGE_SHIFT, 1) if nbytes else 0


class ProtocolMemory:
    """What one protocol's sockets hold, in pages (`allocated`), and its limits.

    `has_pressure` is false for a protocol that knows no pressure. `rmem_min` and `wmem_min` are the bytes that each socket may
    hold in each direction whatever the limits say (tcp_rmem[0], tcp_wmem[0]). `sockets` counts those that share. `on_pressure`
    is called with true when the protocol's own pressure begins, with false when it ends.
    """

    __slots__ = (
        "allocated",
        "has_pressure",
        "high",
        "low",
        "on_pressure",
        "over_pressure",
        "pages",
        "peak",
        "pressure",
        "rmem_min",
        "sockets",
        "wmem_min",
    )

    def __init__(
        self,
        pages: PageAllocator,
        limits: Limits,
        rmem_min: int,
        wmem_min: int,
        on_pressure: Callable[[bool], None] | None = None,
    ) -> None:
        self.pages = pages
        self.low, self.pressure, self.high = limits
        self.rmem_min = rmem_min
        self.wmem_min = wmem_min
        self.on_pressure = on_pressure
        self.has_pressure = on_pressure is not None
        self.over_pressure = False  # the protocol's own part of `under_pressure`
        self.allocated = 0
        self.peak = 0
        self.sockets = 0

    def under_pressure(self) -> bool:
        """Whether sockets are to hold back: the protocol's own figure, or the arena (tcp_under_memory_pressure)."""
        return self.over_pressure or self.pages.under_pressure

    def most_for_one(self) -> int:
        """Bytes of truesize beyond which no limit of a socket grows by itself: a quarter of `low`, so that one socket alone
        never brings pressure. (Linux sets tcp_rmem[2] and tcp_wmem[2] to 1/128 of memory at most when it starts, tcp_init.)
        """
        return max(self.low << (PAGE_SHIFT - 2), GROWTH_MIN)

    def give(self, pages: int) -> None:
        """`pages` come back (__sk_mem_reduce_allocated, which ends pressure as soon as the figure is below `low`)."""
        self.allocated -= pages
        if self.over_pressure and self.allocated < self.low:
            self._set_pressure(False)

    def take(self, pages: int, held: int, minimum: int, total: int) -> bool:
        """Take `pages` for a socket that holds `held` bytes in this direction, of which `minimum` are guaranteed, and `total`
        bytes of pages in all; false when it must not (__sk_mem_raise_allocated).
        """
        allocated = self.allocated + pages
        if allocated <= self.low:
            if self.over_pressure:
                self._set_pressure(False)
            granted = not self.pages.under_pressure or (self.has_pressure and self._within_share(total))
        else:
            pressed = self.over_pressure or allocated > self.pressure
            granted = (
                allocated <= self.high
                and self.has_pressure
                and (not (pressed or self.pages.under_pressure) or self._within_share(total))
            )
        if granted or held < minimum:
            self.take_over(pages)
            granted = True
        if allocated > self.pressure:
            self.enter_pressure()
        return granted

    def take_over(self, pages: int) -> None:
        """Take `pages` whatever the limits say (sk_forced_mem_schedule)."""
        self.allocated += pages
        if self.allocated > self.peak:
            self.peak = self.allocated

    def enter_pressure(self) -> None:
        """Pressure begins: the figure is above `pressure`, or a send buffer could not be had (tcp_enter_memory_pressure).

        But not below `low`, where nothing might come that ends it; it is the arena then that is short.
        """
        if self.has_pressure and not self.over_pressure and self.allocated >= self.low:
            self._set_pressure(True)

    def _within_share(self, total: int) -> bool:
        return self.high > self.sockets * ((total + PAGE_MASK) >> PAGE_SHIFT)

    def _set_pressure(self, on: bool) -> None:
        self.over_pressure = on
        if self.on_pressure is not None:
            self.on_pressure(on)
