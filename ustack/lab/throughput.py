"""How fast NBD is when the memory is full of packets that nobody reads, compared with before and after.

On a TAP of our own, with the kernel's TCP and the NBD server in a process on the other side. The same work is done three times
on one stack and one connection: with the memory free, full, and free again, for the same time each. What the machine does
beside moves all three, so the rate under pressure is compared with the mean of the others. The network namespace must be
entered before (`netns.enter_own`).
"""

from __future__ import annotations

import asyncio
from random import Random
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from ustack.lab.demo import DemoFailure, Findings, fill_memory, open_disk, stack_on_tap
from ustack.lab.demo_peer import DemoPeer
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from ustack.nbd import NbdClient
    from ustack.stack import Stack

MEMORY: Final = 16 << 20
"""Bytes of packet memory."""

DISK: Final = 8 << 20
"""Bytes of the disk."""

NO_LIMITS: Final = TcpConfig(mem_low=2 * MEMORY, mem_pressure=2 * MEMORY, mem_high=2 * MEMORY)
"""tcp_mem so high that it protects nobody, as on a machine that is short of memory."""

SETTLE: Final = 20.0
"""Seconds in which the memory must be free again when the crowd has gone."""


class Round(NamedTuple):
    """Bytes per second with the memory free, full and free again, and the longest time that one request took while it was
    full.
    """

    before: float
    pressed: float
    after: float
    worst: float

    @property
    def ratio(self) -> float:
        """Throughput under pressure, as a share of that without."""
        return 2 * self.pressed / (self.before + self.after)


class Throughput(NamedTuple):
    """All rounds with one pool."""

    pool: str
    rounds: list[Round]

    @property
    def ratio(self) -> float:
        """The median of the rounds."""
        return median(each.ratio for each in self.rounds)


class _Silent:
    """A `demo.Reporter` that nobody watches."""

    def step(self, text: str) -> None:
        """Something begins."""

    def fact(self, text: str) -> None:
        """Something was found."""

    def expect(self, total: int) -> None:
        """Work begins."""

    def advance(self, nbytes: int) -> None:
        """So much of it is done."""


async def _work(disk: NbdClient, size: int, depth: int, seconds: float) -> tuple[float, float]:
    """Read and write at random, `depth` requests of `size` bytes at a time; returns bytes a second and the slowest request."""
    done = 0
    worst = 0.0
    began = perf_counter()
    end = began + seconds

    async def worker(random: Random) -> None:
        nonlocal done, worst
        data = bytearray(random.randbytes(size))
        while (started := perf_counter()) < end:
            offset = random.randrange(DISK // size) * size
            if random.random() < 0.5:
                await disk.pwrite(data, offset)
            else:
                await disk.pread_into(data, offset)
            worst = max(worst, perf_counter() - started)
            done += size

    await asyncio.gather(*(worker(Random(number)) for number in range(depth)))
    return done / (perf_counter() - began), worst


async def _round(peer: DemoPeer, port: int, pool: str, mode: str, size: int, depth: int, seconds: float) -> Round:
    async with stack_on_tap(Findings(), mode, memory=MEMORY, pool=pool, reserve="auto", tcp=NO_LIMITS) as stack:
        disk = await open_disk(stack, port, depth, request_size=size)
        await _work(disk, size, depth, seconds / 4)  # caches are warm, the congestion window is open
        before, _ = await _work(disk, size, depth, seconds)
        crowd = await fill_memory(stack, peer, _Silent())
        refused = sum(stack.pages.failures)
        pressed, worst = await _work(disk, size, depth, seconds)
        if sum(stack.pages.failures) == refused or not stack.pages.under_pressure:
            raise DemoFailure("the memory did not stay full")
        await peer.do("disperse")
        for transport in crowd:
            transport.abort()
        await _until_free(stack)
        after, _ = await _work(disk, size, depth, seconds)
        await disk.close()
    return Round(before, pressed, after, worst)


async def _until_free(stack: Stack) -> None:
    async with asyncio.timeout(SETTLE):
        while stack.pages.under_pressure:  # noqa: ASYNC110 (pages that come back tell nobody)
            await asyncio.sleep(0.01)


async def measure(pool: str, *, mode: str, size: int, depth: int, seconds: float, rounds: int) -> Throughput:
    """So many rounds with `pool`, each part of a round of so many seconds, `depth` requests of `size` bytes at a time.

    Raises DemoFailure when the memory does not fill or something is not given back, OSError when a request fails.
    """
    async with DemoPeer() as peer:
        port = await peer.do("serve", size=DISK)
        done = [await _round(peer, port, pool, mode, size, depth, seconds) for _ in range(rounds)]
    return Throughput(pool, done)
