"""The client over our own TCP, through a TAP device, to a server on the kernel's side."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests import leaks
from tests.nbd.servers import MIB
from ustack import nbd
from ustack.link.tap import TapDevice
from ustack.nbd.copy import copy
from ustack.nbd.disks import MemoryDisk
from ustack.nbd.export import MemoryExport
from ustack.nbd.server import NbdServer
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

KERNEL, OURS = "10.77.0.1", "10.77.0.2"


@asynccontextmanager
async def stack_and_server(netns: Namespace, size: int) -> AsyncIterator[tuple[Stack, NbdServer, str]]:
    """Our stack on one end of a TAP, on the other the kernel with a server that exports `size` bytes; and the URI."""
    device = netns.open(TapDevice, "tap0")
    netns.set_up("tap0", f"{KERNEL}/24")
    bound = netns.open(socket.create_server, (KERNEL, 0))
    server = NbdServer([MemoryExport(size)])
    await server.listen_socket(bound)
    stack = Stack()
    leaks.watch_pool(stack.pool)
    stack.add_interface(device, f"{OURS}/24")
    async with stack:
        yield stack, server, f"nbd://{KERNEL}:{bound.getsockname()[1]}/"
    await server.close()


async def test_a_disk_is_copied_both_ways_and_compares_equal(netns: Namespace) -> None:
    content = random.Random(9).randbytes(32 * MIB)
    async with (
        stack_and_server(netns, len(content)) as (stack, _, uri),
        nbd.connect(uri, create_connection=stack.create_connection) as disk,
    ):
        await copy(MemoryDisk(bytearray(content)), disk, request_size=100_000)
        back = MemoryDisk(bytearray(len(content)))
        await copy(disk, back)
        assert back.data == content
        reads = await asyncio.gather(*(disk.pread(4096, 4096 * n) for n in range(500)))
        assert b"".join(reads) == content[: 4096 * 500]


async def test_a_server_that_goes_away_is_a_clear_error_at_once(netns: Namespace) -> None:
    async with (
        stack_and_server(netns, 32 * MIB) as (stack, server, uri),
        nbd.connect(uri, create_connection=stack.create_connection, dead_after=0) as disk,
    ):
        copying = asyncio.create_task(copy(MemoryDisk(bytearray(32 * MIB)), disk))
        await disk.flush()
        await server.close()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionError, match=KERNEL):
                await copying
