"""The kernel's FUSE protocol, as much of it as one file needs: what is in a request, and how a reply looks. No I/O.

Source: include/uapi/linux/fuse.h, and fuse(4). All values are in the byte order of the machine. Requests that are not
named here are answered with ENOSYS, after which the kernel does without them.
"""

from __future__ import annotations

import stat
import struct
from typing import Final

FUSE_KERNEL_VERSION: Final = 7
FUSE_KERNEL_MINOR_VERSION: Final = 31
"""What we speak. Kernels that are newer fall back to it, older than Linux 5.4 have less."""
FUSE_ROOT_ID: Final = 1

FUSE_FORGET: Final = 2
FUSE_GETATTR: Final = 3
FUSE_SETATTR: Final = 4
FUSE_OPEN: Final = 14
FUSE_READ: Final = 15
FUSE_WRITE: Final = 16
FUSE_STATFS: Final = 17
FUSE_RELEASE: Final = 18
FUSE_FSYNC: Final = 20
FUSE_FLUSH: Final = 25
FUSE_INIT: Final = 26
FUSE_INTERRUPT: Final = 36
FUSE_DESTROY: Final = 38
FUSE_BATCH_FORGET: Final = 42
FUSE_FALLOCATE: Final = 43

WITHOUT_REPLY: Final = frozenset((FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT))
"""Requests that nobody waits for. An interrupt may be ignored; the request that it is about is answered all the same."""

FUSE_ASYNC_READ: Final = 1 << 0
FUSE_BIG_WRITES: Final = 1 << 5
FUSE_ASYNC_DIO: Final = 1 << 15
FUSE_MAX_PAGES: Final = 1 << 22
WANTED: Final = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES
"""Abilities that we ask for: requests larger than a page, and direct I/O that does not wait for its answer, so that a loop
device has more than one request under way."""

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6
"""Flags of an open file: no page cache in between, and writes that do not wait for each other."""

FATTR_SIZE: Final = 1 << 3
"""What FUSE_SETATTR is to set: the size."""

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
REQUEST: Final = struct.Struct("=IIQ")
"""The part of it that is of interest here: len, opcode, unique."""
OUT_HEADER: Final = struct.Struct("=IiQ")
"""len, error (0 or a negative errno), unique."""
READ_WRITE_IN: Final = struct.Struct("=QQI20x")
"""fh, offset, size of fuse_read_in and fuse_write_in, whose other fields are of no interest."""
WRITE_OUT: Final = struct.Struct("=II")
"""size, padding."""
INIT_IN: Final = struct.Struct("=IIII")
"""major, minor, max_readahead, flags."""
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment,
flags2."""
ATTR_OUT: Final = struct.Struct("=QIIQQQQQQIIIIIIIIII")
"""attr_valid, attr_valid_nsec, dummy; ino, size, blocks, atime, mtime, ctime; atimensec, mtimensec, ctimensec; mode, nlink,
uid, gid, rdev, blksize, flags."""
OPEN_OUT: Final = struct.Struct("=QII")
"""fh, open_flags, padding."""
FALLOCATE_IN: Final = struct.Struct("=QQQII")
"""fh, offset, length, mode, padding."""
SETATTR_IN: Final = struct.Struct("=IIQQ")
"""valid, padding, fh, size."""
STATFS_OUT: Final = struct.Struct("=QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding."""

HEADER_LEN: Final = IN_HEADER.size
OUT_LEN: Final = OUT_HEADER.size
DATA_AT: Final = HEADER_LEN + READ_WRITE_IN.size
"""Bytes of a FUSE_WRITE before its data."""
MIN_READ_BUFFER: Final = 8192
"""Bytes of the smallest buffer with which the kernel lets requests be read."""
MAX_PAGES: Final = 256
"""Pages of the largest read or write (fs.fuse.max_pages_limit may allow more)."""
FOREVER: Final = 1 << 30
"""Seconds that the kernel may believe what it was told of a file that never changes its size."""


def init_reply(offered: int, max_write: int, max_background: int) -> bytes:
    """What is agreed: `offered` are the kernel's flags, `max_write` the bytes of the largest read or write, `max_background`
    the requests of direct I/O that are under way together."""
    return INIT_OUT.pack(
        FUSE_KERNEL_VERSION,
        FUSE_KERNEL_MINOR_VERSION,
        max_write,
        offered & WANTED,
        max_background,
        max_background,
        max_write,
        1,
        max(max_write >> 12, 1),
        0,
        0,
    )


def attributes(size: int, block: int, mode: int, owner: tuple[int, int], made_at: int) -> bytes:
    """A regular file of `size` bytes that has permission bits `mode` and since `made_at` (seconds) has not changed."""
    times = (made_at, made_at, made_at)
    blocks = -(-size // 512)
    return ATTR_OUT.pack(
        FOREVER, 0, 0, FUSE_ROOT_ID, size, blocks, *times, 0, 0, 0, stat.S_IFREG | mode, 1, *owner, 0, block, 0
    )
