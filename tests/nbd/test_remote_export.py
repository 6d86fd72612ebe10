"""Disks of other servers behind a unix socket of ours: what is kept, what is said, and Debian's clients in front of it."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nbd import wire
from tests.nbd.servers import MIB, serving
from tests.nbd.test_interop import activated, nbd_server, nbdkit, nbdkit_file, nbdkit_simple, qemu_nbd, run
from tests.needs import extended_qemu_nbd, require_path, require_tool
from ustack import nbd
from ustack.nbd.connector import open_disk
from ustack.nbd.export import FileExport, MemoryExport
from ustack.nbd.remote_export import RemoteExport
from ustack.nbd.server import NbdServer
from ustack.nbd.server_connection import MAX_HELD, MAX_UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from tests.nbd.test_interop import Running
    from ustack.nbd.export import Answers
    from ustack.nbd.server_transmission import Command

SIZE = 16 * MIB


@asynccontextmanager
async def forwarding(folder: Path, uri: str, *, read_only: bool = False, dead_after: float | None = None) -> AsyncIterator[str]:
    """A unix socket in front of the disk at `uri`; gives its URI."""
    disk = await open_disk([uri], dead_after=dead_after, request_timeout=None)
    server = NbdServer([RemoteExport(disk, read_only=read_only)])
    try:
        await server.listen_unix(str(folder / "front"))
        yield str(nbd.NbdUri("nbd+unix", export=disk.name, socket=str(folder / "front")))
    finally:
        await server.close()
        await disk.close(0)


# -- what is kept and said ---------------------------------------------------------------------------------------------------


async def test_a_storm_of_requests_through_two_clients_leaves_the_disk_as_it_should_be(tmp_path: Path) -> None:
    disk = MemoryExport(4 * MIB, "disk", description="far away")
    async with serving(disk) as uri, forwarding(tmp_path, f"{uri}/disk") as front:
        async with nbd.connect(front) as one, nbd.connect(front) as two:
            assert (one.size, one.description, one.can_multi_conn) == (4 * MIB, "far away", True)
            expected = bytearray(4 * MIB)
            rng = random.Random(11)

            async def change(block: int) -> None:
                client, content = rng.choice((one, two)), rng.randbytes(8192)
                expected[block * 8192 : (block + 1) * 8192] = content
                await client.pwrite(content, block * 8192, fua=rng.random() < 0.2)
                await rng.choice((one, two)).flush()
                if rng.random() < 0.2:
                    expected[block * 8192 : block * 8192 + 4096] = bytes(4096)
                    await client.zero(4096, block * 8192)
                other = two if client is one else one
                assert await other.pread(8192, block * 8192) == expected[block * 8192 : (block + 1) * 8192]

            await asyncio.gather(*map(change, range(512)))
            await one.trim(8192, 0)
            await two.cache(4096, 8192)
        assert disk.read(8192, 4 * MIB - 8192) == expected[8192:]


async def test_what_is_not_offered_over_there_is_not_offered_here(tmp_path: Path) -> None:
    async with (
        serving(MemoryExport(MIB, read_only=True)) as uri,
        forwarding(tmp_path, uri) as front,
        nbd.connect(front) as disk,
    ):
        assert disk.read_only
        assert not disk.can_trim
        assert not disk.can_fua


async def test_a_disk_can_be_shown_and_not_be_lent(tmp_path: Path) -> None:
    async with serving() as uri, forwarding(tmp_path, uri, read_only=True) as front, nbd.connect(front) as disk:
        assert disk.read_only
        with pytest.raises(OSError, match="read-only"):
            await disk.pwrite(b"x", 0)
        assert await disk.pread(10, 0) == bytes(10)


async def test_an_error_over_there_is_the_same_error_here(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    async with (
        serving(FileExport(tmp_path / "image")) as uri,
        forwarding(tmp_path, uri) as front,
        nbd.connect(front) as disk,
    ):
        with (tmp_path / "image").open("r+b") as image:
            image.truncate(4096)
        with pytest.raises(OSError, match="shrunk") as caught:
            await disk.pread(4096, 8192)
        assert caught.value.errno == errno.EIO
        assert await disk.pread(4096, 0) == bytes(4096)


async def test_while_the_other_server_is_away_commands_wait_and_then_they_are_done(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"nbd://127.0.0.1:{listener.getsockname()[1]}/"
        first = NbdServer([FileExport(tmp_path / "image")])
        await first.listen_socket(listener.dup())
        async with forwarding(tmp_path, uri) as front, nbd.connect(front) as disk:
            await disk.pwrite(b"before", 0)
            await first.close()
            waiting = [asyncio.ensure_future(disk.pwrite(bytes([n]) * 512, 512 * n)) for n in range(1, 50)]
            flushing = asyncio.ensure_future(disk.flush())
            await asyncio.sleep(0)
            assert not any(each.done() for each in waiting)
            second = NbdServer([FileExport(tmp_path / "image")])
            await second.listen_socket(listener.dup())
            await asyncio.wait_for(asyncio.gather(*waiting, flushing), 30)
            assert await disk.pread(512, 512 * 49) == bytes([49]) * 512
        await second.close()
    assert (tmp_path / "image").read_bytes()[512 : 512 * 50] == b"".join(bytes([n]) * 512 for n in range(1, 50))


async def test_a_disk_that_is_given_up_is_shut_down_here(tmp_path: Path) -> None:
    server = NbdServer([MemoryExport(MIB)])
    port = await server.listen_tcp()
    async with forwarding(tmp_path, f"nbd://127.0.0.1:{port}/", dead_after=0) as front:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "front"))
        writer.write(b"\0\0\0\x03" + wire.option(wire.GO, wire.info_data("")))
        await reader.readexactly(18 + 32 + 20)
        await server.close()
        writer.write(wire.request(wire.READ, 1, 0, 512))
        assert await reader.readexactly(16) == wire.simple(1, 108)
        writer.close()
        await writer.wait_closed()
        assert front


class _Silent:
    """A disk that answers nothing until it is told to, and counts what is asked of it."""

    def __init__(self, size: int) -> None:
        self.info = nbd.ExportInfo("", size, wire.ALL_FLAGS, maximum_payload=32 * MIB)
        self.name, self.size, self.description = "", size, None
        self.minimum_block, self.preferred_block, self.maximum_payload = 1, 4096, 32 * MIB
        self.meta_contexts: frozenset[str] = frozenset()
        self.begun = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def pread_into(self, buffer: bytearray, offset: int) -> None:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        buffer[:] = b"\7" * len(buffer)


@asynccontextmanager
async def in_front_of(disk: _Silent, folder: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client in the transmission phase, spoken by hand."""
    server = NbdServer([RemoteExport(disk)])  # type: ignore[arg-type]
    await server.listen_unix(str(folder / "front"))
    reader, writer = await asyncio.open_unix_connection(str(folder / "front"))
    writer.write(b"\0\0\0\x03" + wire.option(wire.GO, wire.info_data("")))
    await reader.readexactly(18 + 32 + 20)
    try:
        yield reader, writer
    finally:
        writer.close()
        await server.close()


async def turns(count: int = 50) -> None:
    """Let the loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("length", "most"), [(512, MAX_UNDER_WAY), (16 * MIB, MAX_HELD // (16 * MIB))])
async def test_no_more_is_begun_than_there_is_room_for_and_all_is_answered(tmp_path: Path, length: int, most: int) -> None:
    disk = _Silent(1 << 30)
    async with in_front_of(disk, tmp_path) as (reader, writer):
        count = most + 1
        writer.write(b"".join(wire.request(wire.READ, n, 0, length) for n in range(count)))
        async with asyncio.timeout(10):
            while disk.begun < most:
                await asyncio.sleep(0)
        await turns()
        assert disk.begun == most
        disk.go.set()
        cookies = set()
        for _ in range(count):
            head = await reader.readexactly(16)
            assert await reader.readexactly(length) == b"\7" * length
            cookies.add(int.from_bytes(head[8:], "big"))
        assert cookies == set(range(count))


async def test_a_client_that_goes_takes_its_requests_with_it(tmp_path: Path) -> None:
    disk = _Silent(1 << 30)
    async with in_front_of(disk, tmp_path) as (_, writer):
        writer.write(b"".join(wire.request(wire.READ, n, 0, 512) for n in range(10)))
        async with asyncio.timeout(10):
            while disk.begun < 10:
                await asyncio.sleep(0)
            writer.transport.abort()
            while disk.cancelled < 10:
                await asyncio.sleep(0)


async def test_disc_waits_for_what_is_under_way(tmp_path: Path) -> None:
    disk = _Silent(1 << 30)
    async with in_front_of(disk, tmp_path) as (reader, writer):
        writer.write(wire.request(wire.READ, 1, 0, 3) + wire.request(wire.DISC, 2))
        async with asyncio.timeout(10):
            while disk.begun < 1:
                await asyncio.sleep(0)
            await turns()
            disk.go.set()
            assert await reader.read() == wire.simple(1, 0, b"\7\7\7")


async def test_holes_and_other_contexts_are_what_they_are_over_there(tmp_path: Path) -> None:
    disk = MemoryExport(4 * MIB)
    disk.destination(MIB, MIB)[:] = b"x" * MIB
    async with serving(disk) as uri, forwarding(tmp_path, uri) as front, nbd.connect(front) as client:
        assert client.extended_headers
        expected = [(0, MIB, 3), (MIB, MIB, 0), (2 * MIB, 2 * MIB, 3)]
        assert await client.block_status(4 * MIB, 0) == expected
        assert await client.block_status(4 * MIB - 512, 512, one=True) == [(512, MIB - 512, 3)]
        await client.zero(MIB, MIB, fast=True)
        assert await client.block_status(4 * MIB, 0) == [(0, 4 * MIB, 3)]


# -- Debian's clients, our unix socket, each of their servers ------------------------------------------------------------------


def nbdkit_in_blocks(folder: Path) -> AbstractAsyncContextManager[Running]:
    """nbdkit that takes blocks of 4096 to 1 MiB only."""
    limits = ("blocksize-minimum=4096", "blocksize-preferred=64k", "blocksize-maximum=1M", "blocksize-error-policy=error")
    return nbdkit(folder, "--filter=blocksize-policy", "file", str(folder / "image"), *limits)


Servers = "Callable[[Path], AbstractAsyncContextManager[Running]]"


@pytest.mark.e2e
@pytest.mark.parametrize("server", [nbdkit_file, nbdkit_simple, nbdkit_in_blocks, qemu_nbd, nbd_server])
async def test_what_debians_clients_write_they_find_again(
    server: Callable[[Path], AbstractAsyncContextManager[Running]], tmp_path: Path
) -> None:
    content = random.Random(21).randbytes(SIZE // 2) + bytes(SIZE // 4) + random.Random(22).randbytes(SIZE // 4)
    source, target, image = tmp_path / "source", tmp_path / "target", tmp_path / "image"
    source.write_bytes(content)
    image.write_bytes(b"\xff" * SIZE)
    async with server(tmp_path) as (uri, _), forwarding(tmp_path, uri) as front:
        seen = json.loads(await run("nbdinfo", "--json", front))
        assert seen["exports"][0]["export-size"] == SIZE
        assert seen["exports"][0]["can_multi_conn"]
        if server is nbdkit_in_blocks:
            assert (seen["exports"][0]["block_size_minimum"], seen["exports"][0]["block_size_maximum"]) == (4096, MIB)
        if server not in (nbdkit_simple, nbd_server):
            mapped = json.loads(await run("nbdinfo", "--map", "--json", front))
            assert mapped == [{"offset": 0, "length": SIZE, "type": 0, "description": "data"}]
        await run("nbdcopy", "--flush", str(source), front)
        await run("nbdcopy", "-C4", front, str(target))
        assert target.read_bytes() == content
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), front)
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(target), front)
        await run(
            "qemu-io", "-f", "raw",
            "-c", "write -P 0x5a 1M 2M", "-c", "write -f -P 0xa5 4M 64k", "-c", "write -z 5M 1M", "-c", "discard 6M 1M",
            "-c", "flush", "-c", "read -P 0x5a 1M 2M", "-c", "read -P 0xa5 4M 64k", "-c", "read -P 0 5M 1M",
            front,
        )  # fmt: skip
        held = bytearray(content)
        held[MIB : 3 * MIB] = b"\x5a" * (2 * MIB)
        held[4 * MIB : 4 * MIB + 65536] = b"\xa5" * 65536
        held[5 * MIB : 6 * MIB] = bytes(MIB)
        written = image.read_bytes()
        assert written[: 6 * MIB] == held[: 6 * MIB]
        assert written[7 * MIB :] == held[7 * MIB :]


@pytest.mark.e2e
@pytest.mark.parametrize("server", [nbdkit_file, qemu_nbd, nbd_server])
async def test_fio_verifies_what_it_has_written(
    server: Callable[[Path], AbstractAsyncContextManager[Running]], tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(bytes(SIZE))
    async with server(tmp_path) as (uri, _), forwarding(tmp_path, uri) as front:
        await run(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={front}", "--rw=randrw", "--bsrange=4k-64k", f"--size={SIZE}",
            "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=5", "--verify_state_save=0",
            "--output-format=json", f"--output={tmp_path / 'report'}",
        )  # fmt: skip
        report = json.loads((tmp_path / "report").read_text())
        assert report["jobs"][0]["error"] == 0
        assert report["jobs"][0]["write"]["total_ios"] > 100


NBDSH = """
import random
rng = random.Random(3)
size = h.get_size()
held = {}
for _ in range(200):
    block = rng.randrange(size // 4096)
    held[block] = bytes([rng.randrange(256)]) * 4096
    h.pwrite(held[block], block * 4096, nbd.CMD_FLAG_FUA if h.can_fua() and rng.random() < 0.3 else 0)
if h.can_flush():
    h.flush()
buffers = {block: nbd.Buffer(4096) for block in held}
cookies = [h.aio_pread(buffer, block * 4096) for block, buffer in buffers.items()]
while h.aio_in_flight():
    h.poll(-1)
for cookie in cookies:
    assert h.aio_command_completed(cookie)
for block, buffer in buffers.items():
    assert bytes(buffer.to_bytearray()) == held[block], block
"""


@pytest.mark.e2e
async def test_libnbd_has_many_requests_in_flight(tmp_path: Path) -> None:
    async with (
        nbdkit(tmp_path, "--filter=delay", "memory", "4M", "rdelay=2ms", "wdelay=1ms") as (uri, _),
        forwarding(tmp_path, uri) as front,
    ):
        await run("nbdsh", "-c", f"h.connect_uri({front!r})", "-c", NBDSH)


@pytest.mark.e2e
async def test_nbd_client_which_asks_for_no_block_sizes_may_go_beyond_them(tmp_path: Path) -> None:
    """It comes to the point where it needs a device, and the kernel's requests may have more bytes than the server takes."""
    limits = ("blocksize-minimum=1", "blocksize-maximum=64k", "blocksize-preferred=4k", "blocksize-error-policy=error")
    arguments = ("--filter=blocksize-policy", "memory", "4M", *limits)
    async with nbdkit(tmp_path, *arguments) as (uri, _), forwarding(tmp_path, uri):
        said = await run("nbd-client", "-unix", str(tmp_path / "front"), "/dev/null", status=1)
        assert "size = 4MB" in said
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "front"))
        writer.write(b"\0\0\0\x03" + wire.option(wire.GO, wire.info_data("")))
        await reader.readexactly(18 + 32 + 20)
        writer.write(wire.request(wire.WRITE, 1, 0, MIB, payload=b"k" * MIB))
        assert await reader.readexactly(16) == wire.simple(1)
        writer.write(wire.request(wire.READ, 2, 0, MIB))
        assert await reader.readexactly(16 + MIB) == wire.simple(2, 0, b"k" * MIB)
        writer.close()


@pytest.mark.e2e
async def test_errors_that_come_now_and_then_reach_the_one_they_are_for(tmp_path: Path) -> None:
    trigger = tmp_path / "inject"
    arguments = ("error=ENOSPC", "error-pwrite-rate=100%", f"error-file={trigger}")
    async with (
        nbdkit(tmp_path, "--filter=error", "memory", "4M", *arguments) as (uri, _),
        forwarding(tmp_path, uri) as front,
        nbd.connect(front) as disk,
    ):
        await disk.pwrite(b"good", 0)
        trigger.write_bytes(b"")
        with pytest.raises(OSError, match="NBD_CMD_WRITE") as caught:
            await disk.pwrite(b"bad", 0)
        assert caught.value.errno == errno.ENOSPC
        trigger.unlink()
        assert await disk.pread(4, 0) == b"good"


@pytest.mark.e2e
async def test_systemd_and_libnbd_may_hand_us_the_socket(tmp_path: Path) -> None:
    start = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; from ustack.cli import main; main()"]
    start += ["nbd", "serve", "--memory", "4M"]
    async with activated(tmp_path, *start) as (uri, server):
        assert (await run("nbdinfo", "--size", uri)).strip() == str(4 * MIB)
        server.terminate()
        assert await asyncio.to_thread(server.wait) == 0
    await run("nbdsh", "-c", f"h.connect_systemd_socket_activation({start!r})", "-c", NBDSH)


@pytest.mark.e2e
async def test_qemus_client_and_server_with_extended_headers_see_extents_of_gigabytes(tmp_path: Path) -> None:
    server = extended_qemu_nbd()
    client = require_path(Path(server).with_name("qemu-img"), "it comes with qemu-nbd")
    exercise = require_path(Path(server).with_name("qemu-io"), "it comes with qemu-nbd")
    with (tmp_path / "image").open("wb") as image:
        image.truncate(6 << 30)
    arguments = (server, "-t", "-e", "4", "-f", "raw", str(tmp_path / "image"))
    async with activated(tmp_path, *arguments) as (uri, _), forwarding(tmp_path, uri) as front:
        await run(
            str(exercise), "-f", "raw", "-c", "write -P 3 5G 1M", "-c", "write -z -n 0 5G", "-c", "read -P 3 5G 1M",
            "-c", "read -P 0 4G 1M", "-c", "flush", front,
        )  # fmt: skip
        seen = json.loads(await run(str(client), "map", "--output=json", "-f", "raw", front))
        assert [(each["start"], each["length"], each["zero"]) for each in seen] == [
            (0, 5 << 30, True),
            (5 << 30, MIB, False),
            ((5 << 30) + MIB, (1 << 30) - MIB, True),
        ]


@pytest.mark.e2e
async def test_dirty_bitmaps_of_qemu_are_passed_on(tmp_path: Path) -> None:
    image = str(tmp_path / "image")
    await run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    await run("qemu-img", "bitmap", "--add", image, "changes")
    await run("qemu-io", "-c", "write 1M 128k", image)
    context = "qemu:dirty-bitmap:changes"
    async with activated(tmp_path, "qemu-nbd", "-t", "-r", "-B", "changes", "-f", "qcow2", image) as (uri, _):
        disk = await open_disk([uri], meta_contexts=["base:allocation", context])
        server = NbdServer([RemoteExport(disk)])
        await server.listen_unix(str(tmp_path / "front"))
        front = f"nbd+unix:///?socket={tmp_path}/front"
        seen = json.loads(await run("nbdinfo", f"--map={context}", "--json", front))
        assert [(each["offset"], each["length"], each["type"]) for each in seen] == [
            (0, MIB, 0),
            (MIB, 131072, 1),
            (MIB + 131072, 3 * MIB - 131072, 0),
        ]
        both = json.loads(await run("nbdinfo", "--json", front))["exports"][0]["contexts"]
        assert sorted(both) == ["base:allocation", context]
        await server.close()
        await disk.close()


class Counted(RemoteExport):
    """Counts what it is asked."""

    count = 0

    def submit(self, command: Command, answers: Answers) -> asyncio.Task[None]:
        """One more."""
        self.count += 1
        return super().submit(command, answers)


@pytest.mark.e2e
async def test_fio_does_not_notice_that_the_server_is_killed_twenty_times(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(SIZE))
    start = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 </dev/null'
    command = ["/bin/sh", "-c", start, "sh", require_tool("nbdkit"), "-f", "file", str(tmp_path / "image")]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "back"))
        listener.listen()
        server = subprocess.Popen(command, stdin=listener.fileno())
        disk = await open_disk([f"nbd+unix:///?socket={tmp_path}/back"], dead_after=None)
        export = Counted(disk)
        front = NbdServer([export])
        await front.listen_unix(str(tmp_path / "front"))
        fio = await asyncio.create_subprocess_exec(
            require_tool("fio"), "--name=verify", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={tmp_path}/front",
            "--rw=randrw", "--bs=4k", f"--size={SIZE}", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
            "--randseed=7", "--verify_state_save=0", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        ended = asyncio.create_task(fio.communicate())
        try:
            async with asyncio.timeout(100):
                for number in range(1, 21):
                    while export.count < 150 * number and not ended.done():
                        await asyncio.sleep(0.001)
                    server.kill()
                    server.wait()
                    server = subprocess.Popen(command, stdin=listener.fileno())
                _, complaint = await ended
            assert fio.returncode == 0, complaint.decode()
            assert export.count > 20 * 150, "all of them while it ran"
            assert disk.counters()["outages"] >= 10
        finally:
            if fio.returncode is None:
                fio.kill()
            await front.close()
            await disk.close(0)
            server.kill()
            server.wait()
