"""A protocol analyser between two stacks: it sees every segment as it leaves, and looks at both ends.

What must be true of each segment, whatever the wire does and whatever the programs do:

* what is acknowledged was sent, and acknowledgments and the right edge of the window never move back;
* data lies in a window that the receiver has offered, follows what was sent before without a gap, and has no more bytes than
  the receiver's MSS and the MTU allow; what is sent again is not acknowledged yet, and is what it was the first time;
* a SACK block is of data that the sender of the block holds, or, as a D-SACK, of data that was sent;
* nothing comes behind a FIN, which stays where it is;
* timestamps never go back, and what is echoed was said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.connection import Connection
from ustack.wire import ethernet, ipv4, tcp
from ustack.wire.tcp import ACK, FIN, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.link.simwire import SimDevice, WireFrame
    from ustack.stack import Stack
    from ustack.wire.tcp import TcpHeader

HALF: Final = 1 << 31
MASK32: Final = (1 << 32) - 1
UNKNOWN: Final = -1


def later(wire: int, than: int) -> int:
    """How far the 32-bit number `wire` lies beyond `than`; negative when it lies before."""
    return ((wire - than + HALF) & MASK32) - HALF


class Direction:
    """What one end of a connection has sent. Numbers count from its initial sequence number; `stream` begins with number 1."""

    def __init__(self, iss: int) -> None:
        self.iss = iss
        self.stream = bytearray(1)
        self.fin = UNKNOWN
        self.ack = UNKNOWN
        self.edge = 0
        self.mss = 536
        self.wscale = 0
        self.scaled = False
        self.last_ts = UNKNOWN
        self.said: set[int] = set()

    @property
    def end(self) -> int:
        """What comes next."""
        return len(self.stream) + (self.fin >= 0)


class Analyser:
    """Watches what leaves `stacks` through `devices`, which are already on the wire. Raises AssertionError for what must not
    be; `segments` counts what was seen.
    """

    def __init__(self, stacks: list[Stack], devices: list[SimDevice]) -> None:
        self.segments = 0
        self._flows: dict[bytes, dict[bytes, Direction]] = {}
        for stack, device in zip(stacks, devices, strict=True):
            assert device.wire is not None
            device.wire = self._tap(stack, device, device.wire)

    def _tap(self, stack: Stack, device: SimDevice, wire: Callable[[WireFrame], None]) -> Callable[[WireFrame], None]:
        def see(frame: WireFrame) -> None:
            self._on_frame(stack, device, frame)
            wire(frame)

        return see

    def _on_frame(self, stack: Stack, device: SimDevice, frame: WireFrame) -> None:
        data = bytes(frame.data)
        if data[12:14] != ethernet.ETH_P_IP.to_bytes(2) or data[23] != ipv4.IPPROTO_TCP:
            return
        assert frame.gso_size or len(data) <= ethernet.HEADER_LEN + device.mtu, "longer than the MTU"
        l4 = data[34:]
        header = tcp.parse_header(l4, 0, len(l4))
        assert header is not None
        here = data[26:30] + l4[:2]
        there = data[30:34] + l4[2:4]
        self.segments += 1
        conn = stack.tcp.connections.get(data[30:34] + data[26:30] + l4[2:4] + l4[:2])
        try:
            self._on_segment(here, there, header, l4[header.length :], frame.gso_size, conn)
        except AssertionError as error:
            raise AssertionError(f"{error} (segment {self.segments}: {header})") from None

    def _on_segment(self, here: bytes, there: bytes, header: TcpHeader, payload: bytes, gso_size: int, conn: object) -> None:
        flags = header.flags
        flow = self._flows.setdefault(min(here, there) + max(here, there), {})
        mine = flow.get(here)
        other = flow.get(there)
        if flags & RST:
            return
        if flags & SYN and (mine is None or mine.iss != header.seq):
            mine = flow[here] = Direction(header.seq)
            if not flags & ACK and other is not None and other.ack != UNKNOWN:
                del flow[there]  # a new connection under an old name
                other = None
        if mine is None:
            return  # it answers what it does not know
        seq = later(header.seq, mine.iss & MASK32)
        if flags & SYN:
            self._syn(mine, header)
        self._data(mine, other, header, payload, seq, gso_size, conn)
        if flags & ACK and other is not None:
            self._ack(mine, other, header, conn)
        self._timestamps(mine, other, header)

    def _syn(self, mine: Direction, header: TcpHeader) -> None:
        options = header.options
        if options.mss > 0:
            mine.mss = options.mss
        mine.scaled = options.wscale >= 0
        mine.wscale = min(max(options.wscale, 0), 14)
        if not header.flags & ACK:
            mine.edge = max(mine.edge, 1 + header.window)  # what may come before the handshake is done (RFC 7413)

    def _data(
        self,
        mine: Direction,
        other: Direction | None,
        header: TcpHeader,
        payload: bytes,
        seq: int,
        gso_size: int,
        conn: object,
    ) -> None:
        start = seq + bool(header.flags & SYN)
        end = start + len(payload)
        if payload:
            assert start <= len(mine.stream), "there is a gap before it"
            assert mine.fin < 0 or end <= mine.fin, "data behind a FIN"
            known = mine.stream[start:end]
            assert payload[: len(known)] == known, "it is not what it was the first time"
            mine.stream += payload[len(known) :]
            if other is not None:
                size = gso_size or len(payload)
                assert size <= max(other.mss, 48), "more than the peer's MSS"
                assert end <= other.edge or header.flags & SYN, "beyond every window that was offered"
            if isinstance(conn, Connection) and conn.synchronized:
                assert later(header.seq, conn.snd_una & MASK32) >= 0, "what is acknowledged is sent again"
        if header.flags & FIN:
            assert end == len(mine.stream), "a FIN before the end"
            assert mine.fin in (UNKNOWN, end), "the FIN has moved"
            mine.fin = end
        assert start <= mine.end, "a number that has not come yet"

    def _ack(self, mine: Direction, other: Direction, header: TcpHeader, conn: object) -> None:
        ack = later(header.ack, other.iss & MASK32)
        assert ack <= other.end, "what was never sent is acknowledged"
        assert ack >= mine.ack, "the acknowledgment has moved back"
        mine.ack = ack
        scale = 0 if header.flags & SYN or not (mine.scaled and other.scaled) else mine.wscale
        edge = ack + (header.window << scale)
        if isinstance(conn, Connection) and conn.no_room_at < 0:
            assert edge >= mine.edge, "the window has shrunk"
        mine.edge = max(mine.edge, edge)
        self._sack(other, header, ack, conn)

    def _sack(self, other: Direction, header: TcpHeader, ack: int, conn: object) -> None:
        if not isinstance(conn, Connection):
            return
        held = [(skb.seq - conn.irs, skb.end_seq - conn.irs) for skb in conn.receive_queue.ofo]
        blocks = [(later(left, other.iss & MASK32), later(right, other.iss & MASK32)) for left, right in header.options.sack]
        for position, (left, right) in enumerate(blocks):
            assert left < right <= other.end, "a block of what was never sent"
            if not position and (right <= ack or (len(blocks) > 1 and blocks[1][0] <= left and right <= blocks[1][1])):
                continue  # a D-SACK
            assert left > ack, "a block of what is acknowledged"
            at = left
            for begin, end in held:
                if begin <= at < end:
                    at = end
            assert at >= right, f"the block {left}:{right} is of data that is not held"

    def _timestamps(self, mine: Direction, other: Direction | None, header: TcpHeader) -> None:
        options = header.options
        if options.ts_val < 0:
            return
        assert mine.last_ts == UNKNOWN or later(options.ts_val, mine.last_ts) >= 0, "its timestamp is older than the last"
        mine.last_ts = options.ts_val
        mine.said.add(options.ts_val)
        if other is not None and options.ts_ecr and header.flags & ACK:
            assert options.ts_ecr in other.said, "it echoes what was never said"
