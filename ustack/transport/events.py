"""What a socket's user is told, and the directions that can be shut down."""

from __future__ import annotations

from typing import Final, Protocol

READABLE: Final = 1
"""Data, a connection to accept, the end of the stream or an error has come (POLLIN)."""

WRITABLE: Final = 2
"""There is room to send, the connection is made, or an error has come (POLLOUT)."""

SHUT_RD: Final = 1
"""No more reading."""

SHUT_WR: Final = 2
"""No more writing."""

ORPHAN: Final = 4
"""Closed by its user: nobody will read or write any more."""


class DirectReader(Protocol):
    """A user who waits with a buffer, so that data can be copied there straight from the frame, past the receive queue."""

    def buffer_for(self, size: int) -> memoryview | None:
        """A buffer for at least `size` bytes; None when the user has none now, and the data is to be queued."""

    def took(self, size: int) -> None:
        """The first `size` bytes of that buffer are filled. Called when the segment has been dealt with: the user may do
        anything.
        """


def nobody(_: int) -> None:
    """The `wake` of a socket whose user is gone, or has not come yet."""
