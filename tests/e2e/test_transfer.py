"""Bulk data between nc on the kernel's TCP and our streams, in every receive mode, with and without offload."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import asynccontextmanager, closing
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.capture import capture
from tests.e2e.conftest import KERNEL, OURS, PROBES
from tests.e2e.peers import LISTENING, nc, ping, said
from tests.needs import require_tool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])]

DIGEST_PORT: Final = 1001
SOURCE_PORT: Final = 1002
ECHO_PORT: Final = 1003

BULK: Final = Random(1).randbytes(20_000_000)

modes = pytest.mark.parametrize("mode", ["paged", "linear"])
offloads = pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])


@asynccontextmanager
async def services(stack: Stack, data: bytes = BULK) -> AsyncIterator[None]:
    """Over our stack: one port answers with the digest of what it was sent, one sends `data`, one sends back what it gets."""

    async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = sha256()
        while chunk := await reader.read(1 << 20):
            seen.update(chunk)
        writer.write(seen.digest())
        writer.close()

    async def source(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 18):
            writer.write(chunk)
            await writer.drain()
        writer.close()

    servers = [
        await stack.start_server(serve, None, port)
        for serve, port in ((digest, DIGEST_PORT), (source, SOURCE_PORT), (echo, ECHO_PORT))
    ]
    yield
    for server in servers:
        server.close()


@modes
@offloads
async def test_twenty_megabytes_arrive_intact_each_way(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str, offload: bool
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload)
    async with services(stack):
        assert await nc(netns, OURS, DIGEST_PORT, BULK) == sha256(BULK).digest()
        assert sha256(await nc(netns, OURS, SOURCE_PORT)).digest() == sha256(BULK).digest()
    assert stack.drops.by_name().keys() <= PROBES


@modes
@offloads
async def test_both_directions_of_one_connection_run_at_the_same_time(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str, offload: bool
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload)
    async with services(stack):
        assert await nc(netns, OURS, ECHO_PORT, BULK[:5_000_000]) == BULK[:5_000_000]


@pytest.mark.parametrize("mtu", [576, 9000, 65521])
@modes
async def test_other_mtus_carry_it_as_well(stack_on_tap: StackOnTap, netns: Namespace, mode: str, mtu: int) -> None:
    stack = await stack_on_tap(mode=mode, mtu=mtu)
    async with services(stack, BULK[:5_000_000]):
        assert await nc(netns, OURS, ECHO_PORT, BULK[:5_000_000]) == BULK[:5_000_000]
        assert await nc(netns, OURS, SOURCE_PORT) == BULK[:5_000_000]


@pytest.mark.parametrize("pool", ["nta", "srog"])
@modes
async def test_other_pools_carry_it_as_well(stack_on_tap: StackOnTap, netns: Namespace, mode: str, pool: str) -> None:
    stack = await stack_on_tap(mode=mode, pool=pool)
    async with services(stack):
        assert await nc(netns, OURS, ECHO_PORT, BULK[:5_000_000]) == BULK[:5_000_000]


async def test_little_memory_makes_it_slower_and_not_wrong(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(memory=2 << 20)
    async with services(stack):
        transfers = [nc(netns, OURS, ECHO_PORT, BULK[:2_000_000]) for _ in range(4)]
        assert await asyncio.gather(*transfers) == [BULK[:2_000_000]] * 4


async def test_eight_connections_do_not_mix_their_bytes(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    pieces = [BULK[n * 1_000_000 : (n + 2) * 1_000_000] for n in range(8)]
    async with services(stack):
        assert await asyncio.gather(*(nc(netns, OURS, ECHO_PORT, piece) for piece in pieces)) == pieces


async def test_we_are_the_client(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    server = netns.popen(
        *(require_tool("socat"), "-d", "-d", "-b", "65536", f"TCP-LISTEN:1004,bind={KERNEL}", "SYSTEM:sha256sum"),
        stderr=subprocess.STDOUT,
    )
    await said(server, LISTENING)
    reader, writer = await stack.open_connection(KERNEL, 1004)
    with closing(writer):
        writer.write(BULK)
        writer.write_eof()
        async with asyncio.timeout(30):
            assert (await reader.read()).split()[0].decode() == sha256(BULK).hexdigest()
    assert await asyncio.to_thread(server.wait, 10) == 0


@modes
@offloads
async def test_a_decoder_that_is_not_ours_finds_every_frame_well_formed(
    stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path, mode: str, offload: bool
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload)
    async with services(stack, BULK[:1_000_001]), capture(netns, "tap0", tmp_path / "tap0.pcap") as seen:
        assert (await ping(netns, OURS, size=1000)).received == 3
        assert await nc(netns, OURS, ECHO_PORT, BULK[:1_000_001]) == BULK[:1_000_001]
        assert await nc(netns, OURS, SOURCE_PORT) == BULK[:1_000_001]
        with pytest.raises(ConnectionRefusedError):
            await stack.open_connection(KERNEL, 9)
        with pytest.raises(AssertionError, match="exited with 1"):
            await nc(netns, OURS, 9)
    sizes = [len(frame) for frame in seen.frames()]
    assert len(sizes) > 50
    assert (max(sizes) > 10_000) == offload, "super-frames, or none"
    assert seen.complaints(offload) == []
