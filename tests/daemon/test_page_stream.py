"""Connections of a daemon on a real TAP whose clients map what the kernel's sockets have sent them."""

from __future__ import annotations

import asyncio
import errno
import mmap
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pools.arena import PAGE_SIZE
from tests.daemon.running import KERNEL, OURS, RunningDaemon
from ustack.cli.control import Control
from ustack.daemon.page_stream import PAGES_MAX, PAGES_OUT, PageReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

MINE, OTHERS = b"\xa5", b"\x5a"


@pytest.fixture
def policy() -> str:
    return "scrub"


@pytest.fixture
def daemon(policy: str, netns: Namespace, tmp_path: Path) -> Iterator[RunningDaemon]:
    config = f'[memory]\nsize = "4 MiB"\nzero_copy = "{policy}"\n'
    with RunningDaemon(netns, tmp_path, config) as running:
        yield running


def kernel_server(netns: Namespace) -> socket.socket:
    """A listening socket of the kernel's, on a port of its choice."""
    return netns.open(socket.create_server, (KERNEL, 0))


def zero_copy(daemon: RunningDaemon) -> dict[str, Any]:
    """What the daemon says of pages given away."""
    with Control(str(daemon.control)) as control:
        answer: dict[str, Any] = control.call("memory")["zero_copy"]
        return answer


@pytest.mark.parametrize("policy", ["copy", "scrub"])
async def test_two_clients_map_their_own_data_and_nothing_else(daemon: RunningDaemon) -> None:
    size = 400_000
    with kernel_server(daemon.namespace) as server:

        def talk() -> None:
            peers = [server.accept()[0] for _ in range(2)]
            for start in range(0, size, 1000):  # a segment for the one, a segment for the other
                for peer, mark in zip(peers, (MINE, OTHERS), strict=True):
                    peer.sendall(mark * min(1000, size - start))
            for peer in peers:
                peer.close()

        def read(reader: PageReader, mark: bytes) -> int:
            count = 0
            while pieces := reader.read():
                for piece in pieces:
                    assert bytes(piece) == mark * len(piece)
                    count += len(piece)
                    piece.release()
                for one in reader.maps:
                    assert not one[:].translate(None, b"\0" + mark), "a byte of somebody else"
                reader.release()
            return count

        port = server.getsockname()[1]
        talking = asyncio.create_task(asyncio.to_thread(talk))
        first = await asyncio.to_thread(PageReader, str(daemon.control), "connect", host=KERNEL, port=port)
        second = await asyncio.to_thread(PageReader, str(daemon.control), "connect", host=KERNEL, port=port)
        with first, second:
            counts = await asyncio.gather(asyncio.to_thread(read, first, MINE), asyncio.to_thread(read, second, OTHERS))
        await talking
    assert tuple(counts) == (size, size)
    given = zero_copy(daemon)
    assert given["in_place"] + given["copied"] == 2 * size


async def test_pages_cannot_be_written_by_their_reader(daemon: RunningDaemon) -> None:
    with kernel_server(daemon.namespace) as server:
        port = server.getsockname()[1]
        reader = await asyncio.to_thread(PageReader, str(daemon.control), "connect", host=KERNEL, port=port)
        with reader, server.accept()[0] as peer:
            peer.sendall(b"hello")
            head, fds, _, _ = await asyncio.to_thread(socket.recv_fds, reader.socket, 8 + 12, 8)
            assert (head[:8], len(fds)) == (bytes((0, 0, 0, 1, 0, 0, 0, 1)), 1)
            with mmap.mmap(fds[0], PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as page:
                assert bytes(page).strip(b"\0") == b"hello"
            with pytest.raises(PermissionError):
                mmap.mmap(fds[0], PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


async def test_a_client_that_keeps_everything_stops_its_own_connection_only(daemon: RunningDaemon) -> None:
    with kernel_server(daemon.namespace) as server:
        port = server.getsockname()[1]
        reader = await asyncio.to_thread(PageReader, str(daemon.control), "connect", host=KERNEL, port=port)
        with server.accept()[0] as peer:
            peer.setblocking(False)
            for _ in range(100_000):
                try:
                    peer.send(bytes(60_000))
                except BlockingIOError:
                    if zero_copy(daemon)["pages"] >= PAGES_OUT:
                        break
            held = zero_copy(daemon)["pages"]
            assert PAGES_OUT <= held <= PAGES_OUT + 2 * PAGES_MAX
            with pytest.raises(BlockingIOError):
                for _ in range(1000):
                    peer.send(bytes(60_000))
            assert zero_copy(daemon)["pages"] == held
            with reader:
                pass
            peer.setblocking(True)
            peer.settimeout(10)
            with pytest.raises(OSError):  # noqa: PT011 (reset or broken pipe, as it happens)
                while True:
                    peer.send(bytes(60_000))


async def test_netcat_maps(daemon: RunningDaemon) -> None:
    """Both directions, a FIN in each, and a listener."""
    with kernel_server(daemon.namespace) as server:

        def answer() -> bytes:
            with server.accept()[0] as peer:
                asked = b"".join(iter(lambda: peer.recv(65536), b""))
                peer.sendall(asked[::-1])
                return asked

        answering = asyncio.create_task(asyncio.to_thread(answer))
        question = bytes(range(256)) * 1000
        port = str(server.getsockname()[1])
        done = await daemon.ustack("nc", "--map", KERNEL, port, stdin=question)
        assert await answering == question
        assert done.stdout == question[::-1]


async def test_without_zero_copy_it_is_said_what_to_do(netns: Namespace, tmp_path: Path) -> None:
    with RunningDaemon(netns, tmp_path) as plain:
        with pytest.raises(OSError, match="zero_copy") as refused:
            PageReader(str(plain.control), "connect", host=OURS, port=1)
        assert refused.value.errno == errno.EOPNOTSUPP
