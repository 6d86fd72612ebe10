"""ICMP for IPv4 (RFC 792; RFC 1122, section 3.2.2; RFC 1812, section 4.3.2): echo, the errors we send, and the errors we are
told.

An echo is answered straight from the receive ring: nothing is allocated and nothing copied, and the checksum of the reply
follows from that of the request. Checksums of ICMP are never left to the device, because programs get these packets raw and
check them themselves. Redirects, source quench (RFC 6633) and timestamps are not acted on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net.echo import Echo
from ustack.net.icmp_limit import ErrorLimiter
from ustack.net.path import PMTU_MIN, PMTUDISC_DO, PMTUDISC_WANT
from ustack.wire import ethernet, icmp, ipv4
from ustack.wire.checksum import finish, ones_sum_views

if TYPE_CHECKING:
    from ustack.net.ipv4 import Ipv4
    from ustack.net.layer import IpPacket
    from ustack.skb import Buffer, Skb

MemallocOwner = Callable[[bytes, bytes, bytes], bool]
"""`owner(src, dst, quoted)` of a protocol: whether the packet that an error is about was sent by a memalloc socket."""

ErrorHandler = Callable[[int, int, int, bytes, bytes, bytes], bool]
"""`handler(type, code, mtu, src, dst, quoted)` of a protocol: an error about a packet that we sent from `src` to `dst`.

`quoted` are the first bytes of its transport header, at least 8. `mtu` is what the path takes if the error is "fragmentation
needed", else 0; the path is narrowed only after the handler has returned. Returns whether the packet can be one of ours; if
not, nobody acts on the error (RFC 5927).
"""

QUOTE_MAX: Final = 576 - ipv4.HEADER_LEN - icmp.HEADER_LEN
"""Bytes of the offending packet that an error quotes, so that the error is no longer than 576 (RFC 1812, section 4.3.2.3)."""

QUOTED_L4_MAX: Final = 60
"""Bytes of a quoted transport header that are handed up."""

_ERRORS: Final = (icmp.ICMP_DEST_UNREACH, icmp.ICMP_TIME_EXCEEDED, icmp.ICMP_PARAMETERPROB)


class Icmp:
    """ICMP of one stack. `error_handlers` maps an IP protocol to who is told of errors about its packets, `memalloc_owners` to
    who knows for an error in a buffer from the reserve whether it may be handled. Everything else in such a buffer is dropped.
    """

    __slots__ = ("_drops", "_echoes", "_ipv4", "_limiter", "_mib", "_reporter", "error_handlers", "memalloc_owners")

    def __init__(self, ipv4_layer: Ipv4) -> None:
        self._ipv4 = ipv4_layer
        self._drops = ipv4_layer.env.drops
        self._mib = ipv4_layer.env.mib
        self._reporter = b""  # who sent the error that is being processed
        self._limiter = ErrorLimiter(ipv4_layer.env)
        self._echoes: dict[int, Echo] = {}
        self.error_handlers: dict[int, ErrorHandler] = {ipv4.IPPROTO_ICMP: self._on_echo_error}
        self.memalloc_owners: dict[int, MemallocOwner] = {}

    # -- in --

    def input(self, packet: IpPacket) -> None:
        """An ICMP message arrived."""
        self._mib.IcmpInMsgs += 1
        frame = packet.frame
        if packet.l4_len < icmp.HEADER_LEN:
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        if not frame.csum_ok and finish(ones_sum_views(frame.views(packet.l4, packet.l4_len))):
            self._refuse(DropReason.ICMP_CSUM)
            return
        kind, code, checksum, word0, word1 = icmp.HEADER.unpack_from(frame.head, packet.l4)
        if frame.pfmemalloc and kind not in _ERRORS:
            self._drops.count(DropReason.PFMEMALLOC)
            return
        if kind == icmp.ICMP_ECHO and not packet.broadcast:
            self._mib.IcmpInEchos += 1
            self._reply(packet, checksum, word0, word1)
        elif kind == icmp.ICMP_ECHOREPLY:
            echo = self._echoes.get(word0)
            if echo is None:
                self._drops.count(DropReason.NO_SOCKET)
            else:
                payload = frame.tobytes(packet.l4 + icmp.HEADER_LEN, packet.l4_len - icmp.HEADER_LEN)
                echo.on_reply(packet.src, word1, payload, packet.ttl)
        elif kind in _ERRORS:
            self._on_error(packet, kind, code, word1)
        else:
            self._drops.count(DropReason.INVALID_PROTO)

    def _refuse(self, reason: DropReason) -> None:
        self._mib.IcmpInErrors += 1
        self._drops.count(reason)

    def _reply(self, packet: IpPacket, checksum: int, ident: int, seq: int) -> None:
        try:
            path = self._ipv4.path(packet.src, packet.dst)
        except OSError:
            return  # counted there
        # Only the type changes, from 8 to 0, and the checksum with it (RFC 1624, equation 3).
        checksum = finish((checksum ^ 0xFFFF) + 0xFFFF - (icmp.ICMP_ECHO << 8))
        icmp.HEADER.pack_into(path.head, path.l4, icmp.ICMP_ECHOREPLY, 0, checksum, ident, seq)
        self._mib.IcmpOutMsgs += 1
        self._mib.IcmpOutEchoReps += 1
        length = packet.l4_len - icmp.HEADER_LEN
        payload = packet.frame.views(packet.l4 + icmp.HEADER_LEN, length)
        path.send(ipv4.IPPROTO_ICMP, icmp.HEADER_LEN, payload, length, tos=packet.tos, df=False)

    def _on_error(self, packet: IpPacket, kind: int, code: int, mtu: int) -> None:
        """Find out about which packet the error is, and tell its protocol (RFC 1122, section 3.2.2)."""
        head = packet.frame.head
        start = packet.l4 + icmp.HEADER_LEN
        end = min(packet.l4 + packet.l4_len, len(head))
        quoted = ipv4.parse_header(head, start, end)
        if quoted is None or not self._ipv4.is_own(quoted.src) or quoted.frag & ipv4.IP_OFFSET:
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        l4 = bytes(head[start + quoted.ihl : min(end, start + quoted.ihl + QUOTED_L4_MAX)])
        frag_needed = kind == icmp.ICMP_DEST_UNREACH and code == icmp.ICMP_FRAG_NEEDED
        # No link is narrower than 68 bytes, and none refuses what fits. 0 comes from routers older than RFC 1191.
        if len(l4) < 8 or (frag_needed and mtu and not ipv4.MIN_MTU <= mtu < quoted.total):
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        if packet.frame.pfmemalloc:
            owner = self.memalloc_owners.get(quoted.protocol)
            if owner is None or not owner(quoted.src, quoted.dst, l4):
                self._drops.count(DropReason.PFMEMALLOC)
                return
        handler = self.error_handlers.get(quoted.protocol)
        self._reporter = packet.src
        usable = max(mtu, PMTU_MIN) if frag_needed else 0
        if handler is None or not handler(kind, code, usable, quoted.src, quoted.dst, l4):
            self._refuse(DropReason.ICMP_MALFORMED)
        elif frag_needed:
            self._ipv4.learn_pmtu(quoted.dst, mtu)

    def on_neighbour_failed(self, skb: Skb) -> None:
        """The next hop of the frame `skb` does not answer: for its sender the same as "host unreachable" from a router."""
        frame = skb.views(0, min(skb.len, ethernet.HEADER_LEN + ipv4.HEADER_LEN + QUOTED_L4_MAX))[0]
        header = ipv4.parse_header(frame, ethernet.HEADER_LEN, len(frame))
        assert header is not None, "we built it"
        handler = self.error_handlers.get(header.protocol)
        if handler is not None and not header.frag & ipv4.IP_OFFSET:
            self._reporter = header.src
            l4 = bytes(frame[ethernet.HEADER_LEN + header.ihl :])
            handler(icmp.ICMP_DEST_UNREACH, icmp.ICMP_HOST_UNREACH, 0, header.src, header.dst, l4)

    # -- out --

    def send_error(self, packet: IpPacket, kind: int, code: int) -> None:
        """Tell the sender of `packet` what is wrong with it, unless that is forbidden or happens too often.

        Never about a broadcast or an ICMP error (RFC 1122, section 3.2.2). Packets from nobody do not get this far.
        """
        if packet.broadcast:
            return
        frame = packet.frame
        length = min(packet.l4 - packet.l3 + packet.l4_len, QUOTE_MAX)
        self._send_error(
            kind, code, packet.src, packet.dst, packet.proto, frame.head[packet.l4], frame.views(packet.l3, length)
        )

    def send_reassembly_timeout(self, header: bytes, first: Skb) -> None:
        """Tell the sender of a fragment, the first of its datagram, that the others did not come in time. `header` is its IP
        header, `first` what came with it.
        """
        parsed = ipv4.parse_header(header, 0, len(header))
        assert parsed is not None, "it was checked when it arrived"
        data = first.views(0, min(first.len, QUOTE_MAX - len(header)))
        self._send_error(
            icmp.ICMP_TIME_EXCEEDED,
            icmp.ICMP_EXC_FRAGTIME,
            parsed.src,
            parsed.dst,
            parsed.protocol,
            data[0][0],
            [memoryview(header), *data],
        )

    def _send_error(
        self, kind: int, code: int, dst: bytes, src: bytes, proto: int, quoted_type: int, quote: list[memoryview]
    ) -> None:
        """Send an error from our address `src` about a packet of protocol `proto` that `dst` sent, which begins as `quote`;
        `quoted_type` is the first byte of its payload.
        """
        if proto == ipv4.IPPROTO_ICMP and quoted_type in icmp.ERROR_TYPES:
            return
        if not self._limiter.allow(dst):
            self._drops.count(DropReason.ICMP_RATELIMIT)
            return
        try:
            path = self._ipv4.path(dst, src)
        except OSError:
            return  # counted there
        path.head[path.l4 : path.l4 + icmp.HEADER_LEN] = icmp.build_header(kind, code, 0, 0, quote)
        mib = self._mib
        mib.IcmpOutMsgs += 1
        if kind == icmp.ICMP_DEST_UNREACH:
            mib.IcmpOutDestUnreachs += 1
        elif kind == icmp.ICMP_TIME_EXCEEDED:
            mib.IcmpOutTimeExcds += 1
        path.send(ipv4.IPPROTO_ICMP, icmp.HEADER_LEN, quote, sum(map(len, quote)), tos=0xC0, df=False)

    # -- echo of our own --

    def open_echo(
        self, on_reply: Callable[[bytes, int, bytes, int], None], on_error: Callable[[int, int, bytes, int, bytes], None]
    ) -> Echo:
        """An echo client with an identifier of its own.

        `on_reply(src, seq, payload, ttl)` is called for every reply, duplicates included; `on_error(type, code, dst, seq,
        reporter)` for every ICMP error about a request, which the host `reporter` sent (ourselves, when a neighbour is silent).
        Raises OSError EADDRINUSE when all identifiers are taken.
        """
        if len(self._echoes) > 0xFFFF:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        ident = self._ipv4.env.random.getrandbits(16)
        while ident in self._echoes:
            ident = (ident + 1) & 0xFFFF
        echo = self._echoes[ident] = Echo(self, ident, on_reply, on_error)
        return echo

    def _on_echo_error(self, kind: int, code: int, _mtu: int, _src: bytes, dst: bytes, quoted: bytes) -> bool:
        quoted_kind, _, _, ident, seq = icmp.HEADER.unpack_from(quoted)
        echo = self._echoes.get(ident)
        if quoted_kind != icmp.ICMP_ECHO or echo is None:
            return False
        echo.on_error(kind, code, dst, seq, self._reporter)
        return True

    def send_echo(self, ident: int, dst: bytes, seq: int, payload: Buffer, ttl: int, pmtudisc: int) -> bool:
        """Send an echo request; see `Echo.send`."""
        path = self._ipv4.path(dst)
        fits = ipv4.HEADER_LEN + icmp.HEADER_LEN + len(payload) <= path.mtu
        if not fits and pmtudisc >= PMTUDISC_DO:
            raise OSError(errno.EMSGSIZE, f"{os.strerror(errno.EMSGSIZE)}, mtu={path.mtu}")
        df = pmtudisc >= PMTUDISC_DO or (fits and pmtudisc == PMTUDISC_WANT)
        header = icmp.build_header(icmp.ICMP_ECHO, 0, ident, seq, (payload,))
        path.head[path.l4 : path.l4 + icmp.HEADER_LEN] = header
        self._mib.IcmpOutMsgs += 1
        return path.send(ipv4.IPPROTO_ICMP, icmp.HEADER_LEN, (payload,), len(payload), ttl=ttl, df=df)

    def close_echo(self, ident: int) -> None:
        """End the echo client with the identifier `ident`."""
        self._echoes.pop(ident, None)
