"""The model's counterexamples happen to real stacks, and not to the same stacks with the rule.

A page of the model is a unit of real pages. Each step of a trace is done on two stacks; then everybody goes on for minutes: the
crowd sends, the client has requests, the server answers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from pools.arena import PAGE_SIZE
from pools.gfp import ATOMIC, MEMALLOC
from tests.sim.network import Network
from ustack.lab.model.checker import Verdict, check
from ustack.lab.model.reserve_model import ORDINARY_FRAME, WRITE, ReserveModel, configurations
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LINEAR_RING_FRAMES, LinearRing, PagedRing
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from ustack.link.rxring import RxRing
    from ustack.skb import Skb, SkbMemory
    from ustack.transport.tcp.connection import Connection

pytestmark = pytest.mark.sim

LINEAR_UNIT: Final = LINEAR_RING_FRAMES // 2 // 2
"""Real pages for one page of the model: its ring posts two, the real one 64 buffers of 2048 bytes, two in a page."""

PAGED_UNIT: Final = 20
"""A super-frame of 64 KiB, with its heads."""

SEGMENT: Final = 1448
"""Payload of a full segment: small ones are put together in buffers of their own, which need ordinary memory."""

MEMORY: Final = 16 << 20
CROWD: Final = 8
MINUTES: Final = 600.0
MANY: Final = 50


class RingOf2006(LinearRing):
    """A ring that allocates an skb's head together with its buffer, as netdev_alloc_skb did. (LinearRing does it last.)"""

    __slots__ = ("_skbs",)

    def __init__(self, memory: SkbMemory, max_frame: int, prefix: bytearray | None = None) -> None:
        self._skbs: deque[Skb] = deque()
        super().__init__(memory, max_frame, prefix)

    def ready(self) -> bool:
        while len(self._posted) < LINEAR_RING_FRAMES:
            skb = self.memory.alloc(self.max_frame, MEMALLOC if self.emergency else ATOMIC)
            if skb is None:
                break
            self._skbs.append(skb)
            self._posted.append((skb.addr, skb.pfmemalloc))
        if self._posted:
            self._aim()
        return bool(self._posted)

    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        self._posted.popleft()
        skb = self._skbs.popleft()
        skb.data += offset
        skb.tail = skb.data + length
        skb.len = length
        return skb

    def close(self) -> None:
        for skb in self._skbs:
            skb.free()
        self._skbs.clear()
        self._posted.clear()
        self.iov.clear()


class UnmarkedRing(LinearRing):
    """A ring whose frames do not know that they lie in the reserve: the drop rule sees nothing."""

    __slots__ = ()

    def _aim(self) -> None:
        super()._aim()
        self.frame.pfmemalloc = False


class UnmarkedRingOf2006(RingOf2006):
    """Both."""

    __slots__ = ()

    def _aim(self) -> None:
        super()._aim()
        self.frame.pfmemalloc = False


RINGS: Final[dict[tuple[bool, bool], type[LinearRing]]] = {
    # (drop rule, head last)
    (True, False): RingOf2006,
    (False, False): UnmarkedRingOf2006,
    (True, True): LinearRing,
    (False, True): UnmarkedRing,
}


class Disk:
    """A client that has `depth` requests in flight, as far as it is `allowed` to begin them, and the server's answers."""

    def __init__(self, conn: Connection, request: int, reply: int, depth: int) -> None:
        self.conn = conn
        self.request = request
        self.reply = reply
        self.depth = depth
        self.allowed = 0
        self.begun = 0
        self.unsent = 0
        self.received = 0
        self.asked = 0
        self.owed = 0
        conn.wake = lambda _: self.go_on()

    @property
    def done(self) -> int:
        return self.received // self.reply

    def go_on(self) -> None:
        conn = self.conn
        while conn.receive_queue.queue:
            self.received += len(conn.recv(65536))
        while True:
            if not self.unsent and self.begun < self.allowed and self.begun - self.done < self.depth:
                self.begun += 1
                self.unsent = self.request
            if not self.unsent or conn.error:
                return
            try:
                self.unsent -= conn.send(bytes(self.unsent))
            except BlockingIOError:
                return

    def serve(self, conn: Connection) -> None:
        """What the server does with its end of the connection."""

        def answer(_: int) -> None:
            while conn.receive_queue.queue:
                self.asked += len(conn.recv(65536))
                while self.asked >= self.request:
                    self.asked -= self.request
                    self.owed += self.reply
            while self.owed and not conn.error:
                try:
                    self.owed -= conn.send(bytes(self.owed))
                except BlockingIOError:
                    return

        conn.wake = answer


class Replay:
    """Two stacks in the configuration of a model; `pool` is ours."""

    def __init__(self, model: ReserveModel, pool: str = "kmalloc") -> None:
        self.unit = unit = LINEAR_UNIT if model.linear else PAGED_UNIT
        ring: type[RxRing] | _Rings = PagedRing
        features = FEATURE_CSUM | FEATURE_TSO
        if model.linear:
            ring = _Rings(RINGS[model.drop_rule, model.head_last])
            features = FEATURE_CSUM
        config = TcpConfig(mem_low=2 * MEMORY, mem_pressure=2 * MEMORY, mem_high=2 * MEMORY)
        self.network = Network(1, features=features, ring=ring, memory=MEMORY, pool=pool, tcp=config)
        self.world = self.network.world
        ours = self.network.client
        self.pages = ours.pages
        crowd = self.network.listen(1234)
        servers = self.network.listen(10809)
        conn = self.network.connect(10809, memalloc=model.memalloc)
        for _ in range(CROWD):
            self.network.connect(1234)
        assert self.world.run_until(lambda: len(crowd) == CROWD and len(servers) == 1, deadline=10.0)
        if model.emergency and model.memalloc:
            ours.reserve.set_memalloc()
        self.disk = Disk(conn, model.request * PAGE_SIZE, model.reply * 4 * PAGE_SIZE, model.depth)
        self.disk.serve(servers[0])
        self.crowd = crowd
        self.held = self._take_away(self.pages.free_pages - unit * (model.pages - (model.posted if model.linear else 0)))
        self.pages.set_min_pages(unit * model.reserve)

    def _take_away(self, count: int) -> list[int]:
        """Somebody else has all but a few of our pages."""
        owner = self.pages.owner_id("memory hog")
        return [self.pages.alloc(0, ATOMIC, owner) for _ in range(count)]

    def follow(self, actions: list[str]) -> None:
        """Do what a trace says. What the stack does by itself (posting, acknowledging, reading) needs only time."""
        for action in actions:
            if action == ORDINARY_FRAME:
                for conn in self.crowd:
                    if conn.writable:
                        conn.send(bytes(SEGMENT * (self.unit * PAGE_SIZE // CROWD // SEGMENT + 1)))
            elif action == WRITE:
                self.disk.allowed += 1
                self.disk.go_on()
            self.world.run(0.5)

    def go_on(self, seconds: float, requests: int) -> int:
        """Let everybody do what they want until so many requests are done or the time is over; return how many were done."""
        for conn in self.crowd:
            _send_for_ever(conn)
        self.world.run(10.0)
        assert self.pages.failures[0] > 0, "the memory is not full"
        before = self.disk.done
        self.disk.allowed += requests
        self.disk.go_on()
        self.world.run_until(lambda: self.disk.done - before >= requests, deadline=self.world.now + seconds)
        return self.disk.done - before

    def close(self) -> None:
        self.network.close()
        self.pages.free_bulk(self.held)


class _Rings:
    """Makes a small ring for our device, an ordinary one for the peer's."""

    def __init__(self, kind: type[LinearRing]) -> None:
        self._kind = kind

    def __call__(self, memory: SkbMemory, max_frame: int) -> RxRing:
        kind, self._kind = self._kind, LinearRing
        return kind(memory, max_frame)


def _send_for_ever(conn: Connection) -> None:
    def more(_: int) -> None:
        try:
            while conn.writable and not conn.error:
                conn.send(bytes(SEGMENT * 8))
        except BlockingIOError:
            pass

    conn.wake = more
    more(0)


def named(name: str) -> ReserveModel:
    """The configuration of that name."""
    return next(model for model in configurations() if model.name == name)


def replay(model: ReserveModel, actions: list[str], pool: str = "kmalloc") -> int:
    """Replay `actions` on real stacks in the configuration `model`; return how many of `MANY` requests are done afterwards."""
    stacks = Replay(model, pool)
    try:
        stacks.follow(actions)
        return stacks.go_on(MINUTES, MANY)
    finally:
        stacks.close()


def counterexample(model: ReserveModel) -> list[str]:
    """The actions of the model's way into the deadlock."""
    result = check(model)
    assert result.verdict is Verdict.DEADLOCK
    return [step.action for step in result.trace]


PAGED: Final = named("paged")
LINEAR: Final = named("linear")
STOCK: Final = replace(LINEAR, head_last=True)

CASES: Final = {
    "paged, no reserve": (replace(PAGED, reserve=0), PAGED),
    "paged, NBD socket not memalloc": (replace(PAGED, memalloc=False), PAGED),
    "linear, no reserve": (replace(STOCK, reserve=0), STOCK),
    "linear, NBD socket not memalloc": (replace(STOCK, memalloc=False, emergency=False), STOCK),
    "ring of 2006, no reserve": (replace(LINEAR, reserve=0), LINEAR),
    "ring of 2006, no drop rule": (replace(LINEAR, drop_rule=False), LINEAR),
    "ring of 2006, reserve as large as the ring": (replace(LINEAR, reserve=2), LINEAR),
    "ring of 2006, never from the reserve": (replace(LINEAR, emergency=False), LINEAR),
}


@pytest.mark.parametrize(("without", "complete"), CASES.values(), ids=CASES)
def test_what_deadlocks_in_the_model_stands_still_for_real_and_goes_on_with_the_rule(
    without: ReserveModel, complete: ReserveModel
) -> None:
    actions = counterexample(without)
    assert replay(without, actions) == 0
    assert check(complete).verdict is Verdict.PROGRESS
    assert replay(complete, actions) == MANY


def test_a_head_allocated_last_does_the_work_of_the_drop_rule_in_the_model_and_for_real() -> None:
    actions = counterexample(replace(LINEAR, drop_rule=False))
    without = replace(STOCK, drop_rule=False)
    assert check(without).verdict is Verdict.PROGRESS
    assert replay(without, actions) == MANY


@pytest.mark.parametrize("pool", ["page_frag", "page_per_object", "srog"])
@pytest.mark.parametrize("complete", [PAGED, replace(STOCK, reserve=6, pages=10)], ids=["paged", "linear"])
def test_the_reserve_decides_whatever_the_pool(pool: str, complete: ReserveModel) -> None:
    without = replace(complete, reserve=0)
    actions = counterexample(without)
    assert replay(without, actions, pool) == 0
    assert replay(complete, actions, pool) == MANY
