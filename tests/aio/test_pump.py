"""The pump between asyncio's event loop and a stack."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from ustack.aio.pump import BATCHES_BEFORE_TIMERS, Pump
from ustack.stack import Stack
from ustack.timers import Timer

if TYPE_CHECKING:
    from ustack.link.device import Device

pytestmark = pytest.mark.asyncio


class Silent:
    """A device of which no loop sees that frames wait, as when the process was not running while they came."""

    def fileno(self) -> int:
        return -1


class Recorded:
    """A stack that writes down what the pump asks of it, with so many batches waiting."""

    def __init__(self, batches: int) -> None:
        stack = Stack()
        self.env = stack.env
        self.timers = stack.timers
        self.waiting = batches
        self.heard = 0
        self.heard_before_timers = asyncio.get_running_loop().create_future()

    def receive(self, device: Device) -> int:
        if not self.waiting:
            return 0
        self.waiting -= 1
        self.heard += 1
        return 64

    def advance(self, now: float) -> None:
        self.timers.run(now)

    def flush(self) -> None:
        pass


async def heard_when_a_timer_fires(batches: int) -> int:
    """How many of the batches that wait have been received when a timer of the stack fires."""
    stack = Recorded(batches)
    pump = Pump(stack)
    pump.add(Silent())  # type: ignore[arg-type]
    pump.start()
    stack.timers.set(Timer(lambda: stack.heard_before_timers.set_result(stack.heard)), stack.timers.now + 0.001)
    try:
        async with asyncio.timeout(10):
            return int(await stack.heard_before_timers)
    finally:
        pump.stop()


async def test_what_has_arrived_is_heard_before_a_timer_says_that_it_has_not() -> None:
    assert await heard_when_a_timer_fires(batches=3) == 3


async def test_a_flood_does_not_keep_timers_from_firing() -> None:
    assert await heard_when_a_timer_fires(batches=10 * BATCHES_BEFORE_TIMERS) == BATCHES_BEFORE_TIMERS
