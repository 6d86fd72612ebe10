"""SYN cookies (RFC 4987, section 3.6; Bernstein): a listener whose queue is full keeps no state for a SYN.

Our initial sequence number is the state. It says when it was made, which segment size the peer announced, and has a MAC over
both, the connection's name and the peer's initial sequence number. Window scale and SACK do not fit; where the peer sends
timestamps, the low bits of ours carry them, as in Linux (cookie_init_timestamp).
"""

from __future__ import annotations

from hashlib import blake2s
from typing import Final, NamedTuple

from ustack.wire.tcp import TcpOptions

PERIOD: Final = 64
"""Seconds after which cookies look different."""

LIFETIME: Final = 2
"""Periods in which a cookie is good: that in which it was made, and the next."""

MSS_VALUES: Final = (48, 536, 1024, 1220, 1300, 1440, 1460, 8960)
"""The segment sizes that a cookie can say; the largest that is no larger than the peer's is taken."""

COUNT_SHIFT: Final = 27
INDEX_SHIFT: Final = 24
"""A cookie: 5 bits of the period's number, 3 bits of the place in MSS_VALUES, 24 bits of MAC."""

MAC_MASK: Final = (1 << INDEX_SHIFT) - 1
COUNT_MASK: Final = 31

STATE_MASK: Final = 0x3F
"""The bits of a timestamp that carry options: four of window scale, one of SACK."""

NO_WSCALE: Final = 0xF
SACK_BIT: Final = 0x10


class SynState(NamedTuple):
    """What a cookie remembers of a SYN. `wscale` is -1 where it had none, or where there were no timestamps to carry it."""

    mss: int
    wscale: int
    sack: bool


class SynCookies:
    """Makes cookies and knows them again. `secret` is 16 random bytes, made new for each stack."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, key: bytes, irs: int, mss: int, now: float) -> int:
        """The initial sequence number with which to answer a SYN of the connection named `key`, whose sequence number was `irs`
        and whose segment size is `mss` bytes, at `now` seconds.
        """
        index = len(MSS_VALUES) - 1
        while index and MSS_VALUES[index] > mss:
            index -= 1
        count = int(now) // PERIOD
        return (count & COUNT_MASK) << COUNT_SHIFT | index << INDEX_SHIFT | self._mac(key, irs, count, index)

    def check(self, key: bytes, irs: int, cookie: int, now: float) -> int:
        """The segment size in bytes that `cookie` says, or 0 when we did not make it for this connection lately."""
        index = cookie >> INDEX_SHIFT & 7
        newest = int(now) // PERIOD
        age = (newest - (cookie >> COUNT_SHIFT)) & COUNT_MASK
        if age >= LIFETIME or cookie & MAC_MASK != self._mac(key, irs, newest - age, index):
            return 0
        return MSS_VALUES[index]

    def _mac(self, key: bytes, irs: int, count: int, index: int) -> int:
        text = b"%b%d/%d/%d" % (key, irs, count, index)
        return int.from_bytes(blake2s(text, key=self._secret, digest_size=3, person=b"cookie").digest())


def timestamp_with_state(clock: int, wscale: int, sack: bool) -> int:
    """The newest value of the timestamp clock, at most `clock`, whose low bits say `wscale` (-1: none) and `sack`."""
    state = (wscale if wscale >= 0 else NO_WSCALE) | (SACK_BIT if sack else 0)
    value = clock & ~STATE_MASK | state
    return value if value <= clock else value - STATE_MASK - 1


def options_of(mss: int, echoed: int, ts_val: int) -> TcpOptions:
    """The options of the SYN whose cookie said `mss`, as far as they were kept: `echoed` is the value of our timestamp clock
    that came back with `ts_val`, both -1 without timestamps.
    """
    options = TcpOptions()
    options.mss = mss
    if ts_val >= 0:
        options.ts_val = ts_val
        wscale = echoed & NO_WSCALE
        options.wscale = wscale if wscale != NO_WSCALE else -1
        options.sack_permitted = echoed & SACK_BIT != 0
    return options
