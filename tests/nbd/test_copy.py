"""Copies between every two kinds of disk, and what happens when one of them fails."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd.servers import MIB, serving
from ustack import nbd
from ustack.nbd.block_status import Extent
from ustack.nbd.copy import copy, zero_parts, zero_runs
from ustack.nbd.disks import LocalDisk, MemoryDisk, NewFile
from ustack.nbd.export import MemoryExport

if TYPE_CHECKING:
    from pathlib import Path


def content(size: int) -> bytes:
    """Random bytes with a hole in the middle and at the end."""
    third = size // 3
    return (
        random.Random(size).randbytes(third)
        + bytes(third)
        + random.Random(size + 1).randbytes(third - 5000)
        + bytes(size - 3 * third + 5000)
    )


@pytest.mark.parametrize(
    ("requests", "request_size", "sparse"), [(1, 4096, 0), (7, 10_007, 0), (64, MIB, 4096), (3, 65536, 512)]
)
async def test_there_and_back_again(requests: int, request_size: int, sparse: int, tmp_path: Path) -> None:
    data = content(3 * MIB + 123)
    (tmp_path / "source").write_bytes(data)
    source = LocalDisk(tmp_path / "source")
    target = LocalDisk(tmp_path / "target", create_size=len(data))
    memory = MemoryDisk(bytearray(len(data)))
    async with serving(MemoryExport(len(data))) as uri, nbd.connect(uri) as disk:
        for a, b in ((source, disk), (disk, target), (target, memory), (memory, disk), (disk, memory)):
            result = await copy(a, b, requests=requests, request_size=request_size, sparse=sparse)
            assert result.total_bytes == len(data)
            assert result.zero_bytes > 0 or not sparse
            assert result.seconds > 0
    assert memory.data == (tmp_path / "target").read_bytes() == data
    await source.close()
    await target.close()


async def test_holes_stay_holes(tmp_path: Path) -> None:
    target = LocalDisk(tmp_path / "target", create_size=8 * MIB)
    source = MemoryDisk(bytearray(8 * MIB))
    source.data[4 * MIB] = 1
    result = await copy(source, target, sparse=4096)
    await target.close()
    assert (result.data_bytes, result.zero_bytes) == (4096, 8 * MIB - 4096)
    assert (tmp_path / "target").stat().st_blocks * 512 < MIB


async def test_what_the_source_says_is_zero_is_neither_read_nor_sent(tmp_path: Path) -> None:
    with (tmp_path / "source").open("wb") as file:
        file.truncate(300 * MIB)
        file.seek(200 * MIB + 4096)
        file.write(b"island" * 1000)

    class Counted(MemoryDisk):
        reads = 0
        can_block_status = True  # type: ignore[misc]

        async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
            self.reads += len(buffer)
            await super().pread_into(buffer, offset)

        async def block_status(self, length: int, offset: int) -> list[Extent]:
            return await source.block_status(length, offset)

    source = LocalDisk(tmp_path / "source")
    counted = Counted(bytearray((tmp_path / "source").read_bytes()))
    target = NewFile(tmp_path / "target", 300 * MIB)
    result = await copy(counted, target, request_size=MIB, target_is_zero=True)
    assert not (tmp_path / "target").exists()
    await target.complete()
    await target.close()
    assert counted.reads == result.data_bytes <= 65536
    assert (tmp_path / "target").read_bytes() == counted.data
    assert (tmp_path / "target").stat().st_blocks * 512 < MIB
    await source.close()


async def test_a_source_that_cannot_say_after_all_is_read() -> None:
    class Unsure(MemoryDisk):
        can_block_status = True  # type: ignore[misc]

        async def block_status(self, length: int, offset: int) -> list[Extent]:
            raise OSError(errno.EOVERFLOW, "too many")

    source, target = Unsure(bytearray(b"x" * 100_000)), MemoryDisk(bytearray(100_000))
    await copy(source, target)
    assert target.data == source.data


async def test_one_file_is_made_by_one_at_a_time_and_what_is_left_behind_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "target.part").write_bytes(b"left behind by one who was killed")
    first = NewFile(tmp_path / "target", 10)
    with pytest.raises(OSError, match="somebody else") as caught:
        NewFile(tmp_path / "target", 20)
    assert caught.value.errno == errno.EBUSY
    await first.pwrite(bytearray(b"new"), 0)
    await first.complete()
    await first.close()
    assert (tmp_path / "target").read_bytes() == b"new" + bytes(7)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600
    await NewFile(tmp_path / "target", 20).close()
    assert (tmp_path / "target").read_bytes() == b"new" + bytes(7)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


EXTENTS = st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([0, 1, 2, 3])), min_size=1, max_size=20)


@given(EXTENTS, st.sampled_from([1, 512, 4096]))
def test_zero_parts_are_whole_blocks_and_nothing_is_left_out(pieces: list[tuple[int, int]], block: int) -> None:
    extents, at = [], 0
    for length, flags in pieces:
        extents.append(Extent(at, length, flags))
        at += length
    stop = -(-at // block) * block
    parts = list(zero_parts(extents, 0, stop, block))
    assert [start for start, _, _ in parts] == [0, *(end for _, end, _ in parts[:-1])]
    assert parts[-1][1] == stop
    for start, end, zero in parts:
        assert start % block == end % block == 0
        if zero:
            assert all(e.is_zero for e in extents if e.offset < end and start < e.offset + e.length)


async def test_progress_grows_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    await copy(
        MemoryDisk(bytearray(100_000)),
        MemoryDisk(bytearray(200_000)),
        request_size=30_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [total for _, total in seen] == [100_000] * 4
    assert sorted(seen)[-1] == (100_000, 100_000)


async def test_an_empty_disk_is_copied_at_once() -> None:
    assert (await copy(MemoryDisk(bytearray()), MemoryDisk(bytearray()))).total_bytes == 0


async def test_a_target_too_small_is_not_touched() -> None:
    target = MemoryDisk(bytearray(10))
    with pytest.raises(OSError, match="10 bytes") as caught:
        await copy(MemoryDisk(bytearray(b"x" * 11)), target)
    assert caught.value.errno == errno.ENOSPC
    assert target.data == bytes(10)


@pytest.mark.parametrize(("requests", "request_size", "sparse"), [(0, 512, 0), (1, 0, 0), (1, 100, 0), (1, 512, 100)])
async def test_sizes_that_fit_no_block_are_refused(requests: int, request_size: int, sparse: int) -> None:
    class Blocks(MemoryDisk):
        minimum_block = 512  # type: ignore[misc]

    with pytest.raises(ValueError, match="block size of 512"):
        await copy(
            Blocks(bytearray(1024)), Blocks(bytearray(1024)), requests=requests, request_size=request_size, sparse=sparse
        )


async def test_one_failing_request_ends_the_copy_and_all_others_before_it_returns() -> None:
    class Failing(MemoryDisk):
        busy = 0

        async def pwrite(self, data: bytearray | memoryview, offset: int) -> None:
            self.busy += 1
            try:
                if offset == 4096:
                    raise OSError(errno.EIO, "scratch")
                await asyncio.Event().wait()
            finally:
                self.busy -= 1

    target = Failing(bytearray(MIB))
    with pytest.raises(OSError, match="scratch"):
        await copy(MemoryDisk(bytearray(MIB)), target, request_size=4096)
    assert target.busy == 0


async def test_a_local_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 10_000)
    source = LocalDisk(tmp_path / "source")
    os.truncate(tmp_path / "source", 5000)
    with pytest.raises(OSError, match="ends before"):
        await copy(source, MemoryDisk(bytearray(10_000)))
    await source.close()


def test_local_disks_are_files_or_devices(tmp_path: Path) -> None:
    for path, complaint in (("/dev/null", "neither"), (tmp_path, "neither"), (tmp_path / "nix", "No such file")):
        with pytest.raises(OSError, match=complaint):
            LocalDisk(path)


@given(st.binary(max_size=64).map(lambda b: bytes(x & 1 for x in b)), st.integers(1, 16))
def test_zero_runs_cover_the_buffer_and_tell_the_truth(data: bytes, granule: int) -> None:
    buffer = bytearray(data + b"\xff" * 5)
    runs = list(zero_runs(buffer, len(data), granule)) if data else []
    assert b"".join(data[start:stop] for start, stop, _ in runs) == data
    for start, stop, zero in runs:
        assert start % granule == 0
        pieces = [data[at : min(at + granule, stop)] for at in range(start, stop, granule)]
        assert all((not any(piece)) == zero for piece in pieces)
    assert all(one[2] != two[2] for one, two in pairwise(runs))
