"""Timers of the stack: a heap with lazy re-arming, and the only clock there is.

`now` (seconds, monotonic, any origin) is moved by whoever drives the stack: the asyncio pump with real time, the simulator
with virtual time. Setting a timer later than before, which TCP does on every ACK, touches no heap: the old entry is re-armed
when it comes up.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER: Final = inf
"""The deadline of a timer that is not set."""


class Timer:
    """One timer: calls `callback()` once when `deadline` (seconds) has come. Set it with `Timers.set`."""

    __slots__ = ("callback", "deadline", "queued")

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.deadline = NEVER
        self.queued = NEVER  # the deadline of its entry in the heap

    def cancel(self) -> None:
        """Do not fire."""
        self.deadline = NEVER

    @property
    def pending(self) -> bool:
        """Whether the timer is set."""
        return self.deadline != NEVER


class Timers:
    """All timers of a stack, and its clock. `alarm` is called with a deadline that comes before all others, when one is set."""

    __slots__ = ("_heap", "_order", "alarm", "now")

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.alarm: Callable[[float], None] | None = None
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0

    def set(self, timer: Timer, deadline: float) -> None:
        """Let `timer` fire at `deadline` (seconds), and not at what was set before."""
        timer.deadline = deadline
        if deadline < timer.queued:
            timer.queued = deadline
            self._order += 1
            heap = self._heap
            heappush(heap, (deadline, self._order, timer))
            if self.alarm is not None and heap[0][2] is timer:
                self.alarm(deadline)

    def next_deadline(self) -> float:
        """When `run` wants to be called next (seconds); NEVER when no timer is set. May be early, never late."""
        heap = self._heap
        while heap and heap[0][2].deadline == NEVER:
            when, _, timer = heappop(heap)
            if timer.queued == when:
                timer.queued = NEVER
        return heap[0][0] if heap else NEVER

    def run(self, now: float) -> None:
        """Move the clock to `now` and fire what is due, in the order of the deadlines. The clock never moves back."""
        self.now = max(self.now, now)
        now = self.now
        heap = self._heap
        while heap and heap[0][0] <= now:
            when, _, timer = heappop(heap)
            if timer.queued != when:
                continue  # an entry that a shorter deadline overtook
            timer.queued = NEVER
            deadline = timer.deadline
            if deadline <= now:
                timer.deadline = NEVER
                timer.callback()
            elif deadline != NEVER:
                self.set(timer, deadline)
