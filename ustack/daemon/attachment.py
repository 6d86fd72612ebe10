"""An NBD export that the daemon keeps attached: it connects, tries again with back-off, says how things are, and makes the disk
a file, a unix socket or a device if it is told to.

Requests survive a lost connection (`ustack.nbd.session`); only after `dead_after`, or when the export has changed, they fail,
and the export is attached anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Any, Final

from ustack.daemon.front_ends import KernelDevice, UnixSocket
from ustack.daemon.swap import swaps_on
from ustack.nbd.connector import open_disk
from ustack.nbd.fuse_export import FuseExport

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.daemon.config import Nbd
    from ustack.daemon.front_ends import FrontEnd
    from ustack.daemon.watchdog import Board
    from ustack.nbd import NbdClient
    from ustack.stack import Stack

BACKOFF_FIRST: Final = 0.5
"""Seconds after the first failure until the next attempt; doubled after each."""

BACKOFF_MAX: Final = 30.0
"""Seconds between attempts at most."""

log = logging.getLogger("ustack")


class Attachment:
    """One export of the configuration, attached over `stack`. `on_change` is called when its state changes.

    `state` is "connecting", "attached" or "lost"; `client` is there while it is attached; `error` says why it is not. `fuse` is
    the disk as a file, from the first attachment to the end. `first` is done after the first attempt, with its error if it has
    failed.
    """

    def __init__(self, stack: Stack, config: Nbd, on_change: Callable[[], None], board: Board | None = None) -> None:
        """`board` is where the watchdog looks."""
        self.config = config
        self.state = "connecting"
        self.error = ""
        self.client: NbdClient | None = None
        self.fuse: FuseExport | None = None
        self._front_ends: list[FrontEnd] = []
        self._stack = stack
        self._on_change = on_change
        self._board = board
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self.first: asyncio.Future[None] = self._loop.create_future()
        self._task = self._loop.create_task(self._keep_attached())

    def report(self) -> dict[str, Any]:
        """How it is, for the call `status`; `since` is for how many seconds it has been so."""
        return {
            "name": self.config.name,
            "uri": self.config.uri,
            "state": self.state,
            "since": self._loop.time() - self._since,
            "size": self.client.size if self.client is not None else None,
            "error": self.error,
            "counters": self.client.counters() if self.client is not None else {},
            "fuse": self.fuse.report() if self.fuse is not None else None,
            "front_ends": [front_end.report() for front_end in self._front_ends],
        }

    def swaps(self) -> list[str]:
        """The swap devices that are active on it."""
        paths = {front_end.where for front_end in self._front_ends}
        if self.fuse is not None:
            paths.add(self.fuse.path)
        return swaps_on(paths) if paths else []

    async def close(self) -> None:
        """Let go of the export in order."""
        if self.fuse is not None:
            await self.fuse.close()
        for front_end in self._front_ends:
            await front_end.close()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _enter(self, state: str, error: str = "") -> None:
        if state != self.state:
            self._since = self._loop.time()
        self.state, self.error = state, error
        self._on_change()

    async def _keep_attached(self) -> None:
        backoff = BACKOFF_FIRST
        while True:
            try:
                self.client = await self._attach()
            except OSError as error:
                self._enter(self.state, _say(error))
                if not self.first.done():
                    self.first.set_exception(error)
                    self.first.exception()  # marked as seen: perhaps nobody waits for it
                log.warning("nbd %s: %s; trying again in %g s", self.config.name, self.error, backoff)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, BACKOFF_MAX)
                continue
            backoff = BACKOFF_FIRST
            self._enter("attached")
            log.info("nbd %s: attached, %d bytes", self.config.name, self.client.size)
            try:
                if self.config.fuse is not None:
                    self._export_file(self.config.fuse, self.client)
                if not self.first.done():
                    self._say_first()
                await self.client.wait_lost()
            finally:
                client, self.client = self.client, None
                if self.fuse is not None:
                    self.fuse.disk = None
                for front_end in self._front_ends:
                    front_end.suspend()
                await client.close()

    def _say_first(self) -> None:
        if self.config.fuse is not None and self.fuse is None:
            self.first.set_exception(OSError(errno.EINVAL, self.error))
            self.first.exception()
        else:
            self.first.set_result(None)

    async def _attach(self) -> NbdClient:
        """Connect, and let the front ends have the disk."""
        config = self.config
        # Made before anything else, so that who comes to a socket before the disk is there waits instead of being refused.
        if config.unix is not None and not any(isinstance(each, UnixSocket) for each in self._front_ends):
            self._front_ends.append(UnixSocket(config.unix, config.name, int(config.unix_mode, 8)))
        if config.device is not None and not any(isinstance(each, KernelDevice) for each in self._front_ends):
            self._front_ends.append(await KernelDevice.make(config.device, config.name))
        client = await open_disk(
            [config.uri],
            create_connection=self._create_connection,
            queue_depth=config.requests,
            request_size=config.request_size,
            dead_after=config.dead_after or None,
            on_event=self._on_event,
        )
        try:
            for front_end in self._front_ends:
                await front_end.offer(client)
                log.info("nbd %s: at %s", config.name, front_end.where)
        except BaseException:
            await client.close(0)
            raise
        return client

    def _export_file(self, path: str, client: NbdClient) -> None:
        """Make the disk a file; after a loss, let the file have its disk back, if it is the same."""
        if self.fuse is not None and self.fuse.size == client.size:
            self.fuse.disk = client
        elif self.fuse is not None:
            self.error = f"{path}: had {self.fuse.size} bytes, and the disk has {client.size} now: requests fail"
            log.critical("nbd %s: %s", self.config.name, self.error)
        else:
            try:
                self.fuse = FuseExport(
                    client,
                    path,
                    name=f"ustack:{self.config.name}",
                    requests=self.config.requests,
                    request_size=self.config.request_size,
                    since=self._board.slots(self.config.name, self.config.requests) if self._board is not None else None,
                )
            except OSError as error:
                self.error = f"{error.filename or path}: {error.strerror}"
                log.error("nbd %s: %s", self.config.name, self.error)
                return
            log.info("nbd %s: is the file %s", self.config.name, self.fuse.path)
        self._on_change()

    def _on_event(self, event: str, reason: OSError | None) -> None:
        text = str(reason.strerror or reason) if reason is not None else ""
        if event == "attached":
            self._enter("attached")
            log.info("nbd %s: attached again", self.config.name)
        elif event == "data lost":
            log.critical("nbd %s: %s", self.config.name, text)
        else:
            self._enter("lost", text)
            log.error("nbd %s: %s: %s", self.config.name, event, text)

    async def _create_connection(self, factory: Any, host: str, port: int) -> tuple[Any, Any]:
        return await self._stack.create_connection(factory, host, port, memalloc=True)


def _say(error: OSError) -> str:
    text = str(error.strerror or error)
    return f"{error.filename}: {text}" if error.filename else text
