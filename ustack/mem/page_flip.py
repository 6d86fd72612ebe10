"""Page flipping: received data is given to another process by giving away the pages that it lies on.

The issue is who sees what. A process that has mapped a page sees all of it for as long as it likes, and neither can be taken
back. So a page that is given away leaves the arena for good: `Arena.flip` puts another in its place, at the same addresses, and
whatever the pool does there later is written to the new page. Before it goes, everything on it that is not the socket's is
overwritten with zeros: the packets of others, what packets that were freed have left behind, the headers of the frame. For that
every page is a memfd of its own (`Arena(flippable=True)`), because a memfd can be handed over only as a whole.

What lies on the page beside the socket's own data decides what is copied:

* nothing, or nothing that is alive: nothing is copied;
* data of somebody else, by the policy. "copy": the page stays, and the socket's bytes on it are copied to a page of their own.
  "scrub": the page goes, and all else that was on it is copied to its successor, where it is found under its old address;
* data that somebody else refers to as well (a clone): the socket's bytes are copied.

Source: page flipping as in the receive path of Xen's network front end, and the argument of 2006 about zero-copy receive
(claims 1 to 3): whether pages can be given away depends on how the pool packs them, and what the copies cost on the policy.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, discard_page, page_memfd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ustack.skb import Skb, SkbMemory

Policy = Literal["copy", "scrub"]

COPIED: Final = -1
"""In place of a pfn: a page that copies are put together on."""


class GivenPages(NamedTuple):
    """Received data on pages that belong to whoever holds this, and to nobody else.

    `fds` are memfds of one page each, `pieces` the data in order: (index into `fds`, offset on the page, length). All other
    bytes of the pages are zero.
    """

    fds: list[int]
    pieces: list[tuple[int, int, int]]

    @property
    def length(self) -> int:
        """Bytes of data."""
        return sum(length for _, _, length in self.pieces)

    def close(self) -> None:
        """Give the memory of the pages back, also if somebody has mapped them still: he reads zeros then."""
        for fd in self.fds:
            discard_page(fd)
        self.fds.clear()


class PageFlipper:
    """Gives away pages of `memory`, whose arena must be flippable, by `policy`. Raises ValueError for another arena.

    Counters, in bytes: `in_place` is data that was given where it lay, `copied` data that was copied for its reader, `moved`
    what lay beside data that was given and was copied to the page's successor; `pages` counts the pages that were given away.
    """

    __slots__ = ("_memory", "copied", "in_place", "moved", "pages", "policy")

    def __init__(self, memory: SkbMemory, policy: Policy) -> None:
        if not memory.arena.flippable:
            raise ValueError("the pages of this arena cannot be given away")
        self._memory = memory
        self.policy = policy
        self.in_place = 0
        self.copied = 0
        self.moved = 0
        self.pages = 0

    @property
    def copied_share(self) -> float:
        """The part of what was given that had to be copied, by its reader's side or beside it: 0 is zero copy."""
        total = self.in_place + self.copied
        return (self.copied + self.moved) / total if total else 0.0

    def give(self, skbs: Sequence[Skb]) -> GivenPages:
        """Give away the data of `skbs`, one socket's, from first to last. They still hold their memory: free them.

        Their data must not be read any more, whose bytes may be gone from the arena. Raises OSError, and then nothing has
        changed.
        """
        own = {skb.addr for skb in skbs}
        copied = bytearray()
        order: list[tuple[int, int, int]] = []  # pfn or COPIED, offset, length
        given: dict[int, bool] = {}  # pfn -> whether anything on it must be moved, of the pages that go
        stays = {pfn for skb, pfn, _, _ in _pieces(skbs) if not self._may_go(skb, pfn)}
        for skb, pfn, offset, length in _pieces(skbs):
            if pfn not in given and pfn not in stays:
                if self._holds_only(skb, pfn, own):
                    given[pfn] = False
                elif self.policy == "scrub":
                    given[pfn] = True
                else:
                    stays.add(pfn)
            if pfn in given:
                order.append((pfn, offset, length))
            else:
                start = (pfn << PAGE_SHIFT) + offset
                end = start + length
                while start < end:
                    at = len(copied) & PAGE_MASK
                    size = min(end - start, PAGE_SIZE - at)
                    order.append((COPIED - (len(copied) >> PAGE_SHIFT), at, size))
                    copied += self._memory.mem[start : start + size]
                    start += size
        return self._hand_over(order, given, copied)

    def _may_go(self, skb: Skb, pfn: int) -> bool:
        """Whether nobody else refers to the bytes of `skb` on the page."""
        return skb.dataref is None and self._memory.pages.page_count(pfn) == 1

    def _holds_only(self, skb: Skb, pfn: int, own: set[int]) -> bool:
        """Whether all data on the page is the socket's. A page fragment is nobody else's."""
        return pfn in skb.pfns or self._memory.pool.alone_on(pfn, own)

    def _hand_over(self, order: list[tuple[int, int, int]], given: dict[int, bool], copied: bytearray) -> GivenPages:
        arena = self._memory.arena
        spares: list[int] = []  # all pages are there before anything changes
        made: dict[int, int] = {}
        try:
            for start in range(0, len(copied), PAGE_SIZE):
                spares.append(page_memfd())
                os.pwrite(spares[-1], copied[start : start + PAGE_SIZE], 0)
                made[COPIED - (start >> PAGE_SHIFT)] = spares[-1]
            for pfn, shared in given.items():
                spares.append(page_memfd())
                if shared:
                    os.pwrite(spares[-1], arena.page(pfn), 0)
                made[pfn] = spares[-1]
        except OSError:
            for fd in spares:
                os.close(fd)
            raise
        ranges: dict[int, list[tuple[int, int]]] = {}
        for pfn, offset, length in order:
            if pfn >= 0:
                ranges.setdefault(pfn, []).append((offset, length))
        for pfn, shared in given.items():
            _clear_around(arena.page(pfn), ranges[pfn])
            made[pfn] = arena.flip(pfn, made[pfn])
            size = sum(length for _, length in ranges[pfn])
            self.in_place += size
            if shared:
                self.moved += PAGE_SIZE - size
        self.copied += len(copied)
        self.pages += len(made)
        number = {key: index for index, key in enumerate(made)}
        return GivenPages(list(made.values()), [(number[pfn], offset, length) for pfn, offset, length in order])


def _pieces(skbs: Sequence[Skb]) -> Iterator[tuple[Skb, int, int, int]]:
    """The data of `skbs` in order, cut at the borders of pages: skb, pfn, offset on the page, length."""
    for skb in skbs:
        for addr, length in ((skb.data, skb.tail - skb.data), *skb.frags):
            start, left = addr, length
            while left:
                offset = start & PAGE_MASK
                size = min(left, PAGE_SIZE - offset)
                yield skb, start >> PAGE_SHIFT, offset, size
                start += size
                left -= size


def _clear_around(page: memoryview, ranges: list[tuple[int, int]]) -> None:
    """Zero a page but for `ranges`, (offset, length)."""
    at = 0
    for offset, length in sorted(ranges):
        page[at:offset] = bytes(max(offset - at, 0))
        at = max(at, offset + length)
    page[at:] = bytes(PAGE_SIZE - at)
