"""Disks that can be copied from and to: memory, files, block devices. An NBD export is another (`NbdClient`)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final, Protocol

from ustack.nbd.block_status import Extent
from ustack.nbd.constants import NBD_STATE_HOLE, NBD_STATE_ZERO
from ustack.nbd.fallocate import zero_range

_HOLE: Final = NBD_STATE_HOLE | NBD_STATE_ZERO


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

    @property
    def can_block_status(self) -> bool:
        """`block_status` works."""

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`."""

    async def pwrite(self, data: bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""

    async def zero(self, length: int, offset: int, *, no_hole: bool = False) -> None:
        """Write zeroes; with `no_hole` the space stays allocated."""

    async def block_status(self, length: int, offset: int) -> list[Extent]:
        """Which parts are holes and which read as zeroes, without gaps."""

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
    can_block_status: Final = False

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

    async def zero(self, length: int, offset: int, *, no_hole: bool = False) -> None:
        """Write zeroes."""
        await self.pwrite(bytearray(length), offset)

    async def block_status(self, length: int, offset: int) -> list[Extent]:
        """All data."""
        return [Extent(offset, length, 0)]

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
    can_block_status: Final = True

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False, create_size: int | None = None) -> None:
        """Open `path`. With `create_size` a file is made or an old one emptied and given that size in bytes, all zeroes; a
        device must be at least so large (else ENOSPC). Raises OSError."""
        self.path = os.fspath(path)
        flags = (os.O_RDWR if writable or create_size is not None else os.O_RDONLY) | os.O_CLOEXEC
        if create_size is not None and not Path(path).is_block_device():
            flags |= os.O_CREAT
        self._use(os.open(path, flags, 0o666), create_size)

    def _use(self, fd: int, create_size: int | None) -> None:
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

    async def zero(self, length: int, offset: int, *, no_hole: bool = False) -> None:
        """Make a hole there where the file system can, else write zeroes."""
        await asyncio.to_thread(zero_range, self._fd, offset, length, not no_hole)

    async def block_status(self, length: int, offset: int) -> list[Extent]:
        """Holes as the file system tells them (SEEK_DATA); all data where it does not."""
        return await asyncio.to_thread(self._holes, offset, offset + length)

    def _holes(self, offset: int, stop: int) -> list[Extent]:
        extents: list[Extent] = []
        while offset < stop:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), stop)
                end = min(os.lseek(self._fd, data, os.SEEK_HOLE), stop) if data < stop else stop
            except OSError as error:
                # ENXIO: a hole up to the end of the file, which may have come nearer meanwhile; who reads there shall notice.
                # Else a device, or a file system that cannot tell.
                hole = error.errno == errno.ENXIO and os.lseek(self._fd, 0, os.SEEK_END) >= stop
                extents.append(Extent(offset, stop - offset, _HOLE if hole else 0))
                break
            if data > offset:
                extents.append(Extent(offset, data - offset, _HOLE))
            if end > data:
                extents.append(Extent(data, end - data, 0))
            offset = end
        return extents

    async def flush(self) -> None:
        """fdatasync(2)."""
        await asyncio.to_thread(os.fdatasync, self._fd)

    async def close(self) -> None:
        """Close the file. Call when no request is under way."""
        os.close(self._fd)


class NewFile(LocalDisk):
    """A file that is being made. It has its name only when it is `complete`; until then it is NAME.part, and `close` removes
    it. So a copy that fails, or is killed, never leaves a file that looks whole, and one that was there before stays as it was.
    """

    __slots__ = ("_complete", "_name")

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        """`size` bytes, all zeroes. Raises OSError: EBUSY while somebody else makes the same file."""
        name = Path(os.path.realpath(path))
        if name.exists() and not name.is_file():
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", os.fspath(path))
        self._name = name
        self._complete = False
        part = name.with_name(name.name + ".part")
        self.path = os.fspath(part)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), part.stat()):
                raise BlockingIOError  # it was completed just now
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(fd, stat.S_IMODE(name.stat().st_mode))
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError | FileNotFoundError):
                raise OSError(errno.EBUSY, "somebody else is writing this file", self.path) from None
            raise
        self._use(fd, size)

    async def complete(self) -> None:
        """All is there: give the file its name, in place of one that may have had it."""
        await asyncio.to_thread(os.replace, self.path, self._name)
        self._complete = True

    async def close(self) -> None:
        """Close the file, and remove it unless it is complete."""
        if not self._complete:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, self.path)
        await super().close()
