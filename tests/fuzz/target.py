"""The whole input path with state: a stack whose programs accept, read, write and close, and frames that no good host sends.

A frame is one of the corpus (`corpus.txt`, a name and the frame in hexadecimal on each line), changed in some places and mostly
with checksums made right again, or a segment for a connection that there is, with numbers near its own. Everything comes from a
seed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from tests.sim.network import left_behind
from tests.transport.tcp.invariants import Watch
from ustack.lab.world import World
from ustack.link.device import NO_CSUM
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import SimDevice, WireFrame
from ustack.stack import Stack
from ustack.transport.events import SHUT_RD, SHUT_WR
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.connection import Connection
from ustack.wire import arp, ethernet, ipv4, tcp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4, pseudo_v6
from ustack.wire.tcp import ACK, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS: Final = Path(__file__).with_name("corpus.txt")
US: Final = bytes((10, 0, 0, 1))
PEER: Final = bytes((10, 0, 0, 2))
OUR_MAC: Final = b"\x02\x00\x00\x00\x00\x01"
PEER_MAC: Final = b"\x02\x00\x00\x00\x00\x02"
PORT: Final = 80
MEMORY: Final = 2 << 20
ICMPV6: Final = 58
BATCH: Final = 32
"""Frames that arrive at the same time."""


def corpus() -> dict[str, bytes]:
    """The frames of the corpus by name."""
    lines = (line.split() for line in CORPUS.read_text().splitlines() if line and not line.startswith("#"))
    return {name: bytes.fromhex(frame) for name, frame in lines}


def with_checksums(frame: bytes) -> bytes:
    """`frame` with the checksums of IPv4, TCP, UDP and ICMPv6 made right, as far as it has any."""
    data = bytearray(frame)
    if data[12:14] == ethernet.ETH_P_IPV6.to_bytes(2) and len(data) >= 58 and data[20] == ICMPV6:
        data[56:58] = bytes(2)
        body = bytes(data[54:])
        total = pseudo_v6(bytes(data[22:38]), bytes(data[38:54]), ICMPV6, len(body)) + ones_sum(body)
        data[56:58] = finish(total).to_bytes(2)
        return bytes(data)
    if len(data) < 34 or data[12:14] != ethernet.ETH_P_IP.to_bytes(2):
        return frame
    l4 = 14 + (data[14] & 15) * 4
    if 34 <= l4 <= len(data):
        data[24:26] = bytes(2)
        data[24:26] = finish(ones_sum(bytes(data[14:l4]))).to_bytes(2)
    at = l4 + {6: 16, 17: 6}.get(data[23], len(data))
    if at + 2 <= len(data):
        data[at : at + 2] = bytes(2)
        body = bytes(data[l4:])
        checksum = finish(pseudo_v4(bytes(data[26:30]), bytes(data[30:34]), data[23], len(body)) + ones_sum(body))
        data[at : at + 2] = checksum.to_bytes(2)
    return bytes(data)


class Target:
    """The stack, its programs and the host that sends it frames. `frames` counts them."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World(seed)
        ring = self.random.choice((PagedRing, LinearRing))
        self.device = SimDevice("sim0", OUR_MAC, 1500, 0, ring)
        self.device.wire = self._on_sent
        self.stack = Stack(memory=MEMORY, reserve=0, tcp=TcpConfig(max_syn_backlog=64, fastopen=1027), random=Random(seed))
        self.world.add(self.stack, self.device)
        interface = self.stack.add_interface(self.device, "10.0.0.1/24")
        self.stack.ip6.add_interface(interface).add_address(bytes.fromhex("fe800000000000000000000000000001"), 64)
        self.watch = Watch(self.stack)
        self.corpus = list(corpus().values())
        self.frames = 0
        self._answered: set[int] = set()
        self._users: list[Connection] = []
        self._listener = self.stack.tcp.listen(None, PORT, 16, SocketOptions())
        self._datagrams = self.stack.udp.socket(SocketOptions())
        self._datagrams.bind(bytes(4), 1000)

    def _on_sent(self, frame: WireFrame) -> None:
        data = bytes(frame.data)
        if data[12:14] == ethernet.ETH_P_ARP.to_bytes(2):
            if data[20:22] == arp.ARPOP_REQUEST.to_bytes(2) and data[38:42] == PEER:
                reply = arp.build(arp.ARPOP_REPLY, PEER_MAC, PEER, data[22:28], US)
                self._put(ethernet.build_header(OUR_MAC, PEER_MAC, ethernet.ETH_P_ARP) + reply)
        elif data[23] == ipv4.IPPROTO_TCP and data[47] & (SYN | ACK) == SYN | ACK:
            self._answered.add(int.from_bytes(data[36:38]))

    def _put(self, frame: bytes) -> None:
        self.device.receive(WireFrame(frame, 0, NO_CSUM, 0))

    # -- frames --

    def segment(self, sport: int, seq: int, ack: int, flags: int, payload: bytes = b"", options: bytes = b"") -> bytes:
        """A frame with a TCP segment for the listener's port."""
        header = tcp.build_header(sport, PORT, seq, ack, flags, self.random.choice((0, 1, 1000, 65535)), options)
        packet = ipv4.build_header(PEER, US, ipv4.IPPROTO_TCP, len(header) + len(payload)) + header + payload
        return with_checksums(ethernet.build_header(OUR_MAC, PEER_MAC, ethernet.ETH_P_IP) + packet)

    def _for_a_connection(self) -> bytes:
        random = self.random
        conns = [conn for conn in self.stack.tcp.connections.values() if isinstance(conn, Connection)]
        if not conns or random.random() < 0.1:
            return self.segment(
                random.randrange(1024, 1064), random.getrandbits(32), 0, SYN, b"", b"\x02\x04\x05\xb4\x04\x02\x01\x01"
            )
        conn = random.choice(conns)
        near = (0, 0, 0, 1, -1, 1460, 100_000, -5000)
        seq = conn.rcv_nxt + random.choice(near)
        ack = random.choice((conn.snd_nxt, conn.snd_una, conn.snd_nxt + random.choice(near)))
        flags = random.choice((ACK, ACK, ACK, ACK | 8, ACK | 1, ACK | 4, 4, SYN, SYN | ACK, random.randrange(256)))
        options = b""
        if random.random() < 0.3:
            left = conn.snd_una + random.choice(near)
            blocks = tcp.build_options(-1, 0, [(left & 0xFFFFFFFF, (left + random.randrange(5000)) & 0xFFFFFFFF)])
            options = random.choice((blocks, random.randbytes(random.choice((4, 12, 40)))))
        payload = bytes(random.choice((0, 0, 1, 100, 1400)))
        return self.segment(conn.remote_port, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, flags, payload, options)

    def _changed(self) -> bytes:
        random = self.random
        frame = bytearray(random.choice(self.corpus))
        for _ in range(random.choice((0, 1, 1, 2, 5))):
            how = random.random()
            at = random.randrange(12, len(frame)) if len(frame) > 12 else 0
            if how < 0.5:
                frame[at] ^= 1 << random.randrange(8)
            elif how < 0.7:
                frame[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif how < 0.8:
                del frame[max(at, 13) :]
            elif how < 0.9:
                frame += random.randbytes(random.choice((1, 40, 1000)))
            else:
                frame[at:] = random.choice(self.corpus)[at:] or b"\0"
        data = bytes(frame[:1514])
        return with_checksums(data) if random.random() < 0.8 else data

    # -- programs --

    def _use(self) -> None:
        random = self.random
        with suppress(OSError):
            self._users.append(self._listener.accept())
        with suppress(OSError):
            self._datagrams.recvfrom_nowait(2000)
        if not self._users:
            return
        conn = random.choice(self._users)
        what = random.random()
        with suppress(OSError):
            if what < 0.4:
                conn.recv(random.choice((1, 1000, 100_000)))
            elif what < 0.8:
                conn.send(bytes(random.choice((1, 1000, 20_000))))
            elif what < 0.9:
                conn.shutdown(random.choice((SHUT_RD, SHUT_WR, SHUT_RD | SHUT_WR)))
        if what > 0.9 or len(self._users) > 12:
            self._users.remove(conn)
            conn.close()

    # -- the run --

    def replay(self, frame: bytes) -> None:
        """One frame, as it is."""
        self._put(frame)
        self._settle()

    def run(self, frames: int, report: Callable[[int], None] | None = None) -> None:
        """So many frames. Raises what the stack raises, and AssertionError for an invariant that does not hold."""
        random = self.random
        until = self.frames + frames
        while self.frames < until:
            for _ in range(min(BATCH, until - self.frames)):
                self._put(self._for_a_connection() if random.random() < 0.6 else self._changed())
                self.frames += 1
            self._settle()
            for _ in range(3):
                self._use()
            self._settle()
            self.world.run(random.choice((0.0, 0.0, 0.001, 0.05, 0.3, 2.0)))
            if report is not None and self.frames % 100_000 < BATCH:
                report(self.frames)

    def _settle(self) -> None:
        while self.device.waiting:
            self.stack.receive(self.device)
        self.stack.flush()
        self.watch.check()

    def accepts(self) -> bool:
        """Whether a stranger's SYN is answered now, or at least when what is half open has been forgotten."""
        for attempt in range(4):
            port = 50_000 + attempt
            self._put(self.segment(port, 1, 0, SYN))
            self._settle()
            self.world.run(1.0)
            if port in self._answered:
                return True
            for conn in self._users:
                conn.close()
            self._users.clear()
            with suppress(OSError):
                while True:
                    self._listener.accept().close()
            self.world.run(200.0)
        return False

    def close(self) -> list[str]:
        """End everything; what is left behind."""
        for conn in self._users:
            conn.close()
        self._datagrams.close()
        self.stack.close()
        return left_behind(self.stack)
