"""Who has the reserve made for him, how large it is then, and until when."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from ustack.link.simwire import SimDevice
from ustack.mem.reserve import Budget, Demand
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE = Demand(4, 65536)


@pytest.fixture
def stack() -> Iterator[Stack]:
    """A stack whose reserve follows the demands."""
    stack = Stack(memory=16 << 20, reserve="auto", random=Random(1), now=0.0)
    stack.add_interface(SimDevice("sim0", b"\x02\x00\x00\x00\x00\x01"), "10.0.0.1/24")
    yield stack
    stack.close()


def claimed(stack: Stack, demand: Demand) -> Budget:
    """What a disk with this demand may use."""
    budget = stack.reserve.claim("disk", demand)
    assert budget is not None
    return budget


def test_a_socket_has_it_until_it_is_closed(stack: Stack) -> None:
    least = stack.pages.min_pages
    with stack.socket() as sock:
        sock.set_memalloc(True)
        sock.reserve_for(ONE)
        assert stack.pages.min_pages > least
        assert 0 < sock.options.rcvbuf < 16 << 20
    assert stack.pages.min_pages == least


def test_who_connects_again_finds_it_as_he_left_it(stack: Stack) -> None:
    least = stack.pages.min_pages
    for _ in range(3):
        with stack.socket() as sock:
            sock.set_memalloc(True)
            sock.reserve_for(ONE, "disk")
            mine = stack.pages.min_pages
        assert stack.pages.min_pages == mine > least, "between two connections"
    stack.reserve.release("disk")
    assert stack.pages.min_pages == least


def test_several_connections_have_several_times_as_much(stack: Stack) -> None:
    alone = claimed(stack, ONE)
    rings = stack.pages.min_pages - alone.pages
    each = claimed(stack, ONE._replace(connections=3))
    assert each == alone, "what one of them may queue is the same"
    assert stack.pages.min_pages == rings + 3 * alone.pages


def test_a_fixed_one_is_shared_by_all_connections(stack: Stack) -> None:
    stack.reserve.fix(64)
    alone = claimed(stack, ONE)
    shared = claimed(stack, ONE._replace(connections=4))
    assert stack.pages.min_pages == 64
    assert shared.rcvbuf <= alone.rcvbuf // 4 + 4096


def test_more_than_half_of_the_memory_is_refused_and_nothing_changes(stack: Stack) -> None:
    stack.reserve.claim("disk", ONE)
    before = stack.pages.min_pages
    with pytest.raises(OSError, match="more than half"):
        stack.reserve.claim("disk", Demand(1000, 1 << 20, 4))
    assert stack.pages.min_pages == before
