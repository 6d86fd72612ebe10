"""A network interface: a device with an address of ours, its neighbours, and the way of a frame from the device up.

`Interface.input` is what a device delivers to. It looks at the Ethernet header and at nothing else.
"""

from __future__ import annotations

from socket import AF_INET, inet_ntop
from struct import Struct
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net.arp import Arp
from ustack.net.neighbour import NeighbourTable
from ustack.wire import ethernet

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.env import Env
    from ustack.link.device import Device
    from ustack.link.rxring import RxFrame
    from ustack.net.neighbour import NeighbourParameters

_DST_AND_TYPE: Final = Struct("!6s6xH")

RESERVE_PROTOCOLS: Final = frozenset({ethernet.ETH_P_ARP, ethernet.ETH_P_IP, ethernet.ETH_P_IPV6, ethernet.ETH_P_8021Q})
"""Ethertypes that a frame in a buffer from the reserve may have (skb_pfmemalloc_protocol): what a memalloc socket's peer can
be reached by.
"""


def check_host(address: bytes, prefix_len: int) -> None:
    """Raise ValueError, which says why, unless an interface can have the packed IPv4 `address` in a network of `prefix_len`
    bits.
    """
    if len(address) != 4 or not 0 < address[0] < 224 or address[0] == 127:
        raise ValueError(f"{_text(address)} cannot be the IPv4 address of an interface")
    if not 1 <= prefix_len <= 32:
        raise ValueError(f"a prefix length of {prefix_len} is not between 1 and 32")
    hosts = 0xFFFFFFFF >> prefix_len
    if prefix_len < 31 and int.from_bytes(address, "big") & hosts in (0, hosts):
        raise ValueError(f"{_text(address)}/{prefix_len} names the network or everybody in it, not a host")


class Interface:
    """One device with one IPv4 `address` (packed) in a network of `prefix_len` bits. Raises ValueError for what cannot be an
    address.

    `network` and `broadcast` are the first and the last address of that network (there is no broadcast in a /31 or /32: None).
    `handlers` maps an ethertype to `handler(interface, frame, offset)`, with the offset of the network header.
    """

    __slots__ = (
        "_drops",
        "_mac",
        "_mask",
        "_network",
        "address",
        "arp",
        "broadcast",
        "device",
        "handlers",
        "neighbours",
        "network",
        "prefix_len",
    )

    def __init__(
        self, env: Env, device: Device, address: bytes, prefix_len: int, parameters: NeighbourParameters | None = None
    ) -> None:
        check_host(address, prefix_len)
        self.device = device
        self.address = address
        self.prefix_len = prefix_len
        self._mask = 0xFFFFFFFF << (32 - prefix_len) & 0xFFFFFFFF
        self._network = int.from_bytes(address, "big") & self._mask
        self.network = self._network.to_bytes(4, "big")
        self.broadcast: bytes | None = None
        if prefix_len < 31:
            self.broadcast = (self._network | ~self._mask & 0xFFFFFFFF).to_bytes(4, "big")
        self._drops = env.drops
        self._mac = device.mac
        self.handlers: dict[int, Callable[[Interface, RxFrame, int], None]] = {}
        self.arp = Arp(env, self)
        self.neighbours = NeighbourTable(env, device, self.arp.solicit, parameters)
        self.handlers[ethernet.ETH_P_ARP] = self.arp.input

    def on_link(self, address: bytes) -> bool:
        """Whether the packed `address` belongs to the interface's network."""
        return int.from_bytes(address, "big") & self._mask == self._network

    def input(self, frame: RxFrame) -> None:
        """A frame arrived: hand it to the protocol that its ethertype names. For `Device.attach`."""
        sniffers = self.device.sniffers
        if sniffers is not None and not sniffers.inside:
            sniffers.deliver(self.device, frame, self.input)  # comes back here, inside
            return
        if frame.len < ethernet.HEADER_LEN:
            self._drops.count(DropReason.PKT_TOO_SMALL)
            return
        dst, ethertype = _DST_AND_TYPE.unpack_from(frame.head)
        if dst != self._mac and not dst[0] & 1:
            self._drops.count(DropReason.OTHERHOST)
            return
        if frame.pfmemalloc and ethertype not in RESERVE_PROTOCOLS:
            self._drops.count(DropReason.PFMEMALLOC)
            return
        handler = self.handlers.get(ethertype)
        if handler is None:
            self._drops.count(DropReason.UNHANDLED_PROTO)
            return
        handler(self, frame, ethernet.HEADER_LEN)

    def close(self) -> None:
        """Take nothing more in, forget the neighbours, free what waits for them. The device stays open."""
        self.handlers.clear()
        self.arp.close()
        self.neighbours.close()


def _text(address: bytes) -> str:
    return inet_ntop(AF_INET, address) if len(address) == 4 else address.hex(".")
