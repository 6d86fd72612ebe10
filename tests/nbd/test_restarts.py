"""Debian's servers, killed and started again amid verified reads and writes: callers only wait, and nothing is lost.

A handful of restarts each: one for every five of `--seeds`, so `--seeds 100` for twenty.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from tests.nbd.servers import MIB
from tests.nbd.test_interop import nbd_server, nbdkit_file, qemu_nbd
from ustack import nbd

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.nbd.test_interop import Running

pytestmark = pytest.mark.e2e

SIZE = 4 * MIB
OPERATIONS = 60
"""Answered between two restarts."""


@pytest.mark.parametrize("server", [nbdkit_file, qemu_nbd, nbd_server])
async def test_killed_again_and_again_amid_a_verified_storm(
    server: Callable[[Path], AbstractAsyncContextManager[Running]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    restarts = request.config.getoption("--seeds") // 5
    chance = random.Random(11)
    model = bytearray(SIZE)
    (tmp_path / "image").write_bytes(model)
    answered = asyncio.Semaphore(0)
    done = False

    async def storm(disk: nbd.NbdClient, start: int, stop: int) -> None:
        while not done:
            length = chance.choice([512, 4096, 50_000])
            offset = chance.randrange(start, stop - length)
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                model[offset : offset + length] = data
                await disk.pwrite(data, offset, fua=chance.random() < 0.1)
            elif chance.random() < 0.1:
                await disk.flush()
            else:
                assert await disk.pread(length, offset) == model[offset : offset + length]
            answered.release()

    async with AsyncExitStack() as stack:
        disk: nbd.NbdClient | None = None
        storms: list[asyncio.Task[None]] = []
        for _ in range(restarts + 1):
            (tmp_path / "socket").unlink(missing_ok=True)
            # The end of this block is kill -9.
            async with server(tmp_path) as (uri, _):
                if disk is None:
                    disk = await stack.enter_async_context(nbd.connect(uri, queue_depth=16, dead_after=60))
                    step = SIZE // 8
                    storms = [asyncio.create_task(storm(disk, start, start + step)) for start in range(0, SIZE, step)]
                for _ in range(OPERATIONS):
                    await answered.acquire()
                if disk.counters()["outages"] >= restarts:
                    done = True
                    await asyncio.gather(*storms)
                    await disk.flush()
                    assert await disk.pread(SIZE, 0) == model
        assert disk is not None
        counters = disk.counters()
        assert counters["outages"] >= restarts
        assert counters["replayed"] > 0
        assert counters["samples_lost"] == 0
    assert (tmp_path / "image").read_bytes() == model
