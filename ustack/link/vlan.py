"""A VLAN on a device: the frames of it that carry one 802.1Q tag (IEEE 802.1Q, section 9.6).

What is sent goes out by the lower device with the tag behind its Ethernet addresses; what arrives there with the tag is handed
up by the lower interface (`Interface.add_vlan`), in its ring and without a copy. The priority of a tag is not looked at, and is
0 in ours.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from ustack.link.device import NO_CSUM, VLAN_HLEN, Device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.drops import Drops
    from ustack.link.rxring import RxFrame
    from ustack.skb import Buffer, SkbMemory

VID_MAX: Final = 4094
"""The largest VLAN identifier; 0 is no VLAN, and 4095 is reserved."""

ETH_ALEN2: Final = 12
"""Bytes of the two addresses in front of the tag."""

_TAG: Final = Struct("!HH")
_ETH_P_8021Q: Final = 0x8100


class VlanDevice(Device):
    """The VLAN `vid` on the device `lower`, with its Ethernet address and its offloads; `mtu` (0: that of `lower`) is less
    where a frame of `lower` has no room for a tag on top. Raises ValueError for an identifier that cannot be.
    """

    __slots__ = ("_head", "lower", "vid")

    def __init__(self, lower: Device, vid: int, mtu: int = 0) -> None:
        if not 1 <= vid <= VID_MAX:
            raise ValueError(f"a VLAN identifier is 1 to {VID_MAX}, not {vid}")
        super().__init__(f"{lower.name}.{vid}", lower.mac, mtu or lower.mtu, lower.features)
        self.lower = lower
        self.vid = vid
        self._head = bytearray(256)
        _TAG.pack_into(self._head, ETH_ALEN2, _ETH_P_8021Q, vid)

    def attach(self, memory: SkbMemory, drops: Drops, deliver: Callable[[RxFrame], None]) -> None:
        """See `Device.attach`: frames stay in the ring of the lower device, and come by way of its interface."""
        self.ring = self.lower.ring

    def poll(self, budget: int) -> int:
        """Nothing ever waits here."""
        return 0

    def transmit(
        self, head: Buffer, payload: Sequence[Buffer], csum_start: int = 0, csum_offset: int = NO_CSUM, gso_size: int = 0
    ) -> bool:
        """See `Device.transmit`."""
        length = len(head) + VLAN_HLEN
        if length > len(self._head):
            self._head += bytes(length - len(self._head))
        tagged = memoryview(self._head)[:length]
        tagged[:ETH_ALEN2] = memoryview(head)[:ETH_ALEN2]
        tagged[ETH_ALEN2 + VLAN_HLEN :] = memoryview(head)[ETH_ALEN2:]
        lower = self.lower
        if csum_offset == NO_CSUM:
            sent = lower.transmit(tagged, payload)
        else:
            sent = lower.transmit(tagged, payload, csum_start + VLAN_HLEN, csum_offset, gso_size)
        if lower.sniffers is not None:
            lower.sniffers.sent(lower, tagged, payload, sent)
        if sent:
            self.stats.tx_packets += 1
            self.stats.tx_bytes += length + sum(len(piece) for piece in payload)
        else:
            self.stats.tx_errors += 1
        return sent

    def close(self) -> None:
        """Nothing is ours: the ring is the lower device's."""
