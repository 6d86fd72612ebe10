"""The process behind a `RemoteMemory`: brings pages from an export when they are touched, and takes back what is too much.

It is a process of its own, because a thread that touches an absent page stops where it stands: in Python, with the
interpreter's lock in its hand, so that no other thread of its process could help it.

The memory is a memfd that both processes map. In the other one a userfaultfd watches it: an absent page is read from the
export; pages that were only read are write-protected, so that the first write to each is noticed. To make room, the page that
came first goes: if it was written to, it is protected, written to the export, and if nobody wrote to it meanwhile, given back
(a hole in the memfd). `main` takes the number of a socket on which the other process speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

from ustack.nbd.connector import open_disk
from ustack.nbd.fallocate import zero_range
from ustack.nbd.userfaultfd import PAGE, UserFaultFd

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ustack.nbd.client import NbdClient

MESSAGE: Final = 4096
"""Bytes of a message between the two processes."""


class Pager:
    """Pages of `disk` in `memory`, at most `resident` of them, watched by `uffd` at `base` in the other process. Who goes
    through them in order is brought `readahead` at a time."""

    def __init__(self, disk: NbdClient, uffd: UserFaultFd, memory: int, base: int, resident: int, readahead: int) -> None:
        self._disk = disk
        self._uffd = uffd
        self._memory = memory
        self._base = base
        self._limit = max(resident, 2 * readahead)
        self._readahead = readahead
        self._pages = -(-disk.size // PAGE)
        self._map = memoryview(mmap.mmap(memory, self._pages * PAGE))
        self._resident: dict[int, None] = {}  # in the order in which they came
        self._dirty: set[int] = set()
        self._loading: dict[int, bool] = {}  # and whether somebody waits to write there
        self._expected = 0
        self._evicting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.error: OSError | None = None
        """Why pages could not be written, the first reason."""
        self.counters = {"faults": 0, "loaded": 0, "evicted": 0, "written": 0}

    def on_faults(self) -> None:
        """Threads wait: see to them."""
        for fault in self._uffd.faults():
            self.counters["faults"] += 1
            page = (fault.address - self._base) // PAGE
            if page in self._loading:
                self._loading[page] |= fault.write
            elif page not in self._resident:
                if fault.protected:
                    # It went while the message was on its way: let the thread ask for the page itself.
                    self._uffd.wake(self._address(page), PAGE)
                else:
                    self._load(page, fault.write)
            elif fault.write or fault.protected:
                self._dirty.add(page)
                self._uffd.protect(self._address(page), PAGE, False)
            else:
                self._uffd.wake(self._address(page), PAGE)

    def _address(self, page: int) -> int:
        return self._base + page * PAGE

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _load(self, page: int, write: bool) -> None:
        """Bring `page`, and, to who goes on where the last one ended, those behind it that are absent too."""
        first = stop = page
        end = min(first + (self._readahead if page == self._expected else 1), self._pages)
        while stop < end and stop not in self._resident and stop not in self._loading:
            self._loading[stop] = write and stop == page
            stop += 1
        self._expected = stop
        self._start(self._bring(first, stop))

    async def _bring(self, first: int, stop: int) -> None:
        data = bytearray((stop - first) * PAGE)
        length = min(len(data), self._disk.size - first * PAGE)
        try:
            await self._disk.pread_into(memoryview(data)[:length], first * PAGE)
        except OSError:
            for page in range(first, stop):
                del self._loading[page]
            self._refuse(first)
            return
        source = ctypes.addressof(ctypes.c_char.from_buffer(data))
        for page in range(first, stop):
            write = self._loading.pop(page)
            try:
                self._uffd.copy(self._address(page), source + (page - first) * PAGE, PAGE, not write)
            except OSError as error:
                if error.errno == errno.EEXIST:
                    self._uffd.wake(self._address(page), PAGE)
                elif error.errno in (errno.ESRCH, errno.ENOENT):
                    return  # the other process has gone, or its memory
                else:
                    self._refuse(page)
                    continue
            self._resident[page] = None
            if write:
                self._dirty.add(page)
        self.counters["loaded"] += stop - first
        if len(self._resident) > self._limit and not self._evicting:
            self._evicting = True
            self._start(self._make_room())

    def _refuse(self, page: int) -> None:
        """The page cannot be read: who touches it learns it by SIGBUS."""
        with contextlib.suppress(OSError):
            self._uffd.poison(self._address(page), PAGE)
            self._uffd.wake(self._address(page), PAGE)

    # -- taking pages back ---------------------------------------------------------------------------------------------------

    async def _make_room(self) -> None:
        try:
            while len(self._resident) > self._limit and self.error is None:
                oldest = [page for page, _ in zip(self._resident, range(self._readahead), strict=False)]
                await asyncio.gather(*(self._evict(page) for page in oldest))
        finally:
            self._evicting = False

    async def _evict(self, page: int) -> None:
        await self._clean(page)
        if page in self._dirty:
            # Written to again meanwhile, or it cannot be written out: it is not its turn any more.
            self._resident[page] = self._resident.pop(page)
            return
        # Nobody has written since it was protected, and who tries now waits, and then asks for the page.
        del self._resident[page]
        zero_range(self._memory, page * PAGE, PAGE, True)
        self.counters["evicted"] += 1

    async def _clean(self, page: int) -> None:
        """Write `page` to the export if it was written to; on failure it stays dirty."""
        if page not in self._dirty:
            return
        with contextlib.suppress(OSError):  # the other process has gone: nobody writes
            self._uffd.protect(self._address(page), PAGE, True)
        self._dirty.discard(page)
        start = page * PAGE
        stop = min(start + PAGE, self._disk.size)
        try:
            await self._disk.pwrite(bytes(self._map[start:stop]), start)
        except OSError as error:
            self._dirty.add(page)
            self.error = self.error or error
        else:
            self.counters["written"] += 1

    async def flush(self) -> None:
        """Write out all pages that were written to, and bring them to stable storage. Raises OSError when that failed, now or
        before."""
        self.error = None
        await asyncio.gather(*(self._clean(page) for page in list(self._dirty)))
        if self.error is not None:
            raise self.error
        if self._disk.can_flush:
            await self._disk.flush()


async def serve(control: socket.socket) -> None:
    """Do what the other process says until it says no more."""
    loop = asyncio.get_running_loop()
    control.setblocking(False)
    wanted = json.loads(await loop.sock_recv(control, MESSAGE))
    try:
        disk = await open_disk([wanted["uri"]], **wanted["options"])
    except (OSError, ValueError) as error:
        await loop.sock_sendall(control, _failure(error))
        return
    try:
        about = {"size": disk.size, "block": disk.minimum_block, "read_only": disk.read_only}
        await loop.sock_sendall(control, json.dumps(about).encode())
        await _readable(control)
        message, fds, _, _ = socket.recv_fds(control, MESSAGE, 2)
        if not message:
            return
        uffd, memory = fds
        where = json.loads(message)
        pager = Pager(disk, UserFaultFd(uffd), memory, where["base"], wanted["resident"], wanted["readahead"])
        loop.add_reader(uffd, pager.on_faults)
        await loop.sock_sendall(control, b"{}")
        while message := await loop.sock_recv(control, MESSAGE):
            try:
                if message == b"flush":
                    await pager.flush()
                answer = json.dumps(pager.counters).encode()
            except OSError as error:
                answer = _failure(error)
            await loop.sock_sendall(control, answer)
        # The other process has gone without a word: what it has written is kept, as with any shared mapping.
        loop.remove_reader(uffd)
        try:
            await pager.flush()
        except OSError as error:
            sys.exit(f"remote memory: what was written last is lost: {error.strerror or error}")
    finally:
        await disk.close()


def _failure(error: Exception) -> bytes:
    code = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return json.dumps({"errno": code, "error": text[: MESSAGE // 2]}).encode()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def main() -> None:
    """The program."""
    os.setsid()  # an interrupt from the terminal is for the other process; this one ends when that one has
    with socket.socket(fileno=int(sys.argv[1])) as control:
        asyncio.run(serve(control))
