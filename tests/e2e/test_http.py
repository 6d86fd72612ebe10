"""curl fetches from an HTTP responder that is written with asyncio's streams and runs over our TCP."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.conftest import OURS
from tests.e2e.peers import curl
from tests.needs import require_tool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])]

URL: Final = f"http://{OURS}:8080"
PIECE: Final = bytes(range(256)) * 400


class Responder:
    """HTTP/1.1: GET /bytes/N has a body of N bytes, GET /chunked/N comes in N chunks, POST /sha256 answers with the digest."""

    def __init__(self) -> None:
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other until the client closes."""
        self.connections += 1
        try:
            while True:
                await self._respond((await reader.readuntil(b"\r\n\r\n")).decode(), reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async def _respond(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = head.split("\r\n")
        path = lines[0].split()[1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        match path.split("/")[1:]:
            case ["bytes", size]:
                await self._send_bytes(int(size), writer)
            case ["chunked", count]:
                await self._send_chunks(int(count), writer)
            case ["sha256"]:
                if headers.get("expect") == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                seen = sha256()
                left = int(headers["content-length"])
                while left:
                    part = await reader.read(min(left, 1 << 18))
                    assert part
                    seen.update(part)
                    left -= len(part)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + seen.hexdigest().encode())
            case _:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async def _send_bytes(self, size: int, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        while size:
            piece = PIECE[:size]
            writer.write(piece)
            await writer.drain()
            size -= len(piece)

    async def _send_chunks(self, count: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(1, count + 1):
            writer.write(b"%x\r\n%s\r\n" % (number, PIECE[:number]))
            await writer.drain()
        writer.write(b"0\r\n\r\n")


@asynccontextmanager
async def responder(stack: Stack) -> AsyncIterator[Responder]:
    """A responder at URL."""
    http = Responder()
    server = await stack.start_server(http.serve, None, 8080)
    yield http
    server.close()


def body(size: int) -> bytes:
    return (PIECE * (size // len(PIECE) + 1))[:size]


async def test_small_bodies_and_none(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    async with responder(await stack_on_tap()):
        for size in (0, 1, 1447, 1448, 1449, 100_000):
            assert await curl(netns, f"{URL}/bytes/{size}") == (200, body(size))
        assert (await curl(netns, f"{URL}/nothing/here")).status == 404


@pytest.mark.parametrize("mode", ["paged", "linear"])
async def test_a_hundred_megabytes(stack_on_tap: StackOnTap, netns: Namespace, mode: str) -> None:
    async with responder(await stack_on_tap(mode=mode)):
        status, received = await curl(netns, f"{URL}/bytes/100000000")
    assert status == 200
    assert sha256(received).digest() == sha256(body(100_000_000)).digest()


async def test_an_upload(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    data = body(30_000_000)
    async with responder(await stack_on_tap()):
        answered = await curl(netns, f"{URL}/sha256", "--data-binary", "@-", stdin=data)
    assert answered == (200, sha256(data).hexdigest().encode())


async def test_chunks_of_every_size(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    async with responder(await stack_on_tap()):
        answered = await curl(netns, f"{URL}/chunked/2000")
    assert answered == (200, b"".join(PIECE[:number] for number in range(1, 2001)))


async def test_fifty_at_once(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    sizes = [n * 40_009 for n in range(50)]
    async with responder(await stack_on_tap()) as http:
        urls = [word for size in sizes for word in ("-o", "-", f"{URL}/bytes/{size}")]
        fetched = await netns.arun(
            *(
                require_tool("curl"),
                "--no-progress-meter",
                "--noproxy",
                "*",
                "--parallel",
                "--parallel-immediate",
                "--parallel-max",
                "50",
            ),
            *("--write-out", "%{stderr}%{http_code} %{size_download}\n", *urls),
        )
        assert http.connections == 50
    reports = sorted(line.split() for line in fetched.stderr.decode().splitlines())
    assert reports == sorted(["200", str(size)] for size in sizes)
    assert len(fetched.stdout) == sum(sizes)


async def test_a_connection_is_kept_alive_for_the_next_request(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    async with responder(await stack_on_tap()) as http:
        urls = [word for _ in range(200) for word in ("-o", "-", f"{URL}/bytes/100")]
        fetched = await netns.arun(require_tool("curl"), "-sS", "--noproxy", "*", *urls)
        assert fetched.stdout == body(100) * 200
        assert http.connections == 1


async def test_a_client_that_hangs_up_in_the_middle_ends_its_responder(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    ended = asyncio.Event()

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(PIECE)
                await writer.drain()
        except ConnectionError:
            ended.set()

    stack = await stack_on_tap()
    server = await stack.start_server(endless, None, 8080)
    with pytest.raises(AssertionError, match="exited with 28"):  # curl: timed out
        await curl(netns, f"{URL}/", "-o", "/dev/null", timeout=0.3)
    async with asyncio.timeout(10):
        await ended.wait()
    server.close()
    assert not stack.tcp.connections
