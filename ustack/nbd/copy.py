"""Copying between disks: NBD exports, local files and devices, memory.

Many requests are in flight at a time, each a read and then a write through a buffer of its own, so memory is bounded and
nothing is copied on the way through us.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ustack.nbd.fallocate import zero_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REQUESTS: Final = 16
"""Requests in flight: enough to hide the round trip on a LAN."""
REQUEST_SIZE: Final = 256 << 10
"""Bytes in one request (the default of nbdcopy)."""


class Disk(Protocol):
    """What can be copied from and to. `NbdClient` is one. All sizes are bytes; methods raise OSError."""

    @property
    def size(self) -> int:
        """Bytes on the disk."""

    @property
    def minimum_block(self) -> int:
        """Offsets and lengths are multiples of this, a power of two."""

    @property
    def can_zero(self) -> bool:
        """`zero` is cheaper than writing zeroes."""

    @property
    def can_flush(self) -> bool:
        """`flush` works."""

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`."""

    async def pwrite(self, data: bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""

    async def zero(self, length: int, offset: int) -> None:
        """Write zeroes."""

    async def flush(self) -> None:
        """Bring all writes to stable storage."""

    async def close(self) -> None:
        """Let go of the disk."""


class MemoryDisk:
    """A disk in `data`."""

    __slots__ = ("data",)

    minimum_block: Final = 1
    can_zero: Final = True
    can_flush: Final = False

    def __init__(self, data: bytearray) -> None:
        """Reads and writes go to `data` itself."""
        self.data = data

    @property
    def size(self) -> int:
        """Bytes in `data`."""
        return len(self.data)

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`."""
        buffer[:] = memoryview(self.data)[offset : offset + len(buffer)]

    async def pwrite(self, data: bytearray | memoryview, offset: int) -> None:
        """Write `data` at `offset`; ENOSPC beyond the end."""
        if offset + len(data) > len(self.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.data[offset : offset + len(data)] = data

    async def zero(self, length: int, offset: int) -> None:
        """Write zeroes."""
        await self.pwrite(bytearray(length), offset)

    async def flush(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""


class LocalDisk:
    """A regular file or block device.

    Reads that the page cache can answer are done at once (RWF_NOWAIT); all else runs in threads, so that a slow disk never
    holds up the event loop, on which a whole TCP stack may depend.
    """

    __slots__ = ("_fd", "_nowait", "path", "size")

    minimum_block: Final = 1
    can_zero: Final = True
    can_flush: Final = True

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False, create_size: int | None = None) -> None:
        """Open `path`. With `create_size` a file is made or an old one emptied and given that size in bytes, all zeroes; a
        device must be at least so large (else ENOSPC). Raises OSError."""
        self.path = os.fspath(path)
        flags = (os.O_RDWR if writable or create_size is not None else os.O_RDONLY) | os.O_CLOEXEC
        if create_size is not None and not Path(path).is_block_device():
            flags |= os.O_CREAT
        fd = os.open(path, flags, 0o666)
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise OSError(errno.EINVAL, "neither a regular file nor a block device", self.path)
            if create_size is not None and stat.S_ISREG(mode):
                os.ftruncate(fd, 0)
                os.ftruncate(fd, create_size)
            self.size = os.lseek(fd, 0, os.SEEK_END)
            if create_size is not None and self.size < create_size:
                raise OSError(errno.ENOSPC, f"has {self.size} bytes; {create_size} are needed", self.path)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._nowait = True

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; EIO when the file ends before."""
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            got = self._read_cached(view[done:], offset + done)
            if not got:
                got = await asyncio.to_thread(os.preadv, self._fd, [view[done:]], offset + done)
                if not got:
                    raise OSError(errno.EIO, f"the file ends before offset {offset + len(view)}", self.path)
            done += got

    def _read_cached(self, view: memoryview, offset: int) -> int:
        if not self._nowait:
            return 0
        try:
            return os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._nowait = False
            return 0

    async def pwrite(self, data: bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += await asyncio.to_thread(os.pwrite, self._fd, view[done:], offset + done)

    async def zero(self, length: int, offset: int) -> None:
        """Make a hole there where the file system can, else write zeroes."""
        await asyncio.to_thread(zero_range, self._fd, offset, length, True)

    async def flush(self) -> None:
        """fdatasync(2)."""
        await asyncio.to_thread(os.fdatasync, self._fd)

    async def close(self) -> None:
        """Close the file. Call when no request is under way."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy did: bytes written as data, bytes written as zeroes without sending them, and how long it took, flush
    included."""

    data_bytes: int
    zero_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Bytes copied in all."""
        return self.data_bytes + self.zero_bytes


async def copy(
    source: Disk,
    target: Disk,
    *,
    requests: int = REQUESTS,
    request_size: int = REQUEST_SIZE,
    sparse: int = 0,
    flush: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> CopyResult:
    """Copy all of `source` to the start of `target`.

    `requests` reads or writes of up to `request_size` bytes are under way at a time. With `sparse` not 0, runs of zeroes made
    of aligned pieces of that many bytes become `zero` requests instead of data, if `target` is good at that. `progress(done,
    total)` is called with bytes after every request. Raises the first OSError that any request met, after all others have
    ended; ENOSPC before anything is written when `target` is too small, ValueError for sizes that fit no block.
    """
    size = source.size
    block = max(source.minimum_block, target.minimum_block)
    if target.size < size:
        raise OSError(errno.ENOSPC, f"the target has {target.size} bytes, the source {size}")
    if requests < 1 or request_size < 1 or request_size % block or sparse % block:
        raise ValueError(f"requests must be positive, and sizes multiples of the disks' block size of {block} bytes")
    if size % block:
        raise OSError(errno.EINVAL, f"the source's {size} bytes are no multiple of the block size of {block}")
    if not target.can_zero:
        sparse = 0
    offsets = iter(range(0, size, request_size))
    done = zeroed = 0

    async def work() -> None:
        nonlocal done, zeroed
        buffer = bytearray(min(request_size, size))
        whole = memoryview(buffer)
        for offset in offsets:
            length = min(request_size, size - offset)
            view = whole[:length]
            await source.pread_into(view, offset)
            if not sparse:
                await target.pwrite(view, offset)
            else:
                for start, stop, zero in zero_runs(buffer, length, sparse):
                    if zero:
                        await target.zero(stop - start, offset + start)
                        zeroed += stop - start
                    else:
                        await target.pwrite(view[start:stop], offset + start)
            done += length
            if progress is not None:
                progress(done, size)

    started = time.monotonic()
    workers = [asyncio.ensure_future(work()) for _ in range(min(requests, -(-size // request_size)))]
    try:
        if workers:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for worker in workers:
            worker.cancel()
        results = await asyncio.gather(*workers, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    if flush and target.can_flush:
        await target.flush()
    return CopyResult(done - zeroed, zeroed, time.monotonic() - started)


def zero_runs(buffer: bytearray, length: int, granule: int) -> Iterator[tuple[int, int, bool]]:
    """Cut the first `length` bytes of `buffer` into runs (start, stop, all zeroes) of whole granules; the last may be
    shorter."""
    zeroes = bytes(granule)
    start, zero = 0, False
    for at in range(0, length, granule):
        stop = min(at + granule, length)
        if (buffer[at:stop] == zeroes[: stop - at]) != zero:
            if at > start:
                yield start, at, zero
            start, zero = at, not zero
    yield start, length, zero
