"""Sockets of a stack give what they receive to other processes, page by page, while others receive beside them."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest

from pools.arena import PAGE_SIZE
from tests.sim.network import Network
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LinearRing, PagedRing
from ustack.transport.events import SHUT_WR

if TYPE_CHECKING:
    from ustack.link.rxring import RxRing
    from ustack.mem.page_flip import Policy
    from ustack.transport.tcp.connection import Connection

MINE, OTHERS = 0xA5, 0x5A


class Sender:
    """Sends `left` bytes of one value, in writes of `chunk`, as fast as the socket takes them."""

    def __init__(self, conn: Connection, mark: int, left: int, chunk: int) -> None:
        self.conn, self.left, self.data = conn, left, bytes((mark,)) * chunk
        conn.wake = self.wake

    def wake(self, _: int) -> None:
        if not self.conn.writable:
            return
        try:
            while self.left:
                self.left -= self.conn.send(self.data[: self.left])
            if not self.conn.shutdown_mask & SHUT_WR:
                self.conn.shutdown(SHUT_WR)
        except OSError:
            pass


class Reader:
    """Takes pages, checks that every byte on them is the socket's or zero, and keeps them mapped."""

    def __init__(self, net: Network, conn: Connection) -> None:
        self.net, self.conn = net, conn
        self.received = 0
        self.ended = False
        self.maps: list[mmap.mmap] = []
        conn.wake = self.wake

    def wake(self, _: int) -> None:
        flipper = self.net.server.flipper
        assert flipper is not None
        try:
            while not self.ended and self.conn.readable:
                given = self.conn.recv_pages(flipper, 16)
                self.ended = not given.fds
                self.received += given.length
                self.maps += [mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) for fd in given.fds]
                for fd in given.fds:
                    os.close(fd)
        except BlockingIOError:
            pass

    def foreign(self) -> bytes:
        """What can be read of anybody else."""
        return b"".join(one[:].translate(None, bytes((0, MINE))) for one in self.maps)


@pytest.mark.parametrize("policy", ["copy", "scrub"])
@pytest.mark.parametrize("ring", [PagedRing, LinearRing])
@pytest.mark.parametrize("pool", ["kmalloc", "nta", "srog", "page_per_object", "page_frag"])
def test_a_stream_arrives_whole_and_alone(pool: str, ring: type[RxRing], policy: Policy) -> None:
    features = FEATURE_CSUM | FEATURE_TSO if ring is PagedRing else 0
    net = Network(1, pool=pool, ring=ring, zero_copy=policy, memory=2 << 20, features=features)
    size = 300_000
    readers: list[Reader] = []

    def on_accept(conn: Connection) -> None:
        if conn.local_port == 80:
            readers.append(Reader(net, conn))

    net.listen(80, on_accept)
    others = net.listen(81)
    mine = [Sender(net.connect(80), MINE, size, chunk) for chunk in (70_000, 300)]
    beside = Sender(net.connect(81), OTHERS, 200_000, 1000)
    net.world.run_until(lambda: len(readers) == 2 and all(each.ended for each in readers), 60.0)
    assert [each.received for each in readers] == [size, size]
    assert not any(each.foreign() for each in readers)
    while others[0].readable:  # the other socket's data is where it was
        data = others[0].recv(4096)
        assert data == bytes((OTHERS,)) * len(data)
        if not data:
            break
    assert not any(each.foreign() for each in readers)
    flipper = net.server.flipper
    assert flipper is not None
    assert flipper.in_place + flipper.copied == 2 * size
    del mine, beside
    net.close()
    for each in readers:
        for one in each.maps:
            one.close()
