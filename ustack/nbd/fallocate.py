"""fallocate(2) with its modes, which the standard library does not offer."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_FALLOC_FL_ZERO_RANGE: Final = 16
_ZEROES: Final = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def zero_range(fd: int, offset: int, length: int, punch: bool, fast: bool = False) -> None:
    """Make `length` bytes at `offset` of a file or block device read as zeroes: as a hole with `punch`, allocated otherwise.

    Where the kernel, the file system or the device cannot do it (EOPNOTSUPP, ENODEV, EINVAL), zeroes are written, or with
    `fast` it is ENOTSUP. Raises OSError.
    """
    mode = _FALLOC_FL_KEEP_SIZE | (_FALLOC_FL_PUNCH_HOLE if punch else _FALLOC_FL_ZERO_RANGE)
    if _libc.fallocate(fd, mode, offset, length) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
        raise OSError(code, os.strerror(code))
    if fast:
        raise OSError(errno.ENOTSUP, "zeroing is no faster than writing here")
    stop = offset + length
    while offset < stop:
        offset += os.pwrite(fd, _ZEROES[: stop - offset], offset)
