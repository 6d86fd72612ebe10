"""Routes: which interface and which next hop lead to an address, by longest prefix and then by metric (RFC 1122, section
3.3.1).
"""

from __future__ import annotations

from socket import AF_INET, inet_ntop
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.net.interface import Interface


class Route:
    """A route to `network` (packed) of `prefix_len` bits through `interface`; `via` is the gateway, None for what is on the
    link.

    Of two routes to the same network the one with the lower `metric` is taken.
    """

    __slots__ = ("interface", "metric", "network", "prefix_len", "via")

    def __init__(self, network: bytes, prefix_len: int, interface: Interface, via: bytes | None, metric: int) -> None:
        self.network = network
        self.prefix_len = prefix_len
        self.interface = interface
        self.via = via
        self.metric = metric

    def __str__(self) -> str:
        via = f" via {_text(self.via)}" if self.via is not None else ""
        return f"{_text(self.network)}/{self.prefix_len}{via} dev {self.interface.device.name} metric {self.metric}"


class RouteTable:
    """The IPv4 routes of a stack. `on_change` is called after every change."""

    __slots__ = ("_by_length", "_on_change")

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._by_length: dict[int, dict[int, list[Route]]] = {}  # prefix length, longest first -> network -> routes, best first
        self._on_change = on_change

    def __iter__(self) -> Iterator[Route]:
        return (route for networks in self._by_length.values() for routes in networks.values() for route in routes)

    def add(self, network: bytes, prefix_len: int, interface: Interface, via: bytes | None = None, metric: int = 0) -> Route:
        """Add a route; the default route is `0.0.0.0/0`. Raises ValueError that says what is wrong with it."""
        if len(network) != 4:
            raise ValueError(f"a network of {len(network)} bytes is not an IPv4 network")
        if not 0 <= prefix_len <= 32:
            raise ValueError(f"prefix length {prefix_len} is not between 0 and 32")
        number = int.from_bytes(network, "big")
        if number & (0xFFFFFFFF >> prefix_len):
            raise ValueError(f"{_text(network)}/{prefix_len} has bits set behind its prefix")
        if metric < 0:
            raise ValueError(f"metric {metric} is negative")
        if via is not None:
            if len(via) != 4 or not interface.on_link(via):
                raise ValueError(f"gateway {_text(via)} is not on the link of {interface.device.name}")
            if via in (interface.address, interface.broadcast):
                raise ValueError(f"gateway {_text(via)} is no other host")
        routes = self._by_length.get(prefix_len, {}).get(number, [])
        for other in routes:
            if other.metric == metric:
                raise ValueError(f"there is a route with that metric already: {other}")
        route = Route(network, prefix_len, interface, via, metric)
        if prefix_len not in self._by_length:
            self._by_length[prefix_len] = {}
            self._by_length = dict(sorted(self._by_length.items(), reverse=True))
        self._by_length[prefix_len][number] = sorted([*routes, route], key=lambda each: each.metric)
        self._on_change()
        return route

    def remove(self, route: Route) -> None:
        """Take `route` out. Raises ValueError when it is not there."""
        number = int.from_bytes(route.network, "big")
        networks = self._by_length.get(route.prefix_len, {})
        if route not in networks.get(number, ()):
            raise ValueError(f"no such route: {route}")
        networks[number].remove(route)
        if not networks[number]:
            del networks[number]
        self._on_change()

    def remove_interface(self, interface: Interface) -> None:
        """Take every route through `interface` out."""
        for route in [route for route in self if route.interface is interface]:
            self.remove(route)

    def lookup(self, dst: bytes) -> Route | None:
        """The best route to the packed address `dst`."""
        number = int.from_bytes(dst, "big")
        for prefix_len, networks in self._by_length.items():
            routes = networks.get(number & ~(0xFFFFFFFF >> prefix_len))
            if routes:
                return routes[0]
        return None


def _text(address: bytes) -> str:
    return inet_ntop(AF_INET, address) if len(address) == 4 else address.hex(".")
