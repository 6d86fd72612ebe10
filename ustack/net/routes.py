"""Routes: which interface and which next hop lead to an address, by longest prefix and then by metric (RFC 1122, section
3.3.1; RFC 4861, section 5.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.net import addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.net.interface import Interface

IPV4_BITS: Final = 32
IPV6_BITS: Final = 128
"""Bits of an address."""


class Route:
    """A route to `network` (packed) of `prefix_len` bits through `interface`; `via` is the gateway, None for what is on the
    link.

    Of two routes to the same network the one with the lower `metric` is taken. `congestion` names the congestion control of
    connections that take it, unless the socket names one; empty: as configured.
    """

    __slots__ = ("congestion", "interface", "metric", "network", "prefix_len", "via")

    def __init__(
        self, network: bytes, prefix_len: int, interface: Interface, via: bytes | None, metric: int, congestion: str = ""
    ) -> None:
        self.network = network
        self.prefix_len = prefix_len
        self.interface = interface
        self.via = via
        self.metric = metric
        self.congestion = congestion

    def __str__(self) -> str:
        via = f" via {addresses.text(self.via)}" if self.via is not None else ""
        network = f"{addresses.text(self.network)}/{self.prefix_len}"
        congestion = f" congctl {self.congestion}" if self.congestion else ""
        return f"{network}{via} dev {self.interface.device.name} metric {self.metric}{congestion}"


class RouteTable:
    """The routes of a stack for addresses of `bits` bits: IPv4 or IPv6. `on_change` is called after every change."""

    __slots__ = ("_bits", "_by_length", "_on_change")

    def __init__(self, on_change: Callable[[], None], bits: int = IPV4_BITS) -> None:
        self._bits = bits
        self._by_length: dict[int, dict[int, list[Route]]] = {}  # prefix length, longest first -> network -> routes, best first
        self._on_change = on_change

    def __iter__(self) -> Iterator[Route]:
        return (route for networks in self._by_length.values() for routes in networks.values() for route in routes)

    def add(
        self,
        network: bytes,
        prefix_len: int,
        interface: Interface,
        via: bytes | None = None,
        metric: int = 0,
        congestion: str = "",
    ) -> Route:
        """Add a route; the default route is `0.0.0.0/0` or `::/0`. Raises ValueError that says what is wrong with it."""
        bits = self._bits
        if len(network) << 3 != bits:
            raise ValueError(f"a network of {len(network)} bytes is not an {self._version} network")
        if not 0 <= prefix_len <= bits:
            raise ValueError(f"prefix length {prefix_len} is not between 0 and {bits}")
        number = int.from_bytes(network, "big")
        if number & ((1 << (bits - prefix_len)) - 1):
            raise ValueError(f"{addresses.text(network)}/{prefix_len} has bits set behind its prefix")
        if metric < 0:
            raise ValueError(f"metric {metric} is negative")
        if via is not None:
            if addresses.version(via) != addresses.version(network) or not interface.on_link(via):
                raise ValueError(f"gateway {addresses.text(via)} is not on the link of {interface.device.name}")
            if interface.is_own(via) or via in interface.broadcasts:
                raise ValueError(f"gateway {addresses.text(via)} is no other host")
        routes = self._by_length.get(prefix_len, {}).get(number, [])
        for other in routes:
            # Of IPv6 there may be several, one for each router that offers itself (RFC 4861, section 6.3.6).
            if other.metric == metric and (bits == IPV4_BITS or (other.via == via and other.interface is interface)):
                raise ValueError(f"there is a route with that metric already: {other}")
        route = Route(network, prefix_len, interface, via, metric, congestion)
        if prefix_len not in self._by_length:
            self._by_length[prefix_len] = {}
            self._by_length = dict(sorted(self._by_length.items(), reverse=True))
        self._by_length[prefix_len][number] = sorted([*routes, route], key=lambda each: each.metric)
        self._on_change()
        return route

    @property
    def _version(self) -> str:
        return "IPv4" if self._bits == IPV4_BITS else "IPv6"

    def remove(self, route: Route) -> None:
        """Take `route` out. Raises ValueError when it is not there."""
        number = int.from_bytes(route.network, "big")
        networks = self._by_length.get(route.prefix_len, {})
        if route not in networks.get(number, ()):
            raise ValueError(f"no such route: {route}")
        networks[number].remove(route)
        if not networks[number]:
            del networks[number]
            if not networks:
                del self._by_length[route.prefix_len]
        self._on_change()

    def remove_interface(self, interface: Interface) -> None:
        """Take every route through `interface` out."""
        for route in [route for route in self if route.interface is interface]:
            self.remove(route)

    def lookup(self, dst: bytes) -> Route | None:
        """The best route to the packed address `dst`."""
        for routes in self.matches(dst):
            return routes[0]
        return None

    def matches(self, dst: bytes) -> Iterator[list[Route]]:
        """The routes that lead to the packed address `dst`, those to the smallest network first, the best of each first."""
        bits = self._bits
        number = int.from_bytes(dst, "big")
        for prefix_len, networks in self._by_length.items():
            spare = bits - prefix_len
            routes = networks.get(number >> spare << spare)
            if routes:
                yield routes
