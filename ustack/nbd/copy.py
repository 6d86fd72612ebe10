"""Copying between disks: NBD exports, local files and devices, memory.

Many requests are in flight at a time, each a read and then a write through a buffer of its own, so memory is bounded and
nothing is copied on the way through us. What the source says is zero (block status, SEEK_HOLE) is not read, and not sent where
the target can make zeroes by itself.
"""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ustack.nbd.block_status import Extent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from ustack.nbd.disks import Disk

REQUESTS: Final = 64
"""Requests in flight (the default of nbdcopy): enough to hide the round trip."""
REQUEST_SIZE: Final = 256 << 10
"""Bytes in one request (the default of nbdcopy)."""
STATUS_WINDOW: Final = 128 << 20
"""Bytes that the source is asked about at a time; what it says to them is all that is kept."""
_NO_STATUS: Final = frozenset((errno.EOVERFLOW, errno.ENOTSUP, errno.EINVAL, errno.ENOMEM))
"""Answers to block status with which a copy goes on, reading everything."""


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy did: bytes written as data, bytes written as zeroes without sending them, and how long it took, flush
    included."""

    data_bytes: int
    zero_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Bytes copied in all."""
        return self.data_bytes + self.zero_bytes


async def copy(
    source: Disk,
    target: Disk,
    *,
    requests: int = REQUESTS,
    request_size: int = REQUEST_SIZE,
    sparse: int = 0,
    flush: bool = True,
    extents: bool = True,
    allocated: bool = False,
    target_is_zero: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> CopyResult:
    """Copy all of `source` to the start of `target`.

    `requests` reads or writes of up to `request_size` bytes are under way at a time. With `extents` the source is asked which
    parts are zero; with `sparse` not 0, runs of zeroes made of aligned pieces of that many bytes become zeroes too instead of
    data. Zeroes are left out when `target_is_zero`, made by `target.zero` if it can, with `allocated` without holes, and
    written otherwise. `progress(done, total)` is called with bytes after every request. Raises the first OSError that any
    request met, after all others have ended; ENOSPC before anything is written when `target` is too small, ValueError for sizes
    that fit no block.
    """
    size = source.size
    block = max(source.minimum_block, target.minimum_block)
    if target.size < size:
        raise OSError(errno.ENOSPC, f"the target has {target.size} bytes, the source {size}")
    if requests < 1 or request_size < 1 or request_size % block or sparse % block:
        raise ValueError(f"requests must be positive, and sizes multiples of the disks' block size of {block} bytes")
    if size % block:
        raise OSError(errno.EINVAL, f"the source's {size} bytes are no multiple of the block size of {block}")
    skip = target_is_zero and not allocated
    if not (target.can_zero or skip):
        sparse = 0
    pieces = _pieces(source, size, block, request_size, extents, target.can_zero or skip)
    turn = asyncio.Lock()
    nothing = memoryview(bytes(min(request_size, size)))
    done = zeroed = 0

    async def make_zero(length: int, offset: int) -> None:
        nonlocal zeroed
        if target.can_zero and not skip:
            await target.zero(length, offset, no_hole=allocated)
        elif not skip:
            await target.pwrite(nothing[:length], offset)
            return
        zeroed += length

    async def work() -> None:
        nonlocal done
        buffer = bytearray(min(request_size, size))
        whole = memoryview(buffer)
        while True:
            async with turn:
                piece = await anext(pieces, None)
            if piece is None:
                return
            offset, length, zero = piece
            view = whole[:length]
            if zero:
                await make_zero(length, offset)
            elif not sparse:
                await source.pread_into(view, offset)
                await target.pwrite(view, offset)
            else:
                await source.pread_into(view, offset)
                for start, stop, blank in zero_runs(buffer, length, sparse):
                    if blank:
                        await make_zero(stop - start, offset + start)
                    else:
                        await target.pwrite(view[start:stop], offset + start)
            done += length
            if progress is not None:
                progress(done, size)

    started = time.monotonic()
    workers = [asyncio.ensure_future(work()) for _ in range(min(requests, -(-size // request_size)))]
    try:
        if workers:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for worker in workers:
            worker.cancel()
        results = await asyncio.gather(*workers, return_exceptions=True)
        await pieces.aclose()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    if flush and target.can_flush:
        await target.flush()
    return CopyResult(done - zeroed, zeroed, time.monotonic() - started)


async def _pieces(
    source: Disk, size: int, block: int, request_size: int, extents: bool, large_zeroes: bool
) -> AsyncGenerator[tuple[int, int, bool], None]:
    """What is to be done, in order: (offset, length, is zero), data in pieces of at most `request_size` bytes, and zeroes too
    unless `large_zeroes`."""
    extents = extents and source.can_block_status
    for window in range(0, size, STATUS_WINDOW):
        length = min(STATUS_WINDOW, size - window)
        found = [Extent(window, length, 0)]
        if extents:
            try:
                found = await source.block_status(length, window)
            except OSError as error:
                if error.errno not in _NO_STATUS:
                    raise
                extents = False
        for start, stop, zero in zero_parts(found, window, window + length, block):
            step = stop - start if zero and large_zeroes else request_size
            for offset in range(start, stop, step):
                yield offset, min(step, stop - offset), zero


def zero_parts(extents: list[Extent], start: int, stop: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """Cut `start` to `stop` into parts (start, stop, all zeroes) of whole blocks, as `extents` tell; a block that is zero
    only in part is none."""
    at = start
    for extent in extents:
        first = -(-extent.offset // block) * block
        last = (extent.offset + extent.length) // block * block
        if extent.is_zero and last > first:
            if first > at:
                yield at, first, False
            yield first, last, True
            at = last
    if at < stop:
        yield at, stop, False


def zero_runs(buffer: bytearray, length: int, granule: int) -> Iterator[tuple[int, int, bool]]:
    """Cut the first `length` bytes of `buffer` into runs (start, stop, all zeroes) of whole granules; the last may be
    shorter."""
    zeroes = bytes(granule)
    start, zero = 0, False
    for at in range(0, length, granule):
        stop = min(at + granule, length)
        if (buffer[at:stop] == zeroes[: stop - at]) != zero:
            if at > start:
                yield start, at, zero
            start, zero = at, not zero
    yield start, length, zero
