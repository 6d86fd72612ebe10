"""A connection whose received data a client of the control socket maps instead of reading: the calls with `"map": true`.

    -> {"call": "connect", "args": {"host": "10.77.0.1", "port": 80, "map": true}}
    <- {"ok": {"local": [...], "peer": [...]}}

With the `ok` comes one descriptor, the writing end of a pipe. From then on, what the client writes to the socket is sent to the
peer, byte for byte, and its end of file is a FIN. What the peer sends comes as messages: the number of pages and of pieces (two
unsigned 32-bit integers, most significant first), then each piece as three of them, page, offset and length, in the order of
the stream. With the first byte of a message come its pages as descriptors of one page each, read-only. A message without pages
is the end of the stream.

A client that is done with pages says so by a byte for each, in order, in the pipe; they are gone then. When it closes the pipe
the connection is over. Only `PAGES_OUT` pages
are out at once: after that the data waits in the socket, and the peer's window closes. So a client that keeps everything costs
its connection, and no more than a mebibyte. `PageReader` is the client's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import mmap
import os
import socket
from collections import deque
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from pools.arena import PAGE_SIZE, discard_page

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ustack.mem.page_flip import GivenPages
    from ustack.socket import Socket

PAGES_OUT: Final = 256
"""Pages that a client may have, in all its messages that it is not done with."""

PAGES_MAX: Final = 64
"""Pages that are asked for at once. One packet may have some more; a message carries up to 253 (SCM_MAX_FD)."""

COUNTS: Final = Struct("!II")
PIECE: Final = Struct("!III")


class PageStream(asyncio.Protocol):
    """The daemon's end: `stream` on one side, the control socket's `transport` on the other. `close` ends both.

    `ok` is said to the client with the descriptor of the pipe. Raises OSError when it cannot be. `on_lost` is called when the
    client has gone.
    """

    def __init__(self, transport: Any, stream: Socket, ok: dict[str, Any], on_lost: Callable[[Exception | None], None]) -> None:
        self._transport = transport
        self._on_lost = on_lost
        self._stream = stream
        self._out: deque[int] = deque()
        self._room = asyncio.Event()
        self._room.set()
        self._given = False
        self._sent = False
        self._sending: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._client = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._client.setblocking(False)
        self._done_fd, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.set_blocking(write_end, True)
            line = json.dumps({"ok": ok}, separators=(",", ":")).encode() + b"\n"
            socket.send_fds(self._client, [line], [write_end])
        except OSError:
            self._client.close()
            os.close(self._done_fd)
            raise
        finally:
            os.close(write_end)
        self._loop.add_reader(self._done_fd, self._on_done)
        self._giving = self._loop.create_task(self._give())
        self._giving.add_done_callback(self._on_given)

    # -- from the peer --

    async def _give(self) -> None:
        while True:
            await self._room.wait()
            given = await self._stream.recv_pages(PAGES_MAX)
            self._out.extend(given.fds)
            if len(self._out) >= PAGES_OUT:
                self._room.clear()
            await self._tell(given)
            if not given.fds:
                return

    async def _tell(self, given: GivenPages) -> None:
        message = COUNTS.pack(len(given.fds), len(given.pieces)) + b"".join(PIECE.pack(*piece) for piece in given.pieces)
        handed = [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in given.fds]
        sent = 0
        try:
            while not sent:
                try:
                    sent = socket.send_fds(self._client, [message], handed) if handed else self._client.send(message)
                except BlockingIOError:
                    await self._until_writable()
        finally:
            for fd in handed:
                os.close(fd)
        await self._loop.sock_sendall(self._client, message[sent:])

    async def _until_writable(self) -> None:
        writable = self._loop.create_future()
        self._loop.add_writer(self._client.fileno(), writable.set_result, None)
        try:
            await writable
        finally:
            self._loop.remove_writer(self._client.fileno())

    def _on_given(self, task: asyncio.Task[None]) -> None:
        """The stream has ended, or cannot go on."""
        if task.cancelled():
            return
        if task.exception() is None:
            self._given = True
            self._close_if_over()
        elif isinstance(task.exception(), OSError):
            self._transport.abort()
        else:
            self._transport.abort()
            task.result()

    def _on_done(self) -> None:
        try:
            count = len(os.read(self._done_fd, PAGES_OUT))
        except BlockingIOError:
            return
        if not count:  # the client has gone, though it may have ended its side of the socket long before
            self._loop.remove_reader(self._done_fd)
            self._transport.abort()
            return
        for _ in range(min(count, len(self._out))):
            discard_page(self._out.popleft())
        if len(self._out) < PAGES_OUT:
            self._room.set()
        self._close_if_over()

    # -- from the client --

    def data_received(self, data: bytes) -> None:
        """Send it, and read no more until that is done."""
        self._transport.pause_reading()
        self._sending = self._loop.create_task(self._send(data))

    async def _send(self, data: bytes) -> None:
        try:
            await self._stream.sendall(data)
        except OSError:
            self._transport.abort()
        else:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        """The client sends no more: a FIN for the peer."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_WR)
        self._sent = True
        self._close_if_over()
        return True

    def _close_if_over(self) -> None:
        """Both directions have ended, and the client has read everything: only then its pages may go."""
        if self._given and self._sent and not self._out:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: nobody reads what comes, and all its pages are free."""
        self._on_lost(exc)
        self._giving.cancel()
        if self._sending is not None:
            self._sending.cancel()
        self._loop.remove_reader(self._done_fd)
        os.close(self._done_fd)
        self._client.close()
        while self._out:
            discard_page(self._out.popleft())
        self._stream.close()

    def close(self) -> None:
        """End the client's connection, and with it the peer's."""
        self._transport.close()


class PageReader:
    """The client's end: makes the call `name` ("connect" or "listen") with `args` at the control socket `path`, and maps what
    comes. `ok` is the daemon's answer, `socket` what to write to, `maps` are the pages that have not been released. Raises
    OSError: the daemon's.

    A context manager: at its end every view that `read` has given out must have been let go.
    """

    def __init__(self, path: str, name: str, **args: Any) -> None:
        self.maps: list[mmap.mmap] = []
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self.socket.connect(path)
            self.socket.sendall(json.dumps({"call": name, "args": args | {"map": True}}).encode() + b"\n")
            self.ok, self._done_fd = self._answer()
        except BaseException:
            self.socket.close()
            raise

    def _answer(self) -> tuple[dict[str, Any], int]:
        """The `ok` that the pipe comes with: of `listen`, the second."""
        while True:
            line, fds = b"", []
            while not line.endswith(b"\n"):
                seen = self.socket.recv(1 << 16, socket.MSG_PEEK)
                if not seen:
                    raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                data, found, _, _ = socket.recv_fds(self.socket, seen.find(b"\n") + 1 or len(seen), 1)
                line += data
                fds += found
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise OSError(answer["error"]["errno"], answer["error"]["message"])
            if fds:
                return answer["ok"], fds[0]

    def read(self) -> list[memoryview]:
        """Wait for a message, and map it: the next pieces of the stream, read-only, valid until `release`. None left at the end
        of the stream. Raises OSError ECONNRESET when the connection is gone.
        """
        head, fds, _, _ = socket.recv_fds(self.socket, COUNTS.size, 256)
        try:
            pages, pieces = COUNTS.unpack(head + self._exactly(COUNTS.size - len(head)))
            table = self._exactly(pieces * PIECE.size)
            maps = [mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) for fd in fds]
        finally:
            for fd in fds:
                os.close(fd)
        assert len(maps) == pages
        self.maps += maps
        return [memoryview(maps[page])[offset : offset + length] for page, offset, length in PIECE.iter_unpack(table)]

    def release(self) -> None:
        """Done with everything that was read. Raises BufferError while somebody holds a view of it."""
        count = len(self.maps)
        while self.maps:
            self.maps[-1].close()
            self.maps.pop()
        if count:
            with contextlib.suppress(BrokenPipeError):  # the connection is over, and the pages are gone anyway
                os.write(self._done_fd, bytes(count))

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            data = self.socket.recv(count - len(found))
            if not data:
                raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            found += data
        return bytes(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(BufferError):
            self.release()
        os.close(self._done_fd)
        self.socket.close()
