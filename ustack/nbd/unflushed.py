"""What the server has answered and may still lose: writes that no flush has covered yet.

A server that crashes may lose them, and the protocol has no word for it. We cannot write them again, since their data is gone
from here, but we can notice: the last few writes are remembered by a checksum of their first bytes, and after an outage they
are read back. It is a sample, not a proof; what it finds is certain, unless somebody else writes to the same export.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

from ustack.nbd.constants import NBD_CMD_FLAG_FUA, NBD_CMD_TRIM, NBD_CMD_WRITE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.nbd.call import Call

REMEMBERED: Final = 64
"""Writes of which a sample is kept."""
SAMPLE: Final = 512
"""Bytes of a write that are remembered by their checksum, or a block of the export if that is larger."""


class Sample(NamedTuple):
    """The first `length` bytes of an answered write at `offset` had the checksum `crc`; None where they may be anything.
    `extent` is the length of the whole write, `number` its place in the order of answers."""

    number: int
    offset: int
    extent: int
    length: int
    crc: int | None


class UnflushedWrites:
    """Counts answered writes and bytes that no flush covers, and keeps samples of the last `REMEMBERED` writes."""

    __slots__ = ("_answered", "_bytes", "_flushed", "_flushed_bytes", "_sample", "_samples", "_zero_crc")

    def __init__(self, minimum_block: int) -> None:
        """`minimum_block` in bytes: reads must be multiples of it."""
        self._sample = max(SAMPLE, minimum_block)
        self._zero_crc = crc32(bytes(self._sample))
        self._samples: deque[Sample] = deque(maxlen=REMEMBERED)
        self._answered = self._bytes = 0
        self._flushed = self._flushed_bytes = 0

    @property
    def count(self) -> int:
        """Answered writes, trims and zeroes that no flush covers."""
        return self._answered - self._flushed

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return self._bytes - self._flushed_bytes

    def mark(self) -> tuple[int, int]:
        """What a flush that is sent now will cover; for `flushed`."""
        return self._answered, self._bytes

    def flushed(self, mark: tuple[int, int]) -> None:
        """A flush is answered that was sent at `mark`."""
        if mark[0] > self._flushed:
            self._flushed, self._flushed_bytes = mark

    def answered(self, call: Call) -> None:
        """A write, trim or write-zeroes request has been answered without error; its payload is still there."""
        length = min(call.length, self._sample)
        crc: int | None
        if call.command == NBD_CMD_WRITE:
            payload = call.payload
            crc = None if payload is None else crc32(payload if len(payload) == length else payload[:length])
        elif call.command == NBD_CMD_TRIM:
            crc = None
        else:
            crc = self._zero_crc if length == self._sample else crc32(bytes(length))
        if call.flags & NBD_CMD_FLAG_FUA:
            number = 0  # durable already
        else:
            number = self._answered = self._answered + 1
            self._bytes += call.length
        self._samples.append(Sample(number, call.offset, call.length, length, crc))

    def is_flushed(self, sample: Sample) -> bool:
        """A flush has covered the write of this sample, or it was written with FUA."""
        return sample.number <= self._flushed

    def samples(self, changing: Iterable[Call]) -> list[Sample]:
        """What must still be on the export, newest first. Pieces that a newer write or one of `changing`, which are under way,
        has touched are left out."""
        covered = [(call.offset, call.offset + call.length) for call in changing]
        found = []
        for sample in reversed(self._samples):
            start, stop = sample.offset, sample.offset + sample.length
            if sample.crc is not None and not any(a < stop and start < b for a, b in covered):
                found.append(sample)
            covered.append((start, sample.offset + sample.extent))
        return found

    def forget(self) -> None:
        """Begin anew: what was answered so far is known to be lost."""
        self._samples.clear()
        self._flushed, self._flushed_bytes = self._answered, self._bytes
