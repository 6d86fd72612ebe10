"""Neighbours: which station has which address, and how we know.

The states and their timers are those of neighbour unreachability detection (RFC 4861, section 7.3), which Linux uses for ARP as
well (net/core/neighbour.c). Nothing here is about ARP or NDP: how a question is asked is handed in as `solicit`, and whoever
hears an answer calls `update`. Where the two differ, `NeighbourParameters` says how.

    INCOMPLETE --answer--> REACHABLE --time--> STALE --used--> DELAY --time--> PROBE --no answer--> FAILED
                               ^------------------- answer, or confirm() ------------------'

A packet for a neighbour without link-layer address waits in an skb charged to the entry's account. The oldest is dropped when
the queue is full, and all are handed to `on_failed` when nobody answers. A STALE entry that is used leaves that state at once,
so an entry that has been STALE for long is one that nobody used for as long: that is what garbage collection goes by.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from pools.gfp import ATOMIC
from ustack.drops import DropReason
from ustack.skb import Account
from ustack.timers import Timer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ustack.env import Env
    from ustack.link.device import Device
    from ustack.net.path import Path
    from ustack.skb import Buffer, Skb

NUD_NONE: Final = 0x00
NUD_INCOMPLETE: Final = 0x01
NUD_REACHABLE: Final = 0x02
NUD_STALE: Final = 0x04
NUD_DELAY: Final = 0x08
NUD_PROBE: Final = 0x10
NUD_FAILED: Final = 0x20
NUD_PERMANENT: Final = 0x80

STATE_NAMES: Final = {
    NUD_NONE: "NONE",
    NUD_INCOMPLETE: "INCOMPLETE",
    NUD_REACHABLE: "REACHABLE",
    NUD_STALE: "STALE",
    NUD_DELAY: "DELAY",
    NUD_PROBE: "PROBE",
    NUD_FAILED: "FAILED",
    NUD_PERMANENT: "PERMANENT",
}
"""The states as `ip neighbour` prints them; the values are those of linux/neighbour.h."""

RESERVE_FRAMES: Final = 4
"""Frames of memalloc sockets that may wait for one neighbour in memory from the reserve."""

_CONFIRMABLE: Final = NUD_STALE | NUD_DELAY | NUD_PROBE
_UNUSED: Final = (NUD_NONE, NUD_STALE, NUD_FAILED)


@dataclass(frozen=True, slots=True)
class NeighbourParameters:
    """The limits of a neighbour table: names and defaults of Linux (networking/ip-sysctl.rst). Times in seconds."""

    mcast_solicit: int = 3
    """Questions to everybody before an unknown neighbour is given up."""
    ucast_solicit: int = 3
    """Questions to the last known station before a silent neighbour is given up."""
    retrans_time: float = 1.0
    """Between two questions."""
    base_reachable_time: float = 30.0
    """For how long an answer counts; each time a random share of 0.5 to 1.5 of it (RFC 4861, section 6.3.2)."""
    delay_first_probe_time: float = 5.0
    """How long a stale entry in use waits for the upper layers to confirm it before it is probed."""
    locktime: float = 1.0
    """How long an answer stands before another station may replace it, so that of two answers the first wins."""
    doubt: bool = False
    """Another station's answer that may not replace the known one makes that one be verified (RFC 4861, section 7.2.5)."""
    unres_qlen_bytes: int = 212992
    """Truesize that may wait for one neighbour."""
    gc_thresh1: int = 128
    """Entries below which nothing is collected."""
    gc_thresh2: int = 512
    """Entries that collection reduces the table to."""
    gc_thresh3: int = 1024
    """Entries that the table never exceeds."""
    gc_interval: float = 30.0
    """Between two collections of entries that are old."""
    gc_stale_time: float = 60.0
    """How long nobody must have used an entry for it to be old."""

    def with_times(self, base_reachable_time: float, retrans_time: float) -> NeighbourParameters:
        """The same with the times that a router has set (RFC 4861, section 6.3.4)."""
        return replace(self, base_reachable_time=base_reachable_time, retrans_time=retrans_time)


class Neighbour:
    """One neighbour. `lladdr` (6 bytes) is None while it cannot be used.

    A packet may go to `lladdr` at once; when `stale` is set the sender calls `use` first. `paths` are the paths that lead
    through here.
    """

    __slots__ = (
        "_changed",
        "_confirmed",
        "_probes",
        "_queue",
        "_table",
        "_timer",
        "account",
        "address",
        "lladdr",
        "paths",
        "since",
        "stale",
        "state",
    )

    def __init__(self, table: NeighbourTable, address: bytes) -> None:
        self._table = table
        self.address = address
        self.lladdr: bytes | None = None
        self.stale = False
        self.state = NUD_NONE
        self.since = table.env.timers.now
        self.paths: list[Path] = []
        self.account = Account("neighbour queue", table.account)
        self._queue: deque[Skb] = deque()
        self._timer = Timer(self._on_timer)
        self._probes = 0
        self._confirmed = 0.0
        self._changed = 0.0

    # -- sending --

    def use(self) -> None:
        """A packet goes to this stale neighbour: give the upper layers a while to confirm it, then probe."""
        self._enter(NUD_DELAY, self._table.parameters.delay_first_probe_time)

    def enqueue(
        self,
        head: Buffer,
        payload: Sequence[Buffer],
        payload_len: int,
        csum_start: int,
        csum_offset: int,
        gso_size: int,
        gfp: int = ATOMIC,
    ) -> bool:
        """Copy the frame `head + payload` and send it once the neighbour is known; False when there is no memory for it.

        The arguments are those of `Device.transmit`, and what the copy's allocation may do. Starts the resolution, which takes
        no memory itself. At most `RESERVE_FRAMES` copies of at most a page lie in the reserve for one neighbour: a SYN or a
        retransmission, so that they need not be sent again. A transport sends again what does not fit.
        """
        table = self._table
        if self.state in (NUD_NONE, NUD_FAILED):
            self._probes = 0
            self._ask(NUD_INCOMPLETE)
        memory = table.env.memory
        size = len(head) + payload_len
        if size <= PAGE_SIZE:
            if gfp and sum(waiting.pfmemalloc for waiting in self._queue) >= RESERVE_FRAMES:
                gfp = ATOMIC
            skb = memory.alloc(size, gfp)
        else:
            skb = memory.alloc_paged((size + PAGE_MASK) >> PAGE_SHIFT, ATOMIC)
        if skb is None:
            table.env.drops.count(DropReason.NOMEM)
            return False
        skb.append(memoryview(head))
        for piece in payload:
            skb.append(memoryview(piece))
        skb.seq, skb.end_seq, skb.flags = csum_start, csum_offset, gso_size
        while self._queue and self.account.bytes + skb.truesize > table.parameters.unres_qlen_bytes:
            self._queue.popleft().free()
            table.env.drops.count(DropReason.NEIGH_QUEUEFULL)
        skb.charge_to(self.account)
        self._queue.append(skb)
        return True

    def _send_queue(self) -> None:
        lladdr = self.lladdr
        assert lladdr is not None
        table = self._table
        if self._queue and self.stale:
            self.use()
        while self._queue:
            skb = self._queue.popleft()
            frame = skb.views()
            frame[0][0:6] = lladdr
            device = table.device
            sent = device.transmit(frame[0], frame[1:], skb.seq, skb.end_seq, skb.flags)
            if device.sniffers is not None:
                device.sniffers.sent(device, frame[0], frame[1:], sent)
            if not sent:
                table.env.drops.count(DropReason.TX_DEVICE)
            skb.free()

    # -- hearing --

    def update(self, lladdr: bytes | None, solicited: bool, override: bool) -> None:
        """The neighbour said that it is the station `lladdr` (None: the one it was), in answer to us (`solicited`) or on its
        own.

        A known station that is not `override`n stays. What nobody asked for is never taken as proof that the neighbour hears
        us.
        """
        now = self._table.env.timers.now
        if lladdr is None:
            lladdr = self.lladdr
        if lladdr is None:
            return
        if self.lladdr is None:
            self.lladdr = lladdr
        elif self.lladdr == lladdr:
            if not solicited:
                return
        elif override or now > self._changed + self._table.parameters.locktime:
            self.lladdr = lladdr
        else:
            if self._table.parameters.doubt and self.state == NUD_REACHABLE:
                self._timer.cancel()
                self._enter(NUD_STALE)
            return
        self._changed = now
        if solicited:
            self._reachable()
        else:
            self._timer.cancel()
            self._enter(NUD_STALE)
        self._send_queue()

    def confirm(self) -> None:
        """Something that we sent there arrived: an upper layer made forward progress (RFC 4861, section 7.3.1)."""
        self._confirmed = self._table.env.timers.now
        if self.state & _CONFIRMABLE:
            self._reachable()

    # -- states --

    def _enter(self, state: int, timeout: float = 0.0) -> None:
        now = self._table.env.timers.now
        self.state = state
        self.stale = state == NUD_STALE
        self.since = now
        if timeout:
            self._table.env.timers.set(self._timer, now + timeout)

    def _reachable(self) -> None:
        self._confirmed = self._table.env.timers.now
        self._enter(NUD_REACHABLE, self._table.reachable_time())

    def _ask(self, state: int) -> None:
        self._probes += 1
        self._enter(state, self._table.parameters.retrans_time)
        self._table.solicit(self.address, self.lladdr)

    def _on_timer(self) -> None:
        parameters = self._table.parameters
        if self.state == NUD_REACHABLE:
            if self._confirmed > self.since:
                self.since = self._confirmed
                self._table.env.timers.set(self._timer, self._confirmed + self._table.reachable_time())
            else:
                self._enter(NUD_STALE)
        elif self.state == NUD_DELAY:
            self._probes = 0
            self._ask(NUD_PROBE)
        elif self._probes < (parameters.ucast_solicit if self.state == NUD_PROBE else parameters.mcast_solicit):
            self._ask(self.state)
        else:
            self._fail()

    def _fail(self) -> None:
        self.lladdr = None
        self._enter(NUD_FAILED)
        self._abandon_paths()
        queue = self._queue
        self._queue = deque()
        for skb in queue:
            self._table.env.drops.count(DropReason.NEIGH_FAILED)
            self._table.on_failed(skb)
            skb.free()

    def _abandon_paths(self) -> None:
        """Whoever sends through here looks up again whether there is another way."""
        for path in self.paths:
            path.obsolete = True
        self.paths.clear()

    def end(self) -> None:
        """Forget the neighbour: its queue is freed and its paths are obsolete."""
        self._timer.cancel()
        self._abandon_paths()
        while self._queue:
            self._queue.popleft().free()


class NeighbourTable:
    """The neighbours on one interface.

    `solicit(address, lladdr)` asks for `address`: the station `lladdr`, or everybody when that is None. `on_failed(skb)` is
    called with every frame that could not be sent because its neighbour did not answer; it must not keep the skb. All queues
    are charged to `account`.
    """

    __slots__ = ("_collected", "_entries", "account", "device", "env", "on_failed", "parameters", "solicit")

    def __init__(
        self,
        env: Env,
        device: Device,
        solicit: Callable[[bytes, bytes | None], None],
        parameters: NeighbourParameters | None = None,
    ) -> None:
        self.env = env
        self.device = device
        self.solicit = solicit
        self.parameters = parameters or NeighbourParameters()
        self.on_failed: Callable[[Skb], None] = _forget
        self.account = Account("neighbour queue")
        self._entries: dict[bytes, Neighbour] = {}
        self._collected = env.timers.now

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Neighbour]:
        return iter(self._entries.values())

    def find(self, address: bytes) -> Neighbour | None:
        """The entry for `address` if there is one."""
        return self._entries.get(address)

    def lookup(self, address: bytes) -> Neighbour:
        """The entry for `address`, made if needed. Raises OSError ENOBUFS when the table is full of entries in use."""
        neighbour = self._entries.get(address)
        if neighbour is None:
            self._make_room()
            neighbour = self._entries[address] = Neighbour(self, address)
        return neighbour

    def permanent(self, address: bytes, lladdr: bytes) -> Neighbour:
        """An entry outside the table that always is the station `lladdr`: everybody, for a broadcast."""
        neighbour = Neighbour(self, address)
        neighbour.lladdr = lladdr
        neighbour.state = NUD_PERMANENT
        return neighbour

    def reachable_time(self) -> float:
        """For how many seconds the next confirmation counts."""
        return self.parameters.base_reachable_time * self.env.random.uniform(0.5, 1.5)

    def _make_room(self) -> None:
        parameters = self.parameters
        size = len(self._entries)
        if size < parameters.gc_thresh1:
            return
        now = self.env.timers.now
        if size >= parameters.gc_thresh3:
            self._collect(size - parameters.gc_thresh2, now)
        elif now - self._collected >= parameters.gc_interval:
            self._collect(size, now - parameters.gc_stale_time)
        if len(self._entries) >= parameters.gc_thresh3:
            self.env.drops.count(DropReason.NEIGH_TABLEFULL)
            raise OSError(errno.ENOBUFS, f"{os.strerror(errno.ENOBUFS)}: the neighbour table is full")

    def _collect(self, count: int, before: float) -> None:
        """Forget up to `count` entries that nobody used since `before`, the longest unused first."""
        self._collected = self.env.timers.now
        unused = [entry for entry in self._entries.values() if entry.state in _UNUSED and entry.since <= before]
        unused.sort(key=lambda entry: entry.since)
        for entry in unused[:count]:
            entry.end()
            del self._entries[entry.address]

    def close(self) -> None:
        """Forget every neighbour and free what waits for them."""
        for entry in self._entries.values():
            entry.end()
        self._entries.clear()


def _forget(_skb: Skb) -> None:
    """What `on_failed` is until somebody wants to know."""
