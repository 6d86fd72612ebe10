"""Failures of allocations, injected: by probability, by call site, by size, in a window of time.

`FaultyPages` and the class that `faulty` derives from a pool ask an `AllocationFaults` before they allocate. A stack without
faults has neither, so that nothing costs anything. Like Linux's failslab and fail_page_alloc (fault-injection.rst), with call
sites by name instead of a range of addresses.

Who allocates is found from the outside, so that it works on compiled modules, whose callers no stack frame shows: `SiteDevice`
says which frame is being received, the owner of pages says that a ring takes them, `NeighbourSite` is the memory that only the
neighbour table has.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from pools.arena import PAGE_SHIFT, Arena
from pools.base import NULL, Pool
from pools.buddy import PageAllocator
from pools.gfp import may_use_reserve
from ustack.env import Env
from ustack.link.device import NO_CSUM, Device
from ustack.skb import SkbMemory
from ustack.wire.ethernet import ETH_P_IP
from ustack.wire.ipv4 import IP_MF, IP_OFFSET, IPPROTO_TCP, IPPROTO_UDP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from ustack.drops import Drops
    from ustack.lab.pressure.scenario import AllocationFault
    from ustack.link.rxring import RxFrame
    from ustack.net.interface import Interface
    from ustack.skb import Buffer

SITES: Final = {
    "rx_ring": "Memory that the receive ring posts for frames to come",
    "tcp_receive": "What is kept of a TCP segment: the receive and the out-of-order queue",
    "udp_receive": "What is kept of a UDP datagram: the receive queue",
    "fragment": "What is kept of an IP fragment until the datagram is complete",
    "icmp_receive": "What is kept, or sent, because of an ICMP or any other IP packet, and of ARP",
    "tcp_send": "Data that a program sends: the send queue",
    "neighbour": "A packet that waits for its neighbour's address",
    "skb_head": "The head of any packet, whoever wants it",
    "pool_pages": "Pages that the pool takes for itself: slabs, regions, blocks",
    "local": "Packets of the traffic `local` of a scenario",
}
"""Call sites by name, and what they allocate."""

RX_RING: Final = "rx_ring"
TCP_RECEIVE: Final = "tcp_receive"
UDP_RECEIVE: Final = "udp_receive"
FRAGMENT: Final = "fragment"
ICMP_RECEIVE: Final = "icmp_receive"
TCP_SEND: Final = "tcp_send"
NEIGHBOUR: Final = "neighbour"
SKB_HEAD: Final = "skb_head"
POOL_PAGES: Final = "pool_pages"
LOCAL: Final = "local"

RING_OWNER: Final = "rx ring"
"""The owner of the pages of a receive ring (`ustack.link.rxring`)."""

FRAG_OWNER: Final = "skb frags"
NEIGHBOUR_OWNER: Final = "neighbour queue"

_PROTOCOLS: Final = {IPPROTO_TCP: TCP_RECEIVE, IPPROTO_UDP: UDP_RECEIVE}


class AllocationFaults:
    """Decides which allocations fail. `site` is who allocates now; `now` is set to the time since the start of the scenario.

    `injected` counts failures by site.
    """

    def __init__(self, faults: list[AllocationFault], random: Random) -> None:
        self._faults = faults
        self._random = random
        self._active: list[AllocationFault] = []
        self.site = TCP_SEND
        self.injected: Counter[str] = Counter()

    def begin(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        """Start and end the faults when they are due."""
        for fault in self._faults:
            call_later(fault.start, lambda fault=fault: self._active.append(fault))  # type: ignore[misc]
            if fault.stop is not None:
                call_later(fault.stop, lambda fault=fault: self._active.remove(fault))  # type: ignore[misc]

    def end(self) -> None:
        """Let every allocation succeed from now on."""
        self._active.clear()

    def fails(self, size: int, gfp: int, sites: tuple[str, ...]) -> bool:
        """Whether an allocation of `size` bytes by one of `sites` (names of the same caller) is to fail."""
        for fault in self._active:
            if fault.site is not None and fault.site not in sites:
                continue
            if size < fault.min_size or (fault.max_size is not None and size > fault.max_size):
                continue
            if not fault.memalloc and may_use_reserve(gfp):
                continue
            if fault.probability >= 1 or self._random.random() < fault.probability:
                self.injected[fault.site or sites[0]] += 1
                return True
        return False


class FaultyPages(PageAllocator):
    """A page allocator some of whose allocations fail."""

    def __init__(self, arena: Arena, faults: AllocationFaults, min_pages: int | None) -> None:
        super().__init__(arena, min_pages=min_pages)
        self._faults = faults
        self._ring = self.owner_id(RING_OWNER)
        self._frags = self.owner_id(FRAG_OWNER)
        self._neighbour = self.owner_id(NEIGHBOUR_OWNER)

    def alloc(self, order: int, gfp: int, owner: int) -> int:
        """See `PageAllocator.alloc`."""
        if self._faults.fails(1 << order << PAGE_SHIFT, gfp, self._sites(owner)):
            self.failures[order] += 1
            return NULL
        return super().alloc(order, gfp, owner)

    def alloc_bulk(self, count: int, gfp: int, owner: int) -> Sequence[int]:
        """See `PageAllocator.alloc_bulk`."""
        if self._faults.fails(count << PAGE_SHIFT, gfp, self._sites(owner)):
            self.failures[0] += 1
            return ()
        return super().alloc_bulk(count, gfp, owner)

    def _sites(self, owner: int) -> tuple[str, ...]:
        if owner == self._ring:
            # A frame that is kept takes pages along, and the ring others: both want them.
            site = self._faults.site
            return (RX_RING,) if site == RX_RING else (RX_RING, site)
        if owner == self._neighbour:
            return (NEIGHBOUR,)
        return (self._faults.site,) if owner == self._frags else (POOL_PAGES,)


def faulty(kind: type[Pool], faults: AllocationFaults) -> type[Pool]:
    """The pool class `kind` with allocations that fail when `faults` says so. On pages other than `FaultyPages`, such as those
    on which the size of the reserve is worked out, none do.
    """

    class Faulty(kind):  # type: ignore[valid-type, misc]  # a base that is a variable
        name = kind.name

        def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
            """See `Pool.alloc`."""
            if isinstance(self.pages, FaultyPages) and faults.fails(size, gfp, (faults.site,)):
                self.stats.failures += 1
                return NULL
            return int(super().alloc(size, gfp, cpu, group))

        def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
            """See `Pool.alloc_head`."""
            if isinstance(self.pages, FaultyPages) and faults.fails(self.head_charge, gfp, (SKB_HEAD, faults.site)):
                self.stats.failures += 1
                return NULL
            return int(super().alloc_head(gfp, cpu, group))

    return Faulty


class SitePool(Pool):
    """A view of `pool` through which one `site` allocates."""

    name = "site"

    def __init__(self, pool: Pool, faults: AllocationFaults, site: str) -> None:
        super().__init__(pool.pages)
        self._pool = pool
        self._faults = faults
        self._site = site
        self.stats = pool.stats
        self.max_size = pool.max_size
        self.head_charge = pool.head_charge

    def _enter(self) -> str:
        before, self._faults.site = self._faults.site, self._site
        return before

    def _leave(self, before: str) -> None:
        self._faults.site = before
        self.pfmemalloc = self._pool.pfmemalloc

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """See `Pool.alloc`."""
        before = self._enter()
        addr = self._pool.alloc(size, gfp, cpu, group)
        self._leave(before)
        return addr

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """See `Pool.alloc_head`."""
        before = self._enter()
        addr = self._pool.alloc_head(gfp, cpu, group)
        self._leave(before)
        return addr

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """See `Pool.free`."""
        self._pool.free(addr, size, cpu, group)

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """See `Pool.free_head`."""
        self._pool.free_head(addr, cpu, group)

    def charge(self, addr: int, size: int) -> int:
        """See `Pool.charge`."""
        return self._pool.charge(addr, size)

    def link(self, group: int, other: int) -> None:
        """See `Pool.link`."""
        self._pool.link(group, other)

    def reap(self) -> int:
        """See `Pool.reap`."""
        return self._pool.reap()

    def held_pages(self) -> int:
        """See `Pool.held_pages`."""
        return self._pool.held_pages()

    def largest_free_run(self) -> int:
        """See `Pool.largest_free_run`."""
        return self._pool.largest_free_run()

    def check(self) -> None:
        """See `Pool.check`."""
        self._pool.check()


def name_neighbour_site(interface: Interface, faults: AllocationFaults) -> None:
    """Let the neighbour table of `interface` allocate under a name of its own."""
    table = interface.neighbours
    env = table.env
    memory = SkbMemory(SitePool(env.memory.pool, faults, NEIGHBOUR))
    memory.frag_owner = memory.pages.owner_id(NEIGHBOUR_OWNER)
    table.env = Env(env.timers, memory, env.drops, env.mib, env.random)


class SiteDevice(Device):
    """A device around `device` that tells `faults` whose frame is being received."""

    def __init__(self, device: Device, faults: AllocationFaults) -> None:
        super().__init__(device.name, device.mac, device.mtu, device.features)
        self._device = device
        self._faults = faults
        self.stats = device.stats

    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """See `Device.attach`."""
        faults = self._faults

        def deliver_named(frame: RxFrame) -> None:
            faults.site = receiving_site(frame)
            deliver(frame)
            faults.site = RX_RING

        faults.site = RX_RING
        self._device.attach(memory, drops, deliver_named)
        faults.site = TCP_SEND
        self.ring = self._device.ring

    def poll(self, budget: int) -> int:
        """See `Device.poll`."""
        self._faults.site = RX_RING
        count = self._device.poll(budget)
        self._faults.site = TCP_SEND
        return count

    def transmit(
        self, head: Buffer, payload: Sequence[Buffer], csum_start: int = 0, csum_offset: int = NO_CSUM, gso_size: int = 0
    ) -> bool:
        """See `Device.transmit`."""
        return self._device.transmit(head, payload, csum_start, csum_offset, gso_size)

    def fileno(self) -> int:
        """See `Device.fileno`."""
        return self._device.fileno()

    def close(self) -> None:
        """See `Device.close`."""
        self._device.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)  # what a world asks of a simulated device


def receiving_site(frame: RxFrame) -> str:
    """The call site that a received frame is for."""
    head = frame.head
    if frame.len < 34 or head[12] << 8 | head[13] != ETH_P_IP:
        return ICMP_RECEIVE
    if (head[20] << 8 | head[21]) & (IP_MF | IP_OFFSET):
        return FRAGMENT
    return _PROTOCOLS.get(head[23], ICMP_RECEIVE)
