"""The critical load: workers that read and write over NBD and compare every byte, and a heartbeat beside them."""

from __future__ import annotations

import asyncio
from math import ceil, log2
from typing import TYPE_CHECKING, Any, Final

from ustack.lab.disk_work import SECTOR
from ustack.lab.pressure.frames import size_between

if TYPE_CHECKING:
    from random import Random

    from ustack.lab.pressure.scenario import Nbd
    from ustack.nbd import NbdClient

FINEST: Final = 1e-6
"""Seconds: the upper bound of the first bucket of a histogram."""

PER_OCTAVE: Final = 4
"""Buckets of a histogram from one power of two to the next."""


class Latencies:
    """A histogram with buckets that grow by the fourth root of two from a microsecond on, and the exact largest value."""

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.largest = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        bucket = max(ceil(PER_OCTAVE * log2(seconds / FINEST)), 0) if seconds > FINEST else 0
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.largest = max(self.largest, seconds)

    def merge(self, report: dict[str, Any]) -> None:
        """Add what `report` of another gave."""
        for upper, count in report["histogram"]:
            bucket = round(PER_OCTAVE * log2(max(upper, FINEST) / FINEST))
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
            self.count += count
        self.largest = max(self.largest, report["max"])

    def cumulative(self) -> tuple[list[float], list[float]]:
        """The upper bounds of the buckets, and the share of all that lies below each."""
        seen = 0
        times, shares = [], []
        for bucket, count in sorted(self.buckets.items()):
            seen += count
            times.append(min(bound(bucket), self.largest))
            shares.append(seen / self.count)
        return times, shares

    def quantile(self, share: float) -> float:
        """Seconds within which that share of all was done, rounded up to the bound of a bucket; 0 when there are none."""
        wanted = share * self.count
        seen = 0
        for bucket, count in sorted(self.buckets.items()):
            seen += count
            if seen >= wanted:
                return min(bound(bucket), self.largest)
        return 0.0

    def report(self) -> dict[str, Any]:
        """Percentiles in seconds, and the histogram as [upper bound in seconds, count]."""
        return {
            "p50": _rounded(self.quantile(0.5)),
            "p90": _rounded(self.quantile(0.9)),
            "p99": _rounded(self.quantile(0.99)),
            "max": _rounded(self.largest),
            "histogram": [[_rounded(bound(bucket)), count] for bucket, count in sorted(self.buckets.items())],
        }


def bound(bucket: int) -> float:
    """The upper bound of a bucket in seconds."""
    return float(FINEST * 2 ** (bucket / PER_OCTAVE))


def _rounded(seconds: float) -> float:
    return round(seconds, 7)


class DiskWork:
    """The requests of `plan` on `disk`, and its heartbeat. Times are those of the running loop.

    `done` requests have been done, the last at `last_done`; `gap` is the longest time between two, the beginning included.
    `failure` is the first error of a request, or what was read wrong.
    """

    def __init__(self, disk: NbdClient, plan: Nbd, random: Random) -> None:
        self._disk = disk
        self._plan = plan
        self._random = random
        self._loop = asyncio.get_running_loop()
        share = plan.disk // (plan.depth + 1) // SECTOR * SECTOR
        self._share = share
        self.planned = plan.requests
        self._image = memoryview(bytearray(share * plan.depth))
        self._left = plan.requests
        self._tasks: list[asyncio.Task[None]] = []
        self._heartbeat: asyncio.Task[None] | None = None
        self.began = self.last_done = 0.0
        self.done = 0
        self.bytes = 0
        self.gap = 0.0
        self.latencies = Latencies()
        self.beats = 0
        self.beat_gap = 0.0
        self._last_beat = 0.0
        self.failure = ""

    def start(self) -> None:
        """Begin."""
        self.began = self.last_done = self._loop.time()
        self._tasks = [self._loop.create_task(self._work(index)) for index in range(self._plan.depth)]
        if self._plan.heartbeat:
            self._heartbeat = self._loop.create_task(self._beat())

    @property
    def standing(self) -> float:
        """Seconds since a request was last done, or since the beginning."""
        return self._loop.time() - self.last_done

    async def wait(self, seconds: float) -> bool:
        """Wait until all is done or one has failed, but not longer than `seconds`; whether it is so."""
        pending = [task for task in self._tasks if not task.done()]
        if pending and not self.failure:
            await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        return bool(self.failure) or all(task.done() for task in self._tasks)

    async def end(self) -> None:
        """Give up what is left."""
        tasks = self._tasks if self._heartbeat is None else [*self._tasks, self._heartbeat]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, index: int) -> None:
        plan = self._plan
        random = self._random
        loop = self._loop
        image = self._image[index * self._share : (index + 1) * self._share]
        while self._left > 0:
            self._left -= 1
            length = size_between(plan.request_size, random) // SECTOR * SECTOR
            at = random.randrange((self._share - length) // SECTOR + 1) * SECTOR
            piece = image[at : at + length]
            offset = index * self._share + at
            began = loop.time()
            try:
                if random.random() < plan.reads:
                    if await self._disk.pread(length, offset) != piece:
                        self._fail(f"what was read at {offset} is not what was written there")
                        return
                else:
                    piece[:] = random.randbytes(length)
                    await self._disk.pwrite(piece, offset)
            except OSError as error:
                self._fail(str(error))
                return
            now = loop.time()
            self.done += 1
            self.bytes += length
            self.gap = max(self.gap, now - self.last_done)
            self.last_done = now
            self.latencies.add(now - began)
            if plan.pause:
                await asyncio.sleep(random.expovariate(1 / plan.pause))

    async def _beat(self) -> None:
        self._last_beat = self._loop.time()
        sector = self._plan.disk - SECTOR
        while True:
            try:
                await self._disk.pread(SECTOR, sector)
            except OSError as error:
                self._fail(f"heartbeat: {error}")
                return
            now = self._loop.time()
            self.beats += 1
            self.beat_gap = max(self.beat_gap, now - self._last_beat)
            self._last_beat = now
            await asyncio.sleep(self._plan.heartbeat)

    def _fail(self, text: str) -> None:
        self.failure = self.failure or text
        self._left = 0

    def report(self, standing: float) -> dict[str, Any]:
        """What it came to. `standing`: the seconds at the end in which nothing was done."""
        if standing and self._heartbeat is not None:
            self.beat_gap = max(self.beat_gap, self._loop.time() - self._last_beat)
        return {
            "requests": self._plan.requests,
            "done": self.done,
            "bytes": self.bytes,
            "began": round(self.began, 6),
            "seconds": round(self.last_done - self.began, 6),
            "gap": round(self.gap, 6),
            "standing": round(standing, 6),
            "failure": self.failure,
            "connections": self._disk.counters(),
            "latency": self.latencies.report(),
            "heartbeats": self.beats,
            "heartbeat_gap": round(self.beat_gap, 6),
        }
