"""Cuts and worse wires, when a scenario says so: for simulated wires and for the wire behind a TAP."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from ustack.lab.pressure.scenario import Cut, LinkFault, Scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.lab.pressure.result import Result
    from ustack.link.simwire import Direction

CHANGES = ("delay", "jitter", "loss", "duplicate", "corrupt")
"""What of a wire a fault can change."""


class WireFaults:
    """The faults of a wire with the directions `there` (from the stack under test) and `back`.

    What the directions carry is worked out anew whenever a fault begins or ends, so that faults may overlap: of two that set
    the same key, the one that began last holds.
    """

    def __init__(self, there: Direction, back: Direction) -> None:
        self._directions = {"out": there, "in": back}
        self._plain = {"out": there.impairments, "in": back.impairments}
        self._cuts = {"out": 0, "in": 0}
        self._active: list[LinkFault] = []
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self, scenario: Scenario) -> None:
        """Start and end the faults of `scenario` when they are due, counted from now."""
        for fault in scenario.fault:
            if isinstance(fault, Cut):
                self._later(fault.start, lambda fault=fault: self.cut(fault.direction))  # type: ignore[misc]
                self._later(fault.start + fault.duration, lambda fault=fault: self.mend(fault.direction))  # type: ignore[misc]
            elif isinstance(fault, LinkFault):
                self._later(fault.start, lambda fault=fault: self._worsen(fault))  # type: ignore[misc]
                if fault.stop is not None:
                    self._later(fault.stop, lambda fault=fault: self._relieve(fault))  # type: ignore[misc]

    def _later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, callback))

    def end(self) -> None:
        """Begin and end nothing more."""
        for timer in self._timers:
            timer.cancel()

    def cut(self, direction: str) -> None:
        """Lose every frame in "in", "out" or "both" directions. Cuts add up."""
        for each in _each(direction):
            self._cuts[each] += 1
        self._apply()

    def mend(self, direction: str) -> None:
        """End a cut."""
        for each in _each(direction):
            self._cuts[each] -= 1
        self._apply()

    def _worsen(self, fault: LinkFault) -> None:
        self._active.append(fault)
        self._apply()

    def _relieve(self, fault: LinkFault) -> None:
        self._active.remove(fault)
        self._apply()

    def _apply(self) -> None:
        for name, direction in self._directions.items():
            impairments = self._plain[name]
            for fault in self._active:
                if name in _each(fault.direction):
                    changes = {key: value for key in CHANGES if (value := getattr(fault, key)) is not None}
                    impairments = replace(impairments, **changes)
            direction.impairments = replace(impairments, loss=1.0) if self._cuts[name] else impairments

    def report(self) -> Result:
        """Frames in each direction, and what the wire did to them."""
        there, back = self._directions["out"], self._directions["in"]
        return {
            "out": there.frames,
            "in": back.frames,
            "lost": there.drops.total() + back.drops.total(),
            "duplicated": there.duplicated + back.duplicated,
            "corrupted": there.corrupted + back.corrupted,
        }


def _each(direction: str) -> tuple[str, ...]:
    return ("in", "out") if direction == "both" else (direction,)
