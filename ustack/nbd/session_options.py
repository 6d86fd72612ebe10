"""What can be asked of a session, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.nbd.tls import TlsSettings

QUEUE_DEPTH: Final = 64
"""Requests in flight on one connection (libnbd's advice)."""
MAX_BYTES_IN_FLIGHT: Final = 64 << 20
"""Bytes of payload in flight: two requests of the largest size that every server takes."""
REQUEST_SIZE: Final = 64 << 10
"""Bytes of a request that the reserve is made for, unless told otherwise."""
DEAD_AFTER: Final = 30.0
"""Seconds without an answer, while requests wait, after which they fail: enough for a server to be restarted."""


class SessionOptions(TypedDict, total=False):
    """Keyword arguments that `connect` and `NbdClient.open` hand on to the `Session`.

    `queue_depth`: requests in flight per connection; `max_bytes_in_flight`: bytes of their payload, together. `connections`:
    how many to use where the server says that they see one cache (NBD_FLAG_CAN_MULTI_CONN); one otherwise. `connect_timeout`:
    seconds for each attempt to connect and negotiate. `request_timeout`: seconds without any sign of life while a request
    waits, after which a connection counts as lost; None: never. `dead_after`: see `session.py`, seconds; 0: a lost connection
    is the end at once; None: wait for ever. `check_cache`: read samples of unflushed writes back after an outage.
    `copy_writes`: copy the data of each write when it is called, so that a caller who is cancelled may use its memory at once.
    `tls`: what to demand on each of the ways; empty for none. `on_event`: called with the name of an event and its reason.
    `structured_replies`, `extended_headers` and `meta_contexts`: what to ask the server for, see `Wishes`. `strict`: which
    rules to keep, see `strict.py`.
    """

    queue_depth: int
    max_bytes_in_flight: int
    request_size: int
    connections: int
    connect_timeout: float | None
    request_timeout: float | None
    dead_after: float | None
    check_cache: bool
    copy_writes: bool
    on_event: Callable[[str, OSError | None], object]
    tls: Sequence[TlsSettings | None]
    structured_replies: bool
    extended_headers: bool
    meta_contexts: Sequence[str]
    strict: int


@dataclass(slots=True)
class SessionCounters:
    """What has happened to a session so far. All are counts."""

    connected: int = 0
    """Connections made and negotiated."""
    lost: int = 0
    """Connections lost."""
    outages: int = 0
    """Times without any connection."""
    failed_attempts: int = 0
    """Attempts to connect again that failed."""
    replayed: int = 0
    """Requests sent again."""
    slow: int = 0
    """Requests that took longer than the request timeout while the server was alive."""
    unflushed_at_outage: int = 0
    """Writes that were answered but not flushed when an outage began: the server may have lost them."""
    samples_checked: int = 0
    """Of these and older ones, samples read back."""
    samples_lost: int = 0
    """Samples that were not there any more."""

    def report(self) -> dict[str, int]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
