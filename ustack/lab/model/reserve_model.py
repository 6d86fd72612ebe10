"""The reserve, the drop rule and the NBD exchange as a model of a few pages, small enough to be explored completely.

One page is what one frame or one page of a request takes. Ordinary sockets are blocked: what they receive they hold for ever.
The NBD client always has another request. A request is written to the send queue page by page; when all of it has reached the
server, the reply's frames come, in any order and each as often as it takes, for TCP sends again what is not acknowledged. So
loss, reordering and retransmission need no states of their own: a frame that is lost is one that does not arrive yet. A frame
arrives in a posted buffer (linear) or is classified in the ring before anything is allocated (paged), takes the
acknowledgment of everything that has reached the server along, and is kept in order or out of order until the client reads.

Every rule can be left out, which is the point: `configurations` has the complete sets of rules, and each with one rule missing.
`reserve` is the `min` watermark: an ordinary allocation must leave so many pages free, and one with MEMALLOC need not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from ustack.lab.model.checker import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

ORDINARY_FRAME: Final = "ordinary frame"
POST: Final = "post"
WRITE: Final = "write"
REACH: Final = "reach"
ACKNOWLEDGE: Final = "acknowledge"
REPLY: Final = "reply"
REPLY_OUT_OF_ORDER: Final = "reply out of order"
READ: Final = "read"

FAIR: Final = frozenset({POST, WRITE, REACH, ACKNOWLEDGE, REPLY, READ})
"""What happens sooner or later when it can happen again and again: the server sends until it is acknowledged, and the client
reads.
"""


class ReserveState(NamedTuple):
    """Where the pages are, and how far the exchange has come since the oldest request that is not done.

    What is not here is free. `ring` are the posted buffers of a linear ring in their order, True for one from the reserve.
    """

    ring: tuple[bool, ...]
    blocked: int
    """Pages held by ordinary sockets."""
    written: int
    """Pages of requests written to the send queue so far; those up to `acked` are freed."""
    reached: int
    """Pages of requests that the server has."""
    acked: int
    """Pages of requests whose acknowledgment has come."""
    unread: int
    """Frames of replies in the receive queue, a page each."""
    ahead: int
    """Frames held out of order: bit n is the n-th frame after the next expected one."""
    read: int
    """Frames of the oldest reply that the client has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveModel:
    """Bounds and rules. Sizes are pages, a page being a frame."""

    name: str
    linear: bool
    """Buffers are posted before the owner is known; otherwise a frame is classified before anything is allocated."""
    reserve: int
    """The `min` watermark; 0: no reserve."""
    pages: int = 7
    """All there are, without the pages that a paged ring owns for good."""
    posted: int = 2
    """Buffers that a linear ring posts."""
    depth: int = 2
    """Requests in flight at most."""
    request: int = 1
    """Pages of a request."""
    reply: int = 2
    """Frames of a reply."""
    window: int = 2
    """Frames of replies that may be held: the receive limit of the NBD socket."""
    memalloc: bool = True
    """The NBD socket may allocate from the reserve."""
    emergency: bool = True
    """The linear ring may post buffers from the reserve."""
    drop_rule: bool = True
    """A frame in a buffer from the reserve that is for an ordinary socket is dropped."""
    prune: bool = True
    """Out-of-order data is given up when there is no memory for data in order."""
    head_last: bool = False
    """A linear frame's head is allocated when its owner is known, and for him: no page free for him, no head, and the buffer
    stays in the ring. (In a page are so many heads that none is counted.) Otherwise it comes with the buffer, as in 2006.
    """
    admission: bool = False
    """A new request begins only while more than half of the reserve is free."""
    limit: int | None = None
    """Pages that all ordinary sockets together may hold; None: no limit, as when each has its own and there are many."""

    @property
    def fair(self) -> frozenset[str]:
        """See `FAIR`."""
        return FAIR

    @property
    def enough(self) -> int:
        """The smallest reserve with which there is always progress under all rules (found by exploring, see the tests). With
        admission, or with heads last, less may be enough.

        Paged: one frame, whatever is in flight, for acknowledgments need no memory and out-of-order data is given up for data
        in order. Linear: one buffer more than the ring posts, and one more than what may be held while it waits for a frame:
        requests not acknowledged, and replies ahead of a missing frame. Admission is pessimistic about the ring: its buffers
        must leave more than half of the reserve free, or not even a first request begins.
        """
        if not self.linear:
            return 1
        held = self.depth * self.request
        for answered in range(1, self.depth + 1):
            ahead = min(self.window, answered * self.reply) - 1
            held = max(held, ahead + (self.depth - answered) * self.request)
        return max(self.posted, held, 2 * self.posted if self.admission else 0) + 1

    def free(self, state: ReserveState) -> int:
        """Pages that nobody holds."""
        sending = state.written - state.acked
        return self.pages - len(state.ring) - state.blocked - sending - state.unread - state.ahead.bit_count()

    def first(self) -> ReserveState:
        """Before the pressure: the ring is full, everything else is free."""
        return ReserveState((False,) * (self.posted if self.linear else 0), 0, 0, 0, 0, 0, 0, 0)

    def steps(self, state: ReserveState) -> Iterator[Step[ReserveState]]:
        """All that may happen. What changes nothing (a frame that is dropped) is left out."""
        yield from self._ordinary_frame(state)
        yield from self._post(state)
        yield from self._write(state)
        if state.reached < state.written:
            yield Step(REACH, "the server gets a page of a request", state._replace(reached=state.reached + 1))
        if state.acked < state.reached and (state.ring or not self.linear):
            yield Step(ACKNOWLEDGE, "an acknowledgment comes, and what it covers is freed", state._replace(acked=state.reached))
        yield from self._reply(state)
        yield from self._read(state)

    def _allows(self, free: int, memalloc: bool) -> bool:
        """Whether one more page may be taken when `free` are."""
        return free > (0 if memalloc else self.reserve)

    def _ordinary_frame(self, state: ReserveState) -> Iterator[Step[ReserveState]]:
        if self.limit is not None and state.blocked >= self.limit:
            return
        if not self.linear:
            if self._allows(self.free(state), False):
                yield Step(ORDINARY_FRAME, "a frame for a blocked socket is kept", state._replace(blocked=state.blocked + 1))
        elif state.ring and not (state.ring[0] and self.drop_rule):
            if self.head_last and not self._allows(self.free(state), False):
                return
            of = "a buffer from the reserve" if state.ring[0] else "its buffer"
            after = state._replace(blocked=state.blocked + 1, ring=state.ring[1:])
            yield Step(ORDINARY_FRAME, f"a frame for a blocked socket is kept, and takes {of} along", after)

    def _post(self, state: ReserveState) -> Iterator[Step[ReserveState]]:
        if not self.linear or len(state.ring) == self.posted:
            return
        free = self.free(state)
        if self._allows(free, False):
            yield Step(POST, "the ring posts a buffer", state._replace(ring=(*state.ring, False)))
        elif self._allows(free, self.emergency):
            yield Step(POST, "the ring posts a buffer from the reserve", state._replace(ring=(*state.ring, True)))

    def _write(self, state: ReserveState) -> Iterator[Step[ReserveState]]:
        free = self.free(state)
        if not self._allows(free, self.memalloc):
            return
        if state.written % self.request == 0:
            if state.written == self.depth * self.request or (self.admission and free * 2 <= self.reserve):
                return
        origin = ", from the reserve" if free <= self.reserve else ""
        yield Step(WRITE, f"a page of a request is written{origin}", state._replace(written=state.written + 1))

    def _reply(self, state: ReserveState) -> Iterator[Step[ReserveState]]:
        """Any frame may arrive that the server owes, that fits the window, and that is not here yet."""
        if self.linear and (not state.ring or (state.ring[0] and self.drop_rule and not self.memalloc)):
            return
        owed = state.reached // self.request * self.reply - state.read - state.unread
        acked = state._replace(acked=state.reached)
        taken = acked._replace(ring=state.ring[1:])
        fits = (self.linear and not self.head_last) or self._allows(self.free(acked), self.memalloc)
        if owed > 0 and state.unread < self.window:
            if fits:
                yield Step(REPLY, "the next frame of a reply comes and is kept", _in_order(taken))
            elif self.prune and state.ahead:
                pruned = acked._replace(ahead=0)
                if self._allows(self.free(pruned), self.memalloc):
                    pruned = _in_order(taken._replace(ahead=0))
                yield Step(REPLY, "the next frame of a reply comes, and what was out of order is given up for it", pruned)
        for index in range(1, min(owed, self.window - state.unread)):
            if fits and not state.ahead >> index & 1:
                text = f"a frame of a reply comes {index} too early and is kept"
                yield Step(REPLY_OUT_OF_ORDER, text, taken._replace(ahead=state.ahead | 1 << index))

    def _read(self, state: ReserveState) -> Iterator[Step[ReserveState]]:
        if not state.unread:
            return
        after = state._replace(unread=state.unread - 1, read=state.read + 1)
        if after.read < self.reply:
            yield Step(READ, "the client reads a frame", after)
            return
        done = after._replace(
            read=0,
            written=state.written - self.request,
            reached=state.reached - self.request,
            acked=state.acked - self.request,
        )
        yield Step(READ, "the client reads the last frame of a reply: the request is done", done, progress=True)


def _in_order(state: ReserveState) -> ReserveState:
    """One more frame in order, and what has become contiguous with it."""
    count = 1
    while state.ahead >> count & 1:
        count += 1
    return state._replace(unread=state.unread + count, ahead=state.ahead >> count & ~1)


def configurations() -> list[ReserveModel]:
    """The complete rules in both receive modes, and what each rule is for: the same without it."""
    paged = ReserveModel(name="paged", linear=False, reserve=1)
    linear = ReserveModel(name="linear", linear=True, reserve=3)
    wide = replace(linear, depth=2, reply=3, window=4)
    pages = replace(paged, reserve=2, reply=3, window=4)
    throttled = replace(linear, admission=True)
    return [
        paged,
        replace(paged, name="paged, no reserve", reserve=0),
        replace(paged, name="paged, NBD socket not memalloc", memalloc=False),
        replace(pages, name="paged, out of order, given up"),
        replace(pages, name="paged, out of order, never given up", prune=False),
        linear,
        replace(linear, name="linear, no reserve", reserve=0),
        replace(linear, name="linear, NBD socket not memalloc", memalloc=False, emergency=False),
        replace(linear, name="linear, no drop rule", drop_rule=False),
        replace(linear, name="linear, ring never from the reserve", emergency=False),
        replace(linear, name="linear, reserve as large as the ring", reserve=2),
        replace(wide, name="linear, out of order, reserve for it", reserve=4),
        replace(wide, name="linear, out of order, reserve too small", reserve=3),
        replace(throttled, name="linear, admission, larger reserve", reserve=5),
        replace(throttled, name="linear, admission, reserve twice the ring", reserve=4),
        replace(linear, name="linear, no reserve, blocked are limited", reserve=0, limit=2),
        replace(linear, name="linear, head last", head_last=True),
        replace(linear, name="linear, head last, no drop rule", head_last=True, drop_rule=False),
        replace(linear, name="linear, head last, no reserve", head_last=True, reserve=0),
    ]
