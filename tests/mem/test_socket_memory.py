"""One socket's memory: charges, forward allocation, and the pages that it has from its protocol."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pools.arena import PAGE_SIZE, Arena
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from ustack.mem.protocol import ProtocolMemory
from ustack.mem.socket import SocketMemory
from ustack.skb import Account

MINIMUM = 4096


def make_protocol(low: int, pressure: int, high: int) -> ProtocolMemory:
    return ProtocolMemory(PageAllocator(Arena(64), min_pages=0), (low, pressure, high), MINIMUM, MINIMUM, lambda _: None)


def make_socket(protocol: ProtocolMemory) -> SocketMemory:
    return SocketMemory(protocol, Account("receive"), Account("out of order"), Account("send"))


def test_pages_are_taken_whole_and_used_up_by_bytes() -> None:
    protocol = make_protocol(100, 100, 100)
    socket = make_socket(protocol)
    assert socket.rmem_schedule(2304, critical=False)
    assert (protocol.allocated, socket.forward_alloc) == (1, 4096)
    socket.receive.charge(2304)
    assert (protocol.allocated, socket.forward_alloc) == (1, 1792)
    assert socket.rmem_schedule(1792, critical=False)
    assert protocol.allocated == 1
    assert socket.rmem_schedule(1793, critical=False)
    assert (protocol.allocated, socket.forward_alloc) == (2, 5888)
    socket.reclaim()
    assert (protocol.allocated, socket.forward_alloc) == (1, 1792)
    socket.receive.uncharge(2304)
    assert (protocol.allocated, socket.forward_alloc) == (0, 0)


def test_what_was_not_scheduled_is_taken_over_any_limit() -> None:
    """sk_forced_mem_schedule."""
    protocol = make_protocol(1, 1, 1)
    socket = make_socket(protocol)
    socket.send.charge(10_000)
    assert (protocol.allocated, socket.forward_alloc) == (3, 3 * 4096 - 10_000)
    socket.send.uncharge(10_000)
    assert protocol.allocated == 0


def test_the_minimum_is_counted_for_each_direction() -> None:
    protocol = make_protocol(1, 1, 1)
    protocol.sockets = 1
    socket = make_socket(protocol)
    socket.ofo.charge(3000)
    assert socket.rmem_schedule(8192, critical=False), "less than 4096 bytes are received"
    socket.receive.charge(2000)
    assert not socket.rmem_schedule(1 << 16, critical=False)
    assert socket.wmem_schedule(8192, 1 << 20, critical=False), "nothing is queued to send"
    socket.send.charge(8192)
    assert not socket.wmem_schedule(1 << 16, 1 << 20, critical=False)
    socket.ofo.uncharge(3000)
    socket.receive.uncharge(2000)
    socket.send.uncharge(8192)
    socket.leave()
    assert protocol.allocated == 0


def test_who_is_at_its_own_send_limit_waits_for_that() -> None:
    protocol = make_protocol(1, 1, 1)
    protocol.sockets = 1
    socket = make_socket(protocol)
    socket.send.charge(8000)
    assert not socket.wmem_schedule(9000, 20_000, critical=False)
    assert socket.wmem_schedule(9000, 17_000, critical=False)
    assert protocol.allocated == 2
    socket.send.uncharge(8000)


def test_a_memalloc_socket_passes_every_limit() -> None:
    protocol = make_protocol(1, 1, 1)
    socket = make_socket(protocol)
    socket.receive.charge(50_000)
    assert not socket.rmem_schedule(5000, critical=False)
    assert socket.rmem_schedule(5000, critical=True)
    socket.receive.charge(5000)
    assert protocol.allocated == 14
    socket.receive.uncharge(55_000)
    assert protocol.allocated == 0


def test_below_low_nobody_needs_to_ask() -> None:
    protocol = make_protocol(10, 20, 30)
    socket = make_socket(protocol)
    assert socket.ample(8 * PAGE_SIZE)
    assert not socket.ample(9 * PAGE_SIZE), "two pages more are reckoned with"
    socket.receive.charge(8 * PAGE_SIZE)
    assert socket.ample(0)
    assert not socket.ample(PAGE_SIZE)
    socket.receive.uncharge(8 * PAGE_SIZE)
    owner = protocol.pages.owner_id("somebody else")
    starved = make_protocol(10, 20, 30)
    starved.pages.set_min_pages(16)
    while not starved.pages.under_pressure:
        starved.pages.alloc(0, ATOMIC, owner)
    assert not make_socket(starved).ample(0)


def test_in_order_at_last_it_costs_what_it_did() -> None:
    protocol = make_protocol(100, 100, 100)
    socket = make_socket(protocol)
    socket.ofo.charge(6000)
    socket.accept_in_order(6000)
    assert (socket.ofo.bytes, socket.receive.bytes, socket.rmem_alloc) == (0, 6000, 6000)
    assert (protocol.allocated, socket.forward_alloc) == (2, 2192)
    socket.receive.uncharge(6000)


def test_a_socket_shares_once() -> None:
    protocol = make_protocol(100, 100, 100)
    socket = make_socket(protocol)
    socket.join()
    socket.join()
    assert protocol.sockets == 1
    socket.leave()
    socket.leave()
    assert protocol.sockets == 0


Step = tuple[int, str, int]


@settings(max_examples=200, deadline=None)
@given(
    limits=st.lists(st.integers(1, 60), min_size=3, max_size=3).map(sorted),
    steps=st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["receive", "ofo", "send", "free", "reclaim", "accept"]), st.integers(1, 70_000)
        ),
        max_size=80,
    ),
)
def test_whatever_happens_every_page_is_accounted_for_and_comes_back(limits: list[int], steps: list[Step]) -> None:
    protocol = make_protocol(*limits)
    sockets = [make_socket(protocol) for _ in range(4)]
    held: list[list[tuple[str, int]]] = [[] for _ in sockets]
    for socket in sockets:
        socket.join()
    for number, what, size in steps:
        socket, own = sockets[number], held[number]
        if what == "free" and own:
            kind, truesize = own.pop(size % len(own))
            getattr(socket, kind).uncharge(truesize)
        elif what == "accept" and any(kind == "ofo" for kind, _ in own):
            index = next(index for index, (kind, _) in enumerate(own) if kind == "ofo")
            socket.accept_in_order(own[index][1])
            own[index] = ("receive", own[index][1])
        elif what == "reclaim":
            socket.reclaim()
        elif what in ("receive", "ofo", "send"):
            before = protocol.allocated
            pages = -(-max(size - socket.forward_alloc, 0) // PAGE_SIZE)
            granted = (
                socket.wmem_schedule(size, 1 << 30, critical=False)
                if what == "send"
                else socket.rmem_schedule(size, critical=False)
            )
            assert protocol.allocated == before + (pages if granted else 0)
            if granted:
                getattr(socket, what).charge(size)
                own.append((what, size))
        total = 0
        for each, its in zip(sockets, held, strict=True):
            charged = sum(truesize for _, truesize in its)
            assert charged == each.receive.bytes + each.ofo.bytes + each.send.bytes
            assert each.forward_alloc >= 0
            assert (charged + each.forward_alloc) % PAGE_SIZE == 0
            total += charged + each.forward_alloc
        assert total == protocol.allocated * PAGE_SIZE
    for socket, own in zip(sockets, held, strict=True):
        for kind, truesize in own:
            getattr(socket, kind).uncharge(truesize)
        socket.leave()
        assert socket.forward_alloc == 0
    assert protocol.allocated == protocol.sockets == 0
    assert not protocol.over_pressure
