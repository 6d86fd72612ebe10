"""What the server exports: something that answers commands, and two that do so from this machine, memory and files.

An export whose disk is elsewhere is in `remote_export.py`.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

from ustack.nbd.constants import (
    BASE_ALLOCATION,
    DEFAULT_MAXIMUM_PAYLOAD,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_STATE_HOLE,
    NBD_STATE_ZERO,
)
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.fallocate import zero_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.nbd.server_transmission import Command

PREFERRED_BLOCK: Final = 4096
"""Bytes: a page, which is also what holes are made of."""
HOLE_GRANULE: Final = 64 << 10
"""Bytes. `MemoryExport` remembers for pieces of this size whether anything was written to them."""
MAX_EXTENTS: Final = 16
"""Pieces that one read is told in. What is more scattered is sent as data."""
MAX_STATUS_EXTENTS: Final = 4096
"""Extents in the answer to one block status; a client that wants to know more asks again from there on."""
QUICK_ZERO: Final = 1 << 20
"""Bytes of a file that are zeroed at once; more, which may have to be written, in a thread."""

_READ_FLAGS: Final = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
_WRITE_FLAGS: Final = (
    NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO
)
_HOLE_STATE: Final = NBD_STATE_HOLE | NBD_STATE_ZERO


class Answers(Protocol):
    """Where an export's answers go. Each command is answered by exactly one of these calls, whenever and in whatever order."""

    def done(self, command: Command) -> None:
        """Carried out."""

    def read(self, command: Command, extents: Sequence[tuple[int, bytes | bytearray | memoryview | None]]) -> None:
        """The consecutive pieces of what was to be read, each with its length; None for one that is a hole."""

    def status(self, command: Command, extents: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> None:
        """For each context that was asked about, its number and its consecutive extents, each (bytes, flags)."""

    def failed(self, command: Command, error: OSError) -> None:
        """Not carried out."""


class Export(ABC):
    """A disk to serve. `info` is what clients are told, `contexts` the names of its meta contexts.

    Commands come checked against `info`: what they ask for is offered, in range and aligned.
    """

    __slots__ = ("contexts", "info")

    def __init__(self, info: ExportInfo, contexts: tuple[str, ...]) -> None:
        self.info = info
        self.contexts = contexts

    @abstractmethod
    def destination(self, offset: int, length: int) -> memoryview:
        """Memory to receive the data of a write into."""

    @abstractmethod
    def submit(self, command: Command, answers: Answers) -> asyncio.Task[None] | None:
        """Carry out a command. It is answered when this returns, or when the task that it returns is over."""

    @abstractmethod
    def abandon(self, task: asyncio.Task[None]) -> None:
        """Whoever waits for the answer has gone."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the resources."""


class LocalExport(Export):
    """Bytes on this machine. Everything is done at once, except what waits for a disk, for which there are threads.

    Offsets and lengths of its methods are bytes; they raise OSError for what goes wrong underneath.
    """

    __slots__ = ()

    def __init__(self, name: str, size: int, read_only: bool, description: str | None) -> None:
        info = ExportInfo(
            name,
            size,
            _READ_FLAGS | (NBD_FLAG_READ_ONLY if read_only else _WRITE_FLAGS),
            description,
            preferred_block=PREFERRED_BLOCK,
            maximum_payload=DEFAULT_MAXIMUM_PAYLOAD,
        )
        super().__init__(info, (BASE_ALLOCATION,))

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes there. A view may show later writes."""

    @abstractmethod
    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """(length, is a hole) of the consecutive pieces of a range. When there are more than `limit`, the first of them."""

    @abstractmethod
    def write(self, offset: int, payload: memoryview) -> None:
        """`payload`, which is the memory from `destination`, is filled: make it the contents of the export."""

    @abstractmethod
    def zero(self, offset: int, length: int, punch: bool, fast: bool) -> None:
        """Write zeroes; with `punch` the space may be given back. With `fast`, ENOTSUP at once where it takes as long as
        writing."""

    @property
    @abstractmethod
    def volatile(self) -> bool:
        """There is no stable storage: nothing waits for any, and `flush` has nothing to do."""

    @abstractmethod
    def flush(self) -> None:
        """Bring what was written to stable storage. Blocks; may be called from another thread."""

    def submit(self, command: Command, answers: Answers) -> asyncio.Task[None] | None:
        """At once, or in a thread when a disk has to be waited for."""
        kind = command.command
        durable = kind == NBD_CMD_FLUSH or (command.flags & NBD_CMD_FLAG_FUA and kind not in (NBD_CMD_READ, NBD_CMD_CACHE))
        zeroes = kind in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)
        try:
            if kind == NBD_CMD_READ:
                answers.read(command, self._pieces(command))
                return None
            if kind == NBD_CMD_BLOCK_STATUS:
                self._status(command, answers)
                return None
            if kind == NBD_CMD_WRITE:
                assert command.payload is not None
                self.write(command.offset, command.payload)
            if not self.volatile and (durable or (zeroes and command.length > QUICK_ZERO)):
                return asyncio.get_running_loop().create_task(self._in_thread(command, answers, zeroes, bool(durable)))
            if zeroes:
                self._zero(command)
        except OSError as error:
            answers.failed(command, error)
        else:
            answers.done(command)
        return None

    def abandon(self, task: asyncio.Task[None]) -> None:
        """It goes on: a thread cannot be stopped, and ends soon."""

    def _pieces(self, command: Command) -> list[tuple[int, bytes | memoryview | None]]:
        offset, length = command.offset, command.length
        if command.flags & NBD_CMD_FLAG_DF:
            return [(length, self.read(offset, length))]
        found: list[tuple[int, bytes | memoryview | None]] = []
        stop = offset + length
        for size, hole in self.extents(offset, length, MAX_EXTENTS - 1):
            found.append((size, None if hole else self.read(offset, size)))
            offset += size
        if offset < stop:
            found.append((stop - offset, self.read(offset, stop - offset)))
        return found

    def _status(self, command: Command, answers: Answers) -> None:
        limit = 1 if command.flags & NBD_CMD_FLAG_REQ_ONE else MAX_STATUS_EXTENTS
        found = self.extents(command.offset, command.length, limit)
        states = [(size, _HOLE_STATE if hole else 0) for size, hole in found]
        answers.status(command, [(context, states) for context in command.contexts])

    def _zero(self, command: Command) -> None:
        flags = command.flags
        fast = bool(flags & NBD_CMD_FLAG_FAST_ZERO)
        self.zero(command.offset, command.length, not flags & NBD_CMD_FLAG_NO_HOLE, fast)

    async def _in_thread(self, command: Command, answers: Answers, zeroes: bool, durable: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            if zeroes:
                await loop.run_in_executor(None, self._zero, command)
            if durable:
                await loop.run_in_executor(None, self.flush)
        except OSError as error:
            answers.failed(command, error)
        else:
            answers.done(command)


class MemoryExport(LocalExport):
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

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """Holes are granules that nobody has written to."""
        found: list[tuple[int, bool]] = []
        stop = offset + length
        granules = -(-stop // HOLE_GRANULE)
        while offset < stop and len(found) < limit:
            at = offset // HOLE_GRANULE
            hole = not self._written[at]
            change = self._written.find(hole, at, granules)
            end = stop if change < 0 else change * HOLE_GRANULE
            found.append((end - offset, hole))
            offset = end
        return found

    def destination(self, offset: int, length: int) -> memoryview:
        """The memory itself: a write is received in place."""
        # Marked before the data comes: a client that dies amid its payload has changed this piece all the same.
        first, last = offset // HOLE_GRANULE, (offset + length - 1) // HOLE_GRANULE
        self._written[first : last + 1] = b"\1" * (last + 1 - first)
        return self._view[offset : offset + length]

    def write(self, offset: int, payload: memoryview) -> None:
        """Nothing to do: it was received in place."""

    def zero(self, offset: int, length: int, punch: bool, fast: bool) -> None:
        """Always fast: give whole granules back to the kernel, overwrite the rest."""
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


class FileExport(LocalExport):
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

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """Holes as the file system tells them (SEEK_HOLE)."""
        found: list[tuple[int, bool]] = []
        stop = offset + length
        while offset < stop and len(found) < limit:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), stop)
                end = min(os.lseek(self._fd, offset, os.SEEK_HOLE), stop) if data == offset else data
            except OSError as error:
                if error.errno == errno.ENXIO and os.lseek(self._fd, 0, os.SEEK_END) >= stop:
                    data = end = stop  # a hole up to the end of the file
                else:
                    data, end = offset, stop  # a device, a file system without SEEK_DATA, or a file that has shrunk
            found.append((end - offset, data > offset))
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

    def zero(self, offset: int, length: int, punch: bool, fast: bool) -> None:
        """With fallocate(2) where that works, which is fast."""
        zero_range(self._fd, offset, length, punch, fast)

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
