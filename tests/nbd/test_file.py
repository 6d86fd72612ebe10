"""Exports as files, for code without asyncio, and as an fsspec filesystem."""

from __future__ import annotations

import errno
import io
import random
import tomllib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from tests.nbd.servers import MIB
from ustack import nbd
from ustack.nbd.export import MemoryExport
from ustack.nbd.file import LoopThread, open_raw
from ustack.nbd.filesystem import NbdFileSystem
from ustack.nbd.server import NbdServer
from ustack.nbd.uri import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENT = random.Random(9).randbytes(MIB)


class Blocks(MemoryExport):
    """Memory in blocks of 4 KiB, which the server insists on."""

    def __init__(self) -> None:
        from dataclasses import replace

        super().__init__(MIB, "blocks")
        self.info = replace(self.info, minimum_block=4096)


@pytest.fixture
def uri() -> Iterator[str]:
    """A server in another thread: "disk" has CONTENT, "blocks" has large blocks, "fixed" is read-only."""
    thread = LoopThread("server")
    server = NbdServer([MemoryExport(MIB, "disk", description="d"), Blocks(), MemoryExport(MIB, "fixed", read_only=True)])

    async def start() -> int:
        return await server.listen_tcp()

    base = f"nbd://127.0.0.1:{thread.run(start())}"
    with nbd.open_file(f"{base}/disk", "wb") as file:
        assert file.write(CONTENT) == MIB
    yield base
    thread.run(server.close())
    thread.stop()


def test_it_reads_like_any_file(uri: str) -> None:
    with nbd.open_file(f"{uri}/disk") as file:
        assert (file.readable(), file.writable(), file.seekable()) == (True, False, True)
        assert file.read(10) == CONTENT[:10]
        assert file.seek(-10, io.SEEK_END) == MIB - 10
        assert file.read() == CONTENT[-10:]
        assert file.read(1) == b""
        file.seek(1234)
        file.seek(10, io.SEEK_CUR)
        assert file.tell() == 1244
        assert file.readline() == CONTENT[1244 : CONTENT.index(b"\n", 1244) + 1]
        with pytest.raises(OSError, match="seek"):
            file.seek(-1)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    with pytest.raises(ValueError, match="closed file"):
        file.read(1)


def test_what_is_written_small_goes_out_large_and_what_is_flushed_is_there(uri: str) -> None:
    with nbd.open_file(f"{uri}/disk", "r+b") as file:
        file.seek(100)
        for number in range(1000):
            file.write(bytes([number & 255]))
        file.flush()
        with nbd.open_file(f"{uri}/disk") as other:
            other.seek(100)
            assert other.read(1000) == bytes(n & 255 for n in range(1000))
    with open_raw(f"{uri}/disk", "r+b") as raw:
        raw.seek(-2, io.SEEK_END)
        assert raw.write(b"three") == 2
        with pytest.raises(OSError, match="ends at") as caught:
            raw.write(b"x")
        assert caught.value.errno == errno.ENOSPC


def test_blocks_are_kept_by_reading_what_lies_around(uri: str) -> None:
    chance = random.Random(4)
    model = bytearray(MIB)
    with open_raw(f"{uri}/blocks", "r+b") as file:
        assert file.disk.minimum_block == 4096
        for _ in range(60):
            offset = chance.randrange(MIB - 20_000)
            length = chance.choice([1, 100, 4096, 8192, 13_000])
            offset -= offset % 4096 if chance.random() < 0.3 else 0
            if chance.random() < 0.6:
                data = chance.randbytes(length)
                file.seek(offset)
                assert file.write(data) == length
                model[offset : offset + length] = data
            file.seek(offset)
            assert file.read(length) == model[offset : offset + length]
        file.seek(0)
        assert file.readall() == model
        assert file.truncate(MIB) == MIB
        with pytest.raises(OSError, match="keeps its size"):
            file.truncate(0)


def test_what_cannot_be_opened_says_why_and_leaves_no_thread(uri: str) -> None:
    with pytest.raises(OSError, match="read-only") as caught:
        nbd.open_file(f"{uri}/fixed", "r+b")
    assert caught.value.errno == errno.EROFS
    with pytest.raises(ValueError, match="mode is 'ab'"):
        nbd.open_file(f"{uri}/disk", "ab")
    with pytest.raises(nbd.NbdOptionError):
        nbd.open_file(f"{uri}/other")


def test_fsspec_lists_reads_and_writes(uri: str) -> None:
    for scheme in SCHEMES:
        fsspec.register_implementation(scheme, NbdFileSystem, clobber=True)
    with fsspec.open(f"{uri}/disk") as file:
        assert file.read(100) == CONTENT[:100]
    files, paths = fsspec.url_to_fs(f"{uri}/disk")
    assert files.size(paths) == MIB
    assert files.cat_file(paths, 1000, 2000) == CONTENT[1000:2000]
    assert [entry["name"] for entry in files.ls(f"{uri}/")] == [f"{uri}/disk", f"{uri}/blocks", f"{uri}/fixed"]
    assert files.isdir(f"{uri}/")
    assert files.isfile(f"{uri}/disk")
    assert not files.exists(f"{uri}/other")
    with fsspec.open(f"{uri}/disk", "r+b") as file:
        file.write(b"hello")
    assert files.head(paths, 5) == b"hello"


def test_the_entry_points_name_what_is_there() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["fsspec.specs"]
    assert sorted(points) == sorted(SCHEMES)
    for point in points.values():
        module, _, name = point.partition(":")
        assert getattr(import_module(module), name) is NbdFileSystem
