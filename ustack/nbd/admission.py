"""Who may send: a bound on requests and on bytes in flight, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Admission:
    """Counts what is in flight. `enter` when a request may start, `leave` when it is answered.

    A request larger than `max_bytes` is let in when it is alone. With `paused` nobody is let in: the transport has enough to
    send. While `may_begin` says no, one is let in when none is in flight, so that there is always one whose answer makes room.
    """

    __slots__ = ("_bytes", "_depth", "_max_bytes", "_waiting", "closed", "count", "may_begin", "paused")

    def __init__(self, depth: int, max_bytes: int) -> None:
        """At most `depth` requests with `max_bytes` bytes of payload together."""
        self._depth = depth
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.count = 0
        """Requests in flight."""
        self.paused = False
        self.may_begin: Callable[[], bool] = _always
        self.closed = False
        """Everybody is let in at once: there is nothing to wait for, and who comes in will see why."""

    def limit_bytes(self, max_bytes: int) -> None:
        """Let no more than `max_bytes` be in flight, if that is less than before."""
        self._max_bytes = min(self._max_bytes, max_bytes)

    def try_enter(self, nbytes: int) -> bool:
        """Take a place for a request with `nbytes` of payload if there is room and nobody waits for it."""
        if self._waiting or not self._has_room(nbytes):
            return False
        self.count += 1
        self._bytes += nbytes
        return True

    async def enter(self, nbytes: int) -> None:
        """Stand in line. Whoever makes room takes the place in our name before it wakes us, so nobody slips in between."""
        place = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, place))
        self.admit()
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self.leave(nbytes)
                self.admit()
            raise

    def leave(self, nbytes: int) -> None:
        """Give a place back. Call `admit` when all that have become free are given back."""
        self.count -= 1
        self._bytes -= nbytes

    def admit(self) -> None:
        """Let in those for whom there is room now, in the order in which they came."""
        waiting = self._waiting
        while waiting:
            nbytes, place = waiting[0]
            if not place.done():
                if not self._has_room(nbytes):
                    break
                self.count += 1
                self._bytes += nbytes
                place.set_result(None)
            waiting.popleft()

    def _has_room(self, nbytes: int) -> bool:
        if self.closed:
            return True
        if self.paused:
            return False
        if not self.count:
            return True
        return self.count < self._depth and self._bytes + nbytes <= self._max_bytes and self.may_begin()


def _always() -> bool:
    return True
