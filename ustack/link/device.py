"""What a device is: something that delivers Ethernet frames from its ring and takes frames to send.

A device knows nothing of IP. Attached to a stack it is given the packet memory, fills a receive ring from it and hands every
frame to `deliver` while the frame still lies in the ring (see `rxring`). Sending is synchronous: when `transmit` returns, the
device has taken the bytes, so the caller's buffers are free again and no packet waits below the stack.

`mtu` is the largest network-layer packet in bytes, as for Linux: without the 14 bytes of the Ethernet header, which a frame
has on top. What a device cannot do (checksums, cutting super-frames) it does not list in `features`; whoever builds the frame
then does it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.drops import Drops
    from ustack.link.rxring import RxFrame, RxRing
    from ustack.link.sniffer import Sniffers
    from ustack.skb import Buffer, SkbMemory

ETH_HLEN: Final = 14
"""Bytes of an Ethernet header."""

VLAN_HLEN: Final = 4
"""Bytes of an 802.1Q tag, which a frame may have on top of the MTU."""

FEATURE_CSUM: Final = 1
"""Completes the transport checksum of a frame that is sent with `csum_offset` set (NETIF_F_HW_CSUM)."""

FEATURE_TSO: Final = 2
"""Cuts a TCP super-frame of up to 64 KiB into segments of `gso_size` (NETIF_F_TSO)."""

NO_CSUM: Final = -1
"""`csum_offset` of a frame whose checksums are complete."""


class DeviceStats:
    """Frames and bytes in each direction, Ethernet header included; `tx_errors` are frames that the device refused."""

    __slots__ = ("rx_bytes", "rx_packets", "tx_bytes", "tx_errors", "tx_packets")

    def __init__(self) -> None:
        self.rx_packets = 0
        self.rx_bytes = 0
        self.tx_packets = 0
        self.tx_bytes = 0
        self.tx_errors = 0


@mypyc_attr(allow_interpreted_subclasses=True)
class Device(ABC):
    """A network device. `mac` is the stack's own address on it (6 bytes); `sniffers` is who looks on, or None: whoever delivers
    or sends a frame shows it to them.
    """

    __slots__ = ("features", "mac", "mtu", "name", "ring", "sniffers", "stats")

    ring: RxRing
    """Posted receive memory, from `attach` on."""

    def __init__(self, name: str, mac: bytes, mtu: int, features: int) -> None:
        self.name = name
        self.mac = mac
        self.mtu = mtu
        self.features = features
        self.stats = DeviceStats()
        self.sniffers: Sniffers | None = None

    @abstractmethod
    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """Fill the receive ring from `memory`; from now on hand every received frame to `deliver`. Raises OSError ENOMEM."""

    @abstractmethod
    def poll(self, budget: int) -> int:
        """Receive and deliver up to `budget` frames; return how many there were. Fewer than `budget` means that no more
        wait.
        """

    @abstractmethod
    def transmit(
        self, head: Buffer, payload: Sequence[Buffer], csum_start: int = 0, csum_offset: int = NO_CSUM, gso_size: int = 0
    ) -> bool:
        """Send the frame `head + payload`; False when the device refused it.

        With `csum_offset` set (needs FEATURE_CSUM) the checksum field at `csum_start + csum_offset` holds the sum of the
        pseudo-header, and the device completes it over everything from `csum_start` on. With `gso_size` set (needs
        FEATURE_TSO) the frame is a TCP super-frame, to be cut into segments with that much payload each.
        """

    def fileno(self) -> int:
        """The descriptor that becomes readable when frames wait; -1 for a device that has none and is driven by hand."""
        return -1

    @abstractmethod
    def close(self) -> None:
        """Give the ring's memory back and end the device."""
