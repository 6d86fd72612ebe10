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
import resource
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

MAP_FIXED: Final = 0x10
MAP_LOCKED: Final = 0x2000
"""Flags of mmap(2) that the module `mmap` of Python 3.11 does not know."""

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
"""Flags of fallocate(2)."""

DESCRIPTORS_BESIDE: Final = 16384
"""Descriptors that a process has beside those of its pages: sockets, devices, pages that it has given away."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


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


def page_memfd() -> int:
    """A memfd of one page, all zeros and in memory already. Raises OSError."""
    fd = os.memfd_create("ustack-page", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, bytes(PAGE_SIZE), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def discard_page(fd: int) -> None:
    """Free the memory of a page that was given away, and close `fd`. Who has mapped it reads zeros from now on."""
    _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE_SIZE)
    os.close(fd)


class Arena:
    """`pages` pages of zeroed memory.

    With `lock` the pages are locked into RAM (mlock(2)), which needs CAP_IPC_LOCK or a sufficient RLIMIT_MEMLOCK; without
    the right, the constructor raises the `OSError` of mlock. With `memfd` the memory can be mapped by another process
    through `fd`, see `sealed_memfd`. With `flippable` every page is a memfd of its own, so that `flip` can give it away; that
    takes a descriptor for each page (the limit of the process, RLIMIT_NOFILE, is raised as far as it may be) and a mapping of
    the kernel's for each, of which a process has 65,530 (vm.max_map_count). An arena is one or the other: raises ValueError.

    `mem` is one writable view of everything, `size` its length in bytes, `fd` the memfd or -1.
    """

    __slots__ = ("_lock", "_map", "_page_fds", "_page_views", "fd", "mem", "pages", "size")

    def __init__(self, pages: int, *, lock: bool = False, memfd: bool = False, flippable: bool = False) -> None:
        if pages < 1:
            raise ValueError(f"an arena has at least one page, not {pages}")
        if memfd and flippable:
            raise ValueError("an arena is one memfd, or one for each page")
        self.pages = pages
        self.size = pages << PAGE_SHIFT
        self.fd = -1
        if memfd:
            self.fd, self._map = sealed_memfd("ustack-arena", self.size)
        else:
            self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self.mem = memoryview(self._map)
        self._page_views: list[memoryview | None] = [None] * pages
        self._page_fds: list[int] = []
        self._lock = lock
        if flippable:
            try:
                self._map_pages()
            except OSError:
                self.close()
                raise
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

    @property
    def flippable(self) -> bool:
        """Whether its pages can be given away."""
        return bool(self._page_fds)

    def flip(self, pfn: int, spare: int) -> int:
        """Take a page out of the arena and put `spare`, from `page_memfd`, in its place; return the memfd of the old page.

        Addresses and views stay valid, and mean the new page. The old one belongs to the caller: nothing that the arena's users
        write reaches it any more. Raises OSError, and then nothing has changed.
        """
        self._map_page(pfn, spare)
        old = self._page_fds[pfn]
        self._page_fds[pfn] = spare
        return old

    def keep_pages(self) -> None:
        """Give no more pages away: closes their descriptors. The memory stays where it is."""
        for fd in self._page_fds:
            os.close(fd)
        self._page_fds.clear()

    def _map_pages(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.pages + DESCRIPTORS_BESIDE
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        for pfn in range(self.pages):
            self._page_fds.append(page_memfd())
            self._map_page(pfn, self._page_fds[pfn])

    def _map_page(self, pfn: int, fd: int) -> None:
        """Map `fd` where the page is, over what is there now."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + (pfn << PAGE_SHIFT)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE | MAP_FIXED | (MAP_LOCKED if self._lock else 0)
        if _libc.mmap(start, PAGE_SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != start:
            code = ctypes.get_errno()
            raise OSError(code, f"mapping of a page: {os.strerror(code)}")

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
        self.keep_pages()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _mlock(area: mmap.mmap, size: int) -> None:
    first = ctypes.c_char.from_buffer(area)
    refused = _libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size))
    code = ctypes.get_errno()
    del first
    if refused:
        raise OSError(code, f"mlock of {size} bytes: {os.strerror(code)}")
