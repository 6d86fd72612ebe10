"""How large the reserve must be for a connection: worked out by laying out its worst moment, once, on the pool itself.

A memalloc connection with Q requests of up to B bytes has its worst moment either when all of them are writes that the peer
has not acknowledged, or when all are reads whose answers came out of order behind one lost segment. So for each connection

    pages = max(TX, 2 * TX' + 1, RX)

* TX: Q writes in the send queue, and one more of its buffers, because a buffer goes only when its last byte is acknowledged,
  and may hold the first bytes of the next write by then.
* TX': the same without the last write. Twice, because that one begins only while more than half is free
  (`Reserve.may_begin`), so what the others take must be less than half. When there are no others it always begins.
* RX: Q answers in the out-of-order queue, cut into segments of the path's MTU, as the receive ring keeps them. A read takes
  its memory when the answer comes, so it may be all.
* In each of them what waits for the peer's address to be resolved (`RESERVE_FRAMES`). Otherwise nothing waits below the send
  queue: sending is synchronous. ARP itself, pure ACKs and window updates take no memory.

A linear ring adds all its buffers, once for each device: any of them may be filled with what is for others, which is dropped,
and the next one must be there. A paged ring is ordinary memory that stays posted, and nothing is allocated for a frame before
its owner is known; it adds nothing.

TX and RX are limits that the connection's socket is given (`sndbuf`, `rcvbuf`), so that no peer and no user can exceed them:
its window is never more than what the reserve can hold.

Pages are counted by allocating all of it on a scratch arena that is all reserve, with the pool, the send queue and the ring
that the stack uses: rounding, headers, heads and partly filled pages are those of the code that will run.

Source: Zijlstra's reserve of 2007 (pages for each queue and each socket), with the sums done by the allocator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SHIFT, PAGE_SIZE, Arena
from pools.base import NULL
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from ustack.link.device import ETH_HLEN
from ustack.link.rxring import LINEAR_RING_FRAMES, LinearRing, PagedRing
from ustack.mem.protocol import ProtocolMemory
from ustack.mem.reserve import Budget, Demand
from ustack.mem.socket import SocketMemory
from ustack.net.neighbour import RESERVE_FRAMES
from ustack.skb import Account, SkbMemory
from ustack.transport.tcp.send_queue import SendQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from pools.base import Pool
    from ustack.link.rxring import RxRing

REQUEST_HEADER: Final = 28
"""Bytes of an NBD request without its data."""
REPLY_HEADER: Final = 20
"""Bytes of an NBD reply without its data: a structured one."""

HEADERS: Final = 20 + 20 + 12
"""Bytes of IPv4 and TCP headers with timestamps in a segment."""

SLACK: Final = 8
"""Scratch pages for each page of data: more than the least thrifty pool takes for the smallest frames."""


class Link(NamedTuple):
    """What packets come through: MTU in bytes, and whether the receive ring is a linear one."""

    mtu: int
    linear: bool


class _Scratch:
    """Packet memory that is all reserve. What the pool took when it was made is taken, as it is when memory is short."""

    def __init__(self, make_pool: Callable[[PageAllocator], Pool], nbytes: int) -> None:
        self.pages = PageAllocator(Arena((nbytes >> PAGE_SHIFT) * SLACK + 256), min_pages=0)
        self.memory = SkbMemory(make_pool(self.pages))
        self.pages.set_min_pages(self.pages.pages)
        size = self.memory.pool.max_size
        while size:
            while self.memory.pool.alloc(size, ATOMIC) != NULL:
                pass
            size >>= 1
        self._before = self.pages.free_pages

    def used(self) -> int:
        """Pages taken from it."""
        return self._before - self.pages.free_pages

    def ring(self, link: Link) -> RxRing:
        """A ring as it is when there is nothing but reserve. A paged one was there before, and is not counted."""
        if link.linear:
            return LinearRing(self.memory, link.mtu + ETH_HLEN, emergency=True)
        self.pages.set_min_pages(0)
        ring = PagedRing(self.memory, link.mtu + ETH_HLEN)
        self.pages.set_min_pages(self.pages.pages)
        self._before = self.pages.free_pages
        return ring


def ring_pages(make_pool: Callable[[PageAllocator], Pool], link: Link) -> int:
    """Pages of reserve that the receive ring of one device may take."""
    if not link.linear:
        return 0
    size = link.mtu + ETH_HLEN
    scratch = _Scratch(make_pool, 2 * LINEAR_RING_FRAMES * (size + PAGE_SIZE))
    pool = scratch.memory.pool
    buffers = [pool.alloc(size, MEMALLOC) for _ in range(LINEAR_RING_FRAMES)]
    # They come and go one by one. A fragment that is free next to one that is not serves nobody (page_frag): then the last of
    # them is alone on its block.
    for addr in buffers[::2]:
        if addr != NULL:
            pool.free(addr, size)
            pool.alloc(size, MEMALLOC)
    return scratch.used()


def budget(
    make_pool: Callable[[PageAllocator], Pool], demand: Demand, link: Link, *, sndbuf_max: int, rcvbuf_max: int
) -> Budget:
    """What a connection with `demand` over `link` needs of a pool made by `make_pool`, with no more than `sndbuf_max` and
    `rcvbuf_max` bytes of truesize in its queues.
    """
    sndbuf, send_pages = _sending(make_pool, demand, link, sndbuf_max)
    rcvbuf, receive_pages = _receiving(make_pool, demand, link, rcvbuf_max)
    pages = max(send_pages, receive_pages)
    if demand.queue_depth > 1:
        others = Demand(demand.queue_depth - 1, demand.request_size)
        pages = max(pages, 2 * _sending(make_pool, others, link, sndbuf_max)[1] + 1)
    return Budget(sndbuf, rcvbuf, pages)


def _sending(make_pool: Callable[[PageAllocator], Pool], demand: Demand, link: Link, limit: int) -> tuple[int, int]:
    size = demand.queue_depth * (demand.request_size + REQUEST_HEADER)
    scratch = _Scratch(make_pool, min(size, limit) + (1 << 16) + RESERVE_FRAMES * PAGE_SIZE)
    protocol = ProtocolMemory(scratch.pages, (scratch.pages.pages,) * 3, 0, 0)
    queue = SendQueue(scratch.memory, SocketMemory(protocol, Account("receive"), None, None), 1)
    mss = link.mtu - HEADERS
    queue.goal = max((65535 - HEADERS) // mss * mss, mss)
    header, data = memoryview(bytes(REQUEST_HEADER)), memoryview(bytes(demand.request_size))
    for _ in range(demand.queue_depth):
        if queue.append(header, limit, MEMALLOC) + queue.append(data, limit, MEMALLOC) < len(header) + len(data):
            break
    sndbuf = queue.account.bytes
    queue.append(data[: queue.goal], limit + (1 << 17), MEMALLOC)
    _wait_for_address(scratch.memory, link)
    return sndbuf, scratch.used()


def _receiving(make_pool: Callable[[PageAllocator], Pool], demand: Demand, link: Link, limit: int) -> tuple[int, int]:
    size = demand.queue_depth * (demand.request_size + REPLY_HEADER)
    scratch = _Scratch(make_pool, min(size, limit) + (64 + RESERVE_FRAMES) * (link.mtu + PAGE_SIZE))
    ring = scratch.ring(link)
    before = scratch.used()
    mss = link.mtu - HEADERS
    frame = bytes(link.mtu + ETH_HLEN)
    account = Account("out of order")
    for _ in range(-(-size // mss)):
        if not ring.ready():  # a pool may have limits of its own
            break
        ring.fill(frame)
        skb = ring.keep(ETH_HLEN + HEADERS, mss, MEMALLOC)
        if skb is None:
            break
        skb.charge_to(account)
        if account.bytes >= limit:
            break
    ring.ready()
    _wait_for_address(scratch.memory, link)
    return account.bytes, scratch.used() - before


def _wait_for_address(memory: SkbMemory, link: Link) -> None:
    for _ in range(RESERVE_FRAMES):
        memory.alloc(min(link.mtu + ETH_HLEN, PAGE_SIZE), MEMALLOC)
