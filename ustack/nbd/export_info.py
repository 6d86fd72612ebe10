"""What a server says about an export: size, transmission flags, block sizes, name and description."""

from __future__ import annotations

from dataclasses import dataclass

from ustack.nbd.constants import (
    DEFAULT_MAXIMUM_PAYLOAD,
    DEFAULT_MINIMUM_BLOCK,
    DEFAULT_PREFERRED_BLOCK,
    MAX_EXPORT_SIZE,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_ROTATIONAL,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from ustack.nbd.errors import NbdProtocolError


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as negotiated. Sizes are bytes; block sizes are the specification's defaults where the server named none."""

    name: str
    size: int
    flags: int = NBD_FLAG_HAS_FLAGS
    description: str | None = None
    canonical_name: str | None = None
    minimum_block: int = DEFAULT_MINIMUM_BLOCK
    preferred_block: int = DEFAULT_PREFERRED_BLOCK
    maximum_payload: int = DEFAULT_MAXIMUM_PAYLOAD
    block_sizes_advertised: bool = False

    @property
    def read_only(self) -> bool:
        """Writes, trims and zeroes are refused (NBD_FLAG_READ_ONLY)."""
        return bool(self.flags & NBD_FLAG_READ_ONLY)

    @property
    def can_flush(self) -> bool:
        """NBD_CMD_FLUSH may be sent (NBD_FLAG_SEND_FLUSH)."""
        return bool(self.flags & NBD_FLAG_SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        """NBD_CMD_FLAG_FUA may be set (NBD_FLAG_SEND_FUA)."""
        return bool(self.flags & NBD_FLAG_SEND_FUA)

    @property
    def is_rotational(self) -> bool:
        """The medium turns, so order matters (NBD_FLAG_ROTATIONAL)."""
        return bool(self.flags & NBD_FLAG_ROTATIONAL)

    @property
    def can_trim(self) -> bool:
        """NBD_CMD_TRIM may be sent (NBD_FLAG_SEND_TRIM)."""
        return bool(self.flags & NBD_FLAG_SEND_TRIM)

    @property
    def can_zero(self) -> bool:
        """NBD_CMD_WRITE_ZEROES may be sent (NBD_FLAG_SEND_WRITE_ZEROES)."""
        return bool(self.flags & NBD_FLAG_SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        """NBD_CMD_FLAG_FAST_ZERO may be set (NBD_FLAG_SEND_FAST_ZERO)."""
        return bool(self.flags & NBD_FLAG_SEND_FAST_ZERO)

    @property
    def can_df(self) -> bool:
        """NBD_CMD_FLAG_DF may be set on reads (NBD_FLAG_SEND_DF)."""
        return bool(self.flags & NBD_FLAG_SEND_DF)

    @property
    def can_multi_conn(self) -> bool:
        """Several connections see one cache (NBD_FLAG_CAN_MULTI_CONN)."""
        return bool(self.flags & NBD_FLAG_CAN_MULTI_CONN)

    @property
    def can_cache(self) -> bool:
        """NBD_CMD_CACHE may be sent (NBD_FLAG_SEND_CACHE)."""
        return bool(self.flags & NBD_FLAG_SEND_CACHE)

    @property
    def can_block_status_payload(self) -> bool:
        """A block status may be asked for some of the metadata contexts only (NBD_FLAG_BLOCK_STATUS_PAYLOAD)."""
        return bool(self.flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD)


def check_size(size: int) -> None:
    """Refuse an export size that does not fit a signed 64-bit offset with NbdProtocolError."""
    if size > MAX_EXPORT_SIZE:
        raise NbdProtocolError(f"export size {size:#x} does not fit 63 bits")


def check_block_sizes(minimum: int, preferred: int, maximum: int) -> int:
    """Check NBD_INFO_BLOCK_SIZE ("Block size constraints") and return the largest payload in bytes that we will use.

    Raises NbdProtocolError for sizes that no request could satisfy. A maximum of 0xffffffff means no limit; we stay at the 32
    MiB that every peer takes.
    """
    if minimum == 0 or minimum & (minimum - 1) or minimum > DEFAULT_MAXIMUM_PAYLOAD:
        raise NbdProtocolError(f"minimum block size {minimum} is not a power of two from 1 to 32 MiB")
    if preferred < minimum or preferred & (preferred - 1):
        raise NbdProtocolError(f"preferred block size {preferred} is not a power of two from the minimum of {minimum} up")
    if maximum < minimum or (maximum != 0xFFFFFFFF and maximum % minimum):
        raise NbdProtocolError(f"maximum block size {maximum} is no multiple of the minimum of {minimum}")
    largest = min(maximum, DEFAULT_MAXIMUM_PAYLOAD)
    return largest - largest % minimum
