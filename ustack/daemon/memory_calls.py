"""What can be done to the packet memory of a running daemon: record its traffic, add size classes, compact it."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, Final

from pools.kmalloc import KmallocPool
from pools.recorder import RecordingPool

if TYPE_CHECKING:
    from ustack.stack import Stack

RECORD_MAX: Final = 3600.0
"""Seconds that a recording may take."""


def compact(stack: Stack) -> dict[str, int]:
    """Move queued packets together. Returns the pages that were given back, and those that the pool holds now."""
    given_back = stack.compact()
    return {"given_back": given_back, "held": stack.pool.held_pages()}


def _kmalloc(stack: Stack) -> KmallocPool:
    if not isinstance(stack.pool, KmallocPool):
        raise OSError(errno.EOPNOTSUPP, f"the pool {stack.pool.name} has no size classes")
    return stack.pool


def classes(stack: Stack) -> list[int]:
    """The sizes of the general caches in bytes, ascending. Raises OSError EOPNOTSUPP for a pool without any."""
    return [cache.size for cache in _kmalloc(stack).general_caches()]


def add_class(stack: Stack, size: object) -> list[int]:
    """Add a general cache for objects of `size` bytes; returns what there are then. Raises OSError EINVAL, EOPNOTSUPP."""
    pool = _kmalloc(stack)
    if not isinstance(size, int):
        raise OSError(errno.EINVAL, f"{size!r} is no size in bytes")
    try:
        pool.add_class(size)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    return classes(stack)


async def record(stack: Stack, seconds: object) -> list[tuple[int, int, int]]:
    """Record what is allocated and freed for so many seconds: `(number, size, lane)`, and size 0 for a free. Raises OSError
    EINVAL for a time that is none, EBUSY while another recording is made.
    """
    if not isinstance(seconds, int | float) or not 0 < seconds <= RECORD_MAX:
        raise OSError(errno.EINVAL, f"{seconds!r} is no time for a recording: allowed is more than 0, up to {RECORD_MAX:g} s")
    memory = stack.env.memory
    if isinstance(memory.pool, RecordingPool):
        raise OSError(errno.EBUSY, "a recording is being made already")
    recorder = RecordingPool(memory.pool)
    memory.pool = recorder
    try:
        await asyncio.sleep(seconds)
    finally:
        memory.pool = recorder.pool
    return recorder.records


CALLS: Final[dict[str, Any]] = {"compact": compact, "classes": classes, "add_class": add_class, "record": record}
"""The calls of the control socket, by name; each takes the stack, and its arguments by name."""
