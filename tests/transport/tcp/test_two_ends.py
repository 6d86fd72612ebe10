"""Two ends that do anything at any time, over a wire that does anything: both end, nothing is left, the invariants hold."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.sim.network import Network
from tests.transport.tcp.invariants import Watch
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.simwire import Impairments
from ustack.transport.events import SHUT_RD, SHUT_WR
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

pytestmark = pytest.mark.sim

HOUR = 3600.0


class Erratic:
    """A program that writes, reads, shuts down and closes as chance has it. What it reads must be what the other wrote."""

    def __init__(self, conn: Connection, random: Random, stream: bytes, expected: bytes) -> None:
        self.conn = conn
        self.random = random
        self.stream = stream
        self.expected = expected
        self.written = 0
        self.read = 0
        self.closed = False
        if random.random() < 0.5:
            conn.wake = lambda _: self.acts()

    def acts(self) -> None:
        """Do one thing."""
        if self.closed:
            return
        with suppress(OSError):
            what = self.random.random()
            if what < 0.5:
                start = self.written % 40_000
                self.written += self.conn.send(self.stream[start : start + self.random.choice((1, 500, 5000, 40_000))])
            elif what < 0.9:
                data = self.conn.recv(self.random.choice((1, 1000, 20_000)))
                at = self.read % 40_000
                assert data == (self.expected * 2)[at : at + len(data)]
                self.read += len(data)
            elif what < 0.94:
                self.conn.shutdown(self.random.choice((SHUT_WR, SHUT_WR, SHUT_RD, SHUT_RD | SHUT_WR)))
            elif what < 0.96:
                self.closes()

    def closes(self) -> None:
        """Close, in order or with a reset."""
        self.closed = True
        if self.random.random() < 0.2:
            self.conn.options.linger = 0
        self.conn.close()


def test_two_ends_that_do_anything(seed: int) -> None:
    random = Random(seed)
    network = Network(
        seed,
        Impairments(
            delay=random.choice((0.0005, 0.02, 0.3)),
            jitter=random.choice((0.0, 0.001, 0.05)),
            rate=random.choice((0, 1_000_000)),
            loss=random.choice((0.0, 0.02, 0.2)),
            duplicate=random.choice((0.0, 0.1)),
            corrupt=random.choice((0.0, 0.02)),
        ),
        features=random.choice((0, FEATURE_CSUM | FEATURE_TSO)),
        memory=random.choice((1 << 20, 4 << 20)),
        tcp=TcpConfig(sack=random.random() < 0.7, timestamps=random.random() < 0.7, time_wait=5.0),
    )
    streams = random.randbytes(40_000), random.randbytes(40_000)
    watches = [Watch(stack) for stack in network.stacks]
    ends: list[Erratic] = []

    def step(limit: float) -> bool:
        more = network.world.step(limit)
        for watch in watches:
            watch.check()
        return more

    network.listen(
        on_accept=lambda conn: ends.append(Erratic(conn, random, streams[1], streams[0])),
        rcvbuf=random.choice((0, 0, 8192)),
    )
    ends.append(Erratic(network.connect(nodelay=random.random() < 0.5), random, streams[0], streams[1]))
    for _ in range(150):
        random.choice(ends).acts()
        limit = network.world.now + random.choice((0.0, 0.001, 0.05, 1.0))
        while step(limit):
            pass
    for end in ends:
        if not end.closed:
            end.closes()
    limit = network.world.now + HOUR
    while any(stack.tcp.connections for stack in network.stacks) and step(limit):
        for end in ends:
            if not end.closed:
                end.closes()  # accepted only now
    assert not any(stack.tcp.connections for stack in network.stacks), f"still there after an hour: seed {seed}"
    network.close()
