"""The path to one destination: everything about sending there that does not change from packet to packet.

What the kernel's dst entry is, with a frame template: Ethernet and IP header are filled in once, the transport writes its own
header behind them, and `send` completes the few fields that differ. All sockets that talk to the destination share the path,
which works because sending is synchronous: when `send` returns, the device has the bytes or an skb holds a copy.

This is the hottest path on the way out. The header checksum of IPv4 is computed from a constant sum and the fields that vary: a
checksum is `-sum % 0xffff` for every sum that is not 0 (see `wire.checksum`), and these never are. IPv6 has none, and no
fragmentation on the way either: its header is simpler. Its flow label is 0: paths are shared, flows are not (RFC 6437).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from pools.gfp import ATOMIC
from ustack.drops import DropReason
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO, NO_CSUM
from ustack.net.addresses import is_multicast
from ustack.wire import ethernet, ipv4, ipv6, tcp
from ustack.wire.checksum import ones_sum, ones_sum_views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.env import Env
    from ustack.net.interface import Interface
    from ustack.net.neighbour import Neighbour
    from ustack.skb import Buffer

L3: Final = ethernet.HEADER_LEN
"""Offset of the IP header in a frame."""

L4: Final = L3 + ipv4.HEADER_LEN
L4_V6: Final = L3 + ipv6.HEADER_LEN
"""Offset of the transport header in the template: we send no IP options, and no extension headers."""

PMTU_MIN: Final = 552
"""Bytes that a path MTU is never set below, so that nobody can make us send tiny segments (Linux, ip_rt_min_pmtu)."""

PMTUDISC_DONT: Final = 0
PMTUDISC_WANT: Final = 1
PMTUDISC_DO: Final = 2
PMTUDISC_PROBE: Final = 3
"""What is done about datagrams and the path MTU (linux/in.h): never DF; fragments where it must be, else DF; DF, and nothing
that does not fit; the same by the MTU of the device alone.
"""

HOPS_DEFAULT: Final = 64
"""Time to live, or hop limit, of what we send (RFC 1700; RFC 4861, section 6.3.2: until a router says otherwise)."""

_FIELDS: Final = Struct("!6H")
"""The part of the IPv4 header that varies: version to TOS, total length, identification, flags, TTL and protocol, checksum."""

_FIELDS_V6: Final = Struct("!IHBB")
"""The part of the IPv6 header that varies: version, traffic class and flow label; payload length, next header, hop limit."""

_FRAGMENT_V6: Final = Struct("!BxHI")
"""The IPv6 fragment header: next header, offset with the bit for more, identification (RFC 8200, section 4.5)."""

_NEXT_FRAGMENT: Final = 44
_VERSION_IHL: Final = 0x4500
_VERSION_6: Final = 6 << 28


class Path:
    """The way from the address `src` to the address `dst` (both packed).

    `version` is that of the addresses. `head` is the frame template, with room for a transport header of 60 bytes at `l4`.
    `mtu` is the path MTU in bytes of IP packet; it changes when the path turns out to be narrower, and again when that has been
    forgotten; `link_mtu` is that of the device, and what may arrive. `hop_limit` is for packets that do not say how far they
    may go. `pseudo` is the sum of the addresses as the pseudo-header has them. `obsolete` means that the path still works as
    far as is known, but routes or addresses have changed: look it up again. `tso` says whether `send` takes a `gso_size`;
    `broadcast` that `dst` is a broadcast address (never a group's); `congestion` names the route's congestion control, if it
    has one. Who sees that packets arrive says so with `neighbour.confirm()`.
    """

    __slots__ = (
        "_csum_offload",
        "_df",
        "_drops",
        "_env",
        "_ident",
        "_lladdr",
        "_mib",
        "_sum",
        "_view",
        "broadcast",
        "congestion",
        "device",
        "dst",
        "head",
        "hop_limit",
        "interface",
        "l4",
        "link_mtu",
        "mtu",
        "neighbour",
        "obsolete",
        "pseudo",
        "src",
        "tso",
        "version",
    )

    def __init__(self, env: Env, interface: Interface, neighbour: Neighbour, src: bytes, dst: bytes, broadcast: bool) -> None:
        device = interface.device
        self.version = 4 if len(dst) == 4 else 6
        self.interface = interface
        self.device = device
        self.neighbour = neighbour
        self.src = src
        self.dst = dst
        self.broadcast = broadcast
        self.link_mtu = device.mtu
        self.hop_limit = HOPS_DEFAULT
        self.obsolete = False
        self.congestion = ""
        self.tso = bool(device.features & FEATURE_TSO)
        if self.version == 4:
            self.l4 = L4
            ethertype = ethernet.ETH_P_IP
            on_wire = src + dst
        else:
            self.l4 = L4_V6
            ethertype = ethernet.ETH_P_IPV6
            on_wire = src[:16] + dst[:16]
            if interface.inet6 is not None:
                self.link_mtu = interface.inet6.mtu
                self.hop_limit = 1 if is_multicast(dst) else interface.inet6.hop_limit
        self.mtu = self.link_mtu
        self.head = bytearray(self.l4 + tcp.HEADER_MAX)
        self._view = memoryview(self.head)
        ethernet.HEADER.pack_into(self.head, 0, bytes(6), device.mac, ethertype)
        self.head[self.l4 - len(on_wire) : self.l4] = on_wire
        self.pseudo = ones_sum(on_wire)
        self._sum = self.pseudo + _VERSION_IHL
        self._csum_offload = bool(device.features & FEATURE_CSUM)
        self._lladdr = b""  # what the template has now
        self._ident = env.random.getrandbits(16)
        self._df = ipv4.IP_DF
        self._env = env
        self._drops = env.drops
        self._mib = env.mib

    def send(
        self,
        proto: int,
        l4_len: int,
        payload: Sequence[Buffer],
        payload_len: int,
        csum_at: int = -1,
        gso_size: int = 0,
        tos: int = 0,
        ttl: int = 0,
        df: bool = True,
        gfp: int = ATOMIC,
        probe: bool = False,
    ) -> bool:
        """Send a packet; False when it was dropped here (and counted).

        The transport has written its header of `l4_len` bytes to `head` at `l4`. `csum_at` is the offset of the checksum field
        in it, which must hold zero and is completed by the device or here; -1 when the transport has done that itself. A
        payload longer than `gso_size` (if that is not 0) is a TCP super-frame, to be cut into segments with that much payload.
        `ttl` 0 stands for the path's `hop_limit`. While the neighbour is being resolved the packet is copied, by an allocation
        that may do what `gfp` says, and waits. A packet that is longer than the path MTU goes out as fragments unless `df` is
        set; `probe` has it go out whole if the device takes it.
        """
        if payload_len <= gso_size:
            gso_size = 0
        length = l4_len + payload_len
        l4 = self.l4
        total = l4 - L3 + length
        if not ttl:
            ttl = self.hop_limit
        head = self.head
        view = self._view
        if self.version == 4:
            self._mib.IpOutRequests += 1
            if total > (65535 if gso_size else self.mtu) and not (probe and total <= self.link_mtu):
                if not df and not gso_size:
                    return self._send_fragments(proto, l4_len, payload, length, csum_at, tos, ttl, gfp)
                self._mib.IpFragFails += 1
                self._drops.count(DropReason.PKT_TOO_BIG)
                return False
            ident = self._ident
            self._ident = (ident + 1) & 0xFFFF
            flags = self._df if df else 0
            ttl_proto = ttl << 8 | proto
            checksum = -(self._sum + tos + total + ident + flags + ttl_proto) % 0xFFFF
            _FIELDS.pack_into(head, L3, _VERSION_IHL | tos, total, ident, flags, ttl_proto, checksum)
        else:
            self._mib.Ip6OutRequests += 1
            if total > (65535 if gso_size else self.mtu) and not (probe and total <= self.link_mtu):
                if not df and not gso_size:
                    return self._send_fragments(proto, l4_len, payload, length, csum_at, tos, ttl, gfp)
                self._mib.Ip6FragFails += 1
                self._drops.count(DropReason.PKT_TOO_BIG)
                return False
            _FIELDS_V6.pack_into(head, L3, _VERSION_6 | tos << 20, length, proto, ttl)
        l4_end = l4 + l4_len
        csum_start = 0
        csum_offset = NO_CSUM
        if csum_at >= 0:
            checksum = self.pseudo + proto + length
            if self._csum_offload:
                checksum = (checksum - 1) % 0xFFFF + 1
                csum_start = l4
                csum_offset = csum_at
            else:
                checksum = -(checksum + ones_sum(view[l4:l4_end]) + ones_sum_views(payload)) % 0xFFFF
            if not checksum and proto == ipv4.IPPROTO_UDP:
                checksum = 0xFFFF
            field = l4 + csum_at
            head[field] = checksum >> 8
            head[field + 1] = checksum & 0xFF
        neighbour = self.neighbour
        if neighbour.stale:
            neighbour.use()
        lladdr = neighbour.lladdr
        if lladdr is not self._lladdr:
            if lladdr is None:
                return neighbour.enqueue(view[:l4_end], payload, payload_len, csum_start, csum_offset, gso_size, gfp)
            head[0:6] = self._lladdr = lladdr
        device = self.device
        sent = device.transmit(view[:l4_end], payload, csum_start, csum_offset, gso_size)
        if device.sniffers is not None:
            device.sniffers.sent(device, view[:l4_end], payload, sent)
        if sent:
            return True
        self._drops.count(DropReason.TX_DEVICE)
        return False

    def _send_fragments(
        self,
        proto: int,
        l4_len: int,
        payload: Sequence[Buffer],
        length: int,
        csum_at: int,
        tos: int,
        ttl: int,
        gfp: int,
    ) -> bool:
        """Send a packet of `length` bytes behind the IP header in pieces that fit the path; see `send`. All go out together, or
        as many as the device takes.

        The identification is random: nobody can foresee it (RFC 7739), and nothing else is counted with it.
        """
        mib = self._mib
        v4 = self.version == 4
        l4 = self.l4
        if length > (65535 - ipv4.HEADER_LEN if v4 else 65535):
            self._drops.count(DropReason.PKT_TOO_BIG)
            return False
        transport = self._view[l4 : l4 + l4_len]
        if csum_at >= 0:
            checksum = -(self.pseudo + proto + length + ones_sum(transport) + ones_sum_views(payload)) % 0xFFFF
            transport[csum_at : csum_at + 2] = (checksum or 0xFFFF).to_bytes(2, "big")
        views = [memoryview(piece) for piece in payload]
        views.insert(0, transport)
        views.reverse()
        ident = self._env.random.getrandbits(16 if v4 else 32)
        room = (self.mtu - (l4 - L3) - (0 if v4 else _FRAGMENT_V6.size)) & ~7
        header = bytearray(self.head[:l4] if v4 else self.head[:l4] + bytes(_FRAGMENT_V6.size))
        for start in range(0, length, room):
            size = min(room, length - start)
            more = start + size < length
            if v4:
                flags = (ipv4.IP_MF if more else 0) | start >> 3
                total = size + ipv4.HEADER_LEN
                checksum = -(self._sum + tos + total + ident + flags + (ttl << 8 | proto)) % 0xFFFF
                _FIELDS.pack_into(header, L3, _VERSION_IHL | tos, total, ident, flags, ttl << 8 | proto, checksum)
            else:
                _FIELDS_V6.pack_into(header, L3, _VERSION_6 | tos << 20, size + _FRAGMENT_V6.size, _NEXT_FRAGMENT, ttl)
                _FRAGMENT_V6.pack_into(header, l4, proto, start | more, ident)
            if not self._send_piece(header, take(views, size), size, gfp):
                if v4:
                    mib.IpFragFails += 1
                else:
                    mib.Ip6FragFails += 1
                return False
            if v4:
                mib.IpFragCreates += 1
            else:
                mib.Ip6FragCreates += 1
        if v4:
            mib.IpFragOKs += 1
        else:
            mib.Ip6FragOKs += 1
        return True

    def _send_piece(self, header: bytearray, views: list[memoryview], size: int, gfp: int) -> bool:
        neighbour = self.neighbour
        if neighbour.stale:
            neighbour.use()
        lladdr = neighbour.lladdr
        if lladdr is None:
            return neighbour.enqueue(header, views, size, 0, NO_CSUM, 0, gfp)
        header[0:6] = lladdr
        device = self.device
        sent = device.transmit(header, views)
        if device.sniffers is not None:
            device.sniffers.sent(device, header, views, sent)
        if not sent:
            self._drops.count(DropReason.TX_DEVICE)
        return sent

    def narrow(self, mtu: int) -> None:
        """The path takes only `mtu` bytes. Of IPv4, under `PMTU_MIN` it is sent that much all the same, and routers may cut (no
        DF); of IPv6 every link takes `ipv6.MIN_MTU`.
        """
        if mtu < self.mtu:
            least = PMTU_MIN if self.version == 4 else ipv6.MIN_MTU
            self.mtu = min(self.mtu, max(mtu, least))
            self._df = 0 if mtu < least else ipv4.IP_DF

    def widen(self) -> None:
        """Forget what was learned about the path's MTU."""
        self.mtu = self.link_mtu
        self._df = ipv4.IP_DF

    def close(self) -> None:
        """Nobody shall get this path from now on; who has it looks it up again."""
        if not self.obsolete:
            self.obsolete = True
            if self in self.neighbour.paths:
                self.neighbour.paths.remove(self)


def take(views: list[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of `views`, of which the last is the first in order; they are taken off it. There must be so
    many.
    """
    taken = []
    while size:
        view = views.pop()
        if len(view) > size:
            views.append(view[size:])
            view = view[:size]
        taken.append(view)
        size -= len(view)
    return taken
