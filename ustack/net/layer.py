"""What both versions of IP have in common: who handles which protocol, the paths in use, and what was learned of their MTU.

Path MTU discovery is RFC 1191 and RFC 8201: what a router reports is remembered for ten minutes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from ustack.net.path import Path
from ustack.timers import Timer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.env import Env
    from ustack.link.rxring import RxFrame
    from ustack.net.interface import Interface

PATHS_MAX: Final = 1024
"""Paths kept; the one that was looked up longest ago goes first."""

PMTU_EXPIRES: Final = 600.0
"""Seconds after which a path may be tried with larger packets again (RFC 1191, section 6.3; RFC 8201, section 4)."""

PMTU_ENTRIES_MAX: Final = 1024
"""Destinations whose path MTU is remembered; the oldest is forgotten first."""


class IpPacket:
    """A packet that is being delivered. There is one of these for each version of IP; it is valid, like the frame, until the
    handler returns.

    `l3` and `l4` are offsets of the IP and the transport header in `frame`, both within `frame.head`; `l4_len` counts transport
    header and payload in bytes, without any padding of the frame. `src` and `dst` are packed (`net.addresses`). `ttl` is the
    hop limit, `tos` the traffic class. `broadcast`: sent to everybody, or to a group.
    """

    __slots__ = ("broadcast", "dst", "frame", "interface", "l3", "l4", "l4_len", "proto", "src", "tos", "ttl")

    frame: RxFrame
    interface: Interface

    def __init__(self) -> None:
        self.src = b""
        self.dst = b""
        self.l3 = 0
        self.l4 = 0
        self.l4_len = 0
        self.proto = 0
        self.ttl = 0
        self.tos = 0
        self.broadcast = False


class IpLayer(ABC):
    """One version of IP of one stack. `interfaces` are those that it uses, but for `loopback`, which leads to ourselves (None:
    nothing does); `protocols` maps each protocol to its handler.
    """

    __slots__ = ("_paths", "_pmtu", "_pmtu_timer", "env", "interfaces", "loopback", "protocols")

    def __init__(self, env: Env) -> None:
        self.env = env
        self.interfaces: list[Interface] = []
        self.loopback: Interface | None = None
        self.protocols: dict[int, Callable[[IpPacket], None]] = {}
        self._paths: dict[bytes, Path] = {}  # by dst, or dst + src; the one looked up last comes last
        self._pmtu: dict[bytes, tuple[float, int]] = {}  # by dst: when it expires, and the MTU; oldest first
        self._pmtu_timer = Timer(self._expire_pmtu)

    def register(self, proto: int, handler: Callable[[IpPacket], None]) -> None:
        """Hand packets of the IP protocol `proto` to `handler`."""
        self.protocols[proto] = handler

    # -- paths --

    def path(self, dst: bytes, src: bytes | None = None) -> Path:
        """The path to `dst` from our address `src`, or from the address that the route says (both packed).

        Raises OSError: ENETUNREACH when there is no route, EADDRNOTAVAIL when `src` is not ours or we have none to use,
        ENOBUFS when there are too many neighbours.
        """
        key = dst if src is None else dst + src
        path = self._paths.pop(key, None)
        if path is None or path.obsolete:
            path = self._make_path(dst, src)
            if len(self._paths) >= PATHS_MAX:
                oldest = next(iter(self._paths))
                self._paths.pop(oldest).close()
        self._paths[key] = path
        return path

    @abstractmethod
    def _make_path(self, dst: bytes, src: bytes | None) -> Path:
        """See `path`."""

    def _path_to_us(self, loopback: Interface, dst: bytes, src: bytes) -> Path:
        """The path to our own address `dst`: by the loopback device, whose station has no address."""
        return Path(self.env, loopback, loopback.neighbours.permanent(dst, loopback.device.mac), src, dst, broadcast=False)

    def invalidate(self) -> None:
        """Routes or addresses have changed: every path is to be looked up again."""
        for path in self._paths.values():
            path.close()
        self._paths.clear()

    # -- path MTU --

    def _paths_to(self, dst: bytes) -> Iterator[Path]:
        return (path for path in self._paths.values() if path.dst == dst)

    def _known_pmtu(self, path: Path) -> Path:
        """`path`, as narrow as its destination is known to be."""
        known = self._pmtu.get(path.dst)
        if known is not None:
            path.narrow(known[1])
        return path

    def learn_pmtu(self, dst: bytes, mtu: int) -> None:
        """Narrow every path to `dst` to `mtu` bytes for `PMTU_EXPIRES` seconds; what is known to be narrower stays so."""
        known = self._pmtu.get(dst)
        if known is not None and known[1] <= mtu:
            return
        self._pmtu.pop(dst, None)
        if len(self._pmtu) >= PMTU_ENTRIES_MAX:
            self._forget_pmtu(next(iter(self._pmtu)))
        self._pmtu[dst] = (self.env.timers.now + PMTU_EXPIRES, mtu)
        if not self._pmtu_timer.pending:
            self.env.timers.set(self._pmtu_timer, self.env.timers.now + PMTU_EXPIRES)
        for path in self._paths_to(dst):
            path.narrow(mtu)

    def _forget_pmtu(self, dst: bytes) -> None:
        del self._pmtu[dst]
        for path in self._paths_to(dst):
            path.widen()

    def _expire_pmtu(self) -> None:
        now = self.env.timers.now
        for dst in [dst for dst, (expires, _) in self._pmtu.items() if expires <= now]:
            self._forget_pmtu(dst)
        if self._pmtu:
            self.env.timers.set(self._pmtu_timer, next(iter(self._pmtu.values()))[0])

    # -- life --

    @abstractmethod
    def remove_interface(self, interface: Interface) -> None:
        """Use `interface` no longer: its addresses are not ours any more, and the routes through it are gone."""

    def close(self) -> None:
        """Use no interface any more."""
        for interface in self.interfaces[:]:
            self.remove_interface(interface)
        self._pmtu_timer.cancel()
