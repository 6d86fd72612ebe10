"""Where the daemon gives an attached disk to the machine: a unix socket, or a device of the kernel's nbd.

A front end is opened when the disk is there for the first time and stays until it is closed. When the disk is given up and
attached anew, and is the same, the front end goes on with it; meanwhile its clients are told ESHUTDOWN. What waits for a server
that is merely away waits in the client, and no front end knows of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ustack.daemon import nbd_device
from ustack.nbd.remote_export import RemoteExport
from ustack.nbd.server import NbdServer, bind_unix

if TYPE_CHECKING:
    from ustack.nbd.client import NbdClient


class FrontEnd(ABC):
    """One way to a disk. `where` is its path, `name` the name of the export."""

    def __init__(self, where: str, name: str) -> None:
        self.where = where
        self._name = name
        self._export: RemoteExport | None = None
        self._server: NbdServer | None = None

    def report(self) -> dict[str, Any]:
        """How it is, for the call `status`."""
        return {"path": self.where, "clients": 0 if self._server is None else self._server.clients}

    async def offer(self, disk: NbdClient) -> None:
        """The disk is there, for the first time or again. Raises OSError."""
        if self._export is not None and self._export.go_on_with(disk):
            return
        await self._withdraw()  # there was another disk, or none
        self._export = RemoteExport(disk, self._name)
        # A client that is stopped, or swapped out, must find its disk when it goes on, however long that takes.
        self._server = NbdServer([self._export], stall_timeout=None)
        try:
            await self._open(self._server, self._export)
        except BaseException:
            await self._withdraw()
            raise

    def suspend(self) -> None:
        """The disk is given up; perhaps there will be another."""
        if self._export is not None:
            self._export.lose()

    async def close(self) -> None:
        """There will be no disk any more: clients are dropped."""
        await self._withdraw()

    async def _withdraw(self) -> None:
        server, self._server, self._export = self._server, None, None
        if server is not None:
            await self._shut(server)

    @abstractmethod
    async def _open(self, server: NbdServer, export: RemoteExport) -> None:
        """Let clients in."""

    async def _shut(self, server: NbdServer) -> None:
        """Send them away."""
        await server.close()


class UnixSocket(FrontEnd):
    """A unix socket that speaks NBD. It is bound when the front end is made, so that clients that come before the disk is there
    wait; raises OSError when it cannot be."""

    def __init__(self, path: str, name: str, mode: int) -> None:
        super().__init__(path, name)
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._listener = bind_unix(path, mode)
        self._listener.listen()

    async def _open(self, server: NbdServer, export: RemoteExport) -> None:
        await server.listen_socket(self._listener.dup())

    async def close(self) -> None:
        """Drop the clients and remove the socket."""
        await super().close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.where)  # noqa: PTH108


class KernelDevice(FrontEnd):
    """A device `/dev/nbdN` of the kernel, at the other end of a socketpair. `where` is `auto` until the kernel has chosen."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(path, name)
        self._wanted = nbd_device.device_index(path)
        self._index: int | None = None

    @classmethod
    async def make(cls, path: str, name: str) -> Self:
        """Raises OSError ENODEV where the kernel has no nbd."""
        await asyncio.to_thread(nbd_device.check_driver)
        return cls(path, name)

    async def _open(self, server: NbdServer, export: RemoteExport) -> None:
        info = export.info
        block_size = nbd_device.block_size_for(info.size, info.minimum_block)
        ours, theirs = socket.socketpair()
        with theirs:
            await server.attach(ours, self._name)
            self._index = await asyncio.to_thread(
                nbd_device.connect, self._wanted, theirs.fileno(), info.size, block_size, info.flags
            )
        self.where = f"/dev/nbd{self._index}"

    async def _shut(self, server: NbdServer) -> None:
        index, self._index = self._index, None
        if index is not None:
            with contextlib.suppress(OSError):  # it may have been disconnected by others
                await asyncio.to_thread(nbd_device.disconnect, index)
        await server.close()
