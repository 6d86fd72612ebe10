"""Neighbor Discovery messages and options (RFC 4861; RFC 4191 for preferences and routes).

What is built here is what follows the 4 bytes of type, code and checksum, so that who sends it adds those; what is parsed
begins with the type. A message whose options are malformed is none: an option of length 0 makes it invalid (RFC 4861, section
4.6).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from ustack.skb import Buffer

HOP_LIMIT: Final = 255
"""The hop limit of every message: who is not on the link cannot send it (RFC 4861, section 3.1)."""

OPT_SOURCE_LL_ADDR: Final = 1
OPT_TARGET_LL_ADDR: Final = 2
OPT_PREFIX_INFO: Final = 3
OPT_REDIRECT_HDR: Final = 4
OPT_MTU: Final = 5
OPT_NONCE: Final = 14
OPT_ROUTE_INFO: Final = 24

NA_ROUTER: Final = 0x80000000
NA_SOLICITED: Final = 0x40000000
NA_OVERRIDE: Final = 0x20000000
"""Flags of a neighbor advertisement."""

PREFIX_ON_LINK: Final = 0x80
PREFIX_AUTONOMOUS: Final = 0x40
"""Flags of a prefix."""

PREFERENCE_LOW: Final = -1
PREFERENCE_MEDIUM: Final = 0
PREFERENCE_HIGH: Final = 1
"""Router preferences (RFC 4191, section 2.1); the fourth value is reserved and counts as medium, or as no route."""

INFINITE: Final = 0xFFFFFFFF
"""A lifetime in seconds that does not end."""

OPTIONS_MAX: Final = 32
"""Options of a message that are looked at."""

_RA: Final = Struct("!4xBBHII")
_PREFIX: Final = Struct("!2xBBII4x16s")
_ROUTE: Final = Struct("!2xBBI")
_U32: Final = Struct("!I")


class PrefixInfo(NamedTuple):
    """A prefix option: flags, lifetimes in seconds, and the prefix (16 bytes, of which `prefix_len` bits count)."""

    prefix_len: int
    flags: int
    valid: int
    preferred: int
    prefix: bytes


class RouteInfo(NamedTuple):
    """A route option (RFC 4191, section 2.3): more specific than the default route."""

    prefix_len: int
    preference: int
    lifetime: int
    prefix: bytes


class Options:
    """The options of one message. What is absent is None, or 0 for `mtu`; of equal ones the first counts."""

    __slots__ = ("mtu", "nonce", "prefixes", "routes", "source", "target")

    def __init__(self) -> None:
        self.source: bytes | None = None
        self.target: bytes | None = None
        self.mtu = 0
        self.nonce = b""
        self.prefixes: list[PrefixInfo] = []
        self.routes: list[RouteInfo] = []


class NeighborSolicit(NamedTuple):
    """Who has `target`?"""

    target: bytes
    options: Options


class NeighborAdvert(NamedTuple):
    """I have `target`; `flags` are those of NA_."""

    flags: int
    target: bytes
    options: Options


class RouterAdvert(NamedTuple):
    """What a router says: times in seconds, 0 where it leaves them open; `preference` is one of PREFERENCE_."""

    hop_limit: int
    preference: int
    lifetime: int
    reachable_time: float
    retrans_time: float
    options: Options


class Redirect(NamedTuple):
    """For `destination` the better next hop is `target`."""

    target: bytes
    destination: bytes
    options: Options


def parse_options(buffer: Buffer, start: int, end: int) -> Options | None:
    """The options in `buffer[start:end]`, unknown ones skipped; None when one is malformed."""
    options = Options()
    at = start
    count = 0
    while at < end:
        if at + 2 > end:
            return None
        kind, length = buffer[at], buffer[at + 1] << 3
        if not length or at + length > end:
            return None
        count += 1
        if count > OPTIONS_MAX:
            break
        if kind == OPT_SOURCE_LL_ADDR and length == 8:
            options.source = options.source or bytes(buffer[at + 2 : at + 8])
        elif kind == OPT_TARGET_LL_ADDR and length == 8:
            options.target = options.target or bytes(buffer[at + 2 : at + 8])
        elif kind == OPT_MTU and length == 8:
            options.mtu = options.mtu or _U32.unpack_from(buffer, at + 4)[0]
        elif kind == OPT_PREFIX_INFO and length == 32:
            prefix_len, flags, valid, preferred, prefix = _PREFIX.unpack_from(buffer, at)
            if prefix_len <= 128:
                options.prefixes.append(PrefixInfo(prefix_len, flags, valid, preferred, prefix))
        elif kind == OPT_NONCE:
            options.nonce = options.nonce or bytes(buffer[at + 2 : at + length])
        elif kind == OPT_ROUTE_INFO and length <= 24:
            prefix_len, bits, lifetime = _ROUTE.unpack_from(buffer, at)
            if prefix_len <= min((length - 8) << 3, 128) and bits & 0x18 != 0x10:
                prefix = bytes(buffer[at + 8 : at + length]).ljust(16, b"\0")
                options.routes.append(RouteInfo(prefix_len, _preference(bits), lifetime, prefix))
        at += length
    return options


def _preference(bits: int) -> int:
    return {0x08: PREFERENCE_HIGH, 0x18: PREFERENCE_LOW}.get(bits & 0x18, PREFERENCE_MEDIUM)


def parse_neighbor_solicit(buffer: Buffer, start: int, end: int) -> NeighborSolicit | None:
    """A neighbor solicitation that begins, with its type, at `start`; None when it is malformed."""
    if end - start < 24 or end > len(buffer):
        return None
    options = parse_options(buffer, start + 24, end)
    return None if options is None else NeighborSolicit(bytes(buffer[start + 8 : start + 24]), options)


def parse_neighbor_advert(buffer: Buffer, start: int, end: int) -> NeighborAdvert | None:
    """A neighbor advertisement; see `parse_neighbor_solicit`."""
    if end - start < 24 or end > len(buffer):
        return None
    options = parse_options(buffer, start + 24, end)
    if options is None:
        return None
    return NeighborAdvert(_U32.unpack_from(buffer, start + 4)[0], bytes(buffer[start + 8 : start + 24]), options)


def parse_router_advert(buffer: Buffer, start: int, end: int) -> RouterAdvert | None:
    """A router advertisement; see `parse_neighbor_solicit`."""
    if end - start < 16 or end > len(buffer):
        return None
    options = parse_options(buffer, start + 16, end)
    if options is None:
        return None
    hop_limit, flags, lifetime, reachable, retrans = _RA.unpack_from(buffer, start)
    return RouterAdvert(hop_limit, _preference(flags), lifetime, reachable / 1000, retrans / 1000, options)


def parse_redirect(buffer: Buffer, start: int, end: int) -> Redirect | None:
    """A redirect; see `parse_neighbor_solicit`."""
    if end - start < 40 or end > len(buffer):
        return None
    options = parse_options(buffer, start + 40, end)
    if options is None:
        return None
    return Redirect(bytes(buffer[start + 8 : start + 24]), bytes(buffer[start + 24 : start + 40]), options)


def build_lladdr(kind: int, lladdr: bytes) -> bytes:
    """A link-layer address option: OPT_SOURCE_LL_ADDR or OPT_TARGET_LL_ADDR with the 6 bytes of a station."""
    return bytes((kind, 1)) + lladdr


def build_nonce(nonce: bytes) -> bytes:
    """A nonce option of 6 bytes (RFC 3971, section 5.3.2; RFC 7527)."""
    return bytes((OPT_NONCE, 1)) + nonce


def build_prefix(info: PrefixInfo) -> bytes:
    """A prefix option."""
    return bytes((OPT_PREFIX_INFO, 4)) + _PREFIX.pack(*info)[2:]


def build_mtu(mtu: int) -> bytes:
    """An MTU option."""
    return bytes((OPT_MTU, 1, 0, 0)) + _U32.pack(mtu)
