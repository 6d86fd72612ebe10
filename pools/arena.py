"""The arena: one mapping of 4 KiB pages that holds every packet byte.

Made once, pre-faulted, and never grown, so that a packet that arrives under memory pressure finds memory that is there already.
An address is a byte offset into the arena; a page frame number (pfn) is that offset divided by the page size. Which page is in
use by whom is the business of `pools.buddy`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
"""Bytes of a page. Fixed: the figures of the 2006 dispute are for 4 KiB, whatever the host uses."""
PAGE_MASK: Final = PAGE_SIZE - 1

F_SEAL_FUTURE_WRITE: Final = 0x10
"""Who is handed the descriptor of a memfd can neither write to it nor map it writable (fcntl(2), Linux 5.1); the module `fcntl`
of Python 3.11 does not know it.
"""


def sealed_memfd(name: str, size: int) -> tuple[int, mmap.mmap]:
    """`size` bytes of pre-faulted memory in a memfd, and the only writable mapping of it there will ever be.

    Whoever is given the descriptor, or opens it anew under /proc, can read the memory and nothing else: sealed are its size,
    so that no page is pulled from under us, writing, and the seals. Raises OSError.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        area = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd, area


class Arena:
    """`pages` pages of zeroed memory.

    With `lock` the pages are locked into RAM (mlock(2)), which needs CAP_IPC_LOCK or a sufficient RLIMIT_MEMLOCK; without
    the right, the constructor raises the `OSError` of mlock. With `memfd` the memory can be mapped by another process
    through `fd`, see `sealed_memfd`.

    `mem` is one writable view of everything, `size` its length in bytes, `fd` the memfd or -1.
    """

    __slots__ = ("_map", "_page_views", "fd", "mem", "pages", "size")

    def __init__(self, pages: int, *, lock: bool = False, memfd: bool = False) -> None:
        if pages < 1:
            raise ValueError(f"an arena has at least one page, not {pages}")
        self.pages = pages
        self.size = pages << PAGE_SHIFT
        self.fd = -1
        if memfd:
            self.fd, self._map = sealed_memfd("ustack-arena", self.size)
        else:
            self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self.mem = memoryview(self._map)
        self._page_views: list[memoryview | None] = [None] * pages
        if lock:
            try:
                _mlock(self._map, self.size)
            except OSError:
                self.close()
                raise

    def page(self, pfn: int) -> memoryview:
        """A view of one page. The view is kept: asking again is cheap, and the caller must not release it."""
        view = self._page_views[pfn]
        if view is None:
            view = self._page_views[pfn] = self.mem[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT]
        return view

    def view(self, addr: int, length: int) -> memoryview:
        """A new view of `length` bytes from the address `addr`."""
        return self.mem[addr : addr + length]

    def close(self) -> None:
        """Unmap. Raises `BufferError` while someone still holds a view that `view` gave out; closing twice is harmless."""
        for view in self._page_views:
            if view is not None:
                view.release()
        self._page_views = []
        self.mem.release()
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _mlock(area: mmap.mmap, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.c_char.from_buffer(area)
    refused = libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size))
    code = ctypes.get_errno()
    del first
    if refused:
        raise OSError(code, f"mlock of {size} bytes: {os.strerror(code)}")
