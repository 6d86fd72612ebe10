"""File descriptors: numbers for sockets, O_NONBLOCK for each, and waiting until something has happened to one of several."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.socket import Socket

FIRST: Final = 3
"""The lowest number: 0, 1 and 2 are taken in every program."""


class Descriptor:
    """An open socket. `nonblocking` is its O_NONBLOCK."""

    __slots__ = ("nonblocking", "socket", "waiters")

    def __init__(self, socket: Socket, nonblocking: bool = False) -> None:
        self.socket = socket
        self.nonblocking = nonblocking
        self.waiters: set[asyncio.Future[None]] = set()

    def changed(self, _mask: int = 0) -> None:
        """Let every call that waits for this socket look again."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


async def change(descriptors: Iterable[Descriptor]) -> None:
    """Return when something has happened to one of `descriptors`."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    watched = list(descriptors)
    for descriptor in watched:
        descriptor.waiters.add(waiter)
        descriptor.socket.watch(descriptor.changed)  # anew each time: connect and listen give a socket another endpoint
    try:
        await waiter
    finally:
        for descriptor in watched:
            descriptor.waiters.discard(waiter)


class Descriptors:
    """The table of a process: the lowest free number is the next."""

    def __init__(self) -> None:
        self._open: dict[int, Descriptor] = {}

    def add(self, socket: Socket, *, nonblocking: bool = False) -> int:
        """Give `socket` a number."""
        fd = FIRST
        while fd in self._open:
            fd += 1
        self._open[fd] = Descriptor(socket, nonblocking)
        return fd

    def find(self, fd: int) -> Descriptor | None:
        """The socket behind `fd`, if there is one."""
        return self._open.get(fd)

    def get(self, fd: int) -> Descriptor:
        """The socket behind `fd`. Raises OSError EBADF."""
        found = self._open.get(fd)
        if found is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return found

    def remove(self, fd: int) -> Descriptor:
        """Take the number away. Raises OSError EBADF."""
        found = self.get(fd)
        del self._open[fd]
        return found
