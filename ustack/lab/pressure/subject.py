"""The stack under test, with the programs on it that make its memory short: readers that never read, packets of local sockets,
a memory hog. They are the same in virtual and in real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as names
from functools import cache
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Any, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Arena
from pools.base import by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from ustack.lab.pressure.faults import (
    LOCAL,
    AllocationFaults,
    FaultyPages,
    SiteDevice,
    SitePool,
    faulty,
    name_neighbour_site,
)
from ustack.lab.pressure.frames import CROWD_PORT, UDP_PORT, size_between
from ustack.lab.pressure.scenario import (
    AllocationFault,
    LocalSockets,
    MemoryHog,
    Scenario,
    TcpBlocked,
    UdpBlocked,
    pool_options,
)
from ustack.skb import Account, Skb, SkbMemory
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from pools.base import Pool
    from ustack.link.device import Device
    from ustack.socket import Socket

ADDRESS: Final = "10.77.0.2"
PEER: Final = "10.77.0.1"
PREFIX_LEN: Final = 16

SAMPLES: Final = 48
"""Samples of memory that are kept of a run; when there are more, every other is forgotten and they are taken half as often."""

FIRST_INTERVAL: Final = 0.02
"""Seconds between the first samples."""

TICK: Final = 0.001
"""Seconds at least between two steps of traffic that comes at a rate: what is due by then comes together."""


class Repeat:
    """Calls `step(count)` at `rate` times a second, in steps of no less than `TICK` seconds, from `start` to `stop`."""

    def __init__(self, rate: float, start: float, stop: float | None, step: Callable[[int], None]) -> None:
        self._rate = rate
        self._step = step
        self._loop = loop = asyncio.get_running_loop()
        self._began = loop.time() + start
        self._end = inf if stop is None else loop.time() + stop
        self._done = 0
        self._handle = loop.call_at(self._began, self._go_on)

    def _go_on(self) -> None:
        now = self._loop.time()
        if now >= self._end:
            return
        due = max(int((now - self._began) * self._rate + 1e-6) + 1 - self._done, 0)
        self._done += due
        self._handle = self._loop.call_at(max(self._began + self._done / self._rate, now + TICK), self._go_on)
        self._step(due)

    def cancel(self) -> None:
        """Call no more."""
        self._handle.cancel()


class Subject:
    """The stack under test of `scenario`, with `pool`. `attach` gives it its device, `begin` starts what disturbs it."""

    def __init__(self, scenario: Scenario, pool: str, random: Random) -> None:
        self.scenario = scenario
        self.random = random
        memory = scenario.memory
        pages = memory.size // PAGE_SIZE
        reserve = memory.reserve_of_stack()
        min_pages = reserve // PAGE_SIZE if isinstance(reserve, int) else None
        kind: Callable[..., Pool] = pool_class(pool)
        injected = [fault for fault in scenario.fault if isinstance(fault, AllocationFault)]
        self.faults = AllocationFaults(injected, random) if injected else None
        if self.faults is not None:
            allocator: PageAllocator = FaultyPages(Arena(pages), self.faults, min_pages)
            kind = faulty(pool_class(pool), self.faults)
        else:
            allocator = PageAllocator(Arena(pages), min_pages=min_pages)
        self.pool = pool
        options = pool_options(pool, memory.parameters)
        self.stack = Stack(
            pool=kind(allocator, **options),
            pool_options=options,
            reserve=reserve,
            tcp=scenario.tcp_config(),
            udp=scenario.udp_config(),
            random=random,
        )
        self._local = self._local_memory()
        self._local_account = Account("local sockets")
        self._hog = self.stack.pages.owner_id("memory hog")
        self._repeats: list[Repeat] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._endings: list[Callable[[], None]] = []
        self.recorder = Recorder(self.stack)

    def _local_memory(self) -> SkbMemory:
        memory = self.stack.env.memory
        if self.faults is None:
            return memory
        local = SkbMemory(SitePool(memory.pool, self.faults, LOCAL))
        local.frag_owner = memory.frag_owner
        return local

    def attach(self, device: Device) -> Device:
        """Give the stack its device; returns what is to be polled."""
        if self.faults is not None:
            device = SiteDevice(device, self.faults)
        interface = self.stack.add_interface(device, f"{ADDRESS}/{PREFIX_LEN}")
        if self.faults is not None:
            name_neighbour_site(interface, self.faults)
        return device

    # -- what disturbs it --

    def begin(self) -> None:
        """Start faults of allocations, and the local side of all traffic. For the running loop; returns at once."""
        loop = asyncio.get_running_loop()
        if self.faults is not None:
            self.faults.begin(self._later)
        if any(each.kind == "syn_flood" for each in self.scenario.traffic):
            self._listen(CROWD_PORT, None)
        for number, traffic in enumerate(self.scenario.traffic):
            if isinstance(traffic, TcpBlocked):
                self._listen(tcp_port(number), traffic.stop)
            elif isinstance(traffic, UdpBlocked):
                self._never_receive(traffic, udp_port(self.scenario, number))
            elif isinstance(traffic, LocalSockets):
                self._queue_locally(traffic)
            elif isinstance(traffic, MemoryHog):
                self._later(traffic.start, lambda traffic=traffic: self._take_pages(traffic))  # type: ignore[misc]
        self.recorder.begin(loop)

    def _later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        handle = asyncio.get_running_loop().call_later(seconds, callback)
        self._timers.append(handle)
        return handle

    def _listen(self, port: int, stop: float | None) -> None:
        """Accept connections, and never read from them."""
        listener = self.stack.socket()
        listener.bind(("", port))
        listener.listen(4096)
        sockets = [listener]

        def accept(_: int) -> None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    sockets.append(listener.accept_nowait()[0])

        listener.watch(accept)
        self._close_later(sockets, stop)

    def _close_later(self, sockets: list[Socket], stop: float | None) -> None:
        def close() -> None:
            for sock in sockets:
                sock.abort()
                sock.close()
            sockets.clear()

        self._endings.append(close)
        if stop is not None:
            self._later(stop, close)

    def _never_receive(self, traffic: UdpBlocked, port: int) -> None:
        sockets = []
        for number in range(traffic.count):
            sock = self.stack.socket(type=names.SOCK_DGRAM)
            if traffic.rcvbuf is not None:
                sock.setsockopt(names.SOL_SOCKET, names.SO_RCVBUF, traffic.rcvbuf)
            sock.bind(("", port + number))
            sockets.append(sock)
        self._close_later(sockets, traffic.stop)

    def _queue_locally(self, traffic: LocalSockets) -> None:
        waiting: list[tuple[float, int, Skb]] = []
        loop = asyncio.get_running_loop()
        order = 0

        def step(count: int) -> None:
            nonlocal order
            now = loop.time()
            while waiting and waiting[0][0] <= now:
                heappop(waiting)[2].free()
            for _ in range(count):
                size = size_between(traffic.size, self.random)
                skb = self._local.alloc(size, ATOMIC) if size <= self._local.pool.max_size else self._paged(size)
                if skb is None:
                    continue
                skb.charge_to(self._local_account)
                order += 1
                hold = self.random.expovariate(1 / traffic.hold) if traffic.hold else inf
                heappush(waiting, (now + hold, order, skb))

        def end() -> None:
            while waiting:
                heappop(waiting)[2].free()

        self._repeats.append(Repeat(traffic.rate, traffic.start, traffic.stop, step))
        self._endings.append(end)
        if traffic.stop is not None:
            self._later(traffic.stop, end)

    def _paged(self, size: int) -> Skb | None:
        return self._local.alloc_paged((size + PAGE_MASK) >> PAGE_SHIFT, ATOMIC)

    def _take_pages(self, traffic: MemoryHog) -> None:
        pages = self.stack.pages
        held: list[int] = []
        wanted = pages.pages if traffic.size is None else -(-traffic.size // PAGE_SIZE)

        def step(count: int) -> None:
            for _ in range(min(count, wanted - len(held))):
                pfn = pages.alloc(0, ATOMIC, self._hog)
                if pfn < 0:
                    break
                held.append(pfn)

        def give_back() -> None:
            for pfn in held:
                pages.free(pfn, 0)
            held.clear()

        repeat: Repeat | None = None
        if traffic.rate is None:
            step(wanted)
        else:
            repeat = Repeat(traffic.rate / PAGE_SIZE, 0.0, None, step)
            self._repeats.append(repeat)
        self._endings.append(give_back)

        def let_go() -> None:
            if repeat is not None:
                repeat.cancel()
            give_back()

        if traffic.hold is not None:
            self._later(traffic.hold, let_go)
            again = traffic.start + 2 * traffic.hold
            if traffic.stop is None or again < traffic.stop:
                next_turn = traffic.model_copy(update={"start": again})
                self._later(2 * traffic.hold, lambda: self._take_pages(next_turn))
        if traffic.stop is not None:
            self._later(max(traffic.stop - traffic.start, 0.0), let_go)

    # -- the end --

    def end(self) -> None:
        """Stop whatever disturbs, and give back what it holds."""
        for repeat in self._repeats:
            repeat.cancel()
        for timer in self._timers:
            timer.cancel()
        if self.faults is not None:
            self.faults.end()
        self.recorder.end()
        for ending in self._endings:
            ending()

    def left_behind(self) -> list[str]:
        """What the closed stack still holds: must be nothing."""
        stack = self.stack
        stack.pool.reap()
        accounts = [*stack.accounts(), self._local_account]
        found = [f"{account.name}: {account.bytes} bytes" for account in accounts if account.bytes]
        if stack.pages.free_pages != stack.pages.pages:
            owners = {name: count for name, count in stack.pages.pages_by_owner().items() if count}
            found.append(f"pages held: {owners}")
        return found


@cache
def pool_class(name: str) -> type[Pool]:
    """The class of the pool `name`: looking through what is installed takes as long as a tenth of a run."""
    return by_name(name)


def udp_port(scenario: Scenario, number: int) -> int:
    """The port of the first socket of the traffic `number`, which is an `UdpBlocked`."""
    earlier = (each.count for each in scenario.traffic[:number] if isinstance(each, UdpBlocked))
    return UDP_PORT + sum(earlier)


def tcp_port(number: int) -> int:
    """The port of the readers of the traffic `number`, which is a `TcpBlocked`."""
    return CROWD_PORT + 1 + number


class Recorder:
    """Samples who owns the pages, and how low the reserve has been, over the whole of a run of unknown length."""

    def __init__(self, stack: Stack) -> None:
        self._pages = stack.pages
        self._interval = FIRST_INTERVAL
        self._samples: list[tuple[float, int, int, dict[str, int]]] = []
        self._handle: asyncio.TimerHandle | None = None
        self._began = 0.0

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take samples from now on."""
        self._began = loop.time()
        self._sample(loop)

    def _sample(self, loop: asyncio.AbstractEventLoop) -> None:
        self.take(loop.time())
        if len(self._samples) > SAMPLES:
            del self._samples[1::2]
            self._interval *= 2
        self._handle = loop.call_later(self._interval, self._sample, loop)

    def take(self, now: float) -> None:
        """Take one."""
        pages = self._pages
        owners = {name: count for name, count in pages.pages_by_owner().items() if count and name != "free"}
        low_water = min(pages.pages - pages.peak_used, pages.min_pages)
        self._samples.append((now - self._began, pages.free_pages, low_water, owners))

    def end(self) -> None:
        """Take no more."""
        if self._handle is not None:
            self._handle.cancel()

    def report(self) -> dict[str, Any]:
        """Times in seconds; bytes free, the low-water mark of the reserve so far, and bytes by owner at each."""
        names_of = sorted({name for sample in self._samples for name in sample[3]})
        return {
            "time": [round(sample[0], 6) for sample in self._samples],
            "free": [sample[1] << PAGE_SHIFT for sample in self._samples],
            "reserve_low_water": [sample[2] << PAGE_SHIFT for sample in self._samples],
            "owners": {name: [sample[3].get(name, 0) << PAGE_SHIFT for sample in self._samples] for name in names_of},
        }
