"""userfaultfd(2): page faults of a range of memory, handled by a program. The ioctls that paging needs.

Source: ioctl_userfaultfd(2), ioctl_uffd*(2); linux/userfaultfd.h. Numbers are those of 64-bit Linux.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from contextlib import suppress
from typing import Final, NamedTuple

PAGE: Final = 4096

_USERFAULTFD_IOC_NEW: Final = 0xAA00
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_COPY: Final = 0xC028AA03
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_UFFDIO_POISON: Final = 0xC020AA08
_API: Final = 0xAA
_FEATURES: Final = 1 << 0 | 1 << 5 | 1 << 12
"""UFFD_FEATURE_PAGEFAULT_FLAG_WP, MISSING_SHMEM and WP_HUGETLBFS_SHMEM (Linux 5.19)."""
_REGISTER_MISSING_AND_WP: Final = 1 | 2
_COPY_MODE_WP: Final = 2
_WRITEPROTECT_WP: Final = 1
_EVENT_PAGEFAULT: Final = 0x12
_FAULT_WRITE: Final = 1
_FAULT_WP: Final = 2
_MESSAGE: Final = struct.Struct("=B7xQQ8x")
_MESSAGES: Final = 64
_SYSCALL: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}


class Fault(NamedTuple):
    """A thread waits at `address`: for a page, or, with `protected`, for leave to write to one; `write`: it wants to write."""

    address: int
    write: bool
    protected: bool


def open_userfaultfd() -> int:
    """A new userfaultfd, also for faults within system calls. Raises OSError: EPERM says what would give leave."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    with suppress(OSError):
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
        finally:
            os.close(device)
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no userfaultfd known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(number, flags))
    if fd < 0:
        code = ctypes.get_errno()
        hint = "; give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd" if code == errno.EPERM else ""
        raise OSError(code, f"userfaultfd: {os.strerror(code)}{hint}")
    return fd


class UserFaultFd:
    """The userfaultfd `fd`, whose memory may be another process's. Addresses are that process's."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def register(self, start: int, length: int) -> None:
        """From now on accesses to absent pages there wait, and so do writes to protected ones. EINVAL before Linux 5.19."""
        api = bytearray(struct.pack("=QQQ", _API, _FEATURES, 0))
        fcntl.ioctl(self.fd, _UFFDIO_API, api)
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", start, length, _REGISTER_MISSING_AND_WP, 0)))

    def faults(self) -> list[Fault]:
        """Who waits since the last call; empty when nobody does."""
        try:
            data = os.read(self.fd, _MESSAGES * _MESSAGE.size)
        except BlockingIOError:
            return []
        return [
            Fault(address, bool(flags & _FAULT_WRITE), bool(flags & _FAULT_WP))
            for event, flags, address in _MESSAGE.iter_unpack(data)
            if event == _EVENT_PAGEFAULT
        ]

    def copy(self, address: int, source: int, length: int, protect: bool) -> None:
        """Give whole pages their contents, from our memory at `source`, at once, and wake who waits for them; with `protect`
        they cannot be written to. EEXIST when one is there already."""
        done = 0
        while done < length:
            request = bytearray(
                struct.pack("=QQQQq", address + done, source + done, length - done, _COPY_MODE_WP if protect else 0, 0)
            )
            try:
                fcntl.ioctl(self.fd, _UFFDIO_COPY, request)
            except OSError as error:
                copied = int(struct.unpack_from("=q", request, 32)[0])
                if error.errno != errno.EAGAIN:
                    raise
                done += max(copied, 0)
                continue
            return

    def protect(self, address: int, length: int, on: bool) -> None:
        """Stop writes to pages, or let them go on and wake who waits for that."""
        fcntl.ioctl(
            self.fd, _UFFDIO_WRITEPROTECT, bytearray(struct.pack("=QQQ", address, length, _WRITEPROTECT_WP if on else 0))
        )

    def wake(self, address: int, length: int) -> None:
        """Let who waits there try again."""
        fcntl.ioctl(self.fd, _UFFDIO_WAKE, bytearray(struct.pack("=QQ", address, length)))

    def poison(self, address: int, length: int) -> None:
        """Whoever touches these pages gets SIGBUS, as for a file on a broken disk. ENOTTY before Linux 6.6."""
        fcntl.ioctl(self.fd, _UFFDIO_POISON, bytearray(struct.pack("=QQQq", address, length, 0, 0)))
