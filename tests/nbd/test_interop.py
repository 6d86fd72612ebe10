"""Our client and our server with the ones from Debian: nbdkit, qemu-nbd, nbd-server; nbdinfo, nbdcopy, nbdsh, qemu-img."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import socket
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest

from tests.nbd.servers import MIB, serving
from tests.needs import require_tool
from ustack import nbd
from ustack.nbd.copy import copy
from ustack.nbd.disks import LocalDisk, MemoryDisk
from ustack.nbd.export import FileExport, MemoryExport
from ustack.nbd.server import NbdServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

pytestmark = pytest.mark.e2e

SIZE: Final = 48 * MIB
Running: TypeAlias = "tuple[str, subprocess.Popen[bytes]]"


@asynccontextmanager
async def activated(folder: Path, *command: str) -> AsyncIterator[Running]:
    """A server that is given its listening unix socket (sd_listen_fds(3)), so that it is ready before it runs; and the URI."""
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        start = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 </dev/null'
        server = subprocess.Popen(
            ["/bin/sh", "-c", start, "sh", require_tool(command[0]), *command[1:]], stdin=listener.fileno()
        )
    try:
        yield f"nbd+unix:///?socket={path}", server
    finally:
        server.kill()
        server.wait()


def nbdkit(folder: Path, *arguments: str) -> AbstractAsyncContextManager[Running]:
    """nbdkit, in the foreground."""
    return activated(folder, "nbdkit", "-f", *arguments)


def nbdkit_file(folder: Path) -> AbstractAsyncContextManager[Running]:
    """nbdkit on the image."""
    return nbdkit(folder, "file", str(folder / "image"))


def nbdkit_simple(folder: Path) -> AbstractAsyncContextManager[Running]:
    """nbdkit without structured replies."""
    return nbdkit(folder, "--no-sr", "file", str(folder / "image"))


def nbdkit_plain_newstyle(folder: Path) -> AbstractAsyncContextManager[Running]:
    """nbdkit without fixed newstyle: nothing but NBD_OPT_EXPORT_NAME."""
    return nbdkit(folder, "--mask-handshake=0", "file", str(folder / "image"))


def qemu_nbd(folder: Path) -> AbstractAsyncContextManager[Running]:
    """qemu-nbd on the image."""
    return activated(folder, "qemu-nbd", "-t", "-f", "raw", str(folder / "image"))


@asynccontextmanager
async def nbd_server(folder: Path) -> AsyncIterator[Running]:
    """nbd-server on the image. It takes no socket from us, so we wait until it has made its own."""
    path = folder / "socket"
    settings = f"[generic]\nunixsock = {path}\nlistenaddr = 127.0.0.1\nport = {free_port()}\n"
    (folder / "config").write_text(
        settings + f"[disk]\nexportname = {folder / 'image'}\nflush = true\nfua = true\ntrim = true\n"
    )
    server = subprocess.Popen([require_tool("nbd-server"), "-d", "-C", str(folder / "config")])
    try:
        async with asyncio.timeout(10):
            while not path.exists():
                assert server.poll() is None, "nbd-server has ended"
                await asyncio.sleep(0.01)
        yield f"nbd+unix:///disk?socket={path}", server
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    """A TCP port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def run(*command: str, status: int = 0) -> str:
    """Run a program of Debian's, with Debian's Python first in its way; it must end with this status within 60 s."""
    process = await asyncio.create_subprocess_exec(
        require_tool(command[0]),
        *command[1:],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin:/usr/sbin", "LC_ALL": "C.UTF-8"},
    )
    try:
        async with asyncio.timeout(60):
            out, complaint = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == status, complaint.decode()
    return out.decode()


# -- our client, their servers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [nbdkit_file, nbdkit_simple, nbdkit_plain_newstyle, qemu_nbd, nbd_server])
async def test_a_storm_of_requests_leaves_the_image_as_it_should_be(
    server: Callable[[Path], AbstractAsyncContextManager[Running]], tmp_path: Path
) -> None:
    chance = random.Random(2)
    model = bytearray(chance.randbytes(SIZE))
    (tmp_path / "image").write_bytes(model)
    async with server(tmp_path) as (uri, _), nbd.connect(uri, queue_depth=20) as disk:
        assert disk.size == SIZE

        async def storm(start: int, stop: int) -> None:
            # Each task has a range of its own, so that the order among tasks does not matter.
            for _ in range(30):
                length = chance.choice([1, 512, 4096, 70_000, 300_000])
                offset = chance.randrange(start, stop - length)
                match chance.randrange(6):
                    case 0 | 1:
                        data = chance.randbytes(length)
                        model[offset : offset + length] = data
                        await disk.pwrite(data, offset, fua=disk.can_fua and chance.random() < 0.2)
                    case 2 if disk.can_zero:
                        model[offset : offset + length] = bytes(length)
                        await disk.zero(length, offset, no_hole=chance.random() < 0.5)
                    case 3 if disk.can_flush:
                        await disk.flush()
                    case _:
                        assert await disk.pread(length, offset) == model[offset : offset + length]

        step = SIZE // 24
        await asyncio.gather(*(storm(start, start + step) for start in range(0, SIZE, step)))
        whole = await disk.pread(SIZE, 0)
        assert whole == model
        if disk.can_trim:
            await disk.trim(MIB, 0)
        await disk.flush()
    assert (tmp_path / "image").read_bytes()[MIB:] == model[MIB:]


@pytest.mark.parametrize(
    ("server", "structured"),
    [(nbdkit_file, True), (nbdkit_simple, False), (nbdkit_plain_newstyle, False), (qemu_nbd, True), (nbd_server, False)],
)
async def test_structured_replies_are_used_where_the_server_has_them(
    server: Callable[[Path], AbstractAsyncContextManager[Running]], structured: bool, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    async with server(tmp_path) as (uri, _), nbd.connect(uri) as disk:
        assert disk.structured_replies == structured
        assert disk.can_df == structured


async def test_a_sparse_disk_is_read_through_holes(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as image:
        image.truncate(SIZE)
        image.seek(10 * MIB)
        image.write(b"island")
    async with qemu_nbd(tmp_path) as (uri, _), nbd.connect(uri) as disk:
        assert await disk.pread(SIZE, 0) == (tmp_path / "image").read_bytes()


async def test_exports_of_nbdkit_are_listed_with_description(tmp_path: Path) -> None:
    for name in ("apple", "pear"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(bytes(512))
    async with nbdkit(tmp_path, "file", f"dir={tmp_path / 'images'}") as (uri, _):
        listed = await nbd.list_exports(uri)
        assert sorted((e.name, e.info and e.info.size) for e in listed) == [("apple", 512), ("pear", 512)]
        with pytest.raises(nbd.NbdOptionError) as caught:
            async with nbd.connect(nbd.NbdUri("nbd+unix", export="plum", socket=nbd.NbdUri.parse(uri).socket)):
                pass
        assert caught.value.errno in (errno.ENOENT, errno.EINVAL)


async def test_an_oldstyle_server_is_refused_by_name(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, "-o", "memory", "1M") as (uri, _):
        with pytest.raises(nbd.NbdProtocolError, match="oldstyle"):
            async with nbd.connect(uri):
                pass


async def test_errors_of_a_failing_disk_fail_one_request_each(tmp_path: Path) -> None:
    arguments = ("--filter=error", "memory", "4M", "error-pread=EIO", "error-pread-rate=50%", "error-pwrite=ENOSPC")
    async with nbdkit(tmp_path, *arguments, "error-pwrite-rate=100%") as (uri, _), nbd.connect(uri) as disk:
        reads = await asyncio.gather(*(disk.pread(4096, 4096 * n) for n in range(200)), return_exceptions=True)
        failed = [result.errno for result in reads if isinstance(result, OSError)]
        assert set(failed) == {errno.EIO}
        assert 0 < len(failed) < 200
        assert all(bytes(result) == bytes(4096) for result in reads if isinstance(result, bytearray))
        with pytest.raises(OSError, match="ENOSPC") as caught:
            await disk.pwrite(b"x", 0)
        assert caught.value.errno == errno.ENOSPC


async def test_replies_that_overtake_each_other_find_their_requests(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, "--filter=delay", "memory", "4M", "rdelay=20ms") as (uri, _), nbd.connect(uri) as disk:
        await asyncio.gather(*(disk.pwrite(bytes([n]) * 4096, n * 4096) for n in range(16)))
        order: list[int] = []

        async def read(n: int) -> None:
            assert await disk.pread(4096, n * 4096) == bytes([n]) * 4096
            order.append(n)

        await asyncio.gather(disk.flush(), *(read(n) for n in range(16)))
        assert sorted(order) == list(range(16))


async def test_a_server_that_is_too_slow_is_a_timeout(tmp_path: Path) -> None:
    slow = nbdkit(tmp_path, "--filter=delay", "memory", "4M", "rdelay=20")
    async with slow as (uri, _), nbd.connect(uri, request_timeout=0.1, dead_after=0) as disk:
        with pytest.raises(TimeoutError, match=r"no reply .* within 0.1 s"):
            await disk.pread(512, 0)


async def test_block_sizes_are_kept_so_that_a_strict_server_has_no_complaint(tmp_path: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=64k", "blocksize-maximum=256k", "blocksize-error-policy=error"]
    async with nbdkit(tmp_path, "--filter=blocksize-policy", "memory", "8M", *policy) as (uri, _), nbd.connect(uri) as disk:
        assert (disk.minimum_block, disk.preferred_block, disk.maximum_payload) == (4096, 65536, 262144)
        content = random.Random(3).randbytes(5 * MIB)
        await disk.pwrite(content, 4096)
        assert await disk.pread(5 * MIB, 4096) == content
        await disk.zero(4 * MIB, 0)
        await disk.cache(4 * MIB, 0)
        for length, offset in ((4096, 100), (100, 4096)):
            with pytest.raises(OSError, match="blocks have 4096 bytes"):
                await disk.pread(length, offset)


async def test_a_server_killed_amid_a_copy_is_a_clear_error_at_once(tmp_path: Path) -> None:
    slow = nbdkit(tmp_path, "--filter=delay", "memory", str(SIZE), "wdelay=2ms")
    async with slow as (uri, server), nbd.connect(uri, dead_after=0) as disk:

        def strike(done: int, total: int) -> None:
            if done > total // 4:
                server.kill()

        async with asyncio.timeout(10):
            with pytest.raises(ConnectionError, match=r"server closed the connection|connection lost"):
                await copy(MemoryDisk(bytearray(SIZE)), disk, progress=strike)


@pytest.mark.parametrize("server", [nbdkit_file, qemu_nbd, nbd_server])
async def test_an_image_copied_there_and_back_is_the_same(
    server: Callable[[Path], AbstractAsyncContextManager[Running]], tmp_path: Path
) -> None:
    content = random.Random(4).randbytes(SIZE // 2) + bytes(SIZE // 4) + random.Random(5).randbytes(SIZE // 4)
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "image").write_bytes(b"\xff" * SIZE)
    async with server(tmp_path) as (uri, _), nbd.connect(uri) as disk:
        source, target = LocalDisk(tmp_path / "source"), LocalDisk(tmp_path / "target", create_size=SIZE)
        there = await copy(source, disk, sparse=4096, request_size=100_352)
        back = await copy(disk, target, requests=3)
        await source.close()
        await target.close()
        assert there.total_bytes == back.total_bytes == SIZE
        assert there.zero_bytes == (SIZE // 4 if disk.can_zero else 0)
    assert (tmp_path / "image").read_bytes() == content
    assert (tmp_path / "target").read_bytes() == content


# -- our server, their clients -----------------------------------------------------------------------------------------------


async def test_nbdinfo_sees_what_is_exported() -> None:
    exports = MemoryExport(MIB, "one", description="the first"), MemoryExport(512, "two", read_only=True)
    async with serving(*exports) as uri:
        seen = json.loads(await run("nbdinfo", "--json", "--list", uri))
        assert (seen["protocol"], seen["structured"]) == ("newstyle-fixed", True)
        one, two = seen["exports"]
        assert (one["export-name"], one["export-size"], one["description"]) == ("one", MIB, "the first")
        assert (one["is_read_only"], one["can_fua"], one["can_df"], one["can_zero"]) == (False, True, True, True)
        assert (two["is_read_only"], two["can_trim"]) == (True, False)
        assert (one["block_size_minimum"], one["block_size_maximum"]) == (1, 32 * MIB)
        await run("nbdinfo", f"{uri}/three", status=1)


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_nbdcopy_and_qemu_img_bring_back_what_they_took(kind: str, tmp_path: Path) -> None:
    content = random.Random(6).randbytes(SIZE // 3) + bytes(SIZE // 3) + random.Random(7).randbytes(SIZE // 3)
    source, target, image = (str(tmp_path / name) for name in ("source", "target", "image"))
    Path(source).write_bytes(content)
    Path(image).write_bytes(b"\xff" * SIZE)
    async with serving(MemoryExport(SIZE) if kind == "memory" else FileExport(image)) as uri:
        await run("nbdcopy", "--flush", source, uri)
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
        await run("nbdcopy", "-C4", uri, target)
        assert Path(target).read_bytes() == content
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", target, uri)
        await run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, target)
        assert Path(target).read_bytes() == content
    if kind == "file":
        assert Path(image).read_bytes() == content


async def test_nbdinfo_and_qemu_img_see_where_the_holes_are(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"")
    with (tmp_path / "image").open("r+b") as image:
        image.truncate(8 * MIB)
        image.seek(2 * MIB)
        image.write(b"x" * MIB)
    memory = MemoryExport(8 * MIB, "memory")
    memory.destination(2 * MIB, MIB)[:] = b"x" * MIB
    async with serving(memory, FileExport(tmp_path / "image", "file")) as uri:
        for name in ("memory", "file"):
            mapped = json.loads(await run("nbdinfo", "--map", "--json", f"{uri}/{name}"))
            assert [(each["offset"], each["length"], each["type"]) for each in mapped] == [
                (0, 2 * MIB, 3),
                (2 * MIB, MIB, 0),
                (3 * MIB, 5 * MIB, 3),
            ]
            seen = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", f"{uri}/{name}"))
            assert [(each["start"], each["length"], each["zero"]) for each in seen] == [
                (0, 2 * MIB, True),
                (2 * MIB, MIB, False),
                (3 * MIB, 5 * MIB, True),
            ]
            assert "base:allocation" in await run("nbdinfo", f"{uri}/{name}")


NBDSH = """
h.set_strict_mode(0)
def refused(call, code):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == code, error
    else:
        raise AssertionError("not refused")
assert h.get_structured_replies_negotiated() == %s
for _ in range(2):
    refused(lambda: h.pread(10, h.get_size()), "EINVAL")
    refused(lambda: h.pwrite(b"x", h.get_size()), "ENOSPC")
    refused(lambda: h.pwrite(bytes(40 << 20), 0), "EINVAL")
    refused(lambda: h.pread(40 << 20, 0), "EINVAL")
    refused(lambda: h.pread(4, 0, 1 << 9), "EINVAL")
    refused(lambda: h.trim(1, h.get_size()), "EINVAL")
h.pwrite(b"still in step", 100, nbd.CMD_FLAG_FUA)
h.zero(5, 100, nbd.CMD_FLAG_NO_HOLE)
h.flush()
assert h.pread(13, 100) == bytes(5) + b" in step"
h.cache(4096, 0)
cookies = [h.aio_pread(nbd.Buffer(4096), 4096 * n) for n in range(100)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
"""


@pytest.mark.parametrize("structured", [True, False])
async def test_nbdsh_may_break_the_rules_and_the_stream_stays_in_step(structured: bool) -> None:
    async with serving() as uri:
        negotiate = f"h.set_request_structured_replies({structured})"
        await run("nbdsh", "-c", negotiate, "-c", f"h.connect_uri({uri!r})", "-c", NBDSH % structured)


async def test_a_unix_socket_serves_only_its_owner_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = NbdServer([MemoryExport(MIB, "disk")])
    await server.listen_unix(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert (await run("nbdinfo", "--size", f"nbd+unix:///disk?socket={path}")).strip() == str(MIB)
    other = NbdServer([MemoryExport(MIB)])
    with pytest.raises(OSError, match="another server") as caught:
        await other.listen_unix(str(path))
    assert caught.value.errno == errno.EADDRINUSE
    await server.close()
    await other.close()
    assert not path.exists()
