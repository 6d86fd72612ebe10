"""How many ICMP errors we send: a limit for all together and one for each destination (RFC 1812, section 4.3.2.8; RFC 4443,
section 2.4 f), as Linux has them (icmp_msgs_per_sec, icmp_ratelimit).

What one error costs of the common limit is random, zero to two with a mean of one, so that nobody can count from outside what
others have drawn (CVE-2020-25705).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ustack.env import Env

PER_SECOND: Final = 1000.0
"""Errors that we send at most (Linux, icmp_msgs_per_sec)."""

BURST: Final = 50.0
"""Errors that we send at once (Linux, icmp_msgs_burst)."""

PEER_INTERVAL: Final = 1.0
"""Seconds per error to one destination (Linux, icmp_ratelimit)."""

PEER_BURST: Final = 6.0
"""Errors to one destination at once (Linux, XRLIM_BURST_FACTOR)."""

PEERS_MAX: Final = 1024
"""Destinations that are remembered; the one that was told longest ago is forgotten first."""


class ErrorLimiter:
    """The token buckets of one IP version."""

    __slots__ = ("_env", "_peers", "_refilled", "_tokens")

    def __init__(self, env: Env) -> None:
        self._env = env
        self._tokens = BURST
        self._refilled = env.timers.now
        self._peers: dict[bytes, tuple[float, float]] = {}  # tokens, and when; the one told last comes last

    def allow(self, dst: bytes) -> bool:
        """Whether an error may go to `dst` now; if so it is counted."""
        now = self._env.timers.now
        tokens = min(BURST, self._tokens + (now - self._refilled) * PER_SECOND)
        self._refilled = now
        self._tokens = tokens
        if tokens < 1.0:
            return False
        peers = self._peers
        peer_tokens, since = peers.pop(dst, (PEER_BURST, now))
        peer_tokens = min(PEER_BURST, peer_tokens + (now - since) / PEER_INTERVAL)
        allowed = peer_tokens >= 1.0
        if allowed:
            peer_tokens -= 1.0
            self._tokens = max(tokens - self._env.random.randrange(3), 0.0)
        peers[dst] = (peer_tokens, now)
        if len(peers) > PEERS_MAX:
            del peers[next(iter(peers))]
        return allowed
