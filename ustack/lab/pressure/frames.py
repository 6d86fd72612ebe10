"""Frames as a hostile or a merely busy network sends them: fragments, floods, datagrams that nobody reads.

They are made here and put on the wire as they are, since no honest stack would send them.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from ustack.lab.pressure.scenario import ArpFlood, Fragments, IcmpFlood, SynFlood, UdpBlocked
from ustack.wire import arp, ethernet, icmp, ipv4, tcp, udp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from random import Random

CROWD_PORT: Final = 1234
"""TCP port of the stack under test on which the readers that never read listen."""

UDP_PORT: Final = 20_000
"""UDP port of the first socket that nobody reads."""

NOBODYS_PORT: Final = 9
"""UDP port that no socket has."""

SOURCES: Final = 0x0A_4D_80_00
"""The first of the addresses of floods, 10.77.128.0: on the network of the stack under test, and of no station."""

_HEADER: Final = Struct("!BBHHHBBH4s4s")

FloodTraffic = UdpBlocked | Fragments | ArpFlood | SynFlood | IcmpFlood
"""Traffic that comes frame by frame, at a rate."""


class FrameSource:
    """Makes the frames of `traffic` from the peer (`src`, `src_mac`) to the stack under test (`dst`, `dst_mac`).

    `mtu` bounds the IP packets; `first_port` is the port of the first socket of an `UdpBlocked`.
    """

    def __init__(
        self,
        traffic: FloodTraffic,
        random: Random,
        *,
        src: bytes,
        src_mac: bytes,
        dst: bytes,
        dst_mac: bytes,
        mtu: int,
        first_port: int,
    ) -> None:
        self._traffic = traffic
        self._random = random
        self._src = src
        self._src_mac = src_mac
        self._dst = dst
        self._dst_mac = dst_mac
        self._mtu = mtu
        self._first_port = first_port
        self._number = 0

    def next(self) -> list[bytes]:
        """The frames of the next datagram, request or SYN."""
        traffic = self._traffic
        self._number += 1
        if isinstance(traffic, UdpBlocked):
            return self._datagram(size_between(traffic.size, self._random), self._first_port + self._number % traffic.count)
        if isinstance(traffic, Fragments):
            frames = self._datagram(size_between(traffic.size, self._random), NOBODYS_PORT, split=True)
            return frames if traffic.complete else frames[:-1]
        if isinstance(traffic, IcmpFlood):
            payload = bytes(size_between(traffic.size, self._random))
            echo = icmp.build_header(icmp.ICMP_ECHO, 0, 0x4C61, self._number & 0xFFFF, (payload,))
            return [self._packet(ipv4.IPPROTO_ICMP, echo + payload)]
        source = (SOURCES + self._random.randrange(traffic.sources)).to_bytes(4, "big")
        mac = b"\x02\x77" + source
        if isinstance(traffic, ArpFlood):
            request = arp.build(arp.ARPOP_REQUEST, mac, source, bytes(6), self._dst)
            return [ethernet.build_header(ethernet.BROADCAST, mac, ethernet.ETH_P_ARP) + request]
        return [self._syn(source)]

    def _packet(self, protocol: int, payload: bytes, ident: int = 0, frag: int = 0) -> bytes:
        header = bytearray(_HEADER.pack(0x45, 0, 20 + len(payload), ident, frag, 64, protocol, 0, self._src, self._dst))
        header[ipv4.OFF_CSUM : ipv4.OFF_CSUM + 2] = finish(ones_sum(header)).to_bytes(2, "big")
        return ethernet.build_header(self._dst_mac, self._src_mac, ethernet.ETH_P_IP) + bytes(header) + payload

    def _datagram(self, size: int, port: int, *, split: bool = False) -> list[bytes]:
        datagram = udp.build_header(NOBODYS_PORT, port, size) + bytes(size)  # without checksum, which UDP allows
        room = (self._mtu - 20) & ~7
        if split:
            room = min(room, max(len(datagram) // 2 & ~7, 8))
        elif len(datagram) + 20 <= self._mtu:
            return [self._packet(ipv4.IPPROTO_UDP, datagram)]
        ident = self._random.getrandbits(16)
        frames = []
        for offset in range(0, len(datagram), room):
            more = ipv4.IP_MF if offset + room < len(datagram) else 0
            frames.append(self._packet(ipv4.IPPROTO_UDP, datagram[offset : offset + room], ident, more | offset >> 3))
        return frames

    def _syn(self, source: bytes) -> bytes:
        ports = self._random.randrange(1024, 65536) << 16 | CROWD_PORT
        segment = bytearray(20)
        segment[0:4] = ports.to_bytes(4, "big")
        segment[tcp.OFF_SEQ : tcp.OFF_SEQ + 4] = self._random.getrandbits(32).to_bytes(4, "big")
        segment[tcp.OFF_FLAGS] = 5 << 4
        segment[tcp.OFF_FLAGS + 1] = tcp.SYN
        segment[14:16] = b"\xff\xff"
        checksum = finish(pseudo_v4(source, self._dst, ipv4.IPPROTO_TCP, 20) + ones_sum(segment))
        segment[tcp.OFF_CSUM : tcp.OFF_CSUM + 2] = checksum.to_bytes(2, "big")
        frame = bytearray(self._packet(ipv4.IPPROTO_TCP, bytes(segment)))
        frame[26:30] = source
        frame[24:26] = b"\0\0"
        frame[24:26] = finish(ones_sum(frame[14:34])).to_bytes(2, "big")
        return bytes(frame)


def size_between(bounds: tuple[int, int], random: Random) -> int:
    """A size between the two of `bounds`, each octave as often as the next."""
    low, high = bounds
    return low if low == high else min(int(low * (high / low) ** random.random() + 0.5), high)
