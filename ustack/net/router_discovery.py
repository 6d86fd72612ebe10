"""Routers, prefixes and addresses from router advertisements (RFC 4861, section 6.3; RFC 4862, section 5.5; RFC 4191).

A router becomes a default route with a lifetime, a prefix a route to the link, an address or both. Whoever is on the link can
advertise anything, so everything is bounded: routers, prefixes, routes and addresses.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from ustack.net.addresses import ALL_ROUTERS, ANY6, is_link_local
from ustack.timers import Timer
from ustack.wire import ethernet, icmpv6, ipv6, ndp

if TYPE_CHECKING:
    from ustack.net.inet6 import Address6, Inet6
    from ustack.net.layer import IpPacket
    from ustack.net.routes import Route

METRIC: Final = 1024
"""Metric of what routers advertise (IP6_RT_PRIO_USER); a higher preference is one less, a lower one more."""

ROUTES_MAX: Final = 32
"""Default routers and routes of one interface."""

PREFIXES_MAX: Final = 32
"""Advertised prefixes of one interface."""

TWO_HOURS: Final = 7200.0
"""Seconds of lifetime below which an advertisement alone cannot push an address (RFC 4862, section 5.5.3 e)."""

REACHABLE_TIME_MAX: Final = 3600.0
"""Seconds that a router can have answers count for (RFC 4861, section 6.2.1)."""

RETRANS_TIME_MIN: Final = 0.1
"""Seconds between questions that no router can shorten."""


class RouterDiscovery:
    """What routers say on the interface of `inet6`. Nothing is taken in until `start`."""

    __slots__ = ("_inet6", "_left", "_listening", "_prefixes", "_routes", "_solicit_timer", "_timer")

    def __init__(self, inet6: Inet6) -> None:
        self._inet6 = inet6
        self._listening = False
        self._left = 0
        self._solicit_timer = Timer(self._solicit)
        self._timer = Timer(self._expire)
        self._routes: dict[tuple[bytes, int, bytes], tuple[float, Route]] = {}  # network, length, router: until when
        self._prefixes: dict[tuple[bytes, int], float] = {}

    def start(self) -> None:
        """Believe routers from now on, and ask for them."""
        self._listening = True
        self._left = self._inet6.layer.config.router_solicitations
        env = self._inet6.env
        env.timers.set(self._solicit_timer, env.timers.now + env.random.uniform(0.0, 1.0))

    def _solicit(self) -> None:
        """RFC 4861, section 6.3.7."""
        if not self._left:
            return
        self._left -= 1
        inet6 = self._inet6
        source = inet6.link_local()
        body = ndp.build_lladdr(ndp.OPT_SOURCE_LL_ADDR, inet6.interface.device.mac) if source != ANY6 else b""
        inet6.env.mib.Icmp6OutRouterSolicits += 1
        inet6.send(source, ALL_ROUTERS, ethernet.multicast_v6(ALL_ROUTERS), icmpv6.ND_ROUTER_SOLICIT, 0, body)
        if self._left:
            inet6.env.timers.set(self._solicit_timer, inet6.env.timers.now + inet6.layer.config.router_solicitation_interval)

    # -- in --

    def on_advert(self, packet: IpPacket, message: ndp.RouterAdvert | None) -> bool:
        """A router advertisement arrived; False when it is none (RFC 4861, section 6.1.2)."""
        if message is None or not is_link_local(packet.src):
            return False
        if not self._listening:
            return True
        options = message.options
        if options.source is not None and options.source[0] & 1:
            return False
        inet6 = self._inet6
        self._left = 0
        self._solicit_timer.cancel()
        if message.hop_limit:
            inet6.hop_limit = message.hop_limit
        self._set_times(message)
        if ipv6.MIN_MTU <= options.mtu <= inet6.interface.device.mtu and options.mtu != inet6.mtu:
            inet6.mtu = options.mtu
            inet6.layer.invalidate()
        inet6.ndp.learn(packet.src, options.source)
        self._set_route(ANY6, 0, packet.src, message.lifetime, message.preference)
        for route in options.routes[:ROUTES_MAX]:
            self._set_route(
                _masked(route.prefix, route.prefix_len), route.prefix_len, packet.src, route.lifetime, route.preference
            )
        for prefix in options.prefixes[:PREFIXES_MAX]:
            self._on_prefix(prefix)
        self._rearm()
        return True

    def _set_times(self, message: ndp.RouterAdvert) -> None:
        neighbours = self._inet6.neighbours
        known = neighbours.parameters
        reachable = min(message.reachable_time, REACHABLE_TIME_MAX) or known.base_reachable_time
        retrans = max(message.retrans_time, RETRANS_TIME_MIN) if message.retrans_time else known.retrans_time
        if (reachable, retrans) != (known.base_reachable_time, known.retrans_time):
            neighbours.parameters = known.with_times(reachable, retrans)

    def _set_route(self, network: bytes, prefix_len: int, router: bytes, lifetime: int, preference: int) -> None:
        key = network, prefix_len, router
        routes = self._inet6.layer.routes
        known = self._routes.get(key)
        metric = METRIC - preference
        if known is not None and (not lifetime or known[1].metric != metric):
            del self._routes[key]
            routes.remove(known[1])
            known = None
        if not lifetime or (known is None and len(self._routes) >= ROUTES_MAX):
            return
        try:
            route = known[1] if known is not None else routes.add(network, prefix_len, self._inet6.interface, router, metric)
        except ValueError:
            return  # somebody has set the same route by hand, and may keep it
        self._routes[key] = self._until(lifetime), route

    def _until(self, lifetime: int) -> float:
        return inf if lifetime == ndp.INFINITE else self._inet6.env.timers.now + lifetime

    def _on_prefix(self, info: ndp.PrefixInfo) -> None:
        """RFC 4861, section 6.3.4; RFC 4862, section 5.5.3."""
        inet6 = self._inet6
        prefix = _masked(info.prefix, info.prefix_len)
        if is_link_local(prefix) or prefix[0] == 0xFF or info.preferred > info.valid:
            return
        key = prefix, info.prefix_len
        if info.flags & ndp.PREFIX_ON_LINK:
            if not info.valid:
                if self._prefixes.pop(key, None) is not None:
                    inet6.remove_prefix(*key)
            elif key in self._prefixes or (len(self._prefixes) < PREFIXES_MAX and key not in inet6.prefixes):
                self._prefixes[key] = self._until(info.valid)
                inet6.add_prefix(*key)
        if info.flags & ndp.PREFIX_AUTONOMOUS and inet6.layer.config.autoconf and info.prefix_len == 64:
            self._on_autonomous(prefix, info)

    def _on_autonomous(self, prefix: bytes, info: ndp.PrefixInfo) -> None:
        inet6 = self._inet6
        own = next(
            (each for each in inet6.addresses.values() if each.autoconf and each.address[:8] == prefix[:8]),
            None,
        )
        if own is None:
            formed = sum(each.autoconf for each in inet6.addresses.values())
            if not info.valid or formed >= inet6.layer.config.max_addresses:
                return
            own = inet6.form(prefix, 64)
            if own is None:
                return
            own.autoconf = True
            own.valid_until = self._until(info.valid)
        else:
            self._prolong(own, info.valid)
        own.preferred_until = min(self._until(info.preferred), own.valid_until)
        inet6.refresh(own)

    def _prolong(self, own: Address6, valid: int) -> None:
        """An advertisement may lengthen a lifetime, but not end it soon: anybody on the link could send it."""
        now = self._inet6.env.timers.now
        left = own.valid_until - now
        if valid > TWO_HOURS or valid > left:
            own.valid_until = self._until(valid)
        elif left > TWO_HOURS:
            own.valid_until = now + TWO_HOURS

    # -- the end of things --

    def forget(self, router: bytes) -> None:
        """`router` is none any more (RFC 4861, section 7.2.5)."""
        for key in [key for key in self._routes if key[2] == router]:
            self._inet6.layer.routes.remove(self._routes.pop(key)[1])

    def _rearm(self) -> None:
        ends = [until for until, _ in self._routes.values()] + list(self._prefixes.values())
        deadline = min(ends, default=inf)
        if deadline != inf:
            self._inet6.env.timers.set(self._timer, deadline)

    def _expire(self) -> None:
        now = self._inet6.env.timers.now
        for route_key in [key for key, (until, _) in self._routes.items() if until <= now]:
            self._inet6.layer.routes.remove(self._routes.pop(route_key)[1])
        for key in [key for key, until in self._prefixes.items() if until <= now]:
            del self._prefixes[key]
            self._inet6.remove_prefix(*key)
        self._rearm()

    def close(self) -> None:
        """Believe nobody any more. The routes are taken out with the interface."""
        self._listening = False
        self._solicit_timer.cancel()
        self._timer.cancel()
        self._routes.clear()
        self._prefixes.clear()


def _masked(prefix: bytes, prefix_len: int) -> bytes:
    spare = 128 - prefix_len
    return (int.from_bytes(prefix, "big") >> spare << spare).to_bytes(16, "big")
