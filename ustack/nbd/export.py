"""What the server exports: memory or a file."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from typing import Final

from ustack.nbd.constants import (
    DEFAULT_MAXIMUM_PAYLOAD,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.fallocate import zero_range

PREFERRED_BLOCK: Final = 4096
"""Bytes: a page, which is also what holes are made of."""
HOLE_GRANULE: Final = 64 << 10
"""Bytes. `MemoryExport` remembers for pieces of this size whether anything was written to them."""
MAX_EXTENTS: Final = 16
"""Pieces that one read is told in. What is more scattered is sent as data."""

_READ_FLAGS: Final = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
_WRITE_FLAGS: Final = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES


class Export(ABC):
    """Bytes to serve. Offsets and lengths are bytes, checked already; methods raise OSError for what goes wrong underneath."""

    __slots__ = ("info",)

    def __init__(self, name: str, size: int, read_only: bool, description: str | None) -> None:
        self.info = ExportInfo(
            name,
            size,
            _READ_FLAGS | (NBD_FLAG_READ_ONLY if read_only else _WRITE_FLAGS),
            description,
            preferred_block=PREFERRED_BLOCK,
            maximum_payload=DEFAULT_MAXIMUM_PAYLOAD,
        )

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes there. A view may show later writes."""

    @abstractmethod
    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(length, is a hole) of the consecutive pieces of a range; at most `MAX_EXTENTS`."""

    @abstractmethod
    def destination(self, offset: int, length: int) -> memoryview:
        """Memory to receive a write into."""

    @abstractmethod
    def write(self, offset: int, payload: memoryview) -> None:
        """`payload`, which is the memory from `destination`, is filled: make it the contents of the export."""

    @abstractmethod
    def zero(self, offset: int, length: int, punch: bool) -> None:
        """Write zeroes; with `punch` the space may be given back."""

    @property
    @abstractmethod
    def volatile(self) -> bool:
        """There is no stable storage, so `flush` has nothing to do and does not block."""

    @abstractmethod
    def flush(self) -> None:
        """Bring what was written to stable storage. Blocks; may be called from another thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the resources."""


class MemoryExport(Export):
    """Zeroes at first. Writes are received straight into the memory and reads are sent straight from it."""

    __slots__ = ("_memory", "_view", "_written")

    def __init__(self, size: int, name: str = "", *, read_only: bool = False, description: str | None = None) -> None:
        """`size` in bytes; memory is taken only where something is written."""
        super().__init__(name, size, read_only, description)
        self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._written = bytearray(size // HOLE_GRANULE + 1)

    def read(self, offset: int, length: int) -> memoryview:
        """A view of the memory."""
        return self._view[offset : offset + length]

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Holes are granules that nobody has written to."""
        stop = offset + length
        marks = self._written[offset // HOLE_GRANULE : (stop - 1) // HOLE_GRANULE + 1]
        if 1 not in marks:
            return [(length, True)]
        if 0 not in marks:
            return [(length, False)]
        found: list[tuple[int, bool]] = []
        while offset < stop:
            hole = not self._written[offset // HOLE_GRANULE]
            size = min(HOLE_GRANULE - offset % HOLE_GRANULE, stop - offset)
            if found and found[-1][1] == hole:
                found[-1] = (found[-1][0] + size, hole)
            elif len(found) == MAX_EXTENTS - 1:
                found.append((stop - offset, False))
                break
            else:
                found.append((size, hole))
            offset += size
        return found

    def destination(self, offset: int, length: int) -> memoryview:
        """The memory itself: a write is received in place."""
        # Marked before the data comes: a client that dies amid its payload has changed this piece all the same.
        first, last = offset // HOLE_GRANULE, (offset + length - 1) // HOLE_GRANULE
        self._written[first : last + 1] = b"\1" * (last + 1 - first)
        return self._view[offset : offset + length]

    def write(self, offset: int, payload: memoryview) -> None:
        """Nothing to do: it was received in place."""

    def zero(self, offset: int, length: int, punch: bool) -> None:
        """Give whole granules back to the kernel, overwrite the rest."""
        stop = offset + length
        first = -(-offset // HOLE_GRANULE) * HOLE_GRANULE
        last = stop // HOLE_GRANULE * HOLE_GRANULE
        if first < last:
            # Private anonymous pages that are given back read as zeroes from then on: madvise(2).
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
            self._written[first // HOLE_GRANULE : last // HOLE_GRANULE] = bytes((last - first) // HOLE_GRANULE)
            self._view[offset:first] = bytes(first - offset)
            self._view[last:stop] = bytes(stop - last)
        else:
            self._view[offset:stop] = bytes(length)

    @property
    def volatile(self) -> bool:
        """True."""
        return True

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Forget the memory."""
        # Replies that still wait in a transport hold views of the memory; the last of them to go frees it.
        del self._view, self._memory


class FileExport(Export):
    """A regular file or a block device, through the page cache. Reads that the cache does not have block the server."""

    __slots__ = ("_fd",)

    def __init__(
        self, path: str | os.PathLike[str], name: str = "", *, read_only: bool = False, description: str | None = None
    ) -> None:
        """Opens `path`, which must exist; raises OSError."""
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise OSError(errno.EINVAL, "neither a regular file nor a block device", os.fspath(path))
            super().__init__(name, os.lseek(fd, 0, os.SEEK_END), read_only, description)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def read(self, offset: int, length: int) -> bytes:
        """From the page cache or the disk; EIO when the file has become shorter."""
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"the file has shrunk: {len(data)} of {length} bytes at {offset}")
        return data

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Holes as the file system tells them (SEEK_HOLE)."""
        found: list[tuple[int, bool]] = []
        stop = offset + length
        while offset < stop:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), stop)
                end = min(os.lseek(self._fd, data, os.SEEK_HOLE), stop) if data < stop else stop
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end of the file
                    found.append((stop - offset, True))
                    break
                data, end = offset, stop  # a device, or a file system without SEEK_DATA
            if data > offset:
                found.append((data - offset, True))
            if len(found) >= MAX_EXTENTS - 1:
                end = stop
            if end > data:
                found.append((end - data, False))
            offset = end
        return found

    def destination(self, offset: int, length: int) -> memoryview:
        """A buffer of its own for each write."""
        return memoryview(bytearray(length))

    def write(self, offset: int, payload: memoryview) -> None:
        """Into the page cache."""
        done = 0
        while done < len(payload):
            done += os.pwrite(self._fd, payload[done:], offset + done)

    def zero(self, offset: int, length: int, punch: bool) -> None:
        """With fallocate(2) where that works."""
        zero_range(self._fd, offset, length, punch)

    @property
    def volatile(self) -> bool:
        """False."""
        return False

    def flush(self) -> None:
        """fdatasync(2)."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
