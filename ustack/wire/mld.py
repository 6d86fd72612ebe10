"""Multicast Listener Discovery: queries, and reports of versions 1 and 2 (RFC 2710; RFC 3810, section 5)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Buffer

MODE_IS_EXCLUDE: Final = 2
CHANGE_TO_INCLUDE: Final = 3
CHANGE_TO_EXCLUDE: Final = 4
"""Kinds of group records (RFC 3810, section 5.2.12); no sources are named: a whole group is listened to, or it is not."""

QUERY_LEN: Final = 24
QUERY_V2_LEN: Final = 28
"""Bytes of a query of version 1, and of version 2 without sources."""

_QUERY: Final = Struct("!4xH2x16s")


class Query(NamedTuple):
    """A query for `group` (16 bytes; :: for all). `delay` is within how many seconds to answer."""

    version: int
    delay: float
    group: bytes


def parse_query(buffer: Buffer, start: int, end: int) -> Query | None:
    """The query that begins, with its ICMPv6 type, at `start`; None when its length is impossible (RFC 3810, section 8.1)."""
    length = end - start
    if end > len(buffer) or (length != QUERY_LEN and length < QUERY_V2_LEN):
        return None
    code, group = _QUERY.unpack_from(buffer, start)
    if length == QUERY_LEN:
        return Query(1, code / 1000, group)
    milliseconds = code if code < 0x8000 else (code & 0xFFF | 0x1000) << ((code >> 12 & 7) + 3)
    return Query(2, milliseconds / 1000, group)


def build_records(records: Sequence[tuple[int, bytes]]) -> bytes:
    """The body of a version 2 report, behind its ICMPv6 header (whose word is the number of records): kinds and groups."""
    return b"".join(bytes((kind, 0, 0, 0)) + group for kind, group in records)
