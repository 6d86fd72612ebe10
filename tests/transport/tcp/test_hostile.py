"""Whatever arrives, in whatever state: no exception, no leak, and the invariants hold after every segment."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transport.tcp.peer import Peer
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LinearRing, PagedRing
from ustack.transport.events import SHUT_RD, SHUT_WR
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.wire import tcp as wire
from ustack.wire.tcp import ACK, FIN, PSH, RST, SYN

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

STEPS = 150

STATES = (
    State.LISTEN,
    State.SYN_SENT,
    State.SYN_RECV,
    State.ESTABLISHED,
    State.CLOSE_WAIT,
    State.FIN_WAIT1,
    State.FIN_WAIT2,
    State.CLOSING,
    State.LAST_ACK,
    State.TIME_WAIT,
)


def bring_to(peer: Peer, state: State, random: Random) -> Connection | None:
    """Bring a new connection to `state`; returns it unless it has no user."""
    if state is State.SYN_SENT:
        conn = peer.is_called().conn
        peer.ignores()
        return conn
    if state is State.LISTEN:
        peer.listens()
        return None
    if state is State.SYN_RECV:
        peer.listens()
        peer.sends(SYN, seq=0, mss=1460, wscale=random.choice((-1, 3)), sack_permitted=random.random() < 0.5)
        peer.ignores()
        return None
    user = peer.connects(
        mss=random.choice((1460, 536, 100)),
        wscale=random.choice((-1, 0, 7)),
        sack=random.random() < 0.6,
        ts=random.choice((-1, 1000)),
        rcvbuf=random.choice((0, 0, 8192, 65536)),
        sndbuf=random.choice((0, 0, 8192)),
        nodelay=random.random() < 0.5,
        keepalive=random.random() < 0.5,
    )
    if random.random() < 0.5:
        user.sends(random.choice((1, 3000, 20_000)))
    if state in (State.CLOSE_WAIT, State.LAST_ACK):
        peer.sends(FIN | ACK)
    if state in (State.FIN_WAIT1, State.FIN_WAIT2, State.CLOSING, State.LAST_ACK, State.TIME_WAIT):
        user.shuts()
        seen = 1
        if state in (State.FIN_WAIT2, State.TIME_WAIT):
            while not user.is_in(State.FIN_WAIT2):
                peer.sends(ACK)
        if state is State.CLOSING:
            peer.sends(FIN | ACK, ack=seen)
        if state is State.TIME_WAIT:
            peer.sends(FIN | ACK)
    peer.ignores()
    return user.conn


class Attacker:
    """Sends what a confused or malicious peer might, near the numbers that matter, and plays a user who does anything."""

    def __init__(self, peer: Peer, conn: Connection | None, random: Random) -> None:
        self.peer = peer
        self.conn = conn
        self.random = random
        self.written = 0
        self.filled = 0
        if conn is not None and random.random() < 0.5:
            conn.wake = self.wake
        if conn is not None and random.random() < 0.3:
            conn.reader = self

    def a_number(self, *interesting: int) -> int:
        random = self.random
        near = random.choice(interesting)
        return near + random.choice(
            (0, 0, 0, 1, -1, random.randint(-3000, 3000), random.randint(-70_000, 70_000), random.getrandbits(32))
        )

    def numbers(self) -> tuple[int, int]:
        conn = self.conn
        if conn is None or conn.state is State.SYN_SENT:
            return self.a_number(0, 1), self.a_number(0, 1, 2)
        seq = self.a_number(
            conn.rcv_nxt - conn.irs, conn.rcv_adv - conn.irs, conn.rcv_wup - conn.irs, max(conn.fin_seq - conn.irs, 0)
        )
        return seq, self.a_number(conn.snd_una - conn.iss, conn.snd_nxt - conn.iss)

    def options(self) -> bytes:
        random = self.random
        kind = random.random()
        if kind < 0.4:
            return b""
        if kind < 0.6:
            conn = self.conn
            recent = conn.ts_recent if conn is not None else 1000
            return wire.build_options(
                (recent + random.choice((0, 1, -1, 1000, -1000, 1 << 31))) % (1 << 32), random.getrandbits(32)
            )
        if kind < 0.85:
            blocks = []
            for _ in range(random.randint(1, 3)):
                left = self.numbers()[1]
                right = left + random.choice((0, 1, 100, 1460, 5000, -100))
                base = max(self.peer.stack_iss, 0)
                blocks.append(((left + base) % (1 << 32), (right + base) % (1 << 32)))
            return wire.build_options(random.choice((-1, 2000)), 0, blocks)
        return random.randbytes(4 * random.randint(1, 10))

    def sends_something(self) -> None:
        random = self.random
        peer = self.peer
        flags = random.choice(
            (ACK, ACK, ACK, ACK | PSH, ACK | PSH, ACK | FIN, RST, RST | ACK, SYN, SYN | ACK, 0, random.getrandbits(8))
        )
        seq, ack = self.numbers()
        length = random.choice((0, 0, 1, 10, 536, 1400))
        window = random.choice((0, 1, 100, 1460, 65535, random.getrandbits(16)))
        options = (
            wire.build_syn_options(random.getrandbits(16), random.randint(-1, 20), True) if flags & SYN else self.options()
        )
        segment = peer._build(flags, seq, ack, window, options, random.randbytes(length))
        if random.random() < 0.1:
            damaged = bytearray(segment)
            for _ in range(random.randint(1, 4)):
                damaged[random.randrange(12, len(damaged))] ^= 1 << random.randrange(8)
            segment = bytes(damaged[: random.choice((len(damaged), random.randrange(len(damaged) + 1)))])
        peer.sends_raw(segment)

    def behaves(self) -> None:
        """Say what a good peer would say, so that connections also get on."""
        conn = self.conn
        peer = self.peer
        if conn is None or conn.state in (State.CLOSE, State.SYN_SENT):
            return
        seq = conn.rcv_nxt - conn.irs
        segment = peer._build(ACK | PSH, seq, conn.snd_nxt - conn.iss, 60_000, b"", bytes(self.random.choice((0, 100, 1400))))
        peer.sends_raw(segment)

    def reports(self) -> None:
        self.peer.reports(self.random.randrange(16), mtu=self.random.choice((0, 68, 600, 1400, 9000)), seq=self.numbers()[1])

    def uses(self) -> None:
        conn = self.conn
        random = self.random
        if conn is None:
            with suppress(OSError):
                assert self.peer.listener is not None
                self.conn = conn = self.peer.listener.accept()
                self.peer._user(conn)
            return
        with suppress(OSError):
            self.use(conn, random)
        self.peer.settle()

    def use(self, conn: Connection, random: Random) -> None:
        action = random.random()
        if action < 0.4:
            conn.send(bytes(random.choice((1, 1000, 30_000))), more=random.random() < 0.2)
        elif action < 0.8:
            conn.recv(random.choice((1, 1000, 100_000)))
        elif action < 0.9:
            conn.recv_into(memoryview(bytearray(500)), peek=True)
        elif action < 0.93:
            conn.shutdown(random.choice((SHUT_RD, SHUT_WR, SHUT_RD | SHUT_WR)))
        elif action < 0.95:
            conn.close()

    def wake(self, _: int) -> None:
        if self.conn is not None:
            with suppress(OSError):
                self.use(self.conn, self.random)

    # a reader who waits with a buffer

    def buffer_for(self, size: int) -> memoryview | None:
        return memoryview(bytearray(size)) if self.random.random() < 0.7 else None

    def took(self, size: int) -> None:
        self.filled += size
        if self.random.random() < 0.1:
            self.wake(0)


@pytest.fixture
def zeroes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user writes zeroes here, and what comes of it is not looked at by place."""
    monkeypatch.setattr("tests.transport.tcp.peer.pattern", lambda start, length: bytes(length))


def test_a_hostile_peer_and_a_careless_user(seed: int, zeroes: None) -> None:
    random = Random(seed)
    features = random.choice((0, FEATURE_CSUM | FEATURE_TSO))
    config = TcpConfig(
        sack=random.random() < 0.8,
        timestamps=random.random() < 0.8,
        mem_high=random.choice((0, 0, 100_000)),
        max_tw_buckets=random.choice((2, 1000)),
    )
    ring = PagedRing if features else random.choice((PagedRing, LinearRing))
    peer = Peer(seed=seed, features=features, memory=random.choice((1 << 20, 4 << 20)), config=config, ring=ring)
    attacker = Attacker(peer, bring_to(peer, random.choice(STATES), random), random)
    for _ in range(STEPS):
        what = random.random()
        if what < 0.55:
            attacker.sends_something()
        elif what < 0.65:
            attacker.behaves()
        elif what < 0.85 and (attacker.conn is not None or peer.listener is not None):
            attacker.uses()
        elif what < 0.9 and peer.stack_iss >= 0:
            attacker.reports()
        else:
            peer.waits(random.choice((0.001, 0.05, 0.3, 5.0, 100.0)))
        peer.ignores()
    peer.close()


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=st.lists(st.binary(max_size=90), max_size=20))
def test_bytes_that_are_no_segment(state: State, segments: list[bytes]) -> None:
    peer = Peer()
    bring_to(peer, state, Random(1))
    ports = peer.own_port.to_bytes(2) + peer.port.to_bytes(2)
    for segment in segments:
        peer.sends_raw(ports + segment)
        peer.ignores()
    peer.close()


def test_a_flood_of_syns_takes_bounded_memory() -> None:
    peer = Peer(config=TcpConfig(max_syn_backlog=64))
    peer.listens()
    for port in range(1, 5000):
        peer.own_port = port
        peer.sends(SYN, seq=0, mss=1460)
        peer.nxt = 0
    assert len(peer.stack.tcp.connections) <= 64
    peer.waits(200)
    peer.ignores()
    assert not peer.stack.tcp.connections
    peer.close()


def test_connections_that_only_hold_a_closed_window_can_be_ended(zeroes: None) -> None:
    """A peer that takes nothing: what it costs is bounded by the send limit."""
    peer = Peer()
    user = peer.connects()
    peer.sends(ACK, window=0)
    with suppress(BlockingIOError):
        while True:
            user.sends(100_000)
    assert user.conn.send_queue.account.bytes <= user.conn.sndbuf + 70_000
    user.conn.options = SocketOptions(linger=0)
    user.closes()
    assert peer.stack.tcp.send_account.bytes == 0
    peer.close()
