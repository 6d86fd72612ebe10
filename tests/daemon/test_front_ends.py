"""A daemon that gives remote disks to the machine: as unix sockets, by its configuration or on demand, and as devices of the
kernel's nbd, as far as that can be seen without the driver."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.daemon.running import KERNEL, RunningDaemon
from tests.daemon.test_fuse import Storage, listen
from tests.nbd import wire
from ustack import nbd
from ustack.cli.control import call
from ustack.daemon import nbd_device
from ustack.daemon.front_ends import KernelDevice, UnixSocket
from ustack.nbd.connector import open_disk
from ustack.nbd.export import MemoryExport
from ustack.nbd.remote_export import RemoteExport
from ustack.nbd.server import NbdServer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.netns import Namespace

SIZE = 4 << 20


# -- unix sockets ------------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
async def test_a_disk_over_our_stack_is_a_unix_socket_through_a_restart_of_its_server(netns: Namespace, tmp_path: Path) -> None:
    memory = Storage(SIZE)
    server, port = await listen(netns, memory)
    path = tmp_path / "run" / "disk.sock"
    config = f'[[nbd]]\nname = "d"\nuri = "nbd://{KERNEL}:{port}/"\nunix = "{path}"\nunix_mode = "0660"\n'
    with RunningDaemon(netns, tmp_path, config) as daemon:
        async with asyncio.timeout(20):
            while not path.exists():
                await asyncio.sleep(0.02)
        assert path.stat().st_mode & 0o777 == 0o660
        # Whoever comes before the disk is there waits.
        async with nbd.connect(f"nbd+unix:///d?socket={path}", connect_timeout=20) as disk:
            content = random.Random(3).randbytes(SIZE)
            await disk.pwrite(content[: SIZE // 2], 0)
            await server.close()
            waiting = asyncio.create_task(disk.pwrite(content[SIZE // 2 :], SIZE // 2))
            server, _ = await listen(netns, memory, port)
            await waiting
            assert await disk.pread(SIZE, 0) == content
            assert memory.read(0, SIZE) == content
            assert f"at {path}, 1 clients" in (await daemon.ustack("status")).stdout.decode()
    await server.close()
    assert not path.exists()


@pytest.mark.e2e
async def test_attach_and_detach_while_the_daemon_runs(netns: Namespace, tmp_path: Path) -> None:
    server, port = await listen(netns, MemoryExport(SIZE, "disk"))
    uri = f"nbd://{KERNEL}:{port}/disk"
    with RunningDaemon(netns, tmp_path) as daemon:
        attached = await daemon.ustack("nbd", "attach", uri, "--unix", str(tmp_path / "a.sock"))
        assert attached.stdout.decode() == f"disk\t{tmp_path}/a.sock\t4M\n"
        async with nbd.connect(f"nbd+unix:///?socket={tmp_path}/a.sock") as disk:
            await disk.pwrite(b"through", 0)
        # Without the driver a device cannot be had, and a socket beside the control socket is what there is.
        auto = await daemon.ustack("nbd", "attach", uri, "--name", "other")
        assert auto.stdout.decode() == f"other\t{tmp_path}/other.sock\t4M\n"
        assert b"no device: this kernel has no nbd driver" in auto.stderr
        async with nbd.connect(f"nbd+unix:///?socket={tmp_path}/other.sock") as disk:
            assert await disk.pread(7, 0) == b"through"
        assert [each["name"] for each in (await asyncio.to_thread(call, str(daemon.control), "status"))["nbd"]] == [
            "disk",
            "other",
        ]
        for arguments, complaint in (
            (("attach", uri, "--unix", str(tmp_path / "b.sock")), "named 'disk' already"),
            (("attach", uri, "--name", "b", "--unix", str(tmp_path / "a.sock")), "another server listens there"),
            (("attach", uri, "--name", "b", "--device", "/dev/nbd0"), "this kernel has no nbd driver: modprobe nbd"),
            (("attach", uri, "--name", "b", "--device", "/dev/sda"), '"auto" or a device of the kernel'),
            (("attach", f"{uri}s", "--name", "b", "--unix", str(tmp_path / "b.sock")), "no export named 'disks'"),
            (("detach", "b"), "no attached disk is named 'b'; there is disk, other"),
        ):
            refused = await daemon.ustack("nbd", *arguments, check=False)
            assert refused.returncode == 1
            assert complaint in refused.stderr.decode()
        assert not (tmp_path / "b.sock").exists()
        gone = await daemon.ustack("nbd", "detach", "disk")
        assert gone.stdout.decode() == f"disk\t{tmp_path}/a.sock\tgone\n"
        assert not (tmp_path / "a.sock").exists()
    await server.close()
    assert not (tmp_path / "other.sock").exists()


async def test_a_front_end_goes_on_with_the_same_disk_and_not_with_another(tmp_path: Path) -> None:
    first, second, larger = (NbdServer([MemoryExport(size)]) for size in (SIZE, SIZE, 2 * SIZE))
    disks = [await open_disk([f"nbd://127.0.0.1:{await each.listen_tcp()}/"]) for each in (first, second, larger)]
    front_end = UnixSocket(str(tmp_path / "s"), "d", 0o600)
    uri = f"nbd+unix:///?socket={tmp_path}/s"
    try:
        await front_end.offer(disks[0])
        async with nbd.connect(uri, dead_after=0) as client:
            front_end.suspend()
            with pytest.raises(OSError, match="the disk is lost") as caught:
                await client.pread(512, 0)
            assert caught.value.errno == errno.ESHUTDOWN
        async with nbd.connect(uri, dead_after=0) as client:
            await front_end.offer(disks[1])
            assert await client.pread(512, 0) == bytes(512)
            await front_end.offer(disks[2])
            with pytest.raises(ConnectionError):
                await client.pread(512, 0)
        async with nbd.connect(uri) as client:
            assert client.size == 2 * SIZE
    finally:
        await front_end.close()
        for disk, server in zip(disks, (first, second, larger), strict=True):
            await disk.close()
            await server.close()


# -- the kernel's nbd --------------------------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    """An nlattr by hand."""
    size = 4 + len(payload)
    return struct.pack("=HH", size, kind) + payload + bytes(-size % 4)


NESTED = 1 << 15


@pytest.mark.parametrize("index", [None, 3])
def test_connect_says_what_nbd_netlink_h_says(index: int | None) -> None:
    message = nbd_device.connect_message(index, 17, 1 << 30, 4096, 0x16D)
    message.encode()
    expected = b"" if index is None else attribute(1, struct.pack("=I", index))
    expected += attribute(2, struct.pack("=Q", 1 << 30)) + attribute(3, struct.pack("=Q", 4096))
    expected += attribute(4, struct.pack("=Q", 0)) + attribute(5, struct.pack("=Q", 0x16D))
    expected += attribute(7 | NESTED, attribute(1 | NESTED, attribute(1, struct.pack("=I", 17))))
    body = bytes(message.data)[16:]
    assert body[:2] == b"\1\1", "NBD_CMD_CONNECT, version 1"
    assert body[4:] == expected


def test_disconnect_names_the_device() -> None:
    message = nbd_device.disconnect_message(3)
    message.encode()
    assert bytes(message.data)[16:18] == b"\2\1"
    assert bytes(message.data)[20:] == attribute(1, struct.pack("=I", 3))


@pytest.mark.parametrize(
    ("size", "minimum", "block"), [(1 << 30, 1, 4096), (1 << 30, 4096, 4096), (4096 + 512, 1, 512), (1536, 512, 512)]
)
def test_blocks_are_pages_where_the_disk_consists_of_pages(size: int, minimum: int, block: int) -> None:
    assert nbd_device.block_size_for(size, minimum) == block


@pytest.mark.parametrize(("size", "minimum"), [(1 << 30, 8192), (4608, 4096), (1000, 1), (0, 1)])
def test_some_disks_are_none_for_the_kernel(size: int, minimum: int) -> None:
    with pytest.raises(OSError, match="no disk for the kernel"):
        nbd_device.block_size_for(size, minimum)


async def test_without_the_driver_the_refusal_says_what_to_do() -> None:
    if os.path.lexists("/sys/module/nbd"):
        pytest.skip("this kernel has nbd")
    with pytest.raises(OSError, match="no nbd driver: modprobe nbd, or use a unix socket") as caught:
        await KernelDevice.make("auto", "d")
    assert caught.value.errno == errno.ENODEV


async def test_the_kernels_end_of_a_socketpair_is_served_without_negotiation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front end as a whole, with somebody else in the place of the kernel."""
    taken: list[socket.socket] = []
    asked: list[tuple[object, ...]] = []

    def connect(index: int | None, fd: int, *rest: int) -> int:
        taken.append(socket.socket(fileno=os.dup(fd)))
        asked.append((index, *rest))
        return 5

    monkeypatch.setattr(nbd_device, "check_driver", lambda: None)
    monkeypatch.setattr(nbd_device, "connect", connect)
    monkeypatch.setattr(nbd_device, "disconnect", lambda index: asked.append((index,)))
    server = NbdServer([MemoryExport(SIZE)])
    disk = await open_disk([f"nbd://127.0.0.1:{await server.listen_tcp()}/"])
    front_end = await KernelDevice.make("auto", "d")
    await front_end.offer(disk)
    ((index, size, block_size, flags),) = asked
    assert (index, size, block_size) == (None, SIZE, 4096)
    assert flags == RemoteExport(disk).info.flags
    assert front_end.report() == {"path": "/dev/nbd5", "clients": 1}
    reader, writer = await asyncio.open_unix_connection(sock=taken[0])
    writer.write(wire.request(wire.WRITE, 1, 4096, 4096, flags=1, payload=b"x" * 4096))
    assert await reader.readexactly(16) == wire.simple(1)
    writer.write(wire.request(wire.READ, 2, 4096, 4096))
    assert await reader.readexactly(16 + 4096) == wire.simple(2, 0, b"x" * 4096)
    writer.write(wire.request(wire.READ, 3, SIZE, 4096))
    assert await reader.readexactly(16) == wire.simple(3, 22)
    await front_end.close()
    assert asked[1:] == [(5,)]
    assert await reader.read() == b""
    writer.close()
    await disk.close()
    await server.close()
