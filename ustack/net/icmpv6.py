"""ICMPv6 (RFC 4443): echo, the errors we send, the errors we are told, and the way to Neighbor Discovery and MLD.

As with IPv4 an echo is answered straight from the receive ring, and checksums are never left to the device.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net.addresses import ANY6, with_zone
from ustack.net.echo import Echo
from ustack.net.icmp_limit import ErrorLimiter
from ustack.net.path import PMTUDISC_DO
from ustack.wire import ethernet, icmpv6, ipv6
from ustack.wire.checksum import finish, ones_sum_views, pseudo_v6

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.net.icmp import ErrorHandler, MemallocOwner
    from ustack.net.interface import Interface
    from ustack.net.ipv6 import Ipv6
    from ustack.net.layer import IpPacket
    from ustack.skb import Buffer, Skb

QUOTE_MAX: Final = ipv6.MIN_MTU - ipv6.HEADER_LEN - icmpv6.HEADER_LEN
"""Bytes of the offending packet that an error quotes, so that the error fits every link (RFC 4443, section 2.4 c)."""

QUOTED_L4_MAX: Final = 60
"""Bytes of a quoted transport header that are handed up."""

_ERRNO: Final = {
    (icmpv6.ICMPV6_DEST_UNREACH, 0): (errno.ENETUNREACH, False),
    (icmpv6.ICMPV6_DEST_UNREACH, 1): (errno.EACCES, True),
    (icmpv6.ICMPV6_DEST_UNREACH, 2): (errno.EHOSTUNREACH, False),
    (icmpv6.ICMPV6_DEST_UNREACH, 3): (errno.EHOSTUNREACH, False),
    (icmpv6.ICMPV6_DEST_UNREACH, 4): (errno.ECONNREFUSED, True),
    (icmpv6.ICMPV6_DEST_UNREACH, 5): (errno.EACCES, True),
    (icmpv6.ICMPV6_DEST_UNREACH, 6): (errno.EACCES, True),
}

_ND: Final = (
    icmpv6.ND_ROUTER_SOLICIT,
    icmpv6.ND_ROUTER_ADVERT,
    icmpv6.ND_NEIGHBOR_SOLICIT,
    icmpv6.ND_NEIGHBOR_ADVERT,
    icmpv6.ND_REDIRECT,
)


def errno_of(kind: int, code: int) -> tuple[int, bool]:
    """The errno that an ICMPv6 error stands for, and whether it is final (Linux, icmpv6_err_convert)."""
    if kind == icmpv6.ICMPV6_PKT_TOOBIG:
        return errno.EMSGSIZE, False
    if kind == icmpv6.ICMPV6_PARAMPROB:
        return errno.EPROTO, True
    return _ERRNO.get((kind, code), (errno.EHOSTUNREACH, False))


class Icmpv6:
    """ICMPv6 of one stack. `error_handlers` maps a protocol to who is told of errors about its packets, in the types and codes
    of ICMPv6; `memalloc_owners` are those of `Icmp`.
    """

    __slots__ = ("_drops", "_echoes", "_ipv6", "_limit", "_mib", "_reporter", "error_handlers", "memalloc_owners")

    def __init__(self, ipv6_layer: Ipv6) -> None:
        self._ipv6 = ipv6_layer
        self._drops = ipv6_layer.env.drops
        self._mib = ipv6_layer.env.mib
        self._limit = ErrorLimiter(ipv6_layer.env)
        self._echoes: dict[int, Echo] = {}
        self._reporter = ANY6  # who sent the error that is being processed
        self.error_handlers: dict[int, ErrorHandler] = {ipv6.NEXTHDR_ICMP: self._on_echo_error}
        self.memalloc_owners: dict[int, MemallocOwner] = {}

    # -- in --

    def input(self, packet: IpPacket) -> None:
        """An ICMPv6 message arrived."""
        mib = self._mib
        mib.Icmp6InMsgs += 1
        frame = packet.frame
        if packet.l4_len < icmpv6.HEADER_LEN:
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        if not frame.csum_ok:
            total = pseudo_v6(packet.src, packet.dst, ipv6.NEXTHDR_ICMP, packet.l4_len)
            if finish(total + ones_sum_views(frame.views(packet.l4, packet.l4_len))):
                mib.Icmp6InCsumErrors += 1
                self._refuse(DropReason.ICMP_CSUM)
                return
        kind, code, checksum, word = icmpv6.HEADER.unpack_from(frame.head, packet.l4)
        if kind in _ND:
            inet6 = packet.interface.inet6
            if frame.ring is not packet.interface.device.ring:
                self._refuse(DropReason.IPV6_NDISC_BAD_OPTIONS)  # it came in fragments (RFC 6980)
            elif inet6 is not None:
                inet6.ndp.input(packet, kind, code)
        elif frame.pfmemalloc and kind >= icmpv6.ERRORS_END:
            self._drops.count(DropReason.PFMEMALLOC)
        elif kind == icmpv6.ICMPV6_ECHO_REQUEST:
            mib.Icmp6InEchos += 1
            self._reply(packet, checksum, word)
        elif kind == icmpv6.ICMPV6_ECHO_REPLY:
            mib.Icmp6InEchoReplies += 1
            echo = self._echoes.get(word >> 16)
            if echo is None:
                self._drops.count(DropReason.NO_SOCKET)
            else:
                payload = frame.tobytes(packet.l4 + icmpv6.HEADER_LEN, packet.l4_len - icmpv6.HEADER_LEN)
                echo.on_reply(packet.src, word & 0xFFFF, payload, packet.ttl)
        elif icmpv6.ICMPV6_DEST_UNREACH <= kind <= icmpv6.ICMPV6_PARAMPROB:
            self._on_error(packet, kind, code, word)
        elif kind == icmpv6.MLD_QUERY and packet.interface.inet6 is not None:
            packet.interface.inet6.mld.on_query(packet)
        else:
            self._drops.count(DropReason.INVALID_PROTO)

    def _refuse(self, reason: DropReason) -> None:
        self._mib.Icmp6InErrors += 1
        self._drops.count(reason)

    def _reply(self, packet: IpPacket, checksum: int, word: int) -> None:
        if packet.src == ANY6:
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        try:
            path = self._ipv6.path(packet.src, None if packet.broadcast else packet.dst)
        except OSError:
            return  # counted there
        # Only type and our address change, and the checksum with them (RFC 1624, equation 3): a group cannot be the source.
        change = (icmpv6.ICMPV6_ECHO_REPLY - icmpv6.ICMPV6_ECHO_REQUEST) << 8
        if packet.broadcast:
            change += int.from_bytes(path.src[:16], "big") + 0xFFFF - int.from_bytes(packet.dst[:16], "big") % 0xFFFF
        checksum = finish((checksum ^ 0xFFFF) + change)
        icmpv6.HEADER.pack_into(path.head, path.l4, icmpv6.ICMPV6_ECHO_REPLY, 0, checksum, word)
        self._mib.Icmp6OutMsgs += 1
        self._mib.Icmp6OutEchoReplies += 1
        length = packet.l4_len - icmpv6.HEADER_LEN
        payload = packet.frame.views(packet.l4 + icmpv6.HEADER_LEN, length)
        path.send(ipv6.NEXTHDR_ICMP, icmpv6.HEADER_LEN, payload, length, tos=packet.tos, df=False)

    def _on_error(self, packet: IpPacket, kind: int, code: int, word: int) -> None:
        """Find out about which packet the error is, and tell its protocol (RFC 4443, section 2.4 d; RFC 5927)."""
        self._count_error(kind)
        head = packet.frame.head
        start = packet.l4 + icmpv6.HEADER_LEN
        end = min(packet.l4 + packet.l4_len, len(head))
        quoted = ipv6.parse_header(head, start, end)
        zone = packet.src[16:] or packet.interface.zone
        if quoted is None or not self._ipv6.is_own(with_zone(quoted.src, zone)):
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        src, dst = with_zone(quoted.src, zone), with_zone(quoted.dst, zone)
        proto, at = quoted.next_header, start + ipv6.HEADER_LEN
        if proto == ipv6.NEXTHDR_FRAGMENT and at + ipv6.FRAGMENT_LEN <= end:
            proto, _, fragment, _ = ipv6.FRAGMENT.unpack_from(head, at)
            at += ipv6.FRAGMENT_LEN
            if fragment & ipv6.FRAG_OFFSET:
                proto = ipv6.NEXTHDR_NONE  # no transport header in it
        l4 = bytes(head[at : min(end, at + QUOTED_L4_MAX)])
        too_big = kind == icmpv6.ICMPV6_PKT_TOOBIG
        # No link is narrower than 1280 bytes, and none refuses what fits (RFC 8201, section 4; RFC 8021).
        if len(l4) < 8 or (too_big and not ipv6.MIN_MTU <= word < quoted.payload_len + ipv6.HEADER_LEN):
            self._refuse(DropReason.ICMP_MALFORMED)
            return
        if packet.frame.pfmemalloc:
            owner = self.memalloc_owners.get(proto)
            if owner is None or not owner(src, dst, l4):
                self._drops.count(DropReason.PFMEMALLOC)
                return
        handler = self.error_handlers.get(proto)
        self._reporter = packet.src
        if handler is None or not handler(kind, code, word if too_big else 0, src, dst, l4):
            self._refuse(DropReason.ICMP_MALFORMED)
        elif too_big:
            self._ipv6.learn_pmtu(dst, word)

    def _count_error(self, kind: int) -> None:
        mib = self._mib
        if kind == icmpv6.ICMPV6_DEST_UNREACH:
            mib.Icmp6InDestUnreachs += 1
        elif kind == icmpv6.ICMPV6_PKT_TOOBIG:
            mib.Icmp6InPktTooBigs += 1
        elif kind == icmpv6.ICMPV6_TIME_EXCEED:
            mib.Icmp6InTimeExcds += 1
        else:
            mib.Icmp6InParmProblems += 1

    def on_neighbour_failed(self, skb: Skb) -> None:
        """The next hop of the frame `skb` does not answer: for its sender the same as "address unreachable" from a router."""
        start = ethernet.HEADER_LEN
        frame = skb.views(0, min(skb.len, start + ipv6.HEADER_LEN + QUOTED_L4_MAX))[0]
        header = ipv6.parse_header(frame, start, len(frame))
        assert header is not None, "we built it"
        handler = self.error_handlers.get(header.next_header)
        if handler is None:
            return
        l4 = bytes(frame[start + ipv6.HEADER_LEN :])
        for interface in self._ipv6.interfaces:  # the frame does not say which link it was for; its source does
            src = with_zone(header.src, interface.zone)
            if self._ipv6.addresses.get(src) is interface:
                dst = with_zone(header.dst, interface.zone)
                self._reporter = src
                handler(icmpv6.ICMPV6_DEST_UNREACH, icmpv6.ADDR_UNREACH, 0, src, dst, l4)
                return

    # -- out --

    def send_unreachable(self, packet: IpPacket, code: int) -> None:
        """Tell the sender of `packet` that its destination is unreachable here, unless that is forbidden or too often."""
        if not packet.broadcast and self._send_error(packet, icmpv6.ICMPV6_DEST_UNREACH, code, 0):
            self._mib.Icmp6OutDestUnreachs += 1

    def send_parameter_problem(self, packet: IpPacket, code: int, pointer: int) -> None:
        """Tell the sender of `packet` that its byte `pointer` cannot be handled. About a packet to a group that is said only of
        an unknown option (RFC 4443, section 2.4 e).
        """
        if packet.broadcast and code != icmpv6.UNK_OPTION:
            return
        if self._send_error(packet, icmpv6.ICMPV6_PARAMPROB, code, pointer):
            self._mib.Icmp6OutParmProblems += 1

    def _send_error(self, packet: IpPacket, kind: int, code: int, word: int) -> bool:
        """Never about an error, or to nobody in particular (RFC 4443, section 2.4 e)."""
        head = packet.frame.head
        about_icmp = packet.proto == ipv6.NEXTHDR_ICMP and packet.l4_len > 0
        if packet.src == ANY6 or (
            about_icmp and (head[packet.l4] < icmpv6.ERRORS_END or head[packet.l4] == icmpv6.ND_REDIRECT)
        ):
            return False
        if packet.frame.pfmemalloc:
            return False
        if not self._limit.allow(packet.src):
            self._drops.count(DropReason.ICMP_RATELIMIT)
            return False
        try:
            path = self._ipv6.path(packet.src, None if packet.broadcast else packet.dst)
        except OSError:
            return False  # counted there
        length = min(packet.l4 - packet.l3 + packet.l4_len, QUOTE_MAX)
        quote = packet.frame.views(packet.l3, length)
        header = icmpv6.build_header(path.src[:16], path.dst[:16], kind, code, word, quote)
        path.head[path.l4 : path.l4 + icmpv6.HEADER_LEN] = header
        self._mib.Icmp6OutMsgs += 1
        return path.send(ipv6.NEXTHDR_ICMP, icmpv6.HEADER_LEN, quote, length)

    def send_reassembly_timeout(self, header: bytes, first: Skb, interface: Interface) -> None:
        """Tell the sender of a fragment, the first of its datagram, that the others did not come in time. `header` is its IP
        header and what follows it, `first` the payload.
        """
        parsed = ipv6.parse_header(header, 0, len(header))
        assert parsed is not None, "it was checked when it arrived"
        src, dst = with_zone(parsed.src, interface.zone), with_zone(parsed.dst, interface.zone)
        data = first.views(0, min(first.len, QUOTE_MAX - len(header)))
        if src == ANY6 or (header[-ipv6.FRAGMENT_LEN] == ipv6.NEXTHDR_ICMP and data[0][0] < icmpv6.ERRORS_END):
            return
        if not self._limit.allow(src):
            self._drops.count(DropReason.ICMP_RATELIMIT)
            return
        try:
            path = self._ipv6.path(src, dst)
        except OSError:
            return  # counted there
        quote = [memoryview(header), *data]
        built = icmpv6.build_header(path.src[:16], path.dst[:16], icmpv6.ICMPV6_TIME_EXCEED, 1, 0, quote)
        path.head[path.l4 : path.l4 + icmpv6.HEADER_LEN] = built
        self._mib.Icmp6OutMsgs += 1
        self._mib.Icmp6OutTimeExcds += 1
        path.send(ipv6.NEXTHDR_ICMP, icmpv6.HEADER_LEN, quote, sum(len(piece) for piece in quote))

    # -- echo of our own --

    def open_echo(
        self, on_reply: Callable[[bytes, int, bytes, int], None], on_error: Callable[[int, int, bytes, int, bytes], None]
    ) -> Echo:
        """An echo client with an identifier of its own; see `Icmp.open_echo`. The types and codes are those of ICMPv6."""
        if len(self._echoes) > 0xFFFF:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        ident = self._ipv6.env.random.getrandbits(16)
        while ident in self._echoes:
            ident = (ident + 1) & 0xFFFF
        echo = self._echoes[ident] = Echo(self, ident, on_reply, on_error)
        return echo

    def _on_echo_error(self, kind: int, code: int, _mtu: int, _src: bytes, dst: bytes, quoted: bytes) -> bool:
        quoted_kind, _, _, ident, seq = icmpv6.ECHO.unpack_from(quoted)
        echo = self._echoes.get(ident)
        if quoted_kind != icmpv6.ICMPV6_ECHO_REQUEST or echo is None:
            return False
        echo.on_error(kind, code, dst, seq, self._reporter)
        return True

    def send_echo(self, ident: int, dst: bytes, seq: int, payload: Buffer, ttl: int, pmtudisc: int) -> bool:
        """Send an echo request; see `Echo.send`."""
        path = self._ipv6.path(dst)
        fits = ipv6.HEADER_LEN + icmpv6.HEADER_LEN + len(payload) <= path.mtu
        if not fits and pmtudisc >= PMTUDISC_DO:
            raise OSError(errno.EMSGSIZE, f"{os.strerror(errno.EMSGSIZE)}, mtu={path.mtu}")
        word = ident << 16 | seq
        header = icmpv6.build_header(path.src[:16], dst[:16], icmpv6.ICMPV6_ECHO_REQUEST, 0, word, (payload,))
        path.head[path.l4 : path.l4 + icmpv6.HEADER_LEN] = header
        self._mib.Icmp6OutMsgs += 1
        self._mib.Icmp6OutEchos += 1
        return path.send(ipv6.NEXTHDR_ICMP, icmpv6.HEADER_LEN, (payload,), len(payload), ttl=ttl, df=fits)

    def close_echo(self, ident: int) -> None:
        """End the echo client with the identifier `ident`."""
        self._echoes.pop(ident, None)
