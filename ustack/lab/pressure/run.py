"""The course of a run, the same in virtual and in real time: attach the disk, make memory short, work on the disk, judge, and
see that everything is given back.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Protocol

from ustack.drops import DropReason
from ustack.lab.pressure.result import Ending, Job, Result, report
from ustack.lab.pressure.work import DiskWork
from ustack.nbd import NbdClient
from ustack.nbd.connector import connector_for
from ustack.nbd.uri import NbdUri

if TYPE_CHECKING:
    from random import Random

    from ustack.lab.pressure.scenario import Scenario
    from ustack.lab.pressure.subject import Subject
    from ustack.stack import Stack

EXPORT: Final = "disk"

WANT_OF_MEMORY: Final = (DropReason.NOMEM, DropReason.PROTO_MEM, DropReason.MEM_PRESSURE)
"""Why frames are dropped when memory is full."""

FULL_CHECK: Final = 0.01
"""Seconds between two looks at whether an allocation has failed: one that fails tells nobody."""

FULL_LOOKS: Final = 2
"""Looks for which the memory in use must not have grown."""


class Peer(Protocol):
    """The other end of the wire: the NBD server, whoever sends the traffic, and the wire itself with its faults."""

    async def serve(self, size: int) -> int:
        """Export a disk of `size` bytes; returns the port."""

    async def begin(self) -> None:
        """Start the peer's side of all traffic, and the faults of link and server. Returns at once."""

    async def end(self) -> None:
        """Stop all of it."""

    def wire(self) -> Result:
        """What the wire did to frames."""


async def run(job: Job, scenario: Scenario, mode: str, subject: Subject, peer: Peer, host: str, random: Random) -> Result:
    """Run `job`; the stack is left open. Raises OSError when the disk cannot be attached."""
    loop = asyncio.get_running_loop()
    port = await peer.serve(scenario.nbd.disk)
    disk = await _attach(subject, host, port, scenario)
    work = DiskWork(disk, scenario.nbd, random)
    began = loop.time()
    subject.begin()
    await peer.begin()
    try:
        ending = await _work(scenario, subject, work, began + scenario.duration)
        subject.recorder.take(loop.time())
        found = report(job, mode, ending, loop.time() - began, subject, work, peer.wire())
    finally:
        await work.end()
        subject.end()
        await peer.end()
        await disk.close(0.0 if ending_is_bad(work) else 1.0)
    return found


def ending_is_bad(work: DiskWork) -> bool:
    """Whether the connection is of no more use."""
    return bool(work.failure) or work.done < work.planned


async def _attach(subject: Subject, host: str, port: int, scenario: Scenario) -> NbdClient:
    async def create(factory: Any, host: str, port: int) -> tuple[Any, Any]:
        return await subject.stack.create_connection(factory, host, port, memalloc=True)

    connector = connector_for(NbdUri("nbd", host, port, EXPORT), create)
    depth = scenario.nbd.depth + bool(scenario.nbd.heartbeat)
    largest = scenario.nbd.request_size[1]
    timeout = scenario.nbd.request_timeout
    return await NbdClient.open(
        connector, EXPORT, queue_depth=depth, request_size=largest, request_timeout=timeout, dead_after=None
    )


def _is_full(stack: Stack) -> bool:
    """Whether somebody did not get memory: no pages, or no place because there are too few pages, or too many are his."""
    return sum(stack.pages.failures) > 0 or any(stack.drops[reason] for reason in WANT_OF_MEMORY)


async def _wait_until_full(stack: Stack, deadline: float) -> bool:
    """Wait until somebody did not get memory and nobody else gets more than before; whether that was before `deadline`.

    The first who gets none may have asked for several pages in a row, and the pool may have room for smaller packets still.
    """
    loop = asyncio.get_running_loop()
    most = (-1, -1)
    looks = 0
    while looks < FULL_LOOKS:
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(FULL_CHECK)
        if _is_full(stack):
            before, most = most, (stack.pages.peak_used, stack.pool.stats.requested_peak)
            looks = looks + 1 if most == before else 0
    return True


async def _work(scenario: Scenario, subject: Subject, work: DiskWork, deadline: float) -> Ending:
    loop = asyncio.get_running_loop()
    start = scenario.nbd.start
    if isinstance(start, str):
        if not await _wait_until_full(subject.stack, deadline):
            return "never full"
    else:
        await asyncio.sleep(start)
    work.start()
    standstill = scenario.expect.standstill
    while True:
        left = deadline - loop.time()
        if left <= 0:
            return "duration"
        if standstill is not None:
            left = min(left, max(standstill - work.standing, 1e-3))
        if await work.wait(left):
            return "failure" if work.failure else "finished"
        if standstill is not None and work.standing >= standstill:
            return "standstill"
