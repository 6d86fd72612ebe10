"""Both versions of IP, for the layers above, which need not care which one an address belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ustack.wire.icmp import ICMP_DEST_UNREACH, ICMP_PORT_UNREACH
from ustack.wire.icmpv6 import PORT_UNREACH

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.net.icmp import ErrorHandler, MemallocOwner
    from ustack.net.ipv4 import Ipv4
    from ustack.net.ipv6 import Ipv6
    from ustack.net.layer import IpPacket
    from ustack.net.path import Path


class Ip:
    """IPv4 and IPv6 of one stack."""

    __slots__ = ("v4", "v6")

    def __init__(self, v4: Ipv4, v6: Ipv6) -> None:
        self.v4 = v4
        self.v6 = v6

    def register(
        self,
        proto: int,
        handler: Callable[[IpPacket], None],
        on_error: ErrorHandler,
        on_error6: ErrorHandler,
        memalloc_owner: MemallocOwner | None = None,
    ) -> None:
        """Hand packets of the protocol `proto` to `handler`, and what ICMP and ICMPv6 say about those that we sent to the other
        two; `memalloc_owner` knows which of those are a memalloc socket's.
        """
        self.v4.register(proto, handler)
        self.v6.register(proto, handler)
        self.v4.icmp.error_handlers[proto] = on_error
        self.v6.icmp.error_handlers[proto] = on_error6
        if memalloc_owner is not None:
            self.v4.icmp.memalloc_owners[proto] = memalloc_owner
            self.v6.icmp.memalloc_owners[proto] = memalloc_owner

    def path(self, dst: bytes, src: bytes | None = None) -> Path:
        """The path to `dst`; see `IpLayer.path`."""
        return self.v4.path(dst, src) if len(dst) == 4 else self.v6.path(dst, src)

    def is_own(self, address: bytes) -> bool:
        """Whether the packed `address` is ours and in use."""
        return self.v4.is_own(address) if len(address) == 4 else self.v6.is_own(address)

    def is_broadcast(self, address: bytes) -> bool:
        """Whether `address` is the broadcast address of one of our networks."""
        return any(address in interface.broadcasts for interface in self.v4.interfaces)

    def port_unreachable(self, packet: IpPacket) -> None:
        """Tell the sender of `packet` that nobody receives on its port, if that may be said."""
        if len(packet.dst) == 4:
            self.v4.icmp.send_error(packet, ICMP_DEST_UNREACH, ICMP_PORT_UNREACH)
        else:
            self.v6.icmp.send_unreachable(packet, PORT_UNREACH)
