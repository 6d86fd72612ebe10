"""Virtual time: stacks, wires and a clock that jumps from event to event.

A `World` is deterministic: the same seed and the same calls give the same run, and a backoff of ten minutes takes a
millisecond. Nothing in it knows asyncio. `VirtualLoop` is an asyncio event loop whose time and whose only source of events is a
world, so that code written for real sockets runs in virtual time unchanged.
"""

from __future__ import annotations

import asyncio
import selectors
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ustack.env import Env
    from ustack.link.simwire import SimDevice


class Host(Protocol):
    """What takes part in a world: a stack."""

    @property
    def env(self) -> Env:
        """The host's surroundings; its clock is set by the world."""

    def receive(self, device: Any) -> object:
        """Process a batch of frames that wait in `device`."""

    def flush(self) -> object:
        """Wake users and send what is due."""


class World:
    """Hosts, events, and `now` (seconds from 0). Everything random comes from `random`, so from `seed`."""

    __slots__ = ("_devices", "_events", "_hosts", "_order", "now", "random", "seed", "steps")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._hosts: list[Host] = []
        self._devices: list[tuple[Host, SimDevice]] = []

    def add(self, host: Host, *devices: SimDevice) -> None:
        """Let `host` live in this world, receiving from `devices`."""
        self._hosts.append(host)
        self._devices += [(host, device) for device in devices]
        host.env.timers.now = self.now

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call `callback` at `when` (seconds). Events of the same moment happen in the order in which they were asked for."""
        self._order += 1
        heappush(self._events, (when, self._order, callback))

    def after(self, delay: float, callback: Callable[[], None]) -> None:
        """Call `callback` in `delay` seconds."""
        self.at(self.now + delay, callback)

    def step(self, limit: float = inf) -> bool:
        """Go to the next moment at which something happens, and let it happen.

        When nothing happens up to `limit` (seconds), the clock goes there and the result is False.
        """
        self.flush()
        hosts = self._hosts
        events = self._events
        when = events[0][0] if events else inf
        for host in hosts:
            deadline = host.env.timers.next_deadline()
            if deadline < when:
                when = deadline
        if when > limit or when == inf:
            if self.now < limit < inf:
                self._move(limit)
            return False
        self.steps += 1
        self._move(max(when, self.now))
        while events and events[0][0] <= self.now:
            heappop(events)[2]()
        for host, device in self._devices:
            while device.waiting:
                host.receive(device)
        self.flush()
        return True

    def flush(self) -> None:
        """Let every host wake its users and send what is due."""
        for host in self._hosts:
            host.flush()

    def _move(self, now: float) -> None:
        self.now = now
        for host in self._hosts:
            host.env.timers.run(now)

    def run_until(self, predicate: Callable[[], bool], deadline: float = inf) -> bool:
        """Go on until `predicate()` is true; False when it is still not at `deadline` (seconds) or when nothing is left to
        happen.
        """
        while not predicate():
            if not self.step(deadline):
                return predicate()
        return True

    def run(self, seconds: float) -> None:
        """Go on for `seconds`."""
        limit = self.now + seconds
        while self.step(limit):
            pass


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop in the virtual time of `world`. Real file descriptors, threads and signals never wake it.

    Waiting for something that can never happen raises RuntimeError instead of hanging.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__(_WorldSelector(world, lambda: bool(self._ready)))  # type: ignore[attr-defined]  # BaseEventLoop's queue

    def time(self) -> float:
        """The world's clock."""
        return self._world.now


class _WorldSelector(selectors.BaseSelector):
    """Waits by letting the world go on. File descriptors are accepted, since the loop has a self-pipe, and are never ready.

    `is_busy` says whether callbacks wait to be called, who must see the world as it is now.
    """

    def __init__(self, world: World, is_busy: Callable[[], bool]) -> None:
        self._world = world
        self._is_busy = is_busy
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        world = self._world
        world.flush()
        if self._is_busy():
            return []
        if timeout is None:
            if not world.step():
                raise RuntimeError(f"nothing will ever happen again in this world (seed {world.seed}, {world.now} s)")
        elif timeout > 0:
            world.step(world.now + timeout)
        return []
