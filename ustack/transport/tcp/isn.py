"""Initial sequence numbers (RFC 6528, section 3): a 4 microsecond clock plus a keyed hash of the connection's four names."""

from __future__ import annotations

from hashlib import blake2s
from typing import Final

TICKS_PER_SECOND: Final = 250_000
"""The clock M of RFC 6528 ticks every 4 microseconds."""


class IsnGenerator:
    """Chooses initial sequence numbers and timestamp offsets. `secret` is 16 random bytes, made new for each stack."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def isn(self, key: bytes, now: float) -> int:
        """The ISN for the connection named `key` (addresses and ports, packed) at `now` seconds."""
        digest = blake2s(key, key=self._secret, digest_size=4, person=b"isn").digest()
        return (int(now * TICKS_PER_SECOND) + int.from_bytes(digest)) & 0xFFFFFFFF

    def timestamp_offset(self, key: bytes) -> int:
        """What is added to the timestamp clock of the connection named `key`, so that it tells nothing of our uptime (RFC 7323,
        5.4).
        """
        return int.from_bytes(blake2s(key, key=self._secret, digest_size=4, person=b"ts").digest())
