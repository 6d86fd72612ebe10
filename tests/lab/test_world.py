"""The world: its clock jumps, its order is fixed, and asyncio code lives in it without waiting."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from tests.net.host import Host, ip
from ustack.lab.world import VirtualLoop, World
from ustack.link.simwire import Impairments, SimWire
from ustack.timers import Timer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any


def test_events_happen_in_the_order_of_time_and_then_of_asking() -> None:
    world = World(1)
    happened: list[tuple[float, str]] = []
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        world.at(when, lambda name=name: happened.append((world.now, name)))  # type: ignore[misc]
    world.after(0.5, lambda: world.after(0.25, lambda: happened.append((world.now, "first"))))
    world.run(5.0)
    assert happened == [(0.75, "first"), (1.0, "a"), (1.0, "b"), (2.0, "c")]
    assert world.now == 5.0


def test_running_until_something_is_true_stops_there() -> None:
    world = World(1)
    happened: list[int] = []
    for n in range(10):
        world.at(float(n), lambda n=n: happened.append(n))  # type: ignore[misc]
    assert world.run_until(lambda: len(happened) == 4, deadline=100.0)
    assert world.now == 3.0
    assert not world.run_until(lambda: len(happened) == 8, deadline=5.5)
    assert world.now == 5.5
    assert not world.run_until(lambda: len(happened) == 11), "nothing is left to happen"


def test_an_event_in_the_past_happens_now() -> None:
    world = World(1)
    world.run(5.0)
    when: list[float] = []
    world.at(1.0, lambda: when.append(world.now))
    world.run(1.0)
    assert when == [5.0]


@pytest.fixture
def hosts() -> Iterator[tuple[World, Host, Host]]:
    """A world with two hosts on a wire."""
    world = World(1)
    a, b = Host("10.0.0.1/24"), Host("10.0.0.2/24")
    SimWire(world, a.device, b.device, Impairments(delay=0.01))
    a.live_in(world)
    b.live_in(world)
    yield world, a, b
    a.close()
    b.close()


def test_timers_of_hosts_fire_in_world_time(hosts: tuple[World, Host, Host]) -> None:
    world, a, _ = hosts
    fired: list[float] = []
    a.env.timers.set(Timer(lambda: fired.append(world.now)), 600.0)
    began = time.monotonic()
    world.run(1000.0)
    assert fired == [600.0]
    assert time.monotonic() - began < 5.0


def in_world(world: World, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(world)) as runner:
        runner.run(main())


def test_sleeping_for_a_day_takes_no_time() -> None:
    world = World(1)
    began = time.monotonic()

    async def main() -> None:
        await asyncio.gather(asyncio.sleep(86400.0), asyncio.sleep(3.0))
        assert asyncio.get_running_loop().time() == pytest.approx(86400.0)

    in_world(world, main)
    assert world.now == pytest.approx(86400.0)
    assert time.monotonic() - began < 5.0


def test_asyncio_code_talks_over_the_wire(hosts: tuple[World, Host, Host]) -> None:
    world, a, b = hosts
    server = b.udp.socket()
    server.bind(bytes(4), 7)

    def echo(_: int) -> None:
        data, peer = server.recvfrom_nowait(100)
        server.sendto_nowait(data.upper(), peer)

    server.wake = echo
    world.run(5.0)

    async def main() -> None:
        client = a.udp.socket()
        client.connect(b.address, 7)
        readable = asyncio.Event()
        client.wake = lambda _: readable.set()
        client.sendto_nowait(b"hello")
        await asyncio.wait_for(readable.wait(), 1.0)
        assert client.recvfrom_nowait(100)[0] == b"HELLO"
        assert world.now == pytest.approx(5.04), "ARP and the echo"
        with pytest.raises(TimeoutError):
            readable.clear()
            await asyncio.wait_for(readable.wait(), 100.0)
        assert world.now == pytest.approx(105.04)
        client.close()
        server.close()

    in_world(world, main)


def test_waiting_for_what_can_never_happen_is_an_error_not_a_hang() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match=r"nothing will ever happen again in this world \(seed 9"):
        in_world(World(9), main)


def test_the_same_seed_is_the_same_world() -> None:
    def run(seed: int) -> list[tuple[float, bytes]]:
        world = World(seed)
        a, b = Host("10.0.0.1/24"), Host("10.0.0.2/24")
        wire = SimWire(world, a.device, b.device, Impairments(loss=0.3, jitter=0.01, duplicate=0.2))
        seen: list[tuple[float, bytes]] = []
        wire.there.tap = wire.back.tap = lambda now, frame: seen.append((now, frame))
        a.live_in(world)
        b.live_in(world)
        echo = a.ipv4.icmp.open_echo(lambda *_: None, lambda *_: None)
        for seq in range(20):
            echo.send(ip("10.0.0.2"), seq, b"payload")
            world.run(0.5)
        a.close()
        b.close()
        return seen

    assert run(1) == run(1)
    assert run(1) != run(2)
