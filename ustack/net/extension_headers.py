"""The chain of IPv6 extension headers in front of what a packet carries (RFC 8200, section 4).

Everybody can send any chain, so how many headers, options and bytes are looked at is bounded (RFC 8504, section 5.3). Options
are few that we know (padding, router alert): the others are treated as their type says. Routing headers that want the packet
to go on are refused, type 0 among them (RFC 5095). The authentication and encryption headers are not ours.
"""

from __future__ import annotations

from typing import Final

from ustack.drops import DropReason
from ustack.wire import icmpv6, ipv6

HEADERS_MAX: Final = 8
"""Extension headers of a packet."""

BYTES_MAX: Final = 1024
"""Bytes of them all, so that the transport header lies in the contiguous start of every frame."""

OPTIONS_MAX: Final = 8
"""Options of one header, padding not counted (Linux, max_hbh_opts_number)."""

PADDING_MAX: Final = 7
"""Bytes of padding in a row (Linux; more would carry something)."""

DELIVER: Final = 0
DROP: Final = 1
REPORT: Final = 2
REASSEMBLE: Final = 3
"""What is to become of the packet: `proto` begins at `at`; drop it for `reason`; also send "parameter problem" with `code` and
`pointer`; a fragment header is at `at`."""

_TRANSPORT_MIN: Final = {ipv6.NEXTHDR_TCP: 20, ipv6.NEXTHDR_UDP: 8, ipv6.NEXTHDR_ICMP: 8}
"""Bytes of the smallest transport header."""

_CHAIN: Final = frozenset({ipv6.NEXTHDR_HOP, ipv6.NEXTHDR_ROUTING, ipv6.NEXTHDR_FRAGMENT, ipv6.NEXTHDR_DEST})


class ExtensionHeaders:
    """Walks the chain of one packet at a time; what was found stays until the next. Pointers count from the IPv6 header."""

    __slots__ = ("at", "code", "pointer", "proto", "reason")

    def __init__(self) -> None:
        self.proto = 0
        self.at = 0
        self.reason = DropReason.IPV6_BAD_EXTHDR
        self.code = 0
        self.pointer = 0

    def walk(self, head: memoryview, l3: int, at: int, end: int, proto: int, names_proto: int, multicast: bool) -> int:
        """Walk from the header of type `proto` at `at`, which is named by the byte at `names_proto`, to the transport header.

        The packet begins at `l3` and ends at `end`. `multicast`: it was sent to a group, to which some problems are not
        reported.
        """
        start = at
        headers = 0
        while proto in _CHAIN:
            headers += 1
            if headers > HEADERS_MAX or at - start > BYTES_MAX or at + 8 > end:
                return self._drop(DropReason.IPV6_BAD_EXTHDR)
            if proto == ipv6.NEXTHDR_HOP and headers > 1:
                return self._report(icmpv6.UNK_NEXTHDR, names_proto - l3)
            if proto == ipv6.NEXTHDR_FRAGMENT:
                _, _, fragment, _ = ipv6.FRAGMENT.unpack_from(head, at)
                if fragment & (ipv6.FRAG_OFFSET | ipv6.FRAG_MORE):
                    self.at = at
                    self.pointer = names_proto
                    return REASSEMBLE
                length = ipv6.FRAGMENT_LEN  # whole in one piece (RFC 6946)
            else:
                length = (head[at + 1] + 1) << 3
                if at + length > end or at + length - start > BYTES_MAX:
                    return self._drop(DropReason.IPV6_BAD_EXTHDR)
                if proto == ipv6.NEXTHDR_ROUTING:
                    if head[at + 3]:  # segments left
                        return self._report(icmpv6.HDR_FIELD, at + 2 - l3)
                else:
                    verdict = self._options(head, at + 2, at + length, l3, multicast)
                    if verdict != DELIVER:
                        return verdict
            proto = head[at]
            names_proto = at
            at += length
        self.proto = proto
        self.at = at
        self.pointer = names_proto - l3
        if proto == ipv6.NEXTHDR_NONE:
            return self._drop(DropReason.IP_NOPROTO)
        return DELIVER

    def is_complete(self, head: memoryview, at: int, end: int, proto: int) -> bool:
        """Whether the first fragment, which ends at `end`, has the whole chain from the header of type `proto` at `at` on, the
        transport header with it (RFC 7112).
        """
        start = at
        while proto in _CHAIN:
            if at + 8 > end or at - start > BYTES_MAX:
                return False
            length = ipv6.FRAGMENT_LEN if proto == ipv6.NEXTHDR_FRAGMENT else (head[at + 1] + 1) << 3
            proto = head[at]
            at += length
        return at + _TRANSPORT_MIN.get(proto, 1) <= end or proto == ipv6.NEXTHDR_NONE

    def _options(self, head: memoryview, at: int, end: int, l3: int, multicast: bool) -> int:
        count = padding = 0
        while at < end:
            kind = head[at]
            if kind == ipv6.OPT_PAD1:
                at += 1
                padding += 1
            elif at + 2 > end or at + 2 + head[at + 1] > end:
                return self._drop(DropReason.IPV6_BAD_EXTHDR)
            elif kind == ipv6.OPT_PADN:
                padding += 2 + head[at + 1]
                at += 2 + head[at + 1]
            else:
                padding = 0
                count += 1
                if count > OPTIONS_MAX:
                    return self._drop(DropReason.IPV6_BAD_EXTHDR)
                action = kind & ipv6.OPT_ACTION
                if action == ipv6.ACTION_REPORT or (action == ipv6.ACTION_REPORT_UNICAST and not multicast):
                    return self._report(icmpv6.UNK_OPTION, at - l3)
                if action != ipv6.ACTION_SKIP:
                    return self._drop(DropReason.IPV6_BAD_EXTHDR)
                at += 2 + head[at + 1]
            if padding > PADDING_MAX:
                return self._drop(DropReason.IPV6_BAD_EXTHDR)
        return DELIVER

    def _drop(self, reason: DropReason) -> int:
        self.reason = reason
        return DROP

    def _report(self, code: int, pointer: int) -> int:
        self.reason = DropReason.IPV6_BAD_EXTHDR
        self.code = code
        self.pointer = pointer
        return REPORT
