"""A disk over NBD when sockets that nobody reads hold all memory: without the reserve it stands still, with it work goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests import leaks
from tests.e2e.conftest import held_by
from ustack.lab.pressed import Pressed, Work
from ustack.lab.reserve_bisection import POOLS
from ustack.link.device import FEATURE_CSUM
from ustack.link.simwire import Impairments

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.sim

DEPTH = 8
SIZE = 8192
DISK = 1 << 20

each_pool = pytest.mark.parametrize("pool", POOLS)
each_ring = pytest.mark.parametrize("linear", [False, True], ids=["paged", "linear"])


@pytest.fixture
def make_pressed() -> Iterator[Callable[..., Pressed]]:
    """Make a machine under pressure; arguments are those of `Pressed`. Nothing may be left of it."""
    made: list[Pressed] = []

    def make(seed: int, pool: str, **options: Any) -> Pressed:
        name, pool_options = POOLS[pool]
        pressed = Pressed(seed, pool=name, pool_options=pool_options, **options)
        leaks.watch_pool(pressed.stack.pool)
        leaks.watch(lambda: held_by(pressed.stack))
        made.append(pressed)
        return pressed

    yield make
    for pressed in made:
        pressed.close()


def crowded_work(pressed: Pressed, then: Callable[[Work], Awaitable[None]], limit: float) -> tuple[bool, Work]:
    """Attach a disk, let the crowd in, and do `then` with the work; whether it came to its end within `limit` seconds."""
    works: list[Work] = []

    async def story() -> None:
        await pressed.serve(DISK)
        disk = await pressed.attach(DEPTH, SIZE)
        await pressed.crowd(20)
        works.append(Work(pressed, disk, depth=DEPTH, request_size=SIZE, size=DISK))
        await then(works[0])

    done = pressed.run(story, limit)
    return done, works[0]


@each_pool
@each_ring
def test_without_a_reserve_it_stands_still(make_pressed: Callable[..., Pressed], pool: str, linear: bool) -> None:
    pressed = make_pressed(3, pool, linear=linear, reserve=0, memory=2 << 20)
    done, work = crowded_work(pressed, lambda work: work.do(200), limit=6)
    assert not done
    assert work.idle() > 3


@each_pool
@each_ring
def test_with_the_reserve_that_is_worked_out_it_goes_on(
    make_pressed: Callable[..., Pressed], pool: str, linear: bool, seed: int
) -> None:
    wire = Impairments(delay=0.001, loss=0.01 * (seed % 3), jitter=0.0005 * (seed % 2))
    pressed = make_pressed(seed, pool, linear=linear, wire=wire, memory=2 << 20)
    done, work = crowded_work(pressed, lambda work: work.do(200), limit=60)
    assert done
    assert work.gap < 2, "the longest time without an answer"
    assert pressed.stack.pages.reserve_allocs > 0
    assert not pressed.stack.pages.reserve_failures


@each_pool
def test_a_cut_of_200_seconds_is_survived(make_pressed: Callable[..., Pressed], pool: str) -> None:
    pressed = make_pressed(5, pool, memory=2 << 20)

    async def cut(work: Work) -> None:
        await work.do(50)
        pressed.cut(200)
        await work.do(50)

    done, work = crowded_work(pressed, cut, limit=400)
    assert done
    assert 200 < work.gap < 330


@each_pool
def test_a_new_mac_of_the_peer_is_learned(make_pressed: Callable[..., Pressed], pool: str) -> None:
    """Another machine takes over the address of the server, and its ARP announcement is lost."""
    pressed = make_pressed(6, pool, memory=2 << 20, features=FEATURE_CSUM)

    async def replace(work: Work) -> None:
        await work.do(50)
        pressed.change_peer_mac(b"\x02\x00\x00\x00\x00\x77")
        await work.do(50)

    done, work = crowded_work(pressed, replace, limit=200)
    assert done
    assert work.gap < 100


@each_ring
def test_over_ipv6_the_reserve_that_is_worked_out_serves_as_well(make_pressed: Callable[..., Pressed], linear: bool) -> None:
    wire = Impairments(delay=0.001, loss=0.01)
    pressed = make_pressed(4, "kmalloc", linear=linear, wire=wire, memory=2 << 20, version=6)
    done, work = crowded_work(pressed, lambda work: work.do(200), limit=60)
    assert done
    assert work.gap < 2
    assert pressed.stack.pages.reserve_allocs > 0
    assert not pressed.stack.pages.reserve_failures


def test_a_new_mac_of_the_peer_is_learned_over_ipv6(make_pressed: Callable[..., Pressed]) -> None:
    """Neighbour unreachability detection, in the reserve: nobody said that the server is another machine now."""
    pressed = make_pressed(6, "kmalloc", memory=2 << 20, features=FEATURE_CSUM, version=6)
    inet6 = pressed.stack.interfaces[0].inet6
    assert inet6 is not None
    inet6.neighbours.parameters = inet6.neighbours.parameters.with_times(4.0, 1.0)  # as a router can have it

    async def replace(work: Work) -> None:
        await work.do(50)
        pressed.change_peer_mac(b"\x02\x00\x00\x00\x00\x77")
        await work.do(50)

    done, work = crowded_work(pressed, replace, limit=200)
    assert done
    assert work.gap < 30


def test_work_in_flight_stays_within_the_budget(make_pressed: Callable[..., Pressed]) -> None:
    pressed = make_pressed(7, "kmalloc", memory=4 << 20, wire=Impairments(delay=0.001, loss=0.02))
    done, _ = crowded_work(pressed, lambda work: work.do(300), limit=60)
    assert done
    pages = pressed.stack.pages
    assert pages.peak_used < pages.pages
