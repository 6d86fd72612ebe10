"""A remote disk as a file: a FUSE export that is served in this process, by the event loop that serves the disk.

The file is as large as the disk, and reads and writes go past the page cache (FOPEN_DIRECT_IO), so a loop device on it is the
disk, with `losetup --direct-io=on` or without. Requests are served side by side, each in a slot with a buffer of its own that
is there from the beginning: no request makes us ask the kernel for memory. When all slots are taken, further requests wait in
the kernel.

What becomes of a request: FUSE_READ and FUSE_WRITE the same in NBD, beyond the end of the disk as on a block device (short,
then ENOSPC); fsync(2) NBD_CMD_FLUSH, or nothing where the server has none; fallocate(2) with FALLOC_FL_PUNCH_HOLE or
FALLOC_FL_ZERO_RANGE NBD_CMD_WRITE_ZEROES, as loop devices ask for to discard, or zeroes that are written. Offsets and lengths
must be multiples of the export's blocks, as with O_DIRECT (EINVAL). The size does not change (EPERM).

The protocol is spoken by ourselves (`fuse_wire.py`). pyfuse3, the one library for asyncio, makes a bytes object for each reply
and has no fallocate; the others have threads and loops of their own. For swap, the way of a request must neither allocate nor
wait for another thread.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import time
from typing import TYPE_CHECKING, Any, Final

from ustack.nbd.call import Call
from ustack.nbd.client import NbdClient
from ustack.nbd.constants import NBD_CMD_READ, NBD_CMD_WRITE, WIRE_TO_ERRNO
from ustack.nbd.fuse_mount import FuseMount
from ustack.nbd.fuse_wire import (
    DATA_AT,
    FALLOCATE_IN,
    FATTR_SIZE,
    FOPEN_DIRECT_IO,
    FOPEN_PARALLEL_DIRECT_WRITES,
    FUSE_DESTROY,
    FUSE_FALLOCATE,
    FUSE_FSYNC,
    FUSE_GETATTR,
    FUSE_INIT,
    FUSE_KERNEL_VERSION,
    FUSE_OPEN,
    FUSE_READ,
    FUSE_RELEASE,
    FUSE_SETATTR,
    FUSE_STATFS,
    FUSE_WRITE,
    HEADER_LEN,
    INIT_IN,
    MAX_PAGES,
    MIN_READ_BUFFER,
    OPEN_OUT,
    OUT_HEADER,
    OUT_LEN,
    READ_WRITE_IN,
    REQUEST,
    SETATTR_IN,
    STATFS_OUT,
    WITHOUT_REPLY,
    WRITE_OUT,
    attributes,
    init_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, MutableSequence

    from ustack.nbd.disks import Disk

PAGE: Final = 4096
REQUESTS: Final = 64
"""Requests side by side."""
REQUEST_SIZE: Final = 64 << 10
"""Bytes of the largest read or write; the kernel cuts what is larger."""
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
FALLOC_FL_ZERO_RANGE: Final = 16


class Slot:
    """Room for one request. The buffer is laid out so that the data of a write, and of the reply to a read, lies on a page
    boundary, with the header before it: | ... header | data ... |.

    A request that the disk takes at once (`NbdClient.begin`) has no task: the slot itself is told of the reply (it is the
    `Completion` of `call`), and answers before the stack acknowledges what came.
    """

    __slots__ = ("buffer", "call", "data", "finish", "iov", "number", "reply", "task", "unique")

    def __init__(self, number: int, buffer: memoryview, finish: Callable[[Slot, int], None]) -> None:
        """`buffer` begins on a page boundary; its first page is for headers. `finish` is called with the slot and an errno, or
        0, when the disk has done what `call` asks."""
        self.finish = finish
        self.call: Call | None = None
        self.number = number
        self.buffer = buffer
        self.data = buffer[PAGE:]
        self.iov = [buffer[PAGE - DATA_AT :]]
        self.reply = buffer[PAGE - OUT_LEN : PAGE]
        self.unique = 0
        self.task: asyncio.Task[None] | None = None

    def done(self) -> bool:
        """Nobody waits."""
        return self.call is None

    def cancelled(self) -> bool:
        """Requests of the kernel are not cancelled."""
        return False

    def set_result(self, _: None, /) -> None:
        """The disk has answered."""
        assert self.call is not None
        error = self.call.error
        self.finish(self, WIRE_TO_ERRNO.get(error, errno.EINVAL) if error else 0)

    def set_exception(self, exception: BaseException, /) -> None:
        """The disk is lost."""
        self.finish(self, getattr(exception, "errno", None) or errno.EIO)


class FuseExport:
    """`disk` as the file `path`, mounted when this is made and served from the running event loop until `close`.

    `requests` are served side by side; each has a buffer of `request_size` bytes (rounded to pages, 8 KiB to 1 MiB). `mode` are
    the permission bits of the file. `disk` may be replaced by another client of the same export, or by None, and then requests
    fail with EIO. Raises OSError when the file cannot be mounted, see `FuseMount`.
    """

    __slots__ = (
        "_begin_call",
        "_block",
        "_disk",
        "_fd",
        "_free",
        "_loop",
        "_made_at",
        "_memory",
        "_mode",
        "_mount",
        "_request_size",
        "_since",
        "_slots",
        "_starved",
        "_zeroes",
        "bytes_read",
        "bytes_written",
        "errors",
        "lost",
        "others",
        "path",
        "reads",
        "size",
        "writes",
    )

    def __init__(
        self,
        disk: Disk,
        path: str,
        *,
        name: str = "ustack",
        requests: int = REQUESTS,
        request_size: int = REQUEST_SIZE,
        mode: int = 0o600,
        since: MutableSequence[float] | memoryview[float] | None = None,
    ) -> None:
        """`name` is what /proc/mounts shows; `since` is where the time is kept at which the request in each slot came (0: there
        is none), for those who watch over them from outside."""
        self.disk = disk
        self.size = disk.size
        self.reads = self.writes = self.others = self.errors = 0
        self.bytes_read = self.bytes_written = 0
        self.lost = False
        """Somebody else has unmounted the file."""
        self._loop = asyncio.get_running_loop()
        self._mode = mode
        self._made_at = int(time.time())
        self._since = [0.0] * requests if since is None else since
        self._block = max(disk.minimum_block, PAGE)
        self._request_size = max(min(request_size // self._block * self._block, MAX_PAGES * PAGE), MIN_READ_BUFFER, self._block)
        each = PAGE + self._request_size
        self._memory = mmap.mmap(-1, requests * each, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        view = memoryview(self._memory)
        self._slots = [Slot(number, view[number * each : (number + 1) * each], self._finished) for number in range(requests)]
        self._free = self._slots[::-1]
        self._starved = False
        self._zeroes = bytes(self._request_size)
        self._mount = FuseMount(path, name)
        self._fd = self._mount.fd
        self.path = self._mount.path
        self._loop.add_reader(self._fd, self._on_readable)

    @property
    def disk(self) -> Disk | None:
        """Where requests go."""
        return self._disk

    @disk.setter
    def disk(self, disk: Disk | None) -> None:
        self._disk = disk
        self._begin_call = disk.begin if isinstance(disk, NbdClient) else None

    @property
    def in_flight(self) -> int:
        """Requests that are not yet answered."""
        return len(self._slots) - len(self._free)

    @property
    def completed(self) -> int:
        """Requests that were answered."""
        return self.reads + self.writes + self.others + self.errors

    def oldest(self) -> float:
        """The loop's time when the oldest request that is not yet answered came; 0 when there is none."""
        return min((since for since in self._since if since), default=0.0)

    def report(self) -> dict[str, Any]:
        """What it is and has done, for `ustack status`."""
        oldest = self.oldest()
        return {
            "path": self.path,
            "slots": len(self._slots),
            "request_size": self._request_size,
            "in_flight": self.in_flight,
            "oldest": self._loop.time() - oldest if oldest else 0.0,
            "reads": self.reads,
            "writes": self.writes,
            "others": self.others,
            "errors": self.errors,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }

    async def close(self) -> None:
        """Unmount the file. Requests under way are not answered: those who wait for them get ENOTCONN."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._fd = -1
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.run_in_executor(None, self._mount.close)

    # -- requests ------------------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        free = self._free
        fd = self._fd
        while free:
            slot = free[-1]
            try:
                size = os.readv(fd, slot.iov)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # a request that was interrupted before we had it
                self._unmounted()
                return
            free.pop()
            self._begin(slot, size)
        self._starved = True
        self._loop.remove_reader(fd)

    def _begin(self, slot: Slot, size: int) -> None:
        buffer = slot.buffer
        _, opcode, slot.unique = REQUEST.unpack_from(buffer, PAGE - DATA_AT)
        self._since[slot.number] = self._loop.time()
        work: Coroutine[Any, Any, None]
        if opcode == FUSE_READ:
            _, offset, length = READ_WRITE_IN.unpack_from(buffer, PAGE - DATA_AT + HEADER_LEN)
            if self._begin_call is not None:
                call = slot.call = Call(NBD_CMD_READ, 0, offset, length, slot.data[:length], None, slot, length)
                if self._begin_call(call):
                    return
                slot.call = None
            work = self._read(slot, offset, length)
        elif opcode == FUSE_WRITE:
            _, offset, length = READ_WRITE_IN.unpack_from(buffer, PAGE - DATA_AT + HEADER_LEN)
            if self._begin_call is not None:
                call = slot.call = Call(NBD_CMD_WRITE, 0, offset, length, None, slot.data[:length], slot, length)
                if self._begin_call(call):
                    return
                slot.call = None
            work = self._write(slot, offset, length)
        elif opcode == FUSE_FSYNC:
            work = self._sync(slot)
        elif opcode == FUSE_FALLOCATE:
            _, offset, length, mode, _ = FALLOCATE_IN.unpack_from(buffer, PAGE - DATA_AT + HEADER_LEN)
            work = self._allocate(slot, offset, length, mode)
        else:
            self._answer_at_once(slot, opcode)
            self._end(slot)
            return
        slot.task = self._loop.create_task(work)

    def _finished(self, slot: Slot, code: int) -> None:
        """The disk has done what the slot's call asks."""
        call, slot.call = slot.call, None
        assert call is not None
        if code:
            self._fail(slot, code)
        elif call.payload is None:
            self._answer_read(slot, call.length)
        else:
            self._answer_write(slot, call.length)
        self._end(slot)

    def _answer_read(self, slot: Slot, length: int) -> None:
        self.reads += 1
        self.bytes_read += length
        self._reply(slot, length)

    def _answer_write(self, slot: Slot, length: int) -> None:
        self.writes += 1
        self.bytes_written += length
        WRITE_OUT.pack_into(slot.data, 0, length, 0)
        self._reply(slot, WRITE_OUT.size)

    def _end(self, slot: Slot) -> None:
        slot.task = None
        self._since[slot.number] = 0.0
        self._free.append(slot)
        if self._starved and self._fd >= 0:
            self._starved = False
            self._loop.add_reader(self._fd, self._on_readable)

    def _reply(self, slot: Slot, length: int) -> None:
        """Send the first `length` bytes of the slot's data."""
        OUT_HEADER.pack_into(slot.reply, 0, OUT_LEN + length, 0, slot.unique)
        self._send(slot.buffer[PAGE - OUT_LEN : PAGE + length])

    def _reply_error(self, slot: Slot, code: int) -> None:
        OUT_HEADER.pack_into(slot.reply, 0, OUT_LEN, -code, slot.unique)
        self._send(slot.reply)

    def _send(self, message: memoryview) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, message)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the request was interrupted: nobody waits any more
                self._unmounted()

    def _unmounted(self) -> None:
        """ENODEV: the file was unmounted by somebody else."""
        if self._fd >= 0 and not self.lost:
            self.lost = True
            self._loop.remove_reader(self._fd)

    def _fail(self, slot: Slot, code: int) -> None:
        self.errors += 1
        self._reply_error(slot, code if 0 < code < 512 and code != errno.EINTR else errno.EIO)

    def _attached(self) -> Disk:
        if self._disk is None:
            raise OSError(errno.EIO, "the disk is not attached")
        return self._disk

    # -- on the disk ---------------------------------------------------------------------------------------------------------

    async def _read(self, slot: Slot, offset: int, length: int) -> None:
        try:
            length = max(min(length, self.size - offset), 0)
            if length:
                await self._attached().pread_into(slot.data[:length], offset)
            self._answer_read(slot, length)
        except OSError as error:
            self._fail(slot, error.errno or errno.EIO)
        finally:
            self._end(slot)

    async def _write(self, slot: Slot, offset: int, length: int) -> None:
        try:
            if offset + length > self.size:
                if offset >= self.size:
                    raise OSError(errno.ENOSPC, "beyond the end of the disk")
                length = self.size - offset
            await self._attached().pwrite(slot.data[:length], offset)
            self._answer_write(slot, length)
        except OSError as error:
            self._fail(slot, error.errno or errno.EIO)
        finally:
            self._end(slot)

    async def _sync(self, slot: Slot) -> None:
        try:
            disk = self._attached()
            if disk.can_flush:
                await disk.flush()
            self.others += 1
            self._reply(slot, 0)
        except OSError as error:
            self._fail(slot, error.errno or errno.EIO)
        finally:
            self._end(slot)

    async def _allocate(self, slot: Slot, offset: int, length: int, mode: int) -> None:
        try:
            if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                raise OSError(errno.EOPNOTSUPP, "only holes and zeroes can be made")
            if offset + length > self.size:
                if not mode & FALLOC_FL_KEEP_SIZE:
                    raise OSError(errno.ENOSPC, "the disk does not grow")
                length = max(self.size - offset, 0)
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                await self._zero(offset, length)
            self.others += 1
            self._reply(slot, 0)
        except OSError as error:
            self._fail(slot, error.errno or errno.EIO)
        finally:
            self._end(slot)

    async def _zero(self, offset: int, length: int) -> None:
        disk = self._attached()
        if disk.can_zero:
            await disk.zero(length, offset)
            return
        stop = offset + length
        zeroes = memoryview(self._zeroes)
        while offset < stop:
            piece = zeroes[: stop - offset]
            await disk.pwrite(piece, offset)
            offset += len(piece)

    # -- answered by ourselves -----------------------------------------------------------------------------------------------

    def _answer_at_once(self, slot: Slot, opcode: int) -> None:
        if opcode in WITHOUT_REPLY:
            return
        self.others += 1
        at = PAGE - DATA_AT + HEADER_LEN
        if opcode == FUSE_GETATTR:
            self._reply_bytes(slot, self._attributes())
        elif opcode == FUSE_OPEN:
            self._reply_bytes(slot, OPEN_OUT.pack(0, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES, 0))
        elif opcode == FUSE_SETATTR:
            valid, _, _, size = SETATTR_IN.unpack_from(slot.buffer, at)
            if valid & FATTR_SIZE and size != self.size:
                self._reply_error(slot, errno.EPERM)
            else:
                self._reply_bytes(slot, self._attributes())
        elif opcode == FUSE_STATFS:
            blocks = self.size // PAGE
            self._reply_bytes(slot, STATFS_OUT.pack(blocks, 0, 0, 1, 0, PAGE, 255, PAGE, 0))
        elif opcode == FUSE_INIT:
            major, _, _, flags = INIT_IN.unpack_from(slot.buffer, at)
            if major < FUSE_KERNEL_VERSION:
                self._reply_error(slot, errno.EPROTO)
            else:
                self._reply_bytes(slot, init_reply(flags, self._request_size, len(self._slots)))
        elif opcode in (FUSE_RELEASE, FUSE_DESTROY):
            self._reply(slot, 0)
        else:
            self._reply_error(slot, errno.ENOSYS)

    def _reply_bytes(self, slot: Slot, answer: bytes) -> None:
        slot.data[: len(answer)] = answer
        self._reply(slot, len(answer))

    def _attributes(self) -> bytes:
        return attributes(self.size, self._block, self._mode, (os.geteuid(), os.getegid()), self._made_at)
