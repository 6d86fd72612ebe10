"""Clients that stop, trickle, flood and lie: each is dropped or waited for, holds little, and the others notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.nbd import wire
from tests.nbd.servers import MIB
from tests.nbd.test_server_extensions import EXTENDED, SET_CONTEXTS, query, request, status
from ustack import nbd
from ustack.nbd import server_connection
from ustack.nbd.export import MemoryExport
from ustack.nbd.server import MAX_CLIENTS, NbdServer
from ustack.nbd.server_connection import MAX_UNDER_WAY, WRITE_HIGH_WATER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FLAGS = b"\0\0\0\x03"
DIALOGUE = [
    FLAGS,
    wire.option(wire.LIST),
    wire.option(EXTENDED),
    wire.option(SET_CONTEXTS, query("disk", "base:allocation")),
    wire.option(wire.INFO, wire.info_data("disk", 1, 2, 3)),
    wire.option(wire.GO, wire.info_data("disk", 3)),
    request(wire.WRITE, 1, 0, 5, 1 << 5, b"hello"),
    request(wire.WRITE, 2, MIB, 100_000, 1 << 5, bytes(100_000)),
    status(3, 0, MIB, 0),
    request(wire.READ, 4, 0, 3 * MIB),
    request(wire.WRITE_ZEROES, 5, 0, MIB),
    request(wire.CMD_FLUSH, 6),
    request(99, 7, 0, 10, 1 << 5, bytes(10)),
    request(wire.DISC, 8),
]
"""A whole conversation, message by message."""


@asynccontextmanager
async def serving(folder: Path, stall_timeout: float | None = None) -> AsyncIterator[tuple[NbdServer, str]]:
    """A server, and its socket. In the end nothing is left of any client."""
    server = NbdServer([MemoryExport(4 * MIB, "disk")], stall_timeout=stall_timeout)
    path = str(folder / "socket")
    await server.listen_unix(path)
    try:
        yield server, path
        async with asyncio.timeout(10):
            while server.clients:
                await asyncio.sleep(0)
    finally:
        await server.close()


async def check(path: str) -> None:
    """A well-behaved client is served."""
    async with nbd.connect(f"nbd+unix:///disk?socket={path}", dead_after=0) as disk:
        await disk.pwrite(b"alive", 4 * MIB - 5)
        assert await disk.pread(5, 4 * MIB - 5) == b"alive"


@pytest.mark.parametrize("ending", ["close", "reset", "half"])
async def test_a_client_may_go_at_every_boundary_and_amid_every_message(tmp_path: Path, ending: str) -> None:
    stream = b"".join(DIALOGUE)
    ends = [len(b"".join(DIALOGUE[:n])) for n in range(len(DIALOGUE) + 1)]
    cuts = sorted({cut for end in ends for cut in (end - 1, end, end + 1, end + 20) if 0 <= cut <= len(stream)})
    async with serving(tmp_path) as (_, path):
        for cut in cuts:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(stream[:cut])
            if ending == "half":
                writer.write_eof()
                async with asyncio.timeout(10):
                    while await reader.read(1 << 20):
                        pass
            elif ending == "reset":
                writer.transport.abort()
            writer.close()
        await check(path)


async def test_a_client_that_says_one_byte_at_a_time_is_understood(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, path):
        reader, writer = await asyncio.open_unix_connection(path)
        for byte in b"".join([*DIALOGUE[:7], request(wire.READ, 9, 0, 5), DIALOGUE[-1]]):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await reader.read()).endswith(struct.pack(">QQ", 13, 0) + b"hello")
        writer.close()


@pytest.mark.parametrize("said", [0, 1, 3, 7, 8])
async def test_who_does_not_come_to_the_point_in_time_is_dropped(
    tmp_path: Path, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_connection, "HANDSHAKE_TIMEOUT", 0.05)
    async with serving(tmp_path) as (_, path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write((FLAGS + wire.option(wire.LIST))[:said])
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()


@pytest.mark.parametrize(
    "beginning",
    [request(wire.READ, 1, 0, 5)[:7], request(wire.WRITE, 1, 0, MIB, 1 << 5, bytes(100)), status(1, 0, 512, 0)[:-2]],
    ids=["header", "payload", "payload of block status"],
)
async def test_who_stops_amid_a_request_is_dropped_and_who_is_idle_is_not(tmp_path: Path, beginning: bytes) -> None:
    negotiation = b"".join(DIALOGUE[:6])
    async with serving(tmp_path, stall_timeout=0.1) as (_, path):
        idle_reader, idle = await asyncio.open_unix_connection(path)
        idle.write(negotiation + request(wire.CMD_FLUSH, 1))
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(negotiation + beginning)
        async with asyncio.timeout(10):
            await reader.read()
        # The idle one has been looked at as often, and is still there.
        idle.write(request(wire.CMD_FLUSH, 2))
        async with asyncio.timeout(10):
            await idle_reader.readuntil(struct.pack(">QQQ", 2, 0, 0))
        writer.close()
        idle.close()


async def test_a_trickle_does_not_count_as_going_on(tmp_path: Path) -> None:
    async with serving(tmp_path, stall_timeout=0.2) as (_, path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"".join(DIALOGUE[:6]) + request(wire.WRITE, 1, 0, MIB, 1 << 5))

        async def trickle() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                await reader.read()
        trickling.cancel()
        writer.close()


async def test_who_takes_no_replies_is_dropped_where_that_is_wanted(tmp_path: Path) -> None:
    async with serving(tmp_path, stall_timeout=0.1) as (server, path):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.setblocking(False)
            wanted = b"".join(DIALOGUE[:6]) + request(wire.WRITE, 9, 0, 3 * MIB, 1 << 5, b"x" * (3 * MIB))
            wanted += b"".join(request(wire.READ, n, 0, 3 * MIB) for n in range(20))
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().sock_sendall(sock, wanted)
                while server.clients:
                    await asyncio.sleep(0.01)


async def test_floods_leave_no_more_than_a_bounded_pile(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, path):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.setblocking(False)
            flood = b"".join(DIALOGUE[:6]) + request(wire.WRITE, 9, 0, 3 * MIB, 1 << 5, b"x" * (3 * MIB))
            flood += request(wire.READ, 1, 0, 3 * MIB) * 10_000
            view = memoryview(flood)
            for _ in range(2000):
                try:
                    view = view[sock.send(view) :]
                except BlockingIOError:
                    await asyncio.sleep(0)
            (connection,) = server._connections
            assert connection._reading_paused
            assert connection._under_way <= MAX_UNDER_WAY
            waiting = connection._transport.get_write_buffer_size() + connection._out_bytes
            assert waiting <= WRITE_HIGH_WATER + 2 * 3 * MIB
            assert len(view) > 0, "the rest waits over there"
        await check(path)


async def test_more_clients_than_there_are_places_are_turned_away(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, path):
        crowd = []
        for _ in range(MAX_CLIENTS):
            crowd.append(await asyncio.open_unix_connection(path))
            await crowd[-1][0].readexactly(18)
        reader, writer = await asyncio.open_unix_connection(path)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
        assert server.clients == MAX_CLIENTS
        for _, each in crowd:
            each.transport.abort()
        async with asyncio.timeout(10):
            while server.clients == MAX_CLIENTS:
                await asyncio.sleep(0)
        await check(path)


async def test_mutated_conversations_harm_nobody(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    stream = b"".join(DIALOGUE[:12])
    async with serving(tmp_path) as (_, path):
        for _ in range(50):
            mutated = bytearray(stream)
            for _ in range(rng.randrange(1, 6)):
                at = rng.choice((rng.randrange(len(mutated)), rng.randrange(350)))
                mutated[at : at + rng.randrange(1, 5)] = rng.randbytes(rng.randrange(0, 6))
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(mutated)
            for _ in range(4):
                await asyncio.sleep(0)
            writer.transport.abort()
        await check(path)
