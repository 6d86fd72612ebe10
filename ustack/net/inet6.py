"""What an interface knows of IPv6: its addresses, their networks, and what routers say about the link (inet6_dev)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.net.path import HOPS_DEFAULT

if TYPE_CHECKING:
    from ustack.net.interface import Interface


class Inet6:
    """IPv6 on `interface`. `own` are the addresses (packed, `net.addresses`) that are ours there; `mtu` is the link's in bytes,
    and `hop_limit` for packets that do not say how far they may go.
    """

    __slots__ = ("hop_limit", "interface", "mtu", "own", "prefixes")

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self.mtu = interface.device.mtu
        self.hop_limit = HOPS_DEFAULT
        self.own: set[bytes] = set()
        self.prefixes: dict[tuple[bytes, int], None] = {}

    def on_link(self, address: bytes) -> bool:
        """Whether the packed `address` is on this link: link-local in its zone, or in one of its prefixes."""
        if address[16:]:
            return address[16:] == self.interface.zone
        number = int.from_bytes(address, "big")
        return any(
            number >> 128 - prefix_len == int.from_bytes(prefix, "big") >> 128 - prefix_len
            for prefix, prefix_len in self.prefixes
        )

    def close(self) -> None:
        """Have no address any more."""
        self.own.clear()
        self.prefixes.clear()
