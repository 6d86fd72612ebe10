"""Work on a disk that checks itself: copies in requests of random size, and reads and writes whose every byte is known."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from ustack.nbd import NbdClient

SECTOR: Final = 512
"""Bytes that requests are multiples of."""

SMALLEST_BITS: Final = 9
LARGEST_BITS: Final = 19
"""Requests of a copy have 2**9 to 2**19 bytes, each power of two as likely as the next."""


def random_pieces(size: int, rng: random.Random) -> list[tuple[int, int]]:
    """Cut `size` bytes into pieces (offset, length) of random length."""
    pieces = []
    offset = 0
    while offset < size:
        length = int(2 ** rng.uniform(SMALLEST_BITS, LARGEST_BITS)) // SECTOR * SECTOR
        length = min(length, size - offset)
        pieces.append((offset, length))
        offset += length
    return pieces


async def copy(
    disk: NbdClient,
    memory: bytearray,
    rng: random.Random,
    *,
    write: bool,
    requests: int,
    progress: Callable[[int], None],
) -> float:
    """Copy all of `memory` to the disk (`write`) or the disk to `memory`, `requests` at a time; returns the seconds it
    took, flush included.

    `progress` is called with the bytes of each request that is done. Raises OSError.
    """
    pieces = iter(random_pieces(len(memory), rng))
    view = memoryview(memory)

    async def work() -> None:
        for offset, length in pieces:
            piece = view[offset : offset + length]
            if write:
                await disk.pwrite(piece, offset)
            else:
                await disk.pread_into(piece, offset)
            progress(length)

    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(requests):
            group.create_task(work())
    if write:
        await disk.flush()
    return perf_counter() - started


class CheckedWork:
    """Workers that read and write at random on a `disk` that holds `image`, each on a part of its own, and compare what
    they read.

    `latencies` has the seconds of each request that is done, `bytes` their sum, `last_done` the time (perf_counter) of the
    last.
    """

    def __init__(self, disk: NbdClient, image: bytearray, rng: random.Random, *, workers: int, request_size: int) -> None:
        self._disk = disk
        self._image = image
        self._rng = rng
        self._workers = workers
        self._request_size = request_size
        self._tasks: list[asyncio.Task[None]] = []
        self._left = 0
        self.latencies: list[float] = []
        self.bytes = 0
        self.last_done = perf_counter()

    def start(self, requests: int) -> None:
        """Begin with `requests` requests."""
        self._left = requests
        part = len(self._image) // self._workers
        self._tasks = [asyncio.create_task(self._work(index * part, part)) for index in range(self._workers)]

    @property
    def done(self) -> bool:
        """Whether all requests are done, or one has failed."""
        return all(task.done() for task in self._tasks) or any(task.done() and task.exception() for task in self._tasks)

    async def wait(self, seconds: float) -> bool:
        """Wait until all is done, but not longer than `seconds`; whether it is. Raises what a request raised."""
        done, pending = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return not pending

    async def cancel(self) -> None:
        """End."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, start: int, size: int) -> None:
        rng = self._rng
        length = self._request_size
        places = size // length
        view = memoryview(self._image)
        while self._left > 0:
            self._left -= 1
            offset = start + rng.randrange(places) * length
            piece = view[offset : offset + length]
            began = perf_counter()
            if rng.random() < 0.5:
                piece[:] = rng.randbytes(length)
                await self._disk.pwrite(piece, offset)
            elif await self._disk.pread(length, offset) != piece:
                raise OSError(f"what was read at {offset} is not what was written there")
            self.last_done = perf_counter()
            self.latencies.append(self.last_done - began)
            self.bytes += length
