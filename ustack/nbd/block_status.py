"""Block status: what a server says about the parts of an export in one of its metadata contexts.

An answer is a row of (length, flags) pairs, here in flat arrays of 64-bit numbers whether they came with 32 or 64 bits. Source:
doc/proto.md, "Metadata querying", "NBD_REPLY_TYPE_BLOCK_STATUS"; branch extension-ext-header for the wide form.
"""

from __future__ import annotations

import struct
import sys
from array import array
from typing import Final, NamedTuple

from ustack.nbd.constants import MAX_DESCRIPTORS, NBD_STATE_HOLE, NBD_STATE_ZERO
from ustack.nbd.errors import NbdProtocolError

NARROW_HEAD: Final = 4
"""Bytes before the pairs in NBD_REPLY_TYPE_BLOCK_STATUS: the context's number."""
WIDE_HEAD: Final = 8
"""In NBD_REPLY_TYPE_BLOCK_STATUS_EXT there is the number of pairs as well."""
_NARROW_PAIR: Final = 8
_WIDE_PAIR: Final = 16


class Extent(NamedTuple):
    """`length` bytes at `offset` have these `flags`. What they mean is the context's affair: in base:allocation, NBD_STATE_HOLE
    and NBD_STATE_ZERO."""

    offset: int
    length: int
    flags: int

    @property
    def is_hole(self) -> bool:
        """In base:allocation: nothing is allocated there."""
        return bool(self.flags & NBD_STATE_HOLE)

    @property
    def is_zero(self) -> bool:
        """In base:allocation: it reads as zeroes."""
        return bool(self.flags & NBD_STATE_ZERO)


def check_status_size(length: int, wide: bool) -> None:
    """Refuse the payload size of a block status chunk that no honest server sends, before anything of it is kept."""
    head, pair = (WIDE_HEAD, _WIDE_PAIR) if wide else (NARROW_HEAD, _NARROW_PAIR)
    count, rest = divmod(length - head, pair)
    if count < 1 or rest or count > MAX_DESCRIPTORS:
        raise NbdProtocolError(f"block status chunk of {length} bytes: it has 1 to {MAX_DESCRIPTORS} pairs of {pair} bytes")


def parse_status(payload: bytearray, wide: bool, asked: int, only_one: bool) -> tuple[int, array[int]]:
    """The context's number, and the pairs (length, flags) one after the other, of a chunk that answers for `asked` bytes.

    The last extent may reach beyond what was asked, the others may not. Raises NbdProtocolError.
    """
    if wide:
        context, count = struct.unpack_from(">II", payload)
        pairs = array("Q", bytes(memoryview(payload)[WIDE_HEAD:]))
        if 2 * count != len(pairs):
            raise NbdProtocolError(f"block status chunk speaks of {count} extents and has {len(pairs) // 2}")
    else:
        (context,) = struct.unpack_from(">I", payload)
        pairs = array("I", bytes(memoryview(payload)[NARROW_HEAD:]))
    if sys.byteorder == "little":
        pairs.byteswap()
    lengths = pairs[::2]
    if 0 in lengths:
        raise NbdProtocolError("block status with an extent of no bytes")
    if sum(lengths) - lengths[-1] >= asked or (only_one and (len(lengths) > 1 or lengths[0] > asked)):
        raise NbdProtocolError(
            f"block status of {len(lengths)} extents, {sum(lengths)} bytes, where {asked} bytes were asked for"
        )
    return context, pairs if wide else array("Q", pairs)


def append_extents(extents: list[Extent], pairs: array[int], offset: int, stop: int) -> int:
    """Append what `pairs` say from `offset` on, cut at `stop`; equal neighbours become one. Returns where they end."""
    for at in range(0, len(pairs), 2):
        length, flags = min(pairs[at], stop - offset), pairs[at + 1]
        last = extents[-1] if extents else None
        if last is not None and last.flags == flags and last.offset + last.length == offset:
            extents[-1] = Extent(last.offset, last.length + length, flags)
        else:
            extents.append(Extent(offset, length, flags))
        offset += length
    return offset
