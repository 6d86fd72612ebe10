"""A disk as a file: FUSE mounts of this machine's kernel, loop devices on them, and what comes out is compared byte by byte."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nbd.servers import MIB, serving
from tests.needs import require_path, require_tool
from ustack import nbd
from ustack.nbd.disks import MemoryDisk
from ustack.nbd.export import MemoryExport
from ustack.nbd.fuse_export import FuseExport
from ustack.nbd.fuse_mount import FuseMount, is_mounted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from ustack.nbd.disks import Disk

pytestmark = pytest.mark.root

PAGE = 4096


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require_path(Path("/dev/fuse"), "modprobe fuse, or give it to the container")


@asynccontextmanager
async def exported(disk: Disk, path: Path, requests: int = 64, request_size: int = 64 << 10) -> AsyncIterator[FuseExport]:
    """`disk` as the file `path`. Nothing in the thread of the event loop may touch the file."""
    export = FuseExport(disk, str(path), requests=requests, request_size=request_size)
    try:
        yield export
    finally:
        await export.close()
        assert not is_mounted(str(path))


@asynccontextmanager
async def remote(path: Path, memory: MemoryExport) -> AsyncIterator[FuseExport]:
    """The export of a server on this machine, as the file `path`."""
    async with serving(memory) as uri, nbd.connect(uri) as disk, exported(disk, path) as export:
        yield export


@contextmanager
def loop_device(path: Path, direct_io: str) -> Iterator[str]:
    """A loop device on the file `path`."""
    losetup = require_tool("losetup")
    done = subprocess.run(
        [losetup, f"--direct-io={direct_io}", "--show", "-f", path], capture_output=True, timeout=20, check=True
    )
    device = done.stdout.decode().strip()
    try:
        assert Path(f"/sys/block/{device[5:]}/loop/dio").read_text().strip() == ("1" if direct_io == "on" else "0")
        yield device
    finally:
        subprocess.run([losetup, "-d", device], timeout=20, check=True)


def run(*command: str | Path) -> bytes:
    """Run a program that touches the file; never in the thread of the event loop."""
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert not done.returncode, (command, done.stderr)
    return done.stdout


def read_page(path: Path, number: int) -> bytes:
    """One page of the file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, PAGE, number * PAGE)
    finally:
        os.close(fd)


def at(path: Path | str, flags: int, work: Callable[[int], object]) -> object:
    """`work` on an open descriptor of `path`."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        return work(fd)
    finally:
        os.close(fd)


async def test_the_file_has_the_size_and_the_contents_of_the_disk(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(2 * MIB + 512)
    file = tmp_path / "disk"
    async with exported(MemoryDisk(bytearray(content)), file) as export:
        assert (await asyncio.to_thread(file.stat)).st_size == len(content)
        assert await asyncio.to_thread(file.read_bytes) == content
        assert export.bytes_read == len(content)
        assert export.in_flight == 0
    assert not file.exists()


async def test_what_is_written_to_the_file_is_on_the_server(tmp_path: Path) -> None:
    memory = MemoryExport(4 * MIB)
    content = random.Random(2).randbytes(3 * MIB + 100)

    def write(fd: int) -> None:
        os.pwrite(fd, content, 1000)
        os.fsync(fd)

    file = tmp_path / "disk"
    async with remote(file, memory):
        await asyncio.to_thread(at, file, os.O_WRONLY, write)
        assert memory.read(1000, len(content)) == content
        assert bytes(memory.read(0, 1000)) == bytes(1000)


async def test_the_end_of_the_file_is_the_end_of_a_block_device(tmp_path: Path) -> None:
    file = tmp_path / "disk"

    def reach_beyond(fd: int) -> None:
        assert os.pread(fd, 2 * PAGE, MIB - PAGE) == bytes(PAGE)
        assert os.pread(fd, PAGE, MIB) == b""
        assert os.pwrite(fd, bytes(2 * PAGE), MIB - PAGE) == PAGE
        with pytest.raises(OSError, match="space"):
            os.pwrite(fd, bytes(PAGE), MIB)
        os.ftruncate(fd, MIB)
        for size in (0, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)

    async with exported(MemoryDisk(bytearray(MIB)), file):
        await asyncio.to_thread(at, file, os.O_RDWR, reach_beyond)
        assert (await asyncio.to_thread(file.stat)).st_size == MIB


class CountingExport(MemoryExport):
    """Storage that is not volatile, so that a flush is asked of it."""

    __slots__ = ("flushes",)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.flushes = 0

    @property
    def volatile(self) -> bool:
        return False

    def flush(self) -> None:
        self.flushes += 1


async def test_fsync_is_a_flush_on_the_server(tmp_path: Path) -> None:
    memory = CountingExport(MIB)
    file = tmp_path / "disk"
    async with remote(file, memory):
        await asyncio.to_thread(at, file, os.O_RDWR, os.fsync)
        await asyncio.to_thread(at, file, os.O_RDWR, os.fdatasync)
        assert memory.flushes == 2
        await asyncio.to_thread(at, file, os.O_RDWR, lambda fd: os.pread(fd, 1, 0))
        assert memory.flushes == 2, "closing is no flush"


@pytest.mark.parametrize("can_zero", [True, False])
async def test_holes_and_zero_ranges_read_as_zeroes(tmp_path: Path, can_zero: bool) -> None:
    class Disk(MemoryDisk):
        __slots__ = ("can_zero",)

    disk = Disk(bytearray(b"x" * MIB))
    disk.can_zero = can_zero  # type: ignore[misc]
    file = tmp_path / "disk"
    fallocate = require_tool("fallocate")
    async with exported(disk, file, request_size=16 << 10):
        await asyncio.to_thread(run, fallocate, "--punch-hole", "-o", "4096", "-l", "200000", file)
        await asyncio.to_thread(run, fallocate, "--zero-range", "--keep-size", "-o", "500000", "-l", str(MIB), file)
        await asyncio.to_thread(run, fallocate, "-l", str(MIB), file)
        with pytest.raises(AssertionError, match="No space"):
            await asyncio.to_thread(run, fallocate, "-l", str(MIB + 1), file)
        with pytest.raises(AssertionError, match="not supported"):
            await asyncio.to_thread(run, fallocate, "--collapse-range", "-o", "0", "-l", "4096", file)
    zeroed = bytearray(b"x" * MIB)
    zeroed[4096:204096] = bytes(200000)
    zeroed[500000:] = bytes(MIB - 500000)
    assert disk.data == zeroed


class SlowDisk(MemoryDisk):
    """Answers no read before `wanted` of them wait."""

    __slots__ = ("enough", "waiting", "wanted")

    def __init__(self, data: bytearray, wanted: int) -> None:
        super().__init__(data)
        self.wanted = wanted
        self.waiting = 0
        self.enough = asyncio.Event()

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        self.waiting += 1
        if self.waiting == self.wanted:
            self.enough.set()
        await self.enough.wait()
        await super().pread_into(buffer, offset)


async def test_requests_are_served_side_by_side(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(16 * PAGE)
    file = tmp_path / "disk"
    async with exported(SlowDisk(bytearray(content), 4), file) as export:
        pieces = await asyncio.gather(*(asyncio.to_thread(read_page, file, n) for n in range(4)))
        assert b"".join(pieces) == content[: 4 * PAGE]
        assert export.in_flight == 0


async def test_more_requests_than_slots_wait_in_the_kernel(tmp_path: Path) -> None:
    content = random.Random(4).randbytes(16 * PAGE)
    file = tmp_path / "disk"
    async with exported(SlowDisk(bytearray(content), 2), file, requests=2) as export:
        pieces = await asyncio.gather(*(asyncio.to_thread(read_page, file, n) for n in range(16)))
        assert b"".join(pieces) == content
        assert export.report()["reads"] == 16


async def test_errors_of_the_disk_are_errors_of_the_file(tmp_path: Path) -> None:
    class Broken(MemoryDisk):
        async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
            raise OSError(errno.ETIMEDOUT, "the server is dead")

    file = tmp_path / "disk"
    async with exported(Broken(bytearray(MIB)), file) as export:
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(file.read_bytes)
        export.disk = None
        with pytest.raises(OSError, match="Input/output error"):
            await asyncio.to_thread(file.read_bytes)
        assert export.errors == 2


async def test_it_notices_that_somebody_has_unmounted_the_file(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    async with exported(MemoryDisk(bytearray(MIB)), file) as export:
        await asyncio.to_thread(run, require_tool("umount"), file)
        async with asyncio.timeout(10):
            while not export.lost:
                await asyncio.sleep(0)
    assert not file.exists()


def test_what_a_dead_process_has_left_mounted_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.touch()
    dead = FuseMount(str(file), "dead")
    os.close(dead.fd)
    mount = FuseMount(str(file), "alive")
    assert is_mounted(str(file))
    mount.close()
    assert not is_mounted(str(file))
    assert file.exists(), "it was there before"


def test_only_nothing_or_an_empty_file_is_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("precious")
    for name in ("data", "."):
        with pytest.raises(FileExistsError):
            FuseMount(str(tmp_path / name), "x")
    with pytest.raises(FileNotFoundError):
        FuseMount(str(tmp_path / "missing" / "disk"), "x")


# -- loop devices ------------------------------------------------------------------------------------------------------------


def hammer(device: str, size: int, seed: int) -> bytearray:
    """Write pieces of 4 to 128 KiB all over the device, read some back in between, and return what must be on it."""
    rng = random.Random(seed)
    expected = bytearray(size)
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(200):
            length = PAGE * rng.randint(1, 32)
            offset = PAGE * rng.randrange((size - length) // PAGE)
            if rng.random() < 0.3:
                assert os.pread(fd, length, offset) == expected[offset : offset + length]
            else:
                expected[offset : offset + length] = data = rng.randbytes(length)
                os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    return expected


@pytest.mark.parametrize("direct_io", ["on", "off"])
async def test_a_loop_device_on_it_is_the_disk(tmp_path: Path, direct_io: str) -> None:
    size = 8 * MIB
    memory = CountingExport(size)
    file = tmp_path / "disk"

    def use() -> bytearray:
        with loop_device(file, direct_io) as device:
            expected = hammer(device, size, 5)
            run(require_tool("blkdiscard"), "-o", str(MIB), "-l", str(MIB), device)
            expected[MIB : 2 * MIB] = bytes(MIB)
            run(require_tool("blkdiscard"), "--zeroout", "-o", str(3 * MIB), "-l", str(MIB), device)
            expected[3 * MIB : 4 * MIB] = bytes(MIB)
            return expected

    async with remote(file, memory):
        expected = await asyncio.to_thread(use)
        assert memory.read(0, size) == expected
        assert memory.flushes

        def read_back() -> None:
            with loop_device(file, direct_io) as device:
                assert Path(device).read_bytes() == expected

        await asyncio.to_thread(read_back)


@pytest.mark.parametrize("direct_io", ["on", "off"])
async def test_fio_verifies_a_loop_device_with_many_requests_in_flight(tmp_path: Path, direct_io: str) -> None:
    fio = require_tool("fio")
    file = tmp_path / "disk"
    options = ["--name=verify", "--rw=randrw", "--bs=4k-128k", "--iodepth=32", "--ioengine=libaio", "--direct=1"]
    options += [
        "--size=24M",
        "--io_size=24M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--randseed=7",
    ]

    def use() -> None:
        with loop_device(file, direct_io) as device:
            run(fio, f"--filename={device}", *options)

    async with remote(file, MemoryExport(32 * MIB)) as export:
        await asyncio.to_thread(use)
        assert export.errors == 0


async def test_an_error_of_the_server_is_the_error_of_the_file(tmp_path: Path) -> None:
    class Broken(MemoryExport):
        __slots__ = ()

        def read(self, offset: int, length: int) -> memoryview:
            raise OSError(errno.ENOMEM, "no memory")

    file = tmp_path / "disk"
    broken = Broken(MIB)
    broken.destination(0, PAGE)  # no hole: it must be read
    async with remote(file, broken) as export:
        with pytest.raises(OSError, match="Cannot allocate memory"):
            await asyncio.to_thread(read_page, file, 0)
        assert (export.errors, export.in_flight) == (1, 0)


async def test_what_waits_when_the_disk_is_lost_fails_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    cut = False

    async with serving(MemoryExport(MIB)) as uri:

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs, ours = await asyncio.open_connection("127.0.0.1", int(uri.rpartition(":")[2]))

            async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while (data := await source.read(1 << 16)) and not cut:
                    target.write(data)
                for end in (writer, ours):
                    end.close()

            await asyncio.gather(forward(reader, ours), forward(theirs, writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with nbd.connect(f"nbd://127.0.0.1:{port}/", dead_after=0) as disk, exported(disk, file) as export:
            assert await asyncio.to_thread(read_page, file, 0) == bytes(PAGE)
            cut = True
            for _ in range(2):  # under way when it is lost, and afterwards
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(read_page, file, 0)
            assert (export.errors, export.in_flight) == (2, 0)
        server.close()
        await server.wait_closed()
