"""Reassembly: fragments in, datagrams out, for IPv4 (RFC 791, section 3.2; RFC 1122, section 3.3.2) and IPv6 (RFC 8200,
section 4.5).

What the two have in common is here. Who owns a `Fragments` parses the headers, says by which `key` fragments belong together,
and is told by `on_failed` what will never be whole. A piece is an skb charged to its source; a whole datagram is one skb with
the memory of all pieces, so nothing is copied.

Everything is bounded, because anybody can send fragments:

* Memory: `high_thresh` for all and `source_thresh` for one source, in truesize. Over either the oldest datagrams go first, down
  to three quarters, so that an honest datagram, which is whole within a round trip, survives a flood from elsewhere. (Linux
  refuses new datagrams instead: a flood then keeps everybody out until its own time out.)
* Time per fragment: what has come of a datagram is kept as sorted runs without gaps; a fragment finds its place by binary
  search, or at once when it continues the last run. All datagrams time out in the order in which they began, so that one timer
  and the order of a dict are enough.

What overlaps is never merged. IPv6 gives the whole datagram up unless the fragment is an exact duplicate (RFC 5722); IPv4 does
the same as Linux today: what brings nothing new is a duplicate and is dropped alone, any other overlap ends the datagram.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pools.gfp import ATOMIC
from ustack.drops import DropReason
from ustack.skb import Account
from ustack.timers import Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.env import Env
    from ustack.link.rxring import RxFrame
    from ustack.net.interface import Interface
    from ustack.skb import Skb

PACKET_MAX: Final = 65535
"""Bytes of a packet that was put together, network header included; what would be longer is an attack ("ping of death")."""

ARENA_SHARE: Final = 8
"""Fragments never hold more than this fraction of the packet memory, however large `high_thresh` is."""

SOURCE_SHARE: Final = 4
"""One source may hold this fraction of what all may, or `SOURCE_MIN` if that is more."""

SOURCE_MIN: Final = 192 << 10
"""Truesize that one source may hold at least: the largest datagram in fragments of 1500 bytes, and some."""

_ECN_MASK: Final = 3
_OVERLAP: Final = DropReason.FRAG_OVERLAP
_INVALID: Final = DropReason.FRAG_INVALID


@dataclass(slots=True)
class FragmentParameters:
    """The limits of reassembly: names and defaults of Linux (networking/ip-sysctl.rst)."""

    high_thresh: int = 4 << 20
    """Truesize of all fragments that wait (ipfrag_high_thresh); at most an eighth of the packet memory."""
    time: float = 30.0
    """Seconds that a datagram may take to be whole (ipfrag_time; 60 for IPv6)."""
    max_dist: int = 64
    """Fragments that a source may send between two of the same datagram, before what came first is taken for one of an older
    datagram with the same identification (ipfrag_max_dist); 0: any number."""
    exact: bool = False
    """Only an exact duplicate is tolerated, any other overlap ends the datagram (RFC 5722)."""


class FragmentSource:
    """What one host has begun to send us: its datagrams in the order in which they began, and what they cost."""

    __slots__ = ("account", "address", "queues", "received")

    def __init__(self, address: bytes, account: Account) -> None:
        self.address = address
        self.account = Account("fragments", account)
        self.queues: OrderedDict[bytes, FragmentQueue] = OrderedDict()
        self.received = 0  # fragments, for the distance


class FragmentQueue:
    """The pieces of one datagram. `length` is that of its payload in bytes, of which the end is known once `last` is set.

    `header` is everything before the payload of the fragment with offset 0, link header included, as it arrived, with the
    network header at `l3`; empty while that one is missing. `tos` is its type of service, and `ecn` the congestion marks that
    were seen.
    """

    __slots__ = (
        "broadcast",
        "deadline",
        "ecn",
        "ends",
        "header",
        "interface",
        "key",
        "l3",
        "last",
        "length",
        "pieces",
        "serial",
        "source",
        "starts",
        "tos",
    )

    def __init__(self, key: bytes, source: FragmentSource, interface: Interface, broadcast: bool, deadline: float) -> None:
        self.key = key
        self.source = source
        self.interface = interface
        self.broadcast = broadcast
        self.deadline = deadline
        self.header = b""
        self.l3 = 0
        self.tos = 0
        self.length = 0
        self.last = False
        self.pieces: dict[int, Skb] = {}  # by offset
        self.starts: list[int] = []  # of the runs
        self.ends: list[int] = []
        self.ecn = 0  # a bit for each of the four codepoints that was seen
        self.serial = 0  # of the source's fragments, the newest of this datagram

    @property
    def first(self) -> Skb | None:
        """The piece with offset 0, if it has come."""
        return self.pieces.get(0)

    def marked_tos(self) -> int:
        """`tos` as the whole datagram shall have it; -1 when the fragments' marks cannot come from one packet."""
        seen = self.ecn
        if not seen & (seen - 1):  # all the same
            return self.tos
        if seen & 1:  # some are not ECN-capable
            return -1
        return self.tos | 3 if seen & 8 else self.tos


class Fragments:
    """Reassembly for one IP version. `on_failed(queue, reason)` is called before what is left of a datagram is freed."""

    __slots__ = ("_env", "_on_failed", "_queues", "_sources", "_timer", "account", "creates", "parameters")

    def __init__(
        self, env: Env, parameters: FragmentParameters, on_failed: Callable[[FragmentQueue, DropReason], None]
    ) -> None:
        self._env = env
        self._on_failed = on_failed
        self.parameters = parameters
        parameters.high_thresh = min(parameters.high_thresh, env.memory.arena.size // ARENA_SHARE)
        self.account = Account("fragments")
        self._queues: OrderedDict[bytes, FragmentQueue] = OrderedDict()  # the oldest first
        self._sources: dict[bytes, FragmentSource] = {}
        self._timer = Timer(self._expire)

    def __len__(self) -> int:
        return len(self._queues)

    @property
    def source_thresh(self) -> int:
        """Truesize that one source may hold."""
        limit = self.parameters.high_thresh
        return max(limit // SOURCE_SHARE, min(limit, SOURCE_MIN))

    # -- in --

    def add(
        self,
        key: bytes,
        source: bytes,
        interface: Interface,
        frame: RxFrame,
        at: int,
        start: int,
        end: int,
        more: bool,
        tos: int,
        header: bytes,
        l3: int,
        broadcast: bool = False,
    ) -> FragmentQueue | None:
        """The bytes `start .. end` of the payload of the datagram `key` came from `source`; they lie in `frame` from `at` on.
        `more` says that they are not its last, `header` comes with those at 0.

        Returns the datagram when it is whole now, to be taken by `join`; None while something is missing, or when the
        fragment was dropped (and counted). `end` must be beyond `start`, and a multiple of 8 bytes away if `more`.
        """
        if frame.pfmemalloc:
            self._env.drops.count(DropReason.PFMEMALLOC)  # nobody knows whose it is before all have come
            return None
        queue = self._queues.get(key)
        if self.account.bytes > self.parameters.high_thresh:
            self._evict(self._queues, self.account, self.parameters.high_thresh)
            queue = self._queues.get(key)
        if queue is None:
            queue = self._begin(key, source, interface, broadcast)
        origin = queue.source
        if origin.account.bytes > self.source_thresh:
            self._evict(origin.queues, origin.account, self.source_thresh)
            if key not in self._queues:
                queue = self._begin(key, source, interface, broadcast)
                origin = queue.source
        origin.received += 1
        max_dist = self.parameters.max_dist
        if max_dist and queue.pieces and origin.received - queue.serial > max_dist:
            self.discard(queue, DropReason.FRAG_TOO_FAR)
            queue = self._begin(key, source, interface, broadcast)
            origin = queue.source
            origin.received += 1
        queue.serial = origin.received
        reason = self._insert(queue, frame, at, start, end, more)
        if reason is not None:
            self._env.drops.count(reason)
            if reason is _OVERLAP or reason is _INVALID:
                self.discard(queue, reason)
            elif not queue.pieces:
                self._forget(queue)
            return None
        queue.ecn |= 1 << (tos & _ECN_MASK)
        if not start:
            queue.header = header
            queue.l3 = l3
            queue.tos = tos
            queue.interface = interface
        if not queue.last or len(queue.starts) > 1 or queue.starts[0] or queue.ends[0] != queue.length:
            return None
        return queue

    def _insert(self, queue: FragmentQueue, frame: RxFrame, at: int, start: int, end: int, more: bool) -> DropReason | None:
        """Put a piece where it belongs, or say why not."""
        if more:
            if end > queue.length:
                if queue.last:
                    return _INVALID  # beyond the end
        elif end < queue.length or (queue.last and end != queue.length):
            return _INVALID  # another end
        starts = queue.starts
        ends = queue.ends
        at_end = not ends or start >= ends[-1]
        index = len(starts)
        if not at_end:
            index = bisect_right(starts, start)  # the first run that begins behind the fragment
            if (index and start < ends[index - 1]) or (index < len(starts) and starts[index] < end):
                return self._overlap(queue, frame, at, start, end, index)
        skb = frame.keep(at, end - start, ATOMIC)
        if skb is None:
            return DropReason.NOMEM
        if skb.pfmemalloc:
            skb.free()
            return DropReason.PFMEMALLOC
        skb.charge_to(queue.source.account)
        queue.pieces[start] = skb
        if not more:
            queue.last = True
        if end > queue.length:
            queue.length = end
        joins_left = index > 0 and ends[index - 1] == start
        joins_right = index < len(starts) and starts[index] == end
        if joins_left and joins_right:
            ends[index - 1] = ends[index]
            del starts[index], ends[index]
        elif joins_left:
            ends[index - 1] = end
        elif joins_right:
            starts[index] = start
        else:
            starts.insert(index, start)
            ends.insert(index, end)
        return None

    def _overlap(self, queue: FragmentQueue, frame: RxFrame, at: int, start: int, end: int, index: int) -> DropReason:
        """Whether a fragment that overlaps run `index - 1` or `index` is a duplicate, or the end of the datagram."""
        if self.parameters.exact:
            twin = queue.pieces.get(start)
            if twin is not None and twin.len == end - start and twin.tobytes() == frame.tobytes(at, end - start):
                return DropReason.DUP_FRAG
        elif index and end <= queue.ends[index - 1]:
            return DropReason.DUP_FRAG
        return _OVERLAP

    # -- the life of a datagram --

    def _begin(self, key: bytes, address: bytes, interface: Interface, broadcast: bool) -> FragmentQueue:
        source = self._sources.get(address)
        if source is None:
            source = self._sources[address] = FragmentSource(address, self.account)
        timers = self._env.timers
        queue = FragmentQueue(key, source, interface, broadcast, timers.now + self.parameters.time)
        self._queues[key] = source.queues[key] = queue
        if not self._timer.pending:
            timers.set(self._timer, queue.deadline)
        return queue

    def _forget(self, queue: FragmentQueue) -> None:
        del self._queues[queue.key]
        source = queue.source
        del source.queues[queue.key]
        if not source.queues:
            del self._sources[source.address]

    def join(self, queue: FragmentQueue) -> Skb:
        """The payload of the whole datagram `queue` as one skb, which is charged to nobody, and the caller's."""
        self._forget(queue)
        pieces = queue.pieces
        first = pieces[0]
        first.uncharge()
        for start in sorted(pieces):
            if start:
                first.absorb(pieces[start])
        return first

    def discard(self, queue: FragmentQueue, reason: DropReason) -> None:
        """Give `queue` up for `reason`: each piece is counted as dropped."""
        self._forget(queue)
        self._on_failed(queue, reason)
        self._env.drops.counts[reason] += len(queue.pieces)
        for skb in queue.pieces.values():
            skb.free()

    def _evict(self, queues: OrderedDict[bytes, FragmentQueue], account: Account, limit: int) -> None:
        """Give the oldest of `queues` up until `account` is a quarter under its `limit`."""
        target = limit - (limit >> 2)
        while queues and account.bytes > target:
            self.discard(next(iter(queues.values())), DropReason.FRAG_EVICTED)

    def _expire(self) -> None:
        timers = self._env.timers
        while self._queues:
            queue = next(iter(self._queues.values()))
            if queue.deadline > timers.now:
                timers.set(self._timer, queue.deadline)
                return
            self.discard(queue, DropReason.FRAG_REASM_TIMEOUT)

    def forget_interface(self, interface: Interface) -> None:
        """Give up what came through `interface`."""
        for queue in [queue for queue in self._queues.values() if queue.interface is interface]:
            self.discard(queue, DropReason.DEV_READY)

    def close(self) -> None:
        """Free everything, and tell nobody."""
        self._timer.cancel()
        for queue in self._queues.values():
            for skb in queue.pieces.values():
                skb.free()
        self._queues.clear()
        self._sources.clear()
