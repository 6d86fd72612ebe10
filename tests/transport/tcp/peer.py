"""A scripted peer, so that a test reads like a sequence chart.

The peer (10.0.0.2) says what it sends and what it expects, segment by segment; the user is the program on our side of the
connection; the stack (10.0.0.1) between them is the real one, on a simulated device in virtual time.

    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK, seq=0, ack=1)
    peer.sends(ACK)
    user = peer.user()
    user.sends(1000)
    peer.expects(ACK | PSH, seq=1, length=1000)

Sequence numbers count from each side's initial one. The peer's lies shortly before 2**32, so that every story wraps. Data is
a pattern that follows from its place in the stream, and is checked wherever it arrives.
"""

from __future__ import annotations

import errno
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests import leaks
from tests.sim.network import left_behind
from tests.transport.tcp.invariants import Watch
from ustack.lab.world import World
from ustack.link.device import FEATURE_TSO, NO_CSUM
from ustack.link.rxring import PagedRing
from ustack.link.simwire import SimDevice, WireFrame, segments
from ustack.stack import Stack
from ustack.transport.events import SHUT_RD, SHUT_WR
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.config import TcpConfig
from ustack.wire import arp, ethernet, icmp, ipv4, tcp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4
from ustack.wire.tcp import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.link.rxring import RxRing
    from ustack.skb import SkbMemory
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.listener import Listener
    from ustack.transport.tcp.states import State
    from ustack.wire.tcp import TcpOptions

STACK_ADDRESS: Final = bytes((10, 0, 0, 1))
PEER_ADDRESS: Final = bytes((10, 0, 0, 2))
ROUTER_ADDRESS: Final = bytes((10, 0, 0, 3))
PEER_MAC: Final = b"\x02\x00\x00\x00\x00\x02"
PEER_ISS: Final = 0xFFFFFF00
PEER_PORT: Final = 40000
STACK_PORT: Final = 80
TOLERANCE: Final = 0.0015
"""Seconds by which something may come earlier or later than expected."""

_PATTERN: Final = Random(793).randbytes(1 << 16)


def pattern(start: int, length: int) -> bytes:
    """The bytes of every stream from `start` on; the first byte of a stream is number 1, after the SYN."""
    at = start % len(_PATTERN)
    return (_PATTERN * (length // len(_PATTERN) + 2))[at : at + length]


class Seen(NamedTuple):
    """A segment that the stack sent, with relative numbers; `window` is as on the wire."""

    at: float
    flags: int
    seq: int
    ack: int
    length: int
    window: int
    options: TcpOptions
    port: int
    tos: int

    def __repr__(self) -> str:
        names = "".join(name[0] for flag, name in NAMES if self.flags & flag) or "-"
        sack = f" sack {self.options.sack}" if self.options.sack else ""
        return f"{self.at:.6f} {names} {self.seq}:{self.seq + self.length} ack {self.ack} win {self.window}{sack}"


NAMES: Final = (
    (SYN, "SYN"),
    (FIN, "FIN"),
    (RST, "RST"),
    (PSH, "PSH"),
    (URG, "URG"),
    (ECE, "ECE"),
    (CWR, "WCWR"),
    (ACK, ".ACK"),
)


class User:
    """The program on our side of a connection."""

    def __init__(self, peer: Peer, conn: Connection) -> None:
        self.peer = peer
        self.conn = conn
        self.sent = 0
        self.received = 0

    @property
    def acknowledged(self) -> int:
        """SND.UNA, relative."""
        return self.conn.snd_una - self.conn.iss

    @property
    def expected(self) -> int:
        """RCV.NXT, relative."""
        return self.conn.rcv_nxt - self.conn.irs

    @property
    def edge(self) -> int:
        """The right edge of our window, relative."""
        return self.conn.rcv_adv - self.conn.irs

    def is_in(self, state: State) -> bool:
        """Whether the connection is in `state`."""
        return self.conn.state is state

    def sends(self, length: int, *, more: bool = False) -> int:
        """Write `length` bytes; returns how many were taken, which is all of them unless the test says otherwise."""
        taken = self.conn.send(pattern(1 + self.sent, length), more=more)
        self.sent += taken
        self.peer.settle()
        return taken

    def reads(self, length: int) -> None:
        """Read exactly `length` bytes; fewer are waiting when this fails. They must be what the peer sent."""
        data = b""
        while len(data) < length:
            data += self.conn.recv(length - len(data))
        assert data == pattern(1 + self.received, length)
        self.received += length
        self.peer.settle()

    def reads_end(self) -> None:
        """Read the end of the stream."""
        assert self.conn.recv(1) == b""

    def has_nothing_to_read(self) -> None:
        """There is no data, no error and no end."""
        assert not self.conn.readable

    def fails_with(self, error: int) -> None:
        """The connection has failed with this errno."""
        assert errno.errorcode.get(self.conn.take_error()) == errno.errorcode.get(error)

    def shuts(self, how: int = SHUT_WR) -> None:
        """Shut one or both directions down."""
        self.conn.shutdown(how)
        self.peer.settle()

    def stops_reading(self) -> None:
        """Shut the receiving direction down."""
        self.shuts(SHUT_RD)

    def closes(self) -> None:
        """Close the socket."""
        self.conn.close()
        self.peer.settle()


class Peer:
    """The peer, and with it the stack under test. `options` of the connections and listeners are those of `SocketOptions`."""

    def __init__(
        self,
        *,
        config: TcpConfig | None = None,
        features: int = 0,
        mtu: int = 1500,
        memory: int = 4 << 20,
        ring: Callable[[SkbMemory, int], RxRing] = PagedRing,
        seed: int = 1,
        now: float = 0.0,
    ) -> None:
        self.world = World(seed)
        self.world.now = now
        self.config = config or TcpConfig()
        self.device = SimDevice("sim0", b"\x02\x00\x00\x00\x00\x01", mtu, features, ring)
        self.device.wire = self._arrived
        self.stack = Stack(memory=memory, reserve=0, tcp=self.config, random=Random(seed), now=now)
        self.world.add(self.stack, self.device)
        self.stack.add_interface(self.device, "10.0.0.1/24")
        self.watch = Watch(self.stack)
        self.port = STACK_PORT
        self.own_port = PEER_PORT
        self.iss = PEER_ISS
        self.stack_iss = -1
        self.nxt = 0
        self.ack = 0
        self.window = 65535
        self.ts = (-1, 0)
        self.mark = now
        self.listener: Listener | None = None
        self.chart: list[str] = []
        self._seen: list[Seen] = []
        self._users: list[User] = []
        leaks.watch_pool(self.stack.pool)
        leaks.watch(lambda: left_behind(self.stack))
        self._put(ethernet.ETH_P_ARP, arp.build(arp.ARPOP_REQUEST, PEER_MAC, PEER_ADDRESS, bytes(6), STACK_ADDRESS))

    def close(self) -> None:
        """End the stack. Nothing may be left."""
        for user in self._users:
            user.conn.close()
        self.stack.close()

    # -- the wire --

    def _put(self, ethertype: int, packet: bytes, gso_size: int = 0) -> None:
        frame = ethernet.build_header(self.device.mac, PEER_MAC, ethertype) + packet
        self.device.receive(WireFrame(frame, 0, NO_CSUM, gso_size))

    def _arrived(self, frame: WireFrame) -> None:
        data = bytes(frame.data)
        if frame.csum_start:
            frame.complete()
            data = bytes(frame.data)
        if data[12:14] != ethernet.ETH_P_IP.to_bytes(2):
            if data[20:22] == arp.ARPOP_REQUEST.to_bytes(2) and data[38:42] == PEER_ADDRESS:
                self._put(ethernet.ETH_P_ARP, arp.build(arp.ARPOP_REPLY, PEER_MAC, PEER_ADDRESS, data[22:28], STACK_ADDRESS))
            return
        if frame.gso_size:
            assert self.device.features & FEATURE_TSO, "a super-frame for a device that cannot cut it"
            for part in segments(data, frame.gso_size):
                self._segment_arrived(bytes(part))
        else:
            self._segment_arrived(data)

    def _segment_arrived(self, data: bytes) -> None:
        assert len(data) <= self.device.mtu + ethernet.HEADER_LEN, "longer than the MTU"
        packet = data[ethernet.HEADER_LEN :]
        assert not finish(ones_sum(packet[:20]))
        l4 = packet[20 : int.from_bytes(packet[2:4])]
        if packet[9] != ipv4.IPPROTO_TCP:
            return
        assert not finish(pseudo_v4(packet[12:16], packet[16:20], ipv4.IPPROTO_TCP, len(l4)) + ones_sum(l4)), "wrong checksum"
        header = tcp.parse_header(l4, 0, len(l4))
        assert header is not None
        assert header.sport == self.port
        if header.flags & SYN and self.stack_iss < 0:
            self.stack_iss = header.seq
        if self.stack_iss < 0:
            seq = header.seq  # a reset of the unknown, with number 0 or one that we chose
        else:
            seq = (header.seq - self.stack_iss + (1 << 31)) % (1 << 32) - (1 << 31)
        ack = (header.ack - self.iss + (1 << 31)) % (1 << 32) - (1 << 31) if header.flags & ACK else 0
        payload = l4[header.length :]
        sack = tuple(((left - self.iss) % (1 << 32), (right - self.iss) % (1 << 32)) for left, right in header.options.sack)
        header.options.sack = sack
        seen = Seen(
            self.world.now, header.flags, seq, ack, len(payload), header.window, header.options, header.dport, packet[1]
        )
        if payload:
            start = seq + bool(header.flags & SYN)
            assert payload == pattern(start, len(payload)), f"wrong data in {seen}"
        end = seq + len(payload) + bool(header.flags & SYN) + bool(header.flags & FIN)
        if seq <= self.ack < end and not header.flags & RST:
            self.ack = end
        self.chart.append(f"  < {seen}")
        self._seen.append(seen)

    # -- time --

    def settle(self) -> None:
        """Let the stack receive and send what it wants to receive and send now."""
        while self.device.waiting:
            self.stack.receive(self.device)
        self.stack.flush()
        self.watch.check()

    def waits(self, seconds: float) -> None:
        """Let time pass."""
        self._run_until(self.world.now + seconds)
        self.mark = self.world.now

    def _run_until(self, limit: float) -> None:
        while self._step(limit):
            pass

    def _step(self, limit: float) -> bool:
        more = self.world.step(limit)
        self.settle()  # an answer to ARP may wait
        return more

    # -- what the peer does --

    def sends(
        self,
        flags: int = ACK,
        *,
        seq: int | None = None,
        ack: int | None = None,
        length: int = 0,
        window: int | None = None,
        mss: int = -1,
        wscale: int = -1,
        sack_permitted: bool = False,
        ts: tuple[int, int] | None = None,
        sack: Sequence[tuple[int, int]] = (),
        settle: bool = True,
        raw_options: bytes | None = None,
        payload: bytes | None = None,
        fastopen: bytes | None = None,
        tos: int = 0,
    ) -> None:
        """Send a segment. `seq` is what comes next unless given, `ack` everything in sequence that was seen.

        `window` is as on the wire. With `settle` False the segment waits, so that several arrive in one batch.
        """
        if seq is None:
            seq = self.nxt
        if ack is None:
            ack = self.ack
        if window is None:
            window = self.window
        if ts is None:
            ts = self.ts
        data = pattern(seq + bool(flags & SYN), length) if payload is None else payload
        if seq == self.nxt and not flags & RST:
            self.nxt = seq + len(data) + bool(flags & SYN) + bool(flags & FIN)
        if raw_options is not None:
            options = raw_options
        elif flags & SYN:
            options = tcp.build_syn_options(mss, wscale, sack_permitted, *ts, fastopen) if mss >= 0 else b""
        else:
            blocks = [((left + self.stack_iss) % (1 << 32), (right + self.stack_iss) % (1 << 32)) for left, right in sack]
            options = tcp.build_options(*ts, blocks)
        segment = self._build(flags, seq, ack if flags & ACK else None, window, options, data)
        names = "".join(name[0] for flag, name in NAMES if flags & flag) or "-"
        self.chart.append(f"{self.world.now:.6f} > {names} {seq}:{seq + len(data)} ack {ack} win {window} {sack or ''}")
        header = ipv4.build_header(PEER_ADDRESS, STACK_ADDRESS, ipv4.IPPROTO_TCP, len(segment), tos=tos)
        self._put(ethernet.ETH_P_IP, header + segment)
        if settle:
            self.settle()
        self.mark = self.world.now

    def _build(self, flags: int, seq: int, ack: int | None, window: int, options: bytes, data: bytes) -> bytes:
        wire_seq = (seq + self.iss) % (1 << 32)
        wire_ack = 0 if ack is None else (ack + max(self.stack_iss, 0)) % (1 << 32)
        header = tcp.build_header(self.own_port, self.port, wire_seq, wire_ack, flags, window, options)
        checksum = finish(pseudo_v4(PEER_ADDRESS, STACK_ADDRESS, 6, len(header) + len(data)) + ones_sum(header + data))
        return tcp.build_header(self.own_port, self.port, wire_seq, wire_ack, flags, window, options, checksum) + data

    def sends_raw(self, segment: bytes) -> None:
        """Send these bytes as a TCP segment; its checksum is made right when it is long enough to have one."""
        if len(segment) >= tcp.HEADER_LEN:
            cleared = segment[: tcp.OFF_CSUM] + bytes(2) + segment[tcp.OFF_CSUM + 2 :]
            checksum = finish(pseudo_v4(PEER_ADDRESS, STACK_ADDRESS, 6, len(segment)) + ones_sum(cleared))
            segment = segment[: tcp.OFF_CSUM] + checksum.to_bytes(2) + segment[tcp.OFF_CSUM + 2 :]
        self.sends_as_is(segment)

    def sends_as_is(self, segment: bytes) -> None:
        """Send these bytes as a TCP segment, with whatever checksum they have."""
        self._put(ethernet.ETH_P_IP, ipv4.build_header(PEER_ADDRESS, STACK_ADDRESS, ipv4.IPPROTO_TCP, len(segment)) + segment)
        self.settle()

    def reports(self, code: int, *, mtu: int = 0, seq: int, length: int = 1460) -> None:
        """A router sends ICMP "destination unreachable" with `code` about the stack's segment at `seq`."""
        header = tcp.build_header(self.port, self.own_port, (seq + self.stack_iss) % (1 << 32), 0, ACK, 0)
        quoted = ipv4.build_header(STACK_ADDRESS, PEER_ADDRESS, ipv4.IPPROTO_TCP, 20 + length) + header[:8]
        message = icmp.build_header(icmp.ICMP_DEST_UNREACH, code, 0, mtu, [quoted]) + quoted
        self._put(
            ethernet.ETH_P_IP, ipv4.build_header(ROUTER_ADDRESS, STACK_ADDRESS, ipv4.IPPROTO_ICMP, len(message)) + message
        )
        self.settle()
        self.mark = self.world.now

    def fills_the_window(self, user: User) -> int:
        """Send all that our window takes; returns how many bytes that is. Our answers are ignored."""
        before = self.nxt
        while user.edge > self.nxt:
            self.sends(ACK, length=min(user.edge - self.nxt, 1460))
            self.ignores()
        assert user.expected == self.nxt, "not all of it was taken"
        return self.nxt - before

    def returns(self) -> None:
        """The peer opens a new connection with the numbers of the old one: forget what was learned."""
        self.stack_iss = -1
        self.nxt = self.ack = 0

    # -- what the peer expects --

    def expects(
        self,
        flags: int,
        *,
        seq: int | None = None,
        ack: int | None = None,
        length: int | None = None,
        window: int | None = None,
        sack: tuple[tuple[int, int], ...] | None = None,
        after: float = 0.0,
        within: float | None = None,
    ) -> Seen:
        """The stack's next segment is this one, and comes `after` seconds since the peer did or expected something, or at any
        time `within` so many seconds.

        What is None may be anything. PSH is ignored unless asked for.
        """
        due = self.mark + (after if within is None else within)
        if not self._seen:
            limit = due + TOLERANCE
            while not self._seen and self._step(limit):
                pass
        assert self._seen, f"nothing came until {self.world.now:.6f}\n{self.story()}"
        seen = self._seen.pop(0)
        got = seen.flags if flags & PSH else seen.flags & ~PSH
        what = f"{seen}, which is not what was expected\n{self.story()}"
        assert got == flags, what
        assert seq is None or seen.seq == seq, what
        assert ack is None or seen.ack == ack, what
        assert length is None or seen.length == length, what
        assert window is None or seen.window == window, what
        assert sack is None or seen.options.sack == sack, what
        if within is None:
            assert abs(seen.at - due) <= TOLERANCE, f"it came {seen.at - self.mark:.6f} s after, not {after} s: {what}"
        self.mark = max(self.mark, seen.at)
        return seen

    def expects_data(self, start: int, end: int, size: int = 1460, **more: Any) -> None:
        """The stack sends `start .. end` in segments of `size` bytes."""
        while start < end:
            length = min(size, end - start)
            self.expects(ACK, seq=start, length=length, **more)
            start += length

    def expects_nothing(self) -> None:
        """The stack has sent nothing more."""
        assert not self._seen, f"unexpected {self._seen}\n{self.story()}"

    def expects_nothing_for(self, seconds: float) -> None:
        """The stack sends nothing for so long."""
        self._run_until(self.world.now + seconds)
        self.expects_nothing()
        self.mark = self.world.now

    def ignores(self) -> list[Seen]:
        """What the stack has sent meanwhile is not what the test is about."""
        seen, self._seen[:] = self._seen[:], []
        return seen

    def story(self) -> str:
        """The sequence chart so far."""
        return "\n".join(self.chart[-60:])

    # -- opening --

    def listens(self, backlog: int = 16, **options: Any) -> Listener:
        """A program on our side listens."""
        self.listener = self.stack.tcp.listen(None, self.port, backlog, SocketOptions(**options))
        return self.listener

    def user(self) -> User:
        """The program on our side accepts the connection."""
        assert self.listener is not None
        return self._user(self.listener.accept())

    def _user(self, conn: Connection) -> User:
        user = User(self, conn)
        self._users.append(user)
        return user

    def connects(self, *, mss: int = 1460, wscale: int = -1, sack: bool = False, ts: int = -1, **options: Any) -> User:
        """Open a connection to the stack, with what the peer offers and the user's socket options; returns its user."""
        if self.listener is None:
            self.listens(**options)
        self.ts = (ts, 0)
        self.sends(SYN, seq=0, mss=mss, wscale=wscale, sack_permitted=sack)
        answer = self.expects(SYN | ACK, seq=0, ack=1)
        self.ts = (ts, answer.options.ts_val) if answer.options.ts_val >= 0 else (-1, 0)
        self.sends(ACK)
        self.expects_nothing()
        return self.user()

    def is_called(self, early: int | None = None, **options: Any) -> User:
        """A user on our side connects to the peer: the stack's SYN is under way, with up to `early` bytes if it may."""
        self.own_port, self.port = STACK_PORT, 50000
        path = self.stack.ip.path(PEER_ADDRESS)
        data = None if early is None else pattern(1, early)
        user = self._user(self.stack.tcp.connect(path, self.port, self.own_port, SocketOptions(**options), data))
        user.sent = user.conn.snd_nxt - user.conn.iss - 1
        self.settle()
        self.mark = self.world.now
        return user

    def accepts(self, *, mss: int = 1460, wscale: int = -1, sack: bool = False, ts: int = -1, **options: Any) -> User:
        """A user on our side connects to the peer, which answers; returns the user."""
        user = self.is_called(**options)
        syn = self.expects(SYN, seq=0)
        self.ts = (ts, syn.options.ts_val) if ts >= 0 and syn.options.ts_val >= 0 else (-1, 0)
        self.sends(SYN | ACK, seq=0, ack=1, mss=mss, wscale=wscale, sack_permitted=sack)
        self.expects(ACK, seq=1, ack=1)
        return user
