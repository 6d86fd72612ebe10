"""A network interface: a device with addresses of ours, its neighbours, and the way of a frame from the device up.

`Interface.input` is what a device delivers to. It looks at the Ethernet header and at nothing else. What an interface knows of
IPv4 is here; what it knows of IPv6 is `inet6`, once IPv6 uses it.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net import addresses
from ustack.net.arp import Arp
from ustack.net.neighbour import NeighbourTable
from ustack.wire import ethernet

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.env import Env
    from ustack.link.device import Device
    from ustack.link.rxring import RxFrame
    from ustack.net.inet6 import Inet6
    from ustack.net.neighbour import NeighbourParameters

_DST_AND_TYPE: Final = Struct("!6s6xH")
_TAG: Final = Struct("!HH")

_VID: Final = 0x0FFF
"""The bits of a tag that name the VLAN; of 0 the tag says only how urgent the frame is (IEEE 802.1Q, section 9.6)."""

RESERVE_PROTOCOLS: Final = frozenset({ethernet.ETH_P_ARP, ethernet.ETH_P_IP, ethernet.ETH_P_IPV6, ethernet.ETH_P_8021Q})
"""Ethertypes that a frame in a buffer from the reserve may have (skb_pfmemalloc_protocol): what a memalloc socket's peer can
be reached by.
"""


def check_host(address: bytes, prefix_len: int) -> None:
    """Raise ValueError, which says why, unless an interface can have the packed `address` in a network of `prefix_len` bits."""
    if len(address) == 16:
        _check_host6(address, prefix_len)
        return
    if len(address) != 4 or not 0 < address[0] < 224 or address[0] == 127:
        raise ValueError(f"{addresses.text(address)} cannot be the IPv4 address of an interface")
    if not 1 <= prefix_len <= 32:
        raise ValueError(f"a prefix length of {prefix_len} is not between 1 and 32")
    hosts = 0xFFFFFFFF >> prefix_len
    if prefix_len < 31 and int.from_bytes(address, "big") & hosts in (0, hosts):
        raise ValueError(f"{addresses.text(address)}/{prefix_len} names the network or everybody in it, not a host")


def _check_host6(address: bytes, prefix_len: int) -> None:
    if (
        address[0] == 0xFF
        or address in (addresses.ANY6, addresses.LOOPBACK6)
        or addresses.is_v4_mapped(address)
        or not any(address[:8])
    ):
        raise ValueError(f"{addresses.text(address)} cannot be the IPv6 address of an interface")
    if not 1 <= prefix_len <= 128:
        raise ValueError(f"a prefix length of {prefix_len} is not between 1 and 128")
    if prefix_len < 127 and not int.from_bytes(address, "big") & ((1 << (128 - prefix_len)) - 1):
        # The subnet-router anycast address (RFC 4291, section 2.6.1); on a link of two there is none (RFC 6164).
        raise ValueError(f"{addresses.text(address)}/{prefix_len} names the network, not a host")


class InterfaceAddress:
    """An IPv4 `address` (packed) of an interface, in a network of `prefix_len` bits.

    `network` and `broadcast` are the first and the last address of that network (there is no broadcast in a /31 or /32: None).
    Raises ValueError for what cannot be an address.
    """

    __slots__ = ("_mask", "_network", "address", "broadcast", "network", "prefix_len")

    def __init__(self, address: bytes, prefix_len: int) -> None:
        check_host(address, prefix_len)
        self.address = address
        self.prefix_len = prefix_len
        self._mask = 0xFFFFFFFF << (32 - prefix_len) & 0xFFFFFFFF
        self._network = int.from_bytes(address, "big") & self._mask
        self.network = self._network.to_bytes(4, "big")
        self.broadcast: bytes | None = None
        if prefix_len < 31:
            self.broadcast = (self._network | ~self._mask & 0xFFFFFFFF).to_bytes(4, "big")

    def on_link(self, address: bytes) -> bool:
        """Whether the packed IPv4 `address` belongs to the network."""
        return int.from_bytes(address, "big") & self._mask == self._network


class Interface:
    """One device with the addresses that are ours on it. Raises ValueError for what cannot be an address.

    `addresses` are its IPv4 addresses; `address`, `prefix_len`, `network` and `broadcast` are those of the first, which is the
    source of what names no other (b"", 0, b"" and None when there is none). `broadcasts` are the broadcast addresses of all.
    `index` is the number by which sockets call the interface (sin6_scope_id), and `zone` what stands behind its link-local
    addresses. `loopback`: what arrives here is what we have sent ourselves. `vlans` are the interfaces of the VLANs on the
    device. `handlers` maps an ethertype to `handler(interface, frame, offset)`, with the offset of the network header.
    """

    __slots__ = (
        "_drops",
        "_mac",
        "address",
        "addresses",
        "arp",
        "broadcast",
        "broadcasts",
        "device",
        "handlers",
        "index",
        "inet6",
        "loopback",
        "neighbours",
        "network",
        "prefix_len",
        "vlans",
        "zone",
    )

    def __init__(
        self,
        env: Env,
        device: Device,
        address: bytes = b"",
        prefix_len: int = 0,
        parameters: NeighbourParameters | None = None,
        index: int = 1,
        *,
        loopback: bool = False,
    ) -> None:
        self.device = device
        self.loopback = loopback
        self.vlans: dict[int, Interface] = {}
        self.index = index
        self.zone = addresses.zone(index)
        self.addresses: list[InterfaceAddress] = []
        self.address = b""
        self.prefix_len = 0
        self.network = b""
        self.broadcast: bytes | None = None
        self.broadcasts: frozenset[bytes] = frozenset()
        self.inet6: Inet6 | None = None
        self._drops = env.drops
        self._mac = device.mac
        self.handlers: dict[int, Callable[[Interface, RxFrame, int], None]] = {}
        self.arp = Arp(env, self)
        self.neighbours = NeighbourTable(env, device, self.arp.solicit, parameters)
        self.handlers[ethernet.ETH_P_ARP] = self.arp.input
        if address:
            self.add_address(InterfaceAddress(address, prefix_len))

    def add_address(self, own: InterfaceAddress) -> None:
        """Have the IPv4 address `own` as well. For `Ipv4.add_address`, which makes it known."""
        self.addresses.append(own)
        self._addresses_changed()

    def remove_address(self, own: InterfaceAddress) -> None:
        """Have the IPv4 address `own` no longer. For `Ipv4.remove_address`."""
        self.addresses.remove(own)
        self._addresses_changed()

    def _addresses_changed(self) -> None:
        first = self.addresses[0] if self.addresses else None
        self.address = first.address if first is not None else b""
        self.prefix_len = first.prefix_len if first is not None else 0
        self.network = first.network if first is not None else b""
        self.broadcast = first.broadcast if first is not None else None
        self.broadcasts = frozenset(own.broadcast for own in self.addresses if own.broadcast is not None)

    def on_link(self, address: bytes) -> bool:
        """Whether the packed `address` belongs to one of the interface's networks."""
        if len(address) != 4:
            return self.inet6 is not None and self.inet6.on_link(address)
        return any(own.on_link(address) for own in self.addresses)

    def is_own(self, address: bytes) -> bool:
        """Whether the packed `address` is one that we have on this interface."""
        if len(address) != 4:
            return self.inet6 is not None and address in self.inet6.own
        return any(own.address == address for own in self.addresses)

    def source_for(self, address: bytes) -> bytes:
        """Which of our IPv4 addresses to speak from to the packed `address` on the link; b"" when there is none."""
        if len(self.addresses) > 1:
            for own in self.addresses:
                if own.on_link(address):
                    return own.address
        return self.address

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

    def add_vlan(self, vid: int, interface: Interface) -> None:
        """Hand frames with the tag of the VLAN `vid` to `interface`. Raises ValueError when somebody has them already."""
        if vid in self.vlans:
            raise ValueError(f"{self.device.name}: VLAN {vid} is in use")
        self.vlans[vid] = interface
        self.handlers[ethernet.ETH_P_8021Q] = Interface.input_tagged

    def input_tagged(self, frame: RxFrame, offset: int) -> None:
        """A frame arrived with a tag at `offset`: hand it to the protocol that the ethertype behind the tag names, on the
        interface of the VLAN.
        """
        if frame.len < offset + _TAG.size:
            self._drops.count(DropReason.PKT_TOO_SMALL)
            return
        tag, ethertype = _TAG.unpack_from(frame.head, offset)
        vid = tag & _VID
        interface = self.vlans.get(vid) if vid else self
        handler = None if interface is None or ethertype == ethernet.ETH_P_8021Q else interface.handlers.get(ethertype)
        if frame.pfmemalloc and ethertype not in RESERVE_PROTOCOLS:
            self._drops.count(DropReason.PFMEMALLOC)
        elif interface is None or handler is None:
            self._drops.count(DropReason.UNHANDLED_PROTO)
        else:
            if interface is not self:
                stats = interface.device.stats
                stats.rx_packets += 1
                stats.rx_bytes += frame.len
            handler(interface, frame, offset + _TAG.size)

    def close(self) -> None:
        """Take nothing more in, forget the neighbours, free what waits for them. The device stays open."""
        self.handlers.clear()
        self.vlans.clear()
        self.arp.close()
        self.neighbours.close()
        if self.inet6 is not None:
            self.inet6.close()
