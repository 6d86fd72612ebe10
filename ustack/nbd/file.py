"""An export as a file object, for programs that know nothing of asyncio.

    with nbd.open_file("nbd://10.77.0.1/disk", "r+b") as file:
        file.seek(4096)
        header = file.read(512)

The client runs on an event loop in a thread of its own. What `open_file` returns is buffered like any file: small reads and
writes become few requests. Reads and writes that do not fit the export's blocks are made to, by reading what lies around.
"""

from __future__ import annotations

import asyncio
import errno
import io
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack

from ustack.nbd.connector import open_disk

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine

    from ustack.nbd.client import NbdClient
    from ustack.nbd.connection import CreateConnection
    from ustack.nbd.session_options import SessionOptions
    from ustack.nbd.uri import NbdUri

BUFFER_SIZE: Final = 256 << 10
"""Bytes that `open_file` reads ahead and collects before it writes."""
MODES: Final = ("rb", "r+b", "rb+", "wb")

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread, for callers outside of it. `run` waits for a coroutine there; `stop` ends it."""

    def __init__(self, name: str = "ustack-nbd") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raises. An interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class NbdFile(io.RawIOBase):
    """An export as an unbuffered file of a fixed size. For threads other than the loop's. All of `io.RawIOBase`; `truncate` to
    another size is EINVAL, writing beyond the end ENOSPC, and `flush` brings what was written to stable storage."""

    def __init__(self, disk: NbdClient, loop: LoopThread, mode: str = "rb") -> None:
        """`disk`, which lives on `loop`; both belong to the file from now on. Raises ValueError for a mode that is none of
        `MODES`, OSError (EROFS) for writing to what is read-only."""
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; an export can be opened as {', '.join(MODES)}")
        if mode != "rb" and disk.read_only:
            raise OSError(errno.EROFS, f"export {disk.name!r} is read-only")
        self._disk = disk
        self._loop = loop
        self._lock = threading.Lock()
        self._position = 0
        self._dirty = False
        self._reads = mode != "wb"
        self._writes = mode != "rb"
        self.size = disk.size
        """Bytes, for ever."""
        self.mode = mode
        self.name = disk.name

    @property
    def disk(self) -> NbdClient:
        """The client below. Its methods belong to the loop's thread."""
        return self._disk

    def readable(self) -> bool:
        """Opened for reading."""
        return self._reads

    def writable(self) -> bool:
        """Opened for writing."""
        return self._writes

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read or write begins."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; beyond the end too, where there is nothing to read."""
        self._check_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {offset} from {whence}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`, or as much of it as there is before the end; 0 at the end."""
        self._check_open()
        if not self._reads:
            raise io.UnsupportedOperation("not open for reading")
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        if length:
            self._loop.run(self._read(view[:length], self._position))
            self._position += length
        return length

    async def _read(self, view: memoryview, offset: int) -> None:
        start, stop = self._blocks(offset, len(view))
        if (start, stop) == (offset, offset + len(view)):
            await self._disk.pread_into(view, offset)
        else:
            data = memoryview(await self._disk.pread(stop - start, start))
            view[:] = data[offset - start : offset - start + len(view)]

    def write(self, data: Any, /) -> int:
        """Write `data`, or as much of it as fits before the end; ENOSPC when nothing does."""
        self._check_open()
        if not self._writes:
            raise io.UnsupportedOperation("not open for writing")
        view = memoryview(data).cast("B")
        length = min(len(view), self.size - self._position)
        if length < 0 or (view and not length):
            raise OSError(errno.ENOSPC, f"the export ends at {self.size}")
        if length:
            with self._lock:
                self._dirty = True
                self._loop.run(self._write(view[:length], self._position))
            self._position += length
        return length

    async def _write(self, view: memoryview, offset: int) -> None:
        start, stop = self._blocks(offset, len(view))
        if (start, stop) == (offset, offset + len(view)):
            await self._disk.pwrite(view, offset)
            return
        block = self._disk.minimum_block
        data = bytearray(stop - start)
        whole = memoryview(data)
        if start < offset:
            await self._disk.pread_into(whole[:block], start)
        if offset + len(view) < stop and not (stop - start == block and start < offset):
            await self._disk.pread_into(whole[-block:], stop - block)
        whole[offset - start : offset - start + len(view)] = view
        await self._disk.pwrite(data, start)

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks around a range."""
        block = self._disk.minimum_block
        return offset // block * block, min(-(-(offset + length) // block) * block, self.size)

    def truncate(self, size: int | None = None, /) -> int:
        """The size that it has is the only one that it can have."""
        wanted = self.tell() if size is None else size
        if wanted != self.size:
            raise OSError(errno.EINVAL, f"an export keeps its size of {self.size} bytes")
        return self.size

    def flush(self) -> None:
        """Bring what was written to stable storage, where the server can."""
        self._check_open()
        if self._dirty and self._disk.can_flush:
            with self._lock:
                self._dirty = False
                self._loop.run(self._disk.flush())

    def close(self) -> None:
        """Flush, take leave of the server, end the thread."""
        if self.closed:
            return
        try:
            super().close()
        finally:
            try:
                self._loop.run(self._disk.close())
            finally:
                self._loop.stop()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


def open_raw(
    uri: str | NbdUri,
    mode: str = "rb",
    *,
    create_connection: CreateConnection | None = None,
    context: ssl.SSLContext | None = None,
    **options: Unpack[SessionOptions],
) -> NbdFile:
    """The export at `uri` as an unbuffered file. `mode` is one of `MODES`; the rest as for `connect`, and so are the errors."""
    loop = LoopThread()
    try:
        disk = loop.run(open_disk([uri], create_connection=create_connection, context=context, **options))
        try:
            return NbdFile(disk, loop, mode)
        except BaseException:
            loop.run(disk.close())
            raise
    except BaseException:
        loop.stop()
        raise


def open_file(
    uri: str | NbdUri,
    mode: str = "rb",
    buffering: int = BUFFER_SIZE,
    *,
    create_connection: CreateConnection | None = None,
    context: ssl.SSLContext | None = None,
    **options: Unpack[SessionOptions],
) -> io.BufferedIOBase:
    """The export at `uri` as a file with a buffer of `buffering` bytes. See `open_raw`."""
    raw = open_raw(uri, mode, create_connection=create_connection, context=context, **options)
    size = max(buffering, raw.disk.minimum_block)
    if mode == "rb":
        return io.BufferedReader(raw, size)
    return io.BufferedWriter(raw, size) if mode == "wb" else io.BufferedRandom(raw, size)
