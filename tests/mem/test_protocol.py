"""tcp_mem and udp_mem: every rule with plain numbers."""

from __future__ import annotations

import pytest

from pools.arena import PAGE_SIZE, Arena
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from ustack.mem.protocol import ProtocolMemory, limits_for, pages_of

MINIMUM = 4096
LIMITS = (10, 20, 30)


class Protocol:
    """A protocol's memory, and what it has said about pressure."""

    def __init__(self, limits: tuple[int, int, int] = LIMITS, *, has_pressure: bool = True, min_pages: int = 0) -> None:
        self.said: list[bool] = []
        self.arena = PageAllocator(Arena(256), min_pages=min_pages)
        self.mem = ProtocolMemory(self.arena, limits, MINIMUM, MINIMUM, self.said.append if has_pressure else None)

    def asks(self, pages: int, held: int = 1 << 20) -> bool:
        """A socket that holds `held` bytes asks for pages."""
        return self.mem.take(pages, held, MINIMUM, held)

    def starve_arena(self) -> list[int]:
        """Somebody else takes pages until the arena is under pressure."""
        owner = self.arena.owner_id("somebody else")
        taken = []
        while not self.arena.under_pressure:
            taken.append(self.arena.alloc(0, ATOMIC, owner))
        return taken


def test_up_to_low_everything_is_granted() -> None:
    protocol = Protocol()
    assert protocol.asks(10)
    assert protocol.mem.allocated == 10
    assert not protocol.said


def test_between_low_and_pressure_everything_is_granted() -> None:
    protocol = Protocol()
    assert protocol.asks(20)
    assert not protocol.said


def test_above_pressure_it_begins_and_below_low_it_ends() -> None:
    protocol = Protocol()
    protocol.mem.sockets = 1
    assert protocol.asks(21, held=0)
    assert protocol.said == [True]
    protocol.mem.give(11)
    assert protocol.mem.allocated == 10
    assert protocol.said == [True], "at low it goes on: hysteresis"
    protocol.mem.give(1)
    assert protocol.said == [True, False]
    assert not protocol.mem.under_pressure()


def test_a_request_that_stays_within_low_ends_it_too() -> None:
    protocol = Protocol()
    protocol.mem.sockets = 1
    assert protocol.asks(21, held=0)
    protocol.mem.allocated -= 11
    assert protocol.asks(0)
    assert protocol.said == [True, False]


def test_above_high_nothing_is_granted() -> None:
    protocol = Protocol()
    protocol.mem.sockets = 1
    assert protocol.asks(30, held=MINIMUM)
    assert not protocol.asks(1, held=MINIMUM)
    assert protocol.mem.allocated == 30


def test_who_has_less_than_the_minimum_gets_more_whatever_the_limits_say() -> None:
    protocol = Protocol()
    protocol.mem.sockets = 1
    assert protocol.asks(30, held=0)
    assert protocol.asks(5, held=MINIMUM - 1)
    assert protocol.mem.allocated == 35


@pytest.mark.parametrize(
    ("sockets", "pages", "granted"), [(1, 29, True), (1, 30, False), (3, 9, True), (3, 10, False), (15, 2, False)]
)
def test_under_pressure_only_who_holds_less_than_its_share_gets_more(sockets: int, pages: int, granted: bool) -> None:
    """`high` > sockets * own pages."""
    protocol = Protocol()
    protocol.mem.sockets = sockets
    protocol.mem.allocated = 25
    assert protocol.asks(1, held=pages * PAGE_SIZE) is granted
    assert protocol.mem.under_pressure()


def test_own_pages_are_counted_up() -> None:
    protocol = Protocol()
    protocol.mem.sockets = 3
    protocol.mem.allocated = 25
    assert protocol.asks(1, held=9 * PAGE_SIZE)
    assert not protocol.asks(1, held=9 * PAGE_SIZE + 1)


def test_a_refusal_begins_pressure_too() -> None:
    protocol = Protocol()
    assert protocol.asks(10)
    assert not protocol.asks(21)
    assert protocol.mem.allocated == 10
    assert protocol.said == [True]


def test_below_low_there_is_never_pressure_that_nothing_would_end() -> None:
    protocol = Protocol()
    assert not protocol.asks(31)
    protocol.mem.enter_pressure()
    assert not protocol.said


def test_a_protocol_without_pressure_grants_up_to_low() -> None:
    """UDP: sk_has_memory_pressure is false, and what is above low is suppressed."""
    protocol = Protocol(has_pressure=False)
    assert protocol.asks(10)
    assert not protocol.asks(1)
    assert protocol.asks(1, held=MINIMUM - 1)
    assert not protocol.mem.under_pressure()


def test_short_of_pages_the_arena_puts_a_protocol_under_pressure() -> None:
    protocol = Protocol((100, 120, 150), min_pages=16)
    protocol.mem.sockets = 50
    assert protocol.asks(1, held=10 * PAGE_SIZE)
    taken = protocol.starve_arena()
    assert protocol.mem.under_pressure()
    assert not protocol.asks(1, held=3 * PAGE_SIZE), "far below low, but more than its share"
    assert protocol.asks(1, held=2 * PAGE_SIZE)
    assert protocol.asks(1, held=0)
    protocol.arena.free_bulk(taken)
    assert not protocol.mem.under_pressure()
    assert protocol.asks(1, held=10 * PAGE_SIZE)
    assert not protocol.said, "its own pressure is another thing"


def test_a_protocol_without_pressure_stops_when_the_arena_is_short() -> None:
    protocol = Protocol((100, 120, 150), has_pressure=False, min_pages=16)
    taken = protocol.starve_arena()
    assert not protocol.asks(1)
    assert protocol.asks(1, held=0)
    protocol.arena.free_bulk(taken)
    assert protocol.asks(1)


def test_default_limits_are_in_linux_s_proportions() -> None:
    pages = PageAllocator(Arena(1000), min_pages=100)
    assert pages.high_pages == 150
    assert limits_for(pages, (0, 0, 0), 6) == (318, 424, 637)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ((0, 0, 60), (30, 40, 60)),
        ((10, 0, 60), (10, 40, 60)),
        ((0, 20, 60), (20, 20, 60)),
        ((50, 0, 60), (40, 40, 60)),
        ((1, 2, 3), (1, 2, 3)),
        ((0, 0, 1), (1, 1, 1)),
    ],
)
def test_what_is_not_said_follows_from_what_is(given: tuple[int, int, int], limits: tuple[int, int, int]) -> None:
    assert limits_for(PageAllocator(Arena(16)), given, 6) == limits


def test_the_limits_of_one_socket_grow_to_a_quarter_of_low() -> None:
    assert Protocol((100, 200, 300)).mem.most_for_one() == 131072
    assert Protocol((1000, 2000, 3000)).mem.most_for_one() == 1000 * 1024


def test_limits_in_bytes_are_whole_pages() -> None:
    assert [pages_of(nbytes) for nbytes in (0, 1, 4096, 8191, 8192)] == [0, 1, 1, 1, 2]
