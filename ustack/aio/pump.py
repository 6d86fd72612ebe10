"""The pump: asyncio's event loop on one side, a stack that does no I/O on the other.

A readable device is one batch: frames in, users woken, answers out. The nearest deadline of the stack is one timer of the
loop, moved only when something is due earlier than it.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from ustack.timers import NEVER

if TYPE_CHECKING:
    from ustack.env import Env
    from ustack.link.device import Device
    from ustack.timers import Timers

BATCHES_BEFORE_TIMERS: Final = 16
"""Batches received before timers fire: the queue of a TAP device at its usual length. A flood delays no timer by more."""


class Pumped(Protocol):
    """What the pump needs of a stack."""

    env: Env
    timers: Timers

    def receive(self, device: Device) -> int:
        """Process a batch."""

    def advance(self, now: float) -> None:
        """Fire what is due."""

    def flush(self) -> None:
        """End a batch that was not the device's doing."""


class Pump:
    """Drives `stack` from the event loop in which `start` was called. Devices may be added before and after."""

    __slots__ = ("_alarm", "_alarm_at", "_devices", "_flush_handle", "_loop", "_stack")

    def __init__(self, stack: Pumped) -> None:
        self._stack = stack
        self._devices: list[Device] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = NEVER
        self._flush_handle: asyncio.Handle | None = None

    def add(self, device: Device) -> None:
        """Receive from `device`."""
        self._devices.append(device)
        if self._loop is not None:
            self._watch(device)

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        timers = self._stack.timers
        timers.now = monotonic()
        timers.alarm = self._set_alarm
        self._stack.env.kick = self._flush_soon
        for device in self._devices:
            self._watch(device)
        self._set_alarm(timers.next_deadline())

    def stop(self) -> None:
        """End; the stack's clock stands still from now on."""
        if self._loop is None:
            return
        for device in self._devices:
            if device.fileno() >= 0:
                self._loop.remove_reader(device.fileno())
        self._devices.clear()
        self._stack.timers.alarm = None
        self._stack.env.kick = None
        for handle in (self._alarm, self._flush_handle):
            if handle is not None:
                handle.cancel()
        self._loop = None

    def tick(self) -> None:
        """Bring the stack's clock up to date, for calls that come from outside a batch."""
        if self._loop is not None:
            self._stack.timers.now = monotonic()

    def _watch(self, device: Device) -> None:
        assert self._loop is not None
        if device.fileno() >= 0:
            self._loop.add_reader(device.fileno(), self._on_readable, device)

    def _on_readable(self, device: Device) -> None:
        self._stack.timers.now = monotonic()
        self._stack.receive(device)

    def _drain(self, device: Device) -> None:
        for _ in range(BATCHES_BEFORE_TIMERS):
            self._stack.timers.now = monotonic()
            if not self._stack.receive(device):
                return

    def _flush_soon(self) -> None:
        if self._flush_handle is None and self._loop is not None:
            self._flush_handle = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_handle = None
        self._stack.flush()

    def _set_alarm(self, deadline: float) -> None:
        if deadline >= self._alarm_at or self._loop is None:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = deadline
        self._alarm = self._loop.call_later(max(deadline - monotonic(), 0.0), self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = None
        self._alarm_at = NEVER
        stack = self._stack
        # An answer that came while we were kept from running is heard before a timer says that none came: uvloop fires timers
        # before it looks at descriptors, and one batch may not be all that waits.
        for device in self._devices:
            self._drain(device)
        stack.advance(monotonic())
        self._set_alarm(stack.timers.next_deadline())
