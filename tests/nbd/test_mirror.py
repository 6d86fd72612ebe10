"""One disk on several servers: who is written to, who is read from, who has lagged, and how it comes back."""

from __future__ import annotations

import asyncio
import errno
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.nbd.servers import MIB, serving
from tests.nbd.test_reconnect import Fickle
from ustack import nbd
from ustack.nbd.client import NbdClient
from ustack.nbd.export import MemoryExport
from ustack.nbd.mirror import NbdMirror

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SIZE = 4 * MIB


@asynccontextmanager
async def mirrored(folder: Path, count: int = 2, **options: Any) -> AsyncIterator[tuple[NbdMirror, list[Fickle], list[str]]]:
    """A mirror of servers that can be killed and started again, what they serve, and the events."""
    servers, events = [], []
    for number in range(count):
        (folder / str(number)).write_bytes(bytes(SIZE))
        servers.append(Fickle(folder / str(number)))
        await servers[-1].start()
    members = [(f"m{n}", lambda s=server: NbdClient.open(s.connect, dead_after=0)) for n, server in enumerate(servers)]
    options = {"resync_every": None} | options
    options["on_event"] = lambda event, name, _: events.append(f"{name} {event}")
    async with await NbdMirror.open(members, **options) as disk:
        yield disk, servers, events
    for server in servers:
        await server.kill()


def contents(servers: list[Fickle]) -> list[bytes]:
    return [server.image.read_bytes() for server in servers]


async def test_writes_go_to_all_and_a_read_to_one(tmp_path: Path) -> None:
    async with mirrored(tmp_path, 3) as (disk, servers, events):
        assert (disk.size, disk.can_flush, disk.read_only) == (SIZE, True, False)
        content = random.Random(1).randbytes(2 * MIB)
        await disk.pwrite(content, 12345)
        await disk.zero(MIB, 100_000, no_hole=True)
        await disk.trim(4096, 0)
        await disk.flush()
        model = bytearray(SIZE)
        model[12345 : 12345 + 2 * MIB] = content
        model[100_000 : 100_000 + MIB] = bytes(MIB)
        assert await disk.pread(SIZE - 4096, 4096) == model[4096:]
        assert sum(extent.length for extent in await disk.block_status(SIZE, 0)) == SIZE
        assert [member.in_sync for member in disk.members()] == [True, True, True]
    assert [each[4096:] for each in contents(servers)] == [bytes(model[4096:])] * 3
    assert events == []


async def test_a_member_dies_amid_a_storm_and_nobody_notices_and_it_comes_back_with_everything(tmp_path: Path) -> None:
    chance = random.Random(5)
    model = bytearray(SIZE)
    async with mirrored(tmp_path, 2) as (disk, servers, events):
        stop = False

        async def storm(start: int, end: int) -> None:
            while not stop:
                length = chance.choice([512, 4096, 70_000])
                offset = chance.randrange(start, end - length)
                if chance.random() < 0.6:
                    data = chance.randbytes(length)
                    model[offset : offset + length] = data
                    await disk.pwrite(data, offset)
                elif chance.random() < 0.1:
                    await disk.flush()
                else:
                    assert await disk.pread(length, offset) == model[offset : offset + length]

        step = SIZE // 8
        storms = [asyncio.create_task(storm(start, start + step)) for start in range(0, SIZE, step)]
        for round_, server in enumerate([servers[1], servers[0], servers[1]]):
            await disk.pread(512, 0)
            await server.kill()
            while len(events) < 2 * round_ + 1:
                await disk.pwrite(bytes([round_]), SIZE - 1)
                model[SIZE - 1] = round_
            await server.start()
            await disk.resync(servers.index(server))
        stop = True
        await asyncio.gather(*storms)
        await disk.flush()
        assert await disk.pread(SIZE, 0) == model
        assert [member.missed for member in disk.members()] == [0, 0]
    assert contents(servers) == [bytes(model)] * 2
    assert events == ["m1 lagged", "m1 in sync", "m0 lagged", "m0 in sync", "m1 lagged", "m1 in sync"]


async def test_a_member_that_is_away_at_first_gets_everything_and_that_by_itself(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(SIZE)
    one, two = Fickle(tmp_path / "one"), Fickle(tmp_path / "two")
    one.image.write_bytes(content)
    two.image.write_bytes(b"\xff" * SIZE)
    await one.start()
    in_sync = asyncio.Event()

    async def second() -> NbdClient:
        if not two.starts:
            await two.start()
            raise OSError(errno.ECONNREFUSED, "not yet")
        return await NbdClient.open(two.connect)

    async with await NbdMirror.open(
        [("one", lambda: NbdClient.open(one.connect)), ("two", second)], resync_every=0.01, on_event=lambda *_: in_sync.set()
    ) as disk:
        first, other = disk.members()
        assert (first.in_sync, other.in_sync, other.missed >= SIZE) == (True, False, True)
        assert isinstance(other.reason, ConnectionRefusedError)
        async with asyncio.timeout(20):
            await in_sync.wait()
        assert all(member.in_sync for member in disk.members())
    await one.kill()
    await two.kill()
    assert two.image.read_bytes() == content


class Stuck:
    """A disk whose writes and reads stay away until it is told to go on."""

    def __init__(self, disk: NbdClient) -> None:
        self._disk = disk
        self.go_on = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    async def pwrite(self, *arguments: Any, **options: Any) -> None:
        await self.go_on.wait()
        await self._disk.pwrite(*arguments, **options)


async def test_a_member_that_is_much_slower_than_the_others_has_lagged() -> None:
    async with serving(MemoryExport(SIZE, "a"), MemoryExport(SIZE, "b")) as uri:
        slow: list[Any] = []

        async def second() -> Any:
            slow.append(Stuck(await NbdClient.open(await connector(uri), "b")))
            return slow[-1]

        async with await NbdMirror.open([("a", lambda: open_a(uri)), ("b", second)], max_lag=0.05, resync_every=None) as disk:
            await disk.pwrite(b"hello", 0)
            fast, lagging = disk.members()
            assert (fast.in_sync, lagging.in_sync, lagging.missed) == (True, False, MIB)
            assert "took longer" in str(lagging.reason)
            await disk.pwrite(b"more", 2 * MIB)
            assert disk.members()[1].missed == 2 * MIB
            again = asyncio.create_task(disk.resync(1))
            while len(slow) < 2:
                await asyncio.sleep(0)
            slow[1].go_on.set()
            await again
            assert await slow[1]._disk.pread(4, 2 * MIB) == b"more"
            assert disk.members()[1].in_sync


async def connector(uri: str) -> Any:
    from ustack.nbd.connector import connector_for

    return connector_for(nbd.NbdUri.parse(uri))


async def open_a(uri: str) -> NbdClient:
    return await NbdClient.open(await connector(uri), "a")


async def test_the_last_member_takes_its_errors_with_it(tmp_path: Path) -> None:
    async with mirrored(tmp_path, 2) as (disk, servers, _):
        await servers[0].kill()
        await disk.pwrite(b"x", 0)
        await servers[1].kill()
        with pytest.raises(OSError, match=r"server closed|connection"):
            await disk.pwrite(b"y", 0)
        with pytest.raises(OSError, match=r"server closed|connection"):
            await disk.pread(1, 0)
        await servers[0].start()
        await servers[1].start()


async def test_a_cancelled_write_is_on_all_members_or_on_none(tmp_path: Path) -> None:
    async with mirrored(tmp_path, 2) as (disk, servers, _):
        write = asyncio.create_task(disk.pwrite(b"whole" * 100_000, 0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        assert all(member.in_sync for member in disk.members())
    one, two = contents(servers)
    assert one == two


async def test_members_must_have_one_size_and_somebody_must_be_there() -> None:
    async with serving(MemoryExport(MIB, "a"), MemoryExport(SIZE, "b")) as uri:
        with pytest.raises(OSError, match=r"have \[1048576, 4194304\] bytes"):
            async with nbd.connect_mirror([f"{uri}/a", f"{uri}/b"]):
                pass
        with pytest.raises(OSError, match="no export named 'd'"):
            async with nbd.connect_mirror([f"{uri}/c", f"{uri}/d"]):
                pass
        async with nbd.connect_mirror([f"{uri}/a", f"{uri}/a"], stale=[1], resync_every=None) as disk:
            assert [member.in_sync for member in disk.members()] == [True, False]
            await disk.resync(1)
            assert [member.name for member in disk.members()] == [f"{uri}/a"] * 2
    with pytest.raises(ValueError, match="needs members"):
        await NbdMirror.open([])
