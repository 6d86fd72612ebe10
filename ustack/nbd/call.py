"""A request together with what its caller waits for. It outlives connections: what a lost one had in flight is sent again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from ustack.nbd.constants import NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES
from ustack.nbd.transmission import Request

if TYPE_CHECKING:
    import asyncio

CHANGES: Final = frozenset((NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES))
"""Commands that change what the export holds."""


class Completion(Protocol):
    """Who is told what became of a call: an asyncio.Future, or somebody who wants to know within the turn of the event loop
    that brings the reply. Nothing here may raise."""

    def done(self) -> bool:
        """Nobody waits any more."""

    def cancelled(self) -> bool:
        """Whoever waited has gone."""

    def set_result(self, result: None, /) -> None:
        """The call is answered: see its `error`."""

    def set_exception(self, exception: BaseException, /) -> None:
        """It never will be, for this reason."""


class Call(Request):
    """One request of one caller.

    `future` ends when the reply is there, or with the reason why none will come. `payload` is the data of a write: the caller's
    own memory, held until the request is answered. `size` is the bytes of payload that it counts for in the admission, -1 for a
    request that holds no place there. `number` is its place in the order of all calls, `sent_at` the loop's time of its last
    sending, `mark` what a flush covers (see `UnflushedWrites.mark`). `followers` wait until the call is settled.
    """

    __slots__ = ("followers", "future", "mark", "number", "payload", "sent_at", "settled", "size")

    def __init__(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        view: memoryview | None,
        payload: memoryview | None,
        future: Completion,
        size: int,
    ) -> None:
        super().__init__(command, flags, offset, length, view)
        self.payload = payload
        self.future = future
        self.size = size
        self.number = 0
        self.sent_at = 0.0
        self.mark = (0, 0)
        self.settled = False
        self.followers: list[asyncio.Future[None]] | None = None

    def settle(self) -> None:
        """The call is answered, or will never be sent again: let its followers go on."""
        self.settled = True
        if self.followers is not None:
            for follower in self.followers:
                if not follower.done():
                    follower.set_result(None)
            self.followers = None
