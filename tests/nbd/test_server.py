"""The server over real sockets: what it keeps, what it bounds, whom it drops."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.nbd import wire
from tests.nbd.servers import MIB, serving
from ustack import nbd
from ustack.nbd.export import HOLE_GRANULE, Export, FileExport, MemoryExport
from ustack.nbd.server import NbdServer

if TYPE_CHECKING:
    from pathlib import Path

GO = b"\0\0\0\x03" + wire.option(wire.GO, wire.info_data(""))


async def raw(uri: str, *, structured: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection in the transmission phase, spoken by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(uri.rpartition(":")[2]))
    structure = wire.option(wire.STRUCTURED) if structured else b""
    writer.write(GO[:4] + structure + GO[4:])
    assert await reader.readexactly(18) == wire.GREETING
    await reader.readexactly(32 + 20 + (20 if structured else 0))
    return reader, writer


@pytest.fixture(params=["memory", "file"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Export:
    """A disk of 1 MiB, of each kind."""
    if request.param == "memory":
        return MemoryExport(MIB)
    (tmp_path / "image").write_bytes(bytes(MIB))
    return FileExport(tmp_path / "image")


async def test_every_way_to_make_zeroes_makes_zeroes(export: Export) -> None:
    async with serving(export) as uri, nbd.connect(uri) as disk:
        model = bytearray(os.urandom(MIB))
        await disk.pwrite(model, 0)
        for offset, length in ((0, 10), (HOLE_GRANULE - 5, 3 * HOLE_GRANULE), (5 * HOLE_GRANULE, HOLE_GRANULE), (MIB - 1, 1)):
            for no_hole in (False, True):
                model[offset : offset + length] = bytes(length)
                await disk.zero(length, offset, no_hole=no_hole)
                assert await disk.pread(MIB, 0) == model
                assert await disk.pread(MIB, 0, df=True) == model
                # Something to make zero again, at the end of the range or, for a range of one byte, before it.
                at = max(offset + length - 5, 0)
                model[at : at + 5] = b"again"
                await disk.pwrite(b"again", at)
        await disk.flush()


async def test_a_memory_export_answers_with_holes_where_nobody_has_written() -> None:
    async with serving(MemoryExport(MIB)) as uri:
        reader, writer = await raw(uri, structured=True)
        writer.write(
            wire.request(wire.WRITE, 1, HOLE_GRANULE, 1, payload=b"x") + wire.request(wire.READ, 2, 0, 3 * HOLE_GRANULE)
        )
        expected = (
            wire.none(1)
            + wire.hole(2, 0, HOLE_GRANULE)
            + wire.data(2, HOLE_GRANULE, b"x" + bytes(HOLE_GRANULE - 1))
            + wire.hole(2, 2 * HOLE_GRANULE, HOLE_GRANULE, wire.DONE)
        )
        assert await reader.readexactly(len(expected)) == expected
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_reads_nothing_cannot_make_the_server_hoard_replies(export: Export) -> None:
    async with serving(export) as uri, nbd.connect(uri) as disk:
        await disk.pwrite(b"\1" * MIB, 0)
        reader, writer = await raw(uri)
        # A million bytes for every 28: 4,000 requests ask for 4 GB.
        writer.write(b"".join(wire.request(wire.READ, n, 0, MIB) for n in range(4000)))
        # Others are served all the while.
        for _ in range(50):
            assert await disk.pread(MIB, 0) == b"\1" * MIB
        # And when the client reads at last, the replies come in order.
        for n in range(5):
            assert await reader.readexactly(16 + MIB) == wire.simple(n, 0, b"\1" * MIB)
        writer.transport.abort()


async def test_flushes_and_fua_of_a_file_are_answered_when_it_is_on_disk(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    async with serving(FileExport(tmp_path / "image")) as uri, nbd.connect(uri) as disk:
        await asyncio.gather(
            *(disk.pwrite(b"x" * 512, 512 * n, fua=True) for n in range(64)), *(disk.flush() for _ in range(40))
        )
        assert (tmp_path / "image").read_bytes()[: 512 * 64] == b"x" * 512 * 64


async def test_disc_lets_what_is_under_way_finish(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    async with serving(FileExport(tmp_path / "image")) as uri:
        reader, writer = await raw(uri)
        writer.write(wire.request(wire.CMD_FLUSH, 7) + wire.request(wire.DISC, 0))
        assert await reader.read() == wire.simple(7)
        writer.close()
        await writer.wait_closed()


async def test_a_file_that_shrinks_under_the_server_is_an_error_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * MIB)
    async with serving(FileExport(tmp_path / "image")) as uri, nbd.connect(uri) as disk:
        os.truncate(tmp_path / "image", MIB // 2)
        with pytest.raises(OSError, match="shrunk"):
            await disk.pread(MIB, 0, df=True)
        assert await disk.pread(512, 0) == b"x" * 512


@pytest.mark.parametrize(
    "nonsense", [bytes(28), GO[4:] * 2, wire.request(wire.WRITE, 1, 0, 2**32 - 1)], ids=["magic", "option", "flood"]
)
async def test_a_client_out_of_step_is_dropped_and_others_are_not(nonsense: bytes) -> None:
    async with serving() as uri, nbd.connect(uri) as disk:
        reader, writer = await raw(uri)
        writer.write(nonsense)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        assert await disk.pread(4, 0) == bytes(4)


async def test_a_client_that_dies_amid_its_payload_leaves_the_server_alive() -> None:
    async with serving() as uri, nbd.connect(uri) as disk:
        _, writer = await raw(uri)
        writer.write(wire.request(wire.WRITE, 1, 0, MIB, payload=b"half" * 50_000))
        await writer.drain()
        writer.transport.abort()
        assert len(await disk.pread(MIB, 0)) == MIB


async def test_a_socket_that_is_bound_already_is_as_good() -> None:
    server = NbdServer([MemoryExport(MIB)])
    bound = socket.create_server(("127.0.0.1", 0))
    await server.listen_socket(bound)
    async with nbd.connect(f"nbd://127.0.0.1:{bound.getsockname()[1]}/") as disk:
        assert disk.size == MIB
    await server.close()


async def test_tcp_finds_out_when_an_idle_client_is_gone() -> None:
    server = NbdServer([MemoryExport(MIB)])
    async with nbd.connect(f"nbd://127.0.0.1:{await server.listen_tcp()}/"):
        (connection,) = server._connections
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    await server.close()


async def test_closing_the_server_drops_its_clients() -> None:
    server = NbdServer([MemoryExport(MIB)])
    port = await server.listen_tcp()
    async with nbd.connect(f"nbd://127.0.0.1:{port}/", dead_after=0) as disk:
        await disk.flush()
        await server.close()
        with pytest.raises(ConnectionError):
            await disk.flush()


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_a_server_needs_exports_with_different_names(names: list[str]) -> None:
    with pytest.raises(ValueError, match="export"):
        NbdServer(MemoryExport(1, name) for name in names)


def test_only_files_and_devices_are_exported(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        FileExport(tmp_path)
    with pytest.raises(OSError, match="neither"):
        FileExport("/dev/null")
    with pytest.raises(FileNotFoundError):
        FileExport(tmp_path / "nix")


async def test_a_dead_servers_socket_is_replaced_but_a_file_is_not(tmp_path: Path) -> None:
    stale, precious = str(tmp_path / "stale"), tmp_path / "precious"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(stale)
    precious.write_bytes(b"not a socket")
    server = NbdServer([MemoryExport(MIB)])
    await server.listen_unix(stale)
    with pytest.raises(OSError, match="no socket"):
        await server.listen_unix(str(precious))
    async with nbd.connect(f"nbd+unix:///?socket={stale}") as disk:
        assert disk.size == MIB
    await server.close()
    assert precious.read_bytes() == b"not a socket"
