"""The path to one destination: everything about sending there that does not change from packet to packet.

What the kernel's dst entry is, with a frame template: Ethernet and IP header are filled in once, the transport writes its own
header behind them, and `send` completes the few fields that differ. All sockets that talk to the destination share the path,
which works because sending is synchronous: when `send` returns, the device has the bytes or an skb holds a copy.

This is the hottest path on the way out. The header checksum is computed from a constant sum and the fields that vary: a
checksum is `-sum % 0xffff` for every sum that is not 0 (see `wire.checksum`), and these never are.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from pools.gfp import ATOMIC
from ustack.drops import DropReason
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO, NO_CSUM
from ustack.wire import ethernet, ipv4, tcp
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
"""Offset of the transport header in the template: we send no IP options."""

PMTU_MIN: Final = 552
"""Bytes that a path MTU is never set below, so that nobody can make us send tiny segments (Linux, ip_rt_min_pmtu)."""

_FIELDS: Final = Struct("!6H")
"""The part of the IP header that varies: version to TOS, total length, identification, flags, TTL and protocol, checksum."""

_VERSION_IHL: Final = 0x4500


class Path:
    """The way from the address `src` to the address `dst` (both packed).

    `head` is the frame template, with room for a transport header of 60 bytes at `l4`. `mtu` is the path MTU in bytes of IP
    packet; it changes when the path turns out to be narrower, and again when that has been forgotten. `pseudo` is the sum of
    the addresses as the pseudo-header has them. `obsolete` means that the path still works as far as is known, but routes or
    addresses have changed: look it up again. `tso` says whether `send` takes a `gso_size`; `broadcast` that `dst` is a
    broadcast address. Who sees that packets arrive says so with `neighbour.confirm()`.
    """

    __slots__ = (
        "_csum_offload",
        "_df",
        "_drops",
        "_ident",
        "_lladdr",
        "_mib",
        "_sum",
        "_view",
        "broadcast",
        "device",
        "dst",
        "head",
        "interface",
        "l4",
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
        self.version = 4
        self.interface = interface
        self.device = device
        self.neighbour = neighbour
        self.src = src
        self.dst = dst
        self.broadcast = broadcast
        self.mtu = device.mtu
        self.obsolete = False
        self.tso = bool(device.features & FEATURE_TSO)
        self.l4 = L4
        self.head = bytearray(L4 + tcp.HEADER_MAX)
        self._view = memoryview(self.head)
        ethernet.HEADER.pack_into(self.head, 0, bytes(6), device.mac, ethernet.ETH_P_IP)
        self.head[L3 + ipv4.OFF_SRC : L4] = src + dst
        self.pseudo = ones_sum(src + dst)
        self._sum = self.pseudo + _VERSION_IHL
        self._csum_offload = bool(device.features & FEATURE_CSUM)
        self._lladdr = b""  # what the template has now
        self._ident = env.random.getrandbits(16)
        self._df = ipv4.IP_DF
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
        ttl: int = 64,
        df: bool = True,
        gfp: int = ATOMIC,
    ) -> bool:
        """Send a packet; False when it was dropped here (and counted).

        The transport has written its header of `l4_len` bytes to `head` at `l4`. `csum_at` is the offset of the checksum field
        in it, which must hold zero and is completed by the device or here; -1 when the transport has done that itself. A
        payload longer than `gso_size` (if that is not 0) is a TCP super-frame, to be cut into segments with that much payload.
        While the neighbour is being resolved the packet is copied, by an allocation that may do what `gfp` says, and waits.
        """
        self._mib.IpOutRequests += 1
        if payload_len <= gso_size:
            gso_size = 0
        length = l4_len + payload_len
        total = length + 20
        if total > (65535 if gso_size else self.mtu):
            self._drops.count(DropReason.PKT_TOO_BIG)
            return False
        head = self.head
        view = self._view
        ident = self._ident
        self._ident = (ident + 1) & 0xFFFF
        flags = self._df if df else 0
        ttl_proto = ttl << 8 | proto
        checksum = -(self._sum + tos + total + ident + flags + ttl_proto) % 0xFFFF
        _FIELDS.pack_into(head, L3, _VERSION_IHL | tos, total, ident, flags, ttl_proto, checksum)
        l4_end = L4 + l4_len
        csum_start = 0
        csum_offset = NO_CSUM
        if csum_at >= 0:
            checksum = self.pseudo + proto + length
            if self._csum_offload:
                checksum = (checksum - 1) % 0xFFFF + 1
                csum_start = L4
                csum_offset = csum_at
            else:
                checksum = -(checksum + ones_sum(view[L4:l4_end]) + ones_sum_views(payload)) % 0xFFFF
                if not checksum and proto == ipv4.IPPROTO_UDP:
                    checksum = 0xFFFF
            field = L4 + csum_at
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

    def narrow(self, mtu: int) -> None:
        """The path takes only `mtu` bytes. Under `PMTU_MIN` it is sent that much all the same, and routers may cut (no DF)."""
        if mtu < self.mtu:
            self.mtu = min(self.mtu, max(mtu, PMTU_MIN))
            self._df = 0 if mtu < PMTU_MIN else ipv4.IP_DF

    def widen(self) -> None:
        """Forget what was learned about the path's MTU."""
        self.mtu = self.device.mtu
        self._df = ipv4.IP_DF

    def close(self) -> None:
        """Nobody shall get this path from now on; who has it looks it up again."""
        if not self.obsolete:
            self.obsolete = True
            if self in self.neighbour.paths:
                self.neighbour.paths.remove(self)
