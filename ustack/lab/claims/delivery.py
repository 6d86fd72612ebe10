"""Claims 6 to 15 and 43 to 45: who is served when memory is out. On a running stack, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pools.arena import PAGE_SHIFT, PAGE_SIZE, Arena
from pools.base import NULL
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from pools.kmalloc import KmallocPool
from pools.nta import V2, NtaPool
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim
from ustack.lab.pressed import OURS, PEER, Pressed, Work
from ustack.link.device import FEATURE_CSUM
from ustack.link.simwire import Impairments
from ustack.mem.protocol import limits_for
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

POOLS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "kmalloc": ("kmalloc", {}),
    "nta": ("nta", {}),
    "srog": ("srog", {}),
    "srog as fallback": ("srog", {"role": "fallback"}),
    "page_per_object": ("page_per_object", {}),
    "page_frag": ("page_frag", {}),
}

MEMORY: Final = 1 << 20
DISK: Final = 1 << 20
PAGE: Final = 4096
CROWD: Final = 10
STANDSTILL: Final = 2.0
"""Virtual seconds without a page swapped that count as standing still."""
PATIENCE: Final = 30.0
"""Virtual seconds in which the work must be done."""

ACK_SIZED: Final = 512
"""Bytes up to which an allocation counts as that of an ACK, or of a request without data."""


class Swapping(NamedTuple):
    """What came of swapping pages: how many, whether that were all, the longest pause and all of it in seconds."""

    pages: int
    finished: bool
    pause: float
    seconds: float


def swap(
    pressed: Pressed,
    *,
    pages: int = 50,
    depth: int = 4,
    size: int = PAGE,
    reads: float = 0.5,
    limit: float = PATIENCE,
    before: Callable[[], Awaitable[None]] | None = None,
) -> Swapping:
    """Attach the disk, do what is to be done `before`, and swap so many pages, at most for `limit` seconds."""
    works: list[Work] = []

    async def story() -> None:
        await pressed.serve(DISK)
        disk = await pressed.attach(depth, size)
        if before is not None:
            await before()
        works.append(work := Work(pressed, disk, depth=depth, request_size=size, size=DISK, reads=reads))
        started = pressed.loop.time()
        async with asyncio.timeout(limit):
            await work.do(pages)
        times.append(pressed.loop.time() - started)

    times: list[float] = []
    finished = pressed.run(story, 1000.0)
    work = works[0]
    return Swapping(work.done, finished, max(work.gap, 0.0 if finished else work.idle()), times[0] if times else limit)


def machine(terms: Terms, pool: str = "kmalloc", **options: Any) -> Pressed:
    """A machine of 2006: linear buffers, no super-frames, and little memory."""
    name, pool_options = POOLS[pool]
    defaults: dict[str, Any] = {"memory": MEMORY, "linear": True, "features": FEATURE_CSUM}
    return Pressed(terms.seed, pool=name, pool_options=pool_options, **defaults | options)


def swapped(pressed: Pressed, **options: Any) -> Swapping:
    """`swap`, and then the machine is switched off."""
    try:
        return swap(pressed, **options)
    finally:
        pressed.close()


@claim(
    6,
    "EP",
    "A pool of its own takes the network out of reach of an OOM in main memory",
    prior="true for allocations, not for delivery",
)
def own_pool(terms: Terms) -> Outcome:
    """Somebody takes all pages: of another arena, and of the stack's own."""
    times: dict[str, Figure] = {}
    names = ("nowhere", "in main memory", "in the stack's pool")
    for where in names:
        pressed = machine(terms, reserve=0)
        main = PageAllocator(Arena(64), min_pages=0)
        victim = dict(zip(names, (None, main, pressed.stack.pages), strict=True))[where]

        async def hog(victim: PageAllocator | None = victim) -> None:
            while victim is not None and victim.alloc(0, ATOMIC, victim.owner_id("hog")) != NULL:
                pass

        result = swap(pressed, before=hog, limit=STANDSTILL)
        times[where] = result.seconds if result.finished else "never"
        for pages in (main, pressed.stack.pages):
            pages.free_bulk([pfn for pfn in range(pages.pages) if pages.owner_of(pfn) == pages.owner_id("hog")])
        pressed.close()
    apart = times["in main memory"] == times["nowhere"]
    return Outcome(
        "partly" if apart else "false",
        f"50 pages are swapped in {times['nowhere']:.3f} s, and in {times['in main memory']:.3f} s while main memory is "
        f"out. With "
        f"the pool's own pages gone: {times[names[2]]}. A wall "
        "keeps out who is outside; claim 7 is about who is inside.",
        {"seconds by where memory is out": times},
    )


@claim(
    7,
    "PZ",
    "All memory that the limits allow can sit in blocked sockets, and then the system is dead",
    prior="without a reserve for ever, with it bounded",
)
def blocked_sockets(terms: Terms) -> Outcome:
    """Sockets that nobody reads fill the memory; then 50 pages are to be swapped, without a reserve and with one."""
    without: dict[str, Figure] = {}
    pauses: dict[str, Figure] = {}
    for pool in POOLS:
        pressed = machine(terms, pool, reserve=0)
        without[pool] = swapped(pressed, before=partial(pressed.crowd, CROWD), limit=STANDSTILL).pages
        pressed = machine(terms, pool)
        result = swapped(pressed, before=partial(pressed.crowd, CROWD))
        pauses[pool] = round(result.pause, 4) if result.finished else "never"
    dead = all(done == 0 for done in without.values())
    alive = all(isinstance(pause, float) and pause < 1 for pause in pauses.values())
    longest = max((pause for pause in pauses.values() if isinstance(pause, float)), default=0.0)
    return Outcome(
        "true" if dead else "partly",
        f"Without a reserve {sum(done for done in without.values() if isinstance(done, int))} of 50 pages are swapped "
        f"on all pools "
        f"together in {STANDSTILL:.0f} s. With the reserve that is worked out {'all are' if alive else 'not all are'}, "
        f"and the "
        f"longest pause is {longest:.3f} s.",
        {"pages without a reserve": without, "longest pause with a reserve": pauses},
    )


@claim(
    8,
    "EP",
    "Limits for each socket make blocked sockets harmless",
    prior="true as long as the memory is more than all limits together",
)
def limits_of_sockets(terms: Terms) -> Outcome:
    """Blocked connections with a fixed receive limit, in numbers around memory / limit, and no reserve."""
    limit = 65536
    sockets = MEMORY // limit
    done: dict[str, Figure] = {}
    for share in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        config = TcpConfig(rmem_default=limit, rmem_max=limit, mem_low=2 * MEMORY, mem_pressure=2 * MEMORY, mem_high=2 * MEMORY)
        pressed = machine(terms, reserve=0, tcp=config)
        crowd = partial(pressed.crowd, round(sockets * share), datagrams=False)
        done[f"{share:.0%}"] = swapped(pressed, before=crowd, limit=STANDSTILL).pages
    below = done["25%"] == done["50%"] == 50
    above = done["200%"] == 0
    still = next((share for share, pages in done.items() if pages != 50), "")
    return Outcome(
        "partly" if below and above else "true" if not above else "false",
        f"With {MEMORY >> 10} KiB of memory and limits of {limit >> 10} KiB, {sockets} blocked sockets are what the "
        f"memory holds. With "
        f"half as many all pages are swapped; from {still} of them on they are not.",
        {"pages swapped of 50, by blocked sockets": done},
    )


@claim(
    9,
    "PZ",
    "What the sockets of a machine may hold is more than any pool: 65535 * 128 packets * 16 KiB = 128 GiB",
    prior="the arithmetic is right; tcp_mem caps TCP, and nothing else",
)
def capacity(terms: Terms) -> Outcome:
    """The product; and what blocked TCP and UDP sockets come to hold with tcp_mem and without."""
    product = 65535 * 128 * 16384 / (1 << 30)
    held: dict[str, Figure] = {}
    for name, tcp in (("no tcp_mem", None), ("tcp_mem a quarter", TcpConfig(mem_high=MEMORY // 4))):
        for datagrams in (False, True):
            pressed = machine(terms, reserve=0, tcp=tcp)
            with suppress(TimeoutError):
                pressed.run(partial(pressed.crowd, CROWD, datagrams=datagrams), 30)
            tcp_held = pressed.stack.tcp.mem.allocated << PAGE_SHIFT
            udp_held = pressed.stack.udp.mem.allocated << PAGE_SHIFT
            held[f"{name}, {'TCP and UDP' if datagrams else 'TCP'}"] = [tcp_held / MEMORY, udp_held / MEMORY]
            pressed.close()
    shares = {name: value for name, value in held.items() if isinstance(value, list)}
    capped = _first(shares["tcp_mem a quarter, TCP"])
    free = _first(shares["no tcp_mem, TCP"])
    udp = _second(shares["tcp_mem a quarter, TCP and UDP"])
    return Outcome(
        "partly" if capped < free else "true",
        f"The product is {product:.0f} GiB. Blocked TCP sockets hold {free:.0%} of the memory where nothing limits them "
        f"together, and "
        f"{capped:.0%} where tcp_mem is a quarter of it; UDP, which tcp_mem does not know, then holds {udp:.0%} more.",
        {"GiB": product, "share held by TCP and by UDP": held},
    )


def _first(value: Figure) -> float:
    assert isinstance(value, list)
    assert isinstance(value[0], float)
    return value[0]


def _second(value: Figure) -> float:
    assert isinstance(value, list)
    assert isinstance(value[1], float)
    return value[1]


@claim(10, "EP", "TCP can hold 768 kB at most on a machine with 1 GB", prior="false: tcp_mem counts pages, and it is 768 MB")
def unit_of_tcp_mem(terms: Terms) -> Outcome:
    """What blocked connections hold with tcp_mem = 96 128 192."""
    triple = (96, 128, 192)
    low, pressure, high = (number << PAGE_SHIFT for number in triple)
    pressed = machine(terms, reserve=0, tcp=TcpConfig(mem_low=low, mem_pressure=pressure, mem_high=high))
    assert limits_for(pressed.stack.pages, triple, 6) == triple
    pressed.run(partial(pressed.crowd, CROWD, datagrams=False), 30)
    peak = pressed.stack.tcp.mem.peak
    pressed.close()
    real = 196608 * PAGE_SIZE
    return Outcome(
        "false" if peak > triple[2] // 2 else "true",
        f"With tcp_mem = {' '.join(map(str, triple))} connections come to hold {peak} pages, which are "
        f"{peak << PAGE_SHIFT} bytes: the "
        f"numbers are pages. The 98304 131072 196608 of a machine with 1 GB are {real >> 20} MB, three quarters of it.",
        {"tcp_mem": list(map(float, triple)), "peak in pages": float(peak), "limit of a machine with 1 GB, bytes": float(real)},
    )


@claim(
    11,
    "EP",
    "If the pool is larger than the limit of TCP, there is always memory for an ACK",
    prior="true for TCP alone, with a margin; false beside UDP",
)
def room_beside_tcp(terms: Terms) -> Outcome:
    """tcp_mem leaves so many pages of the arena to others. Nobody has a reserve."""
    done: dict[str, Figure] = {}
    for datagrams in (False, True):
        for left in (0, 16, 64, 128):
            limit = MEMORY - (left << PAGE_SHIFT)
            pressed = machine(terms, reserve=0, tcp=TcpConfig(mem_low=limit, mem_pressure=limit, mem_high=limit))
            crowd = partial(pressed.crowd, CROWD, datagrams=datagrams)
            name = f"{left} pages, {'TCP and UDP' if datagrams else 'TCP'}"
            done[name] = swapped(pressed, before=crowd, limit=STANDSTILL).pages
    alone = done["128 pages, TCP"] == 50
    beside = all(pages == 0 for name, pages in done.items() if name.endswith("UDP"))
    enough = next((name.split()[0] for name, pages in done.items() if pages == 50), "no")
    return Outcome(
        "partly" if alone and beside else "true" if alone else "false",
        f"With TCP alone, {enough} pages beside its limit are enough for all 50 pages. With blocked UDP sockets beside "
        f"it, whatever "
        f"was left is theirs: {done['128 pages, TCP and UDP']} pages are swapped.",
        {"pages swapped of 50, by what tcp_mem leaves": done},
    )


@claim(
    12,
    "EP",
    "Over the limit, packets are dropped before anybody looks for their socket",
    prior="false: the socket is found first, and its limit asked",
)
def order_of_tests(terms: Terms) -> Outcome:
    """A socket at its limit beside one that is read: whom the drops are charged to."""
    pressed = machine(terms, reserve=0, memory=4 << 20, tcp=TcpConfig(rmem_default=16384, rmem_max=16384))
    stack = pressed.stack
    with stack.socket(type=2) as blocked, stack.socket(type=2) as read, pressed.peer.socket(type=2) as sender:
        blocked.bind(("", 1))
        blocked.setsockopt(1, 8, 8192)
        read.bind(("", 2))
        taken = 0
        for _ in range(200):
            for port in (1, 2):
                sender.sendto_nowait(bytes(1000), (OURS, port))
            pressed.world.run(0.001)
            with suppress(BlockingIOError):
                read.recv_nowait(2000)
                taken += 1
        assert blocked.datagram is not None
        assert read.datagram is not None
        drops = [blocked.datagram.charges.drops, read.datagram.charges.drops]
    pressed.close()
    return Outcome(
        "false" if drops[0] > 100 and not drops[1] else "true",
        f"Of 200 packets for each, {drops[0]} are dropped at the socket that nobody reads and counted there; the socket "
        f"beside it gets "
        f"{taken} and loses {drops[1]}. No packet is dropped before it is known whose it is.",
        {"dropped at the blocked socket": float(drops[0]), "dropped at the other": float(drops[1]), "read there": float(taken)},
    )


@claim(
    13,
    "PZ",
    "Watermarks and a fallback inside the same allocator, and service for critical sockets only, are sufficient",
    prior="true: it takes the rule, not the allocator",
)
def same_allocator(terms: Terms) -> Outcome:
    """The load of claim 7 on each allocator with the reserve under its watermark, on SROG as posted for fallback, and "
    "with the
    reserve but without the flag on the socket.
    """
    pauses: dict[str, Figure] = {}
    for pool in POOLS:
        pressed = machine(terms, pool)
        result = swapped(pressed, before=partial(pressed.crowd, CROWD))
        pauses[pool] = round(result.pause, 4) if result.finished else "never"
    pressed = machine(terms)

    async def forget_the_flag() -> None:
        for connection in pressed.stack.tcp.connections.values():
            options = getattr(connection, "options", None)
            if options is not None and options.memalloc:
                options.memalloc = False
        await pressed.crowd(CROWD)

    unmarked = swap(pressed, before=forget_the_flag, limit=STANDSTILL)
    for connection in pressed.stack.tcp.connections.values():
        options = getattr(connection, "options", None)
        if options is not None and connection.remote == (bytes(map(int, PEER.split("."))), 10809):
            options.memalloc = True
    pressed.close()
    alive = all(isinstance(pause, float) for pause in pauses.values())
    return Outcome(
        "true" if alive and not unmarked.pages else "partly",
        f"With watermarks in the page allocator and one flag, every allocator swaps all pages; the longest pause is "
        f"{max((pause for pause in pauses.values() if isinstance(pause, float)), default=0.0):.3f} s. The same reserve "
        f"without the flag on "
        f"the socket serves {unmarked.pages} pages.",
        {"longest pause": pauses, "pages without the flag": float(unmarked.pages)},
    )


def _burst(grow_below: float, main: int) -> int:
    """Packets that an NTA pool serves in a burst until the first failure, when so many pages are left in main memory."""
    pages = PageAllocator(Arena(1024), min_pages=0)
    version = V2._replace(initial_regions=8)
    pool = NtaPool(pages, lanes=1, version=version, grow_below=grow_below)
    hog = pages.owner_id("hog")
    while pages.free_pages > main:
        pages.alloc(0, ATOMIC, hog)
    served = 0
    while served < 1000 and pool.alloc(1834, ATOMIC) != NULL:
        served += 1
    return served


@claim(
    14,
    "EP",
    "Growing the pool when it is used to a threshold is a simple fix",
    prior="helps before main memory is out, not when it is",
)
def grow_on_a_threshold(terms: Terms) -> Outcome:
    """A burst of Ethernet frames on a pool of 256 KiB that grows at 50, 75 or 90 % use, or when it fails."""
    served: dict[str, Figure] = {}
    for main, name in ((960, "main memory free"), (0, "main memory out")):
        for threshold in (0.5, 0.75, 0.9, 1.0):
            served[f"{name}, grows at {threshold:.0%}"] = _burst(1 - threshold, main)
    before = [value for name, value in served.items() if "free" in name and isinstance(value, int)]
    during = [value for name, value in served.items() if "out" in name and isinstance(value, int)]
    return Outcome(
        "partly" if min(before) > max(during) else "true",
        f"With main memory free the pool serves {min(before)} packets at least, whatever the threshold. When main "
        f"memory is out it serves "
        f"{min(during)} to {max(during)}, which is what it had; a threshold changes nothing.",
        {"packets until the first failure": served},
    )


@claim(15, "PZ", "Growth that begins when memory is short comes too late", prior="true: as if growth were denied")
def growth_in_reclaim(terms: Terms) -> Outcome:
    """The same burst with growth at every threshold, and with none, while others have all but a few pages."""
    figures: dict[str, Figure] = {}
    late = True
    for left in (0, 4, 16):
        denied = _burst(0.0, 0)
        grown = max(_burst(1 - threshold, left) for threshold in (0.5, 0.75, 0.9))
        figures[f"{left} pages left"] = [float(denied), float(grown)]
        late = late and grown - denied <= left * PAGE_SIZE // 1834
    return Outcome(
        "true" if late else "false",
        f"With growth denied the pool serves {_burst(0.0, 0)} packets. Growth adds what main memory has left, to the "
        f"page, and then ends "
        "the same way.",
        {"packets with growth denied, and with growth": figures},
    )


@claim(
    43,
    "EP",
    "Nobody can know which sockets are critical: ARP, ICMP, routing and sshd are needed as well",
    prior="ARP and its like can be known; an administrator's session cannot",
)
def what_else_is_critical(terms: Terms) -> Outcome:
    """The disk's server gets another hardware address while memory is out; and an ordinary session is tried meanwhile."""
    pressed = machine(terms, memory=MEMORY)
    answers: list[int] = []

    async def replaced() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await reader.read(100):
                    writer.write(data)

        await pressed.stack.start_server(echo, None, 22)
        await pressed.crowd(CROWD)
        pressed.change_peer_mac(b"\x02\x00\x00\x00\x00\x77")

        async def administrate() -> None:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(20):
                    reader, writer = await pressed.peer.open_connection(OURS, 22)
                    writer.write(b"help")
                    answers.append(len(await reader.readexactly(4)))

        sessions.append(pressed.loop.create_task(administrate()))

    sessions: list[asyncio.Task[None]] = []
    result = swapped(pressed, before=replaced, limit=120.0)
    return Outcome(
        "partly" if result.finished and not answers else "true" if not result.finished else "false",
        f"The new address is asked for and learned while memory is out, and all pages are swapped (longest pause "
        f"{result.pause:.1f} s): "
        f"ARP takes no memory of an ordinary kind. The session of an administrator gets {len(answers)} answers.",
        {"pages": float(result.pages), "longest pause": result.pause, "answers of the session": float(len(answers))},
    )


@claim(
    44,
    "DP",
    "Requests must be throttled in the block layer as well; the network alone is not sufficient",
    prior="true: what is in flight must be bounded",
)
def throttling(terms: Terms) -> Outcome:
    """A reserve for 4 requests of 16 KiB, with 4 of them in flight, and with 64."""
    refused: dict[str, Figure] = {}
    for depth in (4, 64):
        pressed = machine(terms, memory=8 << 20, wire=Impairments(delay=0.001, loss=0.01))
        needed = pressed.stack.reserve.claim("bounded", _demand(4))
        assert needed is not None
        pressed.stack.reserve.release("bounded")
        pages = needed.pages + pressed.stack.reserve.ring_pages()

        async def squeeze(pressed: Pressed = pressed, pages: int = pages) -> None:
            pressed.stack.pages.set_min_pages(pages)
            await pressed.crowd(CROWD)

        result = swapped(pressed, pages=200, depth=depth, size=16384, before=squeeze)
        refused[f"{depth} in flight"] = [float(pressed.stack.pages.reserve_failures), result.pause]
    bounded, unbounded = _first(refused["4 in flight"]), _first(refused["64 in flight"])
    return Outcome(
        "true" if unbounded and not bounded else "false",
        f"With 4 requests in flight, for which the reserve was made, {bounded:.0f} allocations are refused; with 64, "
        f"{unbounded:.0f}.",
        {"refused allocations, and longest pause": refused},
    )


def _demand(depth: int) -> Any:
    from ustack.mem.reserve import Demand

    return Demand(depth, 16384)


class AckReservePool(KmallocPool):
    """kmalloc, of whose reserve only objects of up to `largest` bytes may be had."""

    name = "kmalloc with a reserve of ACKs"
    largest = MEMORY

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """As kmalloc does; what is larger stops at the watermark."""
        return super().alloc(size, gfp if size <= self.largest else gfp & ~MEMALLOC, cpu, group)


@claim(45, "EP", "About 2007 reserved buffers of the size of an ACK suffice", prior="false: the answer to a read is data")
def a_reserve_of_acks(terms: Terms) -> Outcome:
    """Pages are read while memory is out, with a reserve of any size, and with one for small objects only."""
    done: dict[str, Figure] = {}
    for name, largest in (("any size", MEMORY), ("the size of an ACK", ACK_SIZED)):
        for loss in (0.0, 0.05):
            pool = AckReservePool(PageAllocator(Arena(MEMORY >> PAGE_SHIFT), min_pages=2007 * 64 >> PAGE_SHIFT))
            pressed = Pressed(
                terms.seed,
                pool=pool,
                reserve=2007 * 64,
                linear=True,
                features=FEATURE_CSUM,
                memory=MEMORY,
                wire=Impairments(loss=loss),
            )

            async def crowd(pressed: Pressed = pressed, pool: AckReservePool = pool, largest: int = largest) -> None:
                pool.largest = largest
                await pressed.crowd(CROWD)

            pages = swapped(pressed, pages=400, reads=1.0, before=crowd, limit=PATIENCE).pages
            done[f"{name}, {'frames are lost' if loss else 'no frame is lost'}"] = pages
    acks, lossy = done["the size of an ACK, no frame is lost"], done["the size of an ACK, frames are lost"]
    full = done["any size, frames are lost"]
    return Outcome(
        "false" if not acks else "true" if lossy == full else "partly",
        f"With a reserve of {2007 * 64 >> 10} KiB for objects of any size {full} of 400 pages are read on a wire that loses a "
        f"frame in twenty. With the same for objects of up to {ACK_SIZED} bytes, {lossy}; {acks} where no frame is lost: data "
        "in order goes from the buffer that is posted into the reader's, and only what comes out of order must be kept.",
        {"pages read of 400": done},
        "the buffers of the ring stay posted, and what cannot be kept is dropped and comes again: so little is enough, where a "
        "kernel of 2006 needed a new buffer for each answer"
        if acks
        else "",
    )
