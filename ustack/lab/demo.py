"""The demo: the main job, end to end, with every claim checked.

A disk image goes to an NBD server over our own TCP and comes back the same. Then the disaster of 2006: ordinary connections
whose readers never read fill the packet memory, while work on the disk goes on. With the reserve it finishes; without, it
stands still, which is shown too.

The namespace must be entered before (`netns.enter_own`). What happens is told to a `Reporter`; what was found is a `Findings`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from pools.arena import PAGE_SHIFT
from ustack.daemon import reports
from ustack.daemon.link import bring_up
from ustack.daemon.ping import PingSeries
from ustack.lab.demo_peer import DemoPeer
from ustack.lab.disk_work import CheckedWork, copy
from ustack.link.tap import TapDevice
from ustack.nbd import NbdClient
from ustack.nbd.connector import connector_for
from ustack.nbd.uri import NbdUri
from ustack.stack import Stack
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TAP: Final = "ustack0"
OURS: Final = "10.77.0.2"
KERNEL: Final = "10.77.0.1"
PREFIX_LEN: Final = 24
CROWD_PORT: Final = 1234

REQUESTS: Final = 16
"""Requests in flight while copying."""

SMALL_MEMORY: Final = 8 << 20
"""Bytes of packet memory in the pressure part: little, so that it is soon full."""

NO_TCP_MEM: Final = TcpConfig(mem_low=2 * SMALL_MEMORY, mem_pressure=2 * SMALL_MEMORY, mem_high=2 * SMALL_MEMORY)
"""The limits of all connections together (tcp_mem), so high that they protect nobody, as on a machine that is short of
memory."""

CROWD: Final = 150
"""Connections that nobody reads from for that memory, and as many more for more: more than twice what it holds at their
receive limit."""

PRESSURE_REQUESTS: Final = 1000
PRESSURE_REQUEST_SIZE: Final = 64 << 10
PRESSURE_WORKERS: Final = 4
"""Work on the disk under pressure: as many requests, of so many bytes, so many at a time."""

FILL_TIMEOUT: Final = 20.0
"""Seconds until the crowd must have filled the memory."""

ALIVE_TIMEOUT: Final = 30.0
"""Seconds in which the work must be done with the reserve, and after the crowd has gone."""

STANDSTILL: Final = 3.0
"""Seconds without a single finished request that count as standing still."""

STANDSTILL_TIMEOUT: Final = 15.0
"""Seconds until it must have come to that without the reserve."""


class Reporter(Protocol):
    """Who shows the demo."""

    def step(self, text: str) -> None:
        """Something begins."""

    def fact(self, text: str) -> None:
        """Something was found."""

    def expect(self, total: int) -> None:
        """Work of `total` bytes begins."""

    def advance(self, nbytes: int) -> None:
        """So much of it is done."""


class DemoFailure(Exception):
    """What the demo wanted to show is not so."""


@dataclass
class Findings:
    """What the demo found. Rates in bytes a second, times in seconds, sizes in bytes."""

    write_rate: float = 0.0
    read_rate: float = 0.0
    drops: dict[str, int] = field(default_factory=dict)
    by_owner: dict[str, int] = field(default_factory=dict)
    """Who held the memory when it was full."""
    memory_size: int = 0
    reserve: int = 0
    reserve_low_water: int = 0
    worst_latency: float = 0.0
    pressure_rate: float = 0.0
    standstill_requests: int = 0
    """Requests that were finished without the reserve before nothing moved any more."""
    recovery: float = 0.0


async def run(size: int, reporter: Reporter) -> Findings:
    """Run the demo with an image of `size` bytes. Raises DemoFailure when a check fails, OSError."""
    findings = Findings()
    rng = random.Random()
    image = bytearray(os.urandom(size))
    async with DemoPeer() as peer:
        port = await peer.do("serve", size=size)
        await _copy_both_ways(peer, port, image, rng, reporter, findings)
        await _with_reserve(peer, port, image, rng, reporter, findings)
        await _without_reserve(peer, port, image, rng, reporter, findings)
        reporter.step("The disk after all that")
        if await peer.do("sha256") != hashlib.sha256(image).hexdigest():
            raise DemoFailure("the disk does not hold what was written to it")
        reporter.fact("holds exactly what was written to it (sha256)")
    return findings


# -- part 1: the job ---------------------------------------------------------------------------------------------------------


async def _copy_both_ways(
    peer: DemoPeer, port: int, image: bytearray, rng: random.Random, reporter: Reporter, findings: Findings
) -> None:
    reporter.step(f"Our stack on {TAP}: {OURS}/{PREFIX_LEN}; the kernel's side: {KERNEL}")
    async with stack_on_tap(findings) as stack:
        began = perf_counter()
        pinged: list[dict[str, Any]] = []
        await PingSeries(stack, KERNEL, count=1, interval=1, size=56, timeout=3, report=pinged.append).run()
        neighbours = [each for each in reports.devices(stack)[0]["neighbours"] if each["lladdr"]]
        if not pinged or not neighbours:
            raise DemoFailure(f"{KERNEL} does not answer")
        reporter.fact(f"neighbour {KERNEL} is at {neighbours[0]['lladdr']}, found and pinged in {_ms(perf_counter() - began)}")

        reporter.step("TCP connection of our own making to the NBD server")
        began = perf_counter()
        disk = await open_disk(stack, port)
        reporter.fact(f"connected and negotiated in {_ms(perf_counter() - began)}: {disk.size >> 20} MiB")

        reporter.step(
            f"Copy {len(image) >> 20} MiB of random data to the server, in requests of random size, {REQUESTS} at a time"
        )
        reporter.expect(len(image))
        seconds = await copy(disk, image, rng, write=True, requests=REQUESTS, progress=reporter.advance)
        findings.write_rate = len(image) / seconds
        reporter.fact(f"{findings.write_rate / 1e6:.0f} MB/s")

        reporter.step("Copy it back")
        back = bytearray(len(image))
        reporter.expect(len(image))
        seconds = await copy(disk, back, rng, write=False, requests=REQUESTS, progress=reporter.advance)
        findings.read_rate = len(image) / seconds
        reporter.fact(f"{findings.read_rate / 1e6:.0f} MB/s")

        reporter.step("Compare")
        digest = hashlib.sha256(image).hexdigest()
        if await peer.do("sha256") != digest or hashlib.sha256(back).hexdigest() != digest:
            raise DemoFailure("the copies differ")
        reporter.fact(f"original, the server's and the copy are the same: sha256 {digest[:16]}...")
        await disk.close()
    reporter.fact("connection closed, every page of packet memory returned")


# -- part 2: pressure --------------------------------------------------------------------------------------------------------


async def _with_reserve(
    peer: DemoPeer, port: int, image: bytearray, rng: random.Random, reporter: Reporter, findings: Findings
) -> None:
    reporter.step(
        f"Pressure: {SMALL_MEMORY >> 20} MiB of packet memory, {CROWD} connections whose readers never read; reserve on"
    )
    async with stack_on_tap(findings, memory=SMALL_MEMORY, tcp=NO_TCP_MEM) as stack:
        disk = await open_disk(stack, port)
        await fill_memory(stack, peer, reporter)
        full = reports.memory(stack)
        findings.by_owner = full["by_owner"]
        findings.memory_size = full["size"]
        findings.reserve = full["reserve"]["size"]
        total = PRESSURE_REQUESTS * PRESSURE_REQUEST_SIZE
        work = CheckedWork(disk, image, rng, workers=PRESSURE_WORKERS, request_size=PRESSURE_REQUEST_SIZE)
        began = perf_counter()
        work.start(PRESSURE_REQUESTS)
        reporter.expect(total)
        if not await _watch(work, reporter, ALIVE_TIMEOUT):
            await work.cancel()
            raise DemoFailure(f"with the reserve on, the work on the disk was not done in {ALIVE_TIMEOUT:g} s")
        findings.pressure_rate = total / (perf_counter() - began)
        findings.worst_latency = max(work.latencies)
        findings.reserve_low_water = reports.memory(stack)["reserve"]["low_water"]
        reporter.fact(
            f"NBD went on: {PRESSURE_REQUESTS} reads and writes of {PRESSURE_REQUEST_SIZE >> 10} KiB,"
            f" {findings.pressure_rate / 1e6:.0f} MB/s, the slowest took {_ms(findings.worst_latency)}"
        )
        await disk.close()
        await peer.do("disperse")


async def _without_reserve(
    peer: DemoPeer, port: int, image: bytearray, rng: random.Random, reporter: Reporter, findings: Findings
) -> None:
    reporter.step("The same with the reserve off")
    async with stack_on_tap(findings, memory=SMALL_MEMORY, tcp=NO_TCP_MEM, reserve=0) as stack:
        disk = await open_disk(stack, port)
        crowd = await fill_memory(stack, peer, reporter)
        work = CheckedWork(disk, image, rng, workers=PRESSURE_WORKERS, request_size=PRESSURE_REQUEST_SIZE)
        work.start(PRESSURE_REQUESTS)
        try:
            await _await_standstill(work, reporter)
            findings.standstill_requests = len(work.latencies)
            reporter.fact(
                f"NBD stands still: {len(work.latencies)} of {PRESSURE_REQUESTS} requests, then none in {STANDSTILL:g} s"
            )
            reporter.step("The blocked connections are closed")
            began = perf_counter()
            before = len(work.latencies)
            for transport in crowd:
                transport.abort()
            while len(work.latencies) == before and perf_counter() - began < ALIVE_TIMEOUT:
                await work.wait(0.02)
            findings.recovery = perf_counter() - began
            if not await work.wait(ALIVE_TIMEOUT):
                raise DemoFailure(f"the work on the disk did not recover in {ALIVE_TIMEOUT:g} s")
            reporter.fact(f"NBD goes on after {_ms(findings.recovery)}, and finishes")
        finally:
            await work.cancel()
        await disk.close()


async def fill_memory(stack: Stack, peer: DemoPeer, reporter: Reporter) -> list[asyncio.Transport]:
    """Let the crowd in until ordinary allocations fail; returns our ends of its connections."""
    crowd: list[asyncio.Transport] = []
    size = stack.arena.size
    connections = CROWD * size // SMALL_MEMORY
    server = await stack.create_server(lambda: _NeverRead(crowd), None, CROWD_PORT, backlog=connections)
    pages = stack.pages
    failures = sum(pages.failures)
    try:
        async with asyncio.timeout(FILL_TIMEOUT):
            await peer.do("crowd", host=OURS, port=CROWD_PORT, connections=connections)
            while sum(pages.failures) == failures:  # noqa: ASYNC110 (an allocation that fails tells nobody)
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise DemoFailure(f"the crowd did not fill the memory in {FILL_TIMEOUT:g} s") from None
    finally:
        server.close()
    free = pages.free_pages << PAGE_SHIFT
    reserve = pages.min_pages << PAGE_SHIFT
    reporter.fact(f"full: {free >> 10} KiB of {size >> 10} KiB are free, and {reserve >> 10} KiB are the reserve")
    return crowd


async def _watch(work: CheckedWork, reporter: Reporter, seconds: float) -> bool:
    deadline = perf_counter() + seconds
    seen = 0
    while not (done := await work.wait(0.1)) and perf_counter() < deadline:
        reporter.advance(work.bytes - seen)
        seen = work.bytes
    reporter.advance(work.bytes - seen)
    return done


async def _await_standstill(work: CheckedWork, reporter: Reporter) -> None:
    deadline = perf_counter() + STANDSTILL_TIMEOUT
    reporter.expect(PRESSURE_REQUESTS * PRESSURE_REQUEST_SIZE)
    seen = 0
    while perf_counter() - work.last_done < STANDSTILL:
        if await work.wait(0.1) or perf_counter() > deadline:
            raise DemoFailure("without the reserve the work on the disk should stand still, and does not")
        reporter.advance(work.bytes - seen)
        seen = work.bytes


class _NeverRead(asyncio.Protocol):
    """A reader that is asleep: waiting to be swapped in."""

    def __init__(self, crowd: list[asyncio.Transport]) -> None:
        self._crowd = crowd

    def connection_made(self, transport: Any) -> None:
        transport.pause_reading()
        self._crowd.append(transport)


# -- what both need ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def stack_on_tap(findings: Findings, mode: str = "paged", **options: Any) -> AsyncIterator[Stack]:
    """A stack on a TAP of its own, whose frames are received in `mode`; in the end everything must have been given back."""
    stack = Stack(**options)
    stack.add_interface(await asyncio.to_thread(_open_tap, mode), f"{OURS}/{PREFIX_LEN}")
    async with stack:
        yield stack
    for reason, count in stack.drops.by_name().items():
        findings.drops[reason] = findings.drops.get(reason, 0) + count
    stack.pool.reap()
    left = {name: nbytes for name, nbytes in reports.charges(stack).items() if nbytes}
    if left or stack.pages.free_pages != stack.pages.pages:
        owners = reports.memory(stack)["by_owner"]
        raise DemoFailure(f"not everything was given back: charged {left}, pages held {owners}")


def _open_tap(mode: str) -> TapDevice:
    tap = TapDevice(TAP, mode=mode)
    bring_up(TAP, f"{KERNEL}/{PREFIX_LEN}")
    return tap


async def open_disk(stack: Stack, port: int, requests: int = REQUESTS, **options: Any) -> NbdClient:
    """The disk that the peer serves on `port`, over our stack with a memalloc socket, with up to `requests` in flight; other
    `options` are those of `NbdClient.open`.
    """
    uri = NbdUri("nbd", KERNEL, port, "disk")

    async def create(factory: Any, host: str, port: int) -> tuple[Any, Any]:
        return await stack.create_connection(factory, host, port, memalloc=True)

    return await NbdClient.open(connector_for(uri, create), uri.export, queue_depth=requests, **options)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
