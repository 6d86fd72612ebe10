"""A Linux TAP device, with checksum and segmentation offload through virtio-net headers (Documentation/networking/tuntap.rst).

With IFF_VNET_HDR and TUNSETOFFLOAD the kernel hands us frames of up to 64 KiB, not yet cut into segments, whose checksums it
has not computed because nothing can have damaged them; and it takes such frames from us. Opening needs CAP_NET_ADMIN, or a
persistent device that belongs to us. The device belongs to the network namespace in which it was opened, whatever namespace
the process enters later.
"""

from __future__ import annotations

import errno
import fcntl
import os
from hashlib import blake2s
from struct import Struct
from typing import TYPE_CHECKING, Final

import pytun

from ustack.drops import DropReason
from ustack.link.device import ETH_HLEN, FEATURE_CSUM, FEATURE_TSO, NO_CSUM, VLAN_HLEN, Device
from ustack.link.rxring import LinearRing, PagedRing
from ustack.wire import vnet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.drops import Drops
    from ustack.link.rxring import RxFrame
    from ustack.skb import Buffer, SkbMemory

TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUN_F_CSUM: Final = 1
TUN_F_TSO4: Final = 2
TUN_F_TSO6: Final = 4
TUN_F_TSO_ECN: Final = 8

SUPER_FRAME: Final = 65535 + ETH_HLEN
"""Bytes of the largest frame that the kernel builds."""

_INT: Final = Struct("i")
_DELIVERED_WHOLE: Final = vnet.F_NEEDS_CSUM | vnet.F_DATA_VALID


class TapDevice(Device):
    """The TAP interface `name`, made if it does not exist ("" or a pattern like "tap%d" lets the kernel choose).

    `mode` is the receive mode, "paged" or "linear". `offload` asks for super-frames and checksum offload; the linear mode
    takes no super-frames. `mac` is the stack's own address, made from the device's name when None. Raises OSError when the
    device cannot be opened: EPERM without the right, EBUSY when another process holds it, ENOENT or ENODEV without
    /dev/net/tun, EINVAL when the interface exists and is no TAP with vnet headers; ValueError for another `mode`. The MTU is
    that of the moment of opening.
    """

    __slots__ = (
        "_deliver",
        "_drops",
        "_fd",
        "_mode",
        "_receives_super_frames",
        "_tap",
        "_vnet_fields",
        "_vnet_in",
        "_vnet_out",
    )

    def __init__(self, name: str, *, mode: str = "paged", offload: bool = True, mac: bytes | None = None) -> None:
        if mode not in ("paged", "linear"):
            raise ValueError(f"receive mode {mode!r} is neither 'paged' nor 'linear'")
        flags = pytun.IFF_TAP | pytun.IFF_NO_PI | pytun.IFF_VNET_HDR
        try:
            self._tap = pytun.TunTapDevice(name=name, flags=flags)
        except pytun.Error as error:
            code = error.args[0] if error.args else errno.EIO
            raise OSError(code, os.strerror(code), name) from error
        self._fd: int = self._tap.fileno()
        os.set_blocking(self._fd, False)
        fcntl.ioctl(self._fd, TUNSETVNETHDRSZ, _INT.pack(vnet.HEADER_LEN))
        receive = 0
        if offload:
            receive = TUN_F_CSUM | (TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN if mode == "paged" else 0)
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, receive)
        self._mode = mode
        self._vnet_in = bytearray(vnet.HEADER_LEN)
        self._vnet_out = bytearray(vnet.HEADER_LEN)
        self._vnet_fields = (0, NO_CSUM, 0, 0)
        super().__init__(
            self._tap.name,
            mac or b"\x02" + blake2s(self._tap.name.encode(), digest_size=5).digest(),
            self._tap.mtu,
            FEATURE_CSUM | FEATURE_TSO if offload else 0,
        )
        self._receives_super_frames = bool(receive & TUN_F_TSO4)

    def fileno(self) -> int:
        """The descriptor that becomes readable when frames wait."""
        return self._fd

    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """Fill the receive ring from `memory`; from now on hand every received frame to `deliver`. Raises OSError ENOMEM."""
        self._drops = drops
        self._deliver = deliver
        largest = self.mtu + ETH_HLEN + VLAN_HLEN
        if self._mode == "linear":
            self.ring = LinearRing(memory, largest, self._vnet_in)
        else:
            self.ring = PagedRing(memory, max(largest, SUPER_FRAME) if self._receives_super_frames else largest, self._vnet_in)

    def poll(self, budget: int) -> int:
        """Receive and deliver up to `budget` frames; return how many there were."""
        fd = self._fd
        ring = self.ring
        frame = ring.frame
        iov = ring.iov
        stats = self.stats
        header = self._vnet_in
        for count in range(budget):
            if not ring.ready():
                return self._discard(count, budget)
            try:
                size = os.readv(fd, iov)
            except BlockingIOError:
                return count
            except OSError:  # the interface went away: nothing will come any more
                return count
            length = size - vnet.HEADER_LEN
            stats.rx_packets += 1
            stats.rx_bytes += length
            frame.len = length
            frame.csum_ok = header[0] & _DELIVERED_WHOLE != 0
            frame.gso_size = header[4] | header[5] << 8 if header[1] else 0
            self._deliver(frame)
        return budget

    def _discard(self, done: int, budget: int) -> int:
        """There is no buffer to receive into: what waits is lost, as on a network card whose ring is empty."""
        for count in range(done, budget):
            try:
                os.readv(self._fd, [self._vnet_in])
            except BlockingIOError:
                return count
            self.stats.rx_packets += 1
            self._drops.count(DropReason.RING_EMPTY)
        return budget

    def transmit(
        self, head: Buffer, payload: Sequence[Buffer], csum_start: int = 0, csum_offset: int = NO_CSUM, gso_size: int = 0
    ) -> bool:
        """Send the frame `head + payload`; False when the device refused it. See `Device.transmit`."""
        fields = (csum_start, csum_offset, gso_size, len(head))
        if fields != self._vnet_fields:
            self._describe(fields)
        stats = self.stats
        try:
            stats.tx_bytes += os.writev(self._fd, [self._vnet_out, head, *payload]) - vnet.HEADER_LEN
        except OSError:
            stats.tx_errors += 1
            return False
        stats.tx_packets += 1
        return True

    def _describe(self, fields: tuple[int, int, int, int]) -> None:
        """Fill in the virtio-net header, which is the same for most frames in a row."""
        self._vnet_fields = fields
        csum_start, csum_offset, gso_size, head_len = fields
        if csum_offset == NO_CSUM:
            vnet.HEADER.pack_into(self._vnet_out, 0, 0, 0, 0, 0, 0, 0)
        else:
            gso_type = vnet.GSO_NONE
            if gso_size:
                # The header before TCP is 20 bytes of IPv4 or 40 of IPv6: we send no options with super-frames.
                gso_type = vnet.GSO_TCPV6 if csum_start >= ETH_HLEN + 40 else vnet.GSO_TCPV4
            vnet.HEADER.pack_into(self._vnet_out, 0, vnet.F_NEEDS_CSUM, gso_type, head_len, gso_size, csum_start, csum_offset)

    def close(self) -> None:
        """Give the ring's memory back, if the device was attached, and release the interface."""
        if hasattr(self, "ring"):
            self.ring.close()
        self._tap.close()
