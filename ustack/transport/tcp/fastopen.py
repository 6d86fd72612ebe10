"""TCP Fast Open (RFC 7413): data with the SYN, for clients that have shown before that they are where they say they are.

The cookie that shows it is a MAC over the client's address. It is given out with a SYN-ACK when a SYN asks for it.
"""

from __future__ import annotations

from hashlib import blake2s
from hmac import compare_digest
from typing import Final

CLIENT: Final = 0x1
"""`TcpConfig.fastopen`: connections that are opened with data send it with the SYN (tcp_fastopen)."""
SERVER: Final = 0x2
"""Listeners with TCP_FASTOPEN take data with the SYN."""
CLIENT_NO_COOKIE: Final = 0x4
"""A client sends data even without a cookie."""
SERVER_COOKIE_NOT_REQD: Final = 0x200
"""A server takes data even without a cookie."""
SERVER_WO_SOCKOPT: Final = 0x400
"""Every listener is as if it had TCP_FASTOPEN."""

COOKIE_LEN: Final = 8
"""Bytes of our cookies."""

KNOWN_MAX: Final = 1024
"""Servers whose cookies are remembered; the oldest is forgotten first."""


class FastOpen:
    """The cookies that we give to clients, and those that servers gave to us. `secret` is 16 random bytes, new for each
    stack.
    """

    __slots__ = ("_known", "_secret")

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._known: dict[bytes, tuple[bytes, int]] = {}

    def cookie_for(self, client: bytes) -> bytes:
        """The cookie of the client with that address (packed)."""
        return blake2s(client, key=self._secret, digest_size=COOKIE_LEN, person=b"fastopen").digest()

    def knows(self, client: bytes, cookie: bytes) -> bool:
        """Whether `cookie` is the one that we gave to `client`."""
        return compare_digest(cookie, self.cookie_for(client))

    def remember(self, server: bytes, cookie: bytes, mss: int) -> None:
        """The `server` with that address (packed) gave us `cookie`, and announced segments of `mss` bytes."""
        self._known.pop(server, None)
        if len(self._known) >= KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[server] = (cookie, mss)

    def recall(self, server: bytes) -> tuple[bytes, int] | None:
        """What `remember` was told of `server`."""
        return self._known.get(server)
