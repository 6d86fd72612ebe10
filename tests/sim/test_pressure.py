"""Many sockets fill what TCP may hold; those who read get on, and when the others do, everything is as it was."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import pytest

from pools.base import names
from pools.gfp import ATOMIC
from tests.sim.network import Network, Talker
from ustack.drops import DropReason
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import Impairments
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.connection import Connection
from ustack.transport.tcp.output import WINDOW_UNCLAMPED

if TYPE_CHECKING:
    from ustack.skb import Skb
    from ustack.stack import Stack

CROWD = 30
HIGH = 128
"""Pages that TCP may hold: less than five for each of the crowd."""

MEM = TcpConfig(mem_high=HIGH * 4096)


def send_for_ever(conn: Connection) -> None:
    """As much as the connection takes, whenever it takes some."""

    def more(_: int) -> None:
        with suppress(OSError):
            while True:
                conn.send(bytes(8192))

    conn.wake = more
    more(0)


def read_all(conns: list[Connection]) -> None:
    for conn in conns:
        while conn.readable and not conn.error:
            if not conn.recv(65536):
                break


def check_charges(stack: Stack, users: list[Connection]) -> None:
    """Every page that TCP has taken is somebody's: a connection's, or one's that is over and whose user has unread data."""
    mem = stack.tcp.mem
    conns = {
        conn for conn in (*stack.tcp.connections.values(), *users) if isinstance(conn, Connection) and conn.tcp is stack.tcp
    }
    total = 0
    for conn in conns:
        charges = conn.charges
        receive = conn.receive_queue
        assert charges.receive.bytes == sum(skb.truesize for skb in receive.queue)
        assert charges.ofo.bytes == sum(skb.truesize for skb in receive.ofo)
        total += charges.rmem_alloc + charges.send.bytes + charges.forward_alloc
    assert total == mem.allocated * 4096
    assert not mem.over_pressure or mem.allocated >= mem.low


@pytest.mark.parametrize("pool", ["kmalloc", "srog", "page_per_object"])
def test_a_crowd_that_never_reads_fills_tcp_mem_and_everything_recovers(pool: str) -> None:
    network = Network(1, features=FEATURE_CSUM | FEATURE_TSO, memory=8 << 20, pool=pool)
    server = network.server
    mem = server.tcp.mem
    mem.low, mem.pressure, mem.high = HIGH // 2, HIGH * 2 // 3, HIGH
    blocked = network.listen(1234)
    talking = network.listen(80, lambda conn: talkers.append(Talker(conn, b"")))
    talkers: list[Talker] = []
    crowd = [network.connect(1234) for _ in range(CROWD)]
    busy = network.connect(80)
    assert network.world.run_until(lambda: len(blocked) == CROWD and len(talking) == 1, deadline=10.0)
    for conn in crowd:
        send_for_ever(conn)
    network.world.run(20.0)
    check_charges(server, blocked)
    assert mem.under_pressure()
    assert server.drops[DropReason.PROTO_MEM] > 0
    overrun = 2 * CROWD  # one segment each, for who had nothing, and what its pool rounds up
    assert mem.allocated <= HIGH + overrun
    late = network.connect(1234)
    outgoing = Random(1).randbytes(300_000)
    sender = Talker(busy, outgoing)
    network.world.run(300.0)
    assert not late.synchronized
    assert server.drops[DropReason.MEM_PRESSURE] > 0
    assert sender.finished, "who reads gets on"
    assert talkers[0].incoming == outgoing
    check_charges(server, blocked)

    for conn in crowd:
        conn.wake = lambda _: None
    while any(conn.unacknowledged for conn in crowd):
        read_all(blocked)
        network.world.run(0.5)
        assert network.world.now < 2000.0, "some timeouts have backed off to two minutes, and no more than that"
    read_all(blocked)
    assert not mem.under_pressure()
    assert mem.allocated == 0
    assert server.mib.TcpExtTCPMemoryPressures > 0

    fresh = network.connect(1234)
    assert network.world.run_until(lambda: fresh.synchronized, deadline=network.world.now + 5.0), "new connections are welcome"
    for conn in (crowd[0], fresh):
        accepted = next(each for each in blocked if each.remote_port == conn.local_port)
        for _ in range(60):
            conn.send(bytes(20_000))
            network.world.run(0.5)
            read_all(blocked)
        assert accepted.rcv_ssthresh == WINDOW_UNCLAMPED
    network.close()


def test_a_hog_of_the_arena_puts_tcp_under_pressure_and_lets_it_go() -> None:
    network = Network(2, memory=8 << 20, reserve=512 << 10)
    server = network.server
    pages = server.pages
    accepted = network.listen(80)
    conn = network.connect(80)
    assert network.world.run_until(lambda: len(accepted) == 1, deadline=5.0)
    owner = pages.owner_id("memory hog")
    taken = []
    while not pages.under_pressure:
        taken.append(pages.alloc(0, ATOMIC, owner))
    network.connect(80)
    network.world.run(3.0)
    assert len(accepted) == 1
    assert server.drops[DropReason.MEM_PRESSURE] > 0
    send_for_ever(conn)
    for _ in range(20):
        network.world.run(0.1)
        read_all(accepted)
    assert accepted[0].rcv_ssthresh == 4 * 1460
    pages.free_bulk(taken)
    for _ in range(40):
        network.world.run(0.5)
        read_all(accepted)
    assert len(accepted) == 2, "its SYN came again"
    assert accepted[0].rcv_ssthresh == WINDOW_UNCLAMPED
    network.close()


@pytest.mark.parametrize("pool", names())
def test_what_the_pool_keeps_for_later_does_not_keep_up_the_pressure(pool: str) -> None:
    network = Network(4, memory=4 << 20, reserve=256 << 10, pool=pool)
    server = network.server
    pages, memory = server.pages, server.env.memory
    accepted = network.listen(80)
    skbs: list[Skb] = []
    while not pages.under_pressure:
        skb = memory.alloc(network.world.random.choice((100, 500, 1500, 2000)), ATOMIC)
        assert skb is not None
        skbs.append(skb)
        if pages.under_pressure:
            memory.pool.reap()
    conn = network.connect(80)
    network.world.run(2.5)
    assert not accepted
    network.world.random.shuffle(skbs)
    for skb in skbs:
        skb.free()
    assert network.world.run_until(lambda: not pages.under_pressure, deadline=network.world.now + 1.0)
    assert network.world.run_until(lambda: conn.synchronized, deadline=network.world.now + 10.0)
    network.close()


def test_whatever_happens_charges_are_exact_and_all_comes_back(seed: int) -> None:
    """Readers and senders that come, stall, go on and leave, on a lossy wire, with little memory for all."""
    random = Random(seed)
    features = random.choice((0, FEATURE_CSUM | FEATURE_TSO))
    network = Network(
        seed,
        Impairments(delay=0.005, jitter=random.choice((0.0, 0.004)), loss=random.choice((0.0, 0.03))),
        features=features,
        ring=PagedRing if features else random.choice((PagedRing, LinearRing)),
        memory=random.choice((2 << 20, 4 << 20)),
        reserve=random.choice((0, 128 << 10)),
        pool=random.choice(("kmalloc", "nta", "srog", "page_frag", "page_per_object")),
        tcp=TcpConfig(mem_high=random.choice((20, 60, 200)) * 4096, rmem_min=random.choice((1, 4096))),
    )
    accepted = network.listen(80)
    conns: list[Connection] = []
    steps = ("open", "send", "answer", "read", "read answer", "leave", "hang up")
    for _ in range(150):
        (step,) = random.choices(steps, (3, 10, 5, 6, 3, 1, 1))
        who = conns if step in ("send", "read answer", "leave") else accepted
        if step == "open":
            conns.append(network.connect(80, memalloc=random.random() < 0.2))
        elif not who:
            continue
        elif step in ("send", "answer"):
            send_some(random.choice(who), random.choice((100, 5000, 60_000)))
        elif step in ("read", "read answer"):
            read_some(random.choice(who), random.choice((10, 3000, 100_000)))
        else:
            who.pop(random.randrange(len(who))).close()
        network.world.run(random.choice((0.0, 0.01, 0.2, 1.0)))
        for stack in network.stacks:
            check_charges(stack, [*conns, *accepted])
    for conn in (*conns, *accepted):
        conn.close()
    network.close()


def send_some(conn: Connection, size: int) -> None:
    with suppress(OSError):
        conn.send(bytes(size))


def read_some(conn: Connection, size: int) -> None:
    with suppress(OSError):
        conn.recv(size)
