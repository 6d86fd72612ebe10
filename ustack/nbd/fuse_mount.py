"""Mounting a FUSE file system that is a single file: fuse(4) and mount(2), without the help of fusermount.

The root of the file system is a regular file, so it is mounted on a regular file, and nothing can be looked up in it. Mounting
needs CAP_SYS_ADMIN. Whoever serves the mount must not touch its path in between: it would wait for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Final

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
FSTYPE: Final = "fuse.ustack"
"""What /proc/mounts says it is."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class FuseMount:
    """A mount on the file `path`, which is made if there is none, and removed again at the end. `fd` is the end of it that is
    to be read; it does not block.

    What a process that is dead has left mounted there is taken away first. Raises OSError that says what is missing: EPERM
    without CAP_SYS_ADMIN, ENOENT without /dev/fuse, EBUSY when something is mounted there, EEXIST when it is no empty file.
    """

    __slots__ = ("_made", "fd", "path")

    def __init__(self, path: str, source: str) -> None:
        """`source` is what /proc/mounts shows as the device."""
        self.path = str(Path(path).absolute())
        try:
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}; a FUSE export needs /dev/fuse (modprobe fuse)", "/dev/fuse"
            ) from None
        try:
            self._made = _mount_point(self.path)
            options = (
                f"fd={self.fd},rootmode={stat.S_IFREG:o},user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
            )
            flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
            if _libc.mount(source.encode(), os.fsencode(self.path), FSTYPE.encode(), flags, options.encode()):
                code = ctypes.get_errno()
                hint = "; mounting needs CAP_SYS_ADMIN" if code == errno.EPERM else ""
                self._remove_file()
                raise OSError(code, f"cannot mount: {os.strerror(code)}{hint}", self.path)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Unmount; who still has the file open gets ENOTCONN from now on."""
        unmount(self.path)
        os.close(self.fd)
        self._remove_file()

    def _remove_file(self) -> None:
        if self._made:
            with contextlib.suppress(OSError):
                Path(self.path).unlink()


def unmount(path: str) -> None:
    """Take the mount at `path` away, used or not. Nobody minds when there is none."""
    _libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW)


def is_mounted(path: str) -> bool:
    """Whether one of our files is mounted at `path`. Does not touch it."""
    absolute = str(Path(path).absolute())
    with Path("/proc/self/mounts").open() as mounts:
        return any(fields[1] == absolute and fields[2] == FSTYPE for fields in map(str.split, mounts))


def _mount_point(path: str) -> bool:
    """See to it that there is an empty file at `path`; returns whether it was made for us."""
    if is_mounted(path):
        try:
            os.close(os.open(path, os.O_PATH))  # opens nothing: asks nobody who might not answer
            os.stat(path)  # noqa: PTH116
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            unmount(path)  # whoever served it is dead
        else:
            raise OSError(errno.EBUSY, "somebody serves a disk there", path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise OSError(errno.EEXIST, "the mount point must be an empty file, or nothing", path) from None
        return False
    return True
