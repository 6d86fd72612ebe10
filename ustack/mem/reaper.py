"""The reaper: while pages are short, the pool gives back those that it only keeps for later.

A pool holds on to memory that it will most likely need again: free slabs, per-CPU arrays, empty regions. Without this, pages
that nobody uses would keep the arena under pressure after the last packet has gone. In Linux kswapd shrinks the slabs when it
is woken, and a timer drains the arrays (cache_reap, every two seconds).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.timers import Timer

if TYPE_CHECKING:
    from ustack.env import Env

REAP_INTERVAL: Final = 0.5
"""Seconds between two times at least, because every one goes over the whole pool."""


class Reaper:
    """Reaps the pool of `env` when it is woken, and again as long as pages are short."""

    __slots__ = ("_env", "_last", "_timer")

    def __init__(self, env: Env) -> None:
        self._env = env
        self._last = env.timers.now - REAP_INTERVAL
        self._timer = Timer(self._reap)

    def wake(self) -> None:
        """Pages are short (wakeup_kswapd)."""
        if self._timer.pending:
            return
        timers = self._env.timers
        if timers.now - self._last >= REAP_INTERVAL:
            self._reap()
        else:
            timers.set(self._timer, self._last + REAP_INTERVAL)

    def _reap(self) -> None:
        env = self._env
        self._last = env.timers.now
        env.memory.pool.reap()
        if env.memory.pages.under_pressure:
            env.timers.set(self._timer, self._last + REAP_INTERVAL)

    def close(self) -> None:
        """Reap no more."""
        self._timer.cancel()
