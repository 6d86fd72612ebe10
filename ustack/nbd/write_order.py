"""Which writes are under way where, so that two that overlap never are at the same time.

NBD promises nothing about the order of requests that are in flight together, and a lost connection leaves open which of them
were done. Were a write and a newer one to the same place both in flight, and only the newer one answered, sending the older
again would undo it. So the newer waits until the older is settled. Writes that do not overlap never wait for each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ustack.nbd.call import Call

GRANULE_SHIFT: Final = 16
"""Calls are filed under the pieces of 64 KiB that they touch."""
MAX_GRANULES: Final = 8
"""A call that touches more pieces is filed in a list of its own, through which everybody looks."""


class WriteOrder:
    """The unsettled writes, trims and zeroes of a session. `add` each before it is sent, `remove` it when it is settled."""

    __slots__ = ("_granules", "_large")

    def __init__(self) -> None:
        self._granules: dict[int, list[Call]] = {}
        self._large: list[Call] = []

    def add(self, call: Call) -> list[Call] | None:
        """File `call`; returns the earlier ones that it overlaps and has to wait for, or None."""
        first = call.offset >> GRANULE_SHIFT
        last = (call.offset + call.length - 1) >> GRANULE_SHIFT
        granules = self._granules
        earlier: list[Call] | None = None
        if last - first >= MAX_GRANULES:
            candidates = {id(other): other for filed in granules.values() for other in filed}
            earlier = _overlapping(call, list(candidates.values()), earlier)
            earlier = _overlapping(call, self._large, earlier)
            self._large.append(call)
            return earlier
        if self._large:
            earlier = _overlapping(call, self._large, earlier)
        for granule in range(first, last + 1):
            filed = granules.get(granule)
            if filed is None:
                granules[granule] = [call]
            else:
                earlier = _overlapping(call, filed, earlier)
                filed.append(call)
        return earlier

    def remove(self, call: Call) -> None:
        """Forget a call that is settled."""
        first = call.offset >> GRANULE_SHIFT
        last = (call.offset + call.length - 1) >> GRANULE_SHIFT
        if last - first >= MAX_GRANULES:
            self._large.remove(call)
            return
        granules = self._granules
        for granule in range(first, last + 1):
            filed = granules[granule]
            if len(filed) == 1:
                del granules[granule]
            else:
                filed.remove(call)

    def __bool__(self) -> bool:
        return bool(self._granules or self._large)


def _overlapping(call: Call, others: list[Call], found: list[Call] | None) -> list[Call] | None:
    start, stop = call.offset, call.offset + call.length
    for other in others:
        if other.offset < stop and start < other.offset + other.length:
            if found is None:
                found = [other]
            elif other not in found:
                found.append(other)
    return found
