"""A daemon that makes a remote disk a file: over its own stack, through outages, until it ends."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.running import KERNEL, RunningDaemon
from tests.needs import require_path
from ustack.cli.control import call
from ustack.nbd.export import MemoryExport
from ustack.nbd.fuse_mount import is_mounted
from ustack.nbd.server import NbdServer

if TYPE_CHECKING:
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

SIZE = 4 << 20


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require_path(Path("/dev/fuse"), "modprobe fuse, or give it to the container")


async def attached(daemon: RunningDaemon) -> dict[str, Any]:
    """Wait until the daemon's export is a file; returns what status says of it."""
    async with asyncio.timeout(20):
        while True:
            (nbd,) = (await asyncio.to_thread(call, str(daemon.control), "status"))["nbd"]
            if nbd["fuse"] is not None:
                return dict(nbd)
            await asyncio.sleep(0.02)


class Storage(MemoryExport):
    """What survives the server in front of it."""

    __slots__ = ()

    def close(self) -> None:
        pass


async def listen(netns: Namespace, memory: MemoryExport, port: int = 0) -> tuple[NbdServer, int]:
    """A server on the kernel's end of the TAP."""
    bound = netns.open(socket.create_server, ("0.0.0.0", port))
    server = NbdServer([memory])
    await server.listen_socket(bound)
    return server, bound.getsockname()[1]


def write_and_sync(path: Path, data: bytes, offset: int) -> None:
    """Returns when the data is on the server."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


async def test_the_disk_is_a_file_until_the_daemon_ends_and_survives_a_restart_of_its_server(
    netns: Namespace, tmp_path: Path
) -> None:
    content = random.Random(8).randbytes(SIZE)
    memory = Storage(SIZE)
    server, port = await listen(netns, memory)
    disk = tmp_path / "disk"
    config = f'[[nbd]]\nname = "d"\nuri = "nbd://{KERNEL}:{port}/"\nfuse = "{disk}"\n'
    with RunningDaemon(netns, tmp_path, config) as daemon:
        report = await attached(daemon)
        assert report["fuse"]["path"] == str(disk)
        await asyncio.to_thread(write_and_sync, disk, content[: SIZE // 2], 0)
        await server.close()
        waiting = asyncio.create_task(asyncio.to_thread(write_and_sync, disk, content[SIZE // 2 :], SIZE // 2))
        server, _ = await listen(netns, memory, port)
        await waiting
        assert memory.read(0, SIZE) == content
        assert await asyncio.to_thread(disk.read_bytes) == content
        text = (await daemon.ustack("status")).stdout.decode()
        assert f"file {disk}: " in text
        assert "0 errors" in text
    await server.close()
    assert not is_mounted(str(disk))
    assert not disk.exists()


async def test_a_file_that_cannot_be_is_said_and_the_export_stays_attached(netns: Namespace, tmp_path: Path) -> None:
    server, port = await listen(netns, MemoryExport(SIZE))
    (tmp_path / "disk").write_text("precious")
    config = f'[[nbd]]\nname = "d"\nuri = "nbd://{KERNEL}:{port}/"\nfuse = "{tmp_path}/disk"\n'
    with RunningDaemon(netns, tmp_path, config) as daemon:
        async with asyncio.timeout(20):
            while not (report := (await asyncio.to_thread(call, str(daemon.control), "status"))["nbd"][0])["size"]:
                await asyncio.sleep(0.02)
        assert (report["state"], report["fuse"]) == ("attached", None)
        assert "empty file" in report["error"]
    await server.close()
    assert (tmp_path / "disk").read_text() == "precious"
