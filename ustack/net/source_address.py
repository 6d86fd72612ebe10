"""Which of our IPv6 addresses to speak from (RFC 6724, section 5), and the policy table behind it (section 2.1)."""

from __future__ import annotations

from ipaddress import IPv6Network
from typing import TYPE_CHECKING, Final

from ustack.net.addresses import SCOPE_GLOBAL, SCOPE_LINK, SCOPE_SITE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.net.inet6 import Address6
    from ustack.net.interface import Interface

_POLICY: Final = tuple(
    (128 - network.prefixlen, int(network.network_address) >> (128 - network.prefixlen), label)
    for network, label in (
        (IPv6Network("::1/128"), 0),
        (IPv6Network("::ffff:0:0/96"), 4),
        (IPv6Network("::/96"), 3),
        (IPv6Network("2001::/32"), 5),
        (IPv6Network("2002::/16"), 2),
        (IPv6Network("3ffe::/16"), 12),
        (IPv6Network("fec0::/10"), 11),
        (IPv6Network("fc00::/7"), 13),
    )
)
"""Labels by prefix, longest first; 1 for all others."""


def label(address: bytes) -> int:
    """The label of `address` in the default policy table."""
    number = int.from_bytes(address[:16], "big")
    for spare, prefix, found in _POLICY:
        if number >> spare == prefix:
            return found
    return 1


def scope(address: bytes) -> int:
    """How far `address` reaches (RFC 6724, section 3.1)."""
    if address[0] == 0xFF:
        return address[1] & 15
    if address[0] == 0xFE:
        if address[1] & 0xC0 == 0x80:
            return SCOPE_LINK
        if address[1] & 0xC0 == 0xC0:
            return SCOPE_SITE
    return SCOPE_GLOBAL


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading bits, of the first 64, the two have in common."""
    return 64 - (int.from_bytes(a[:8], "big") ^ int.from_bytes(b[:8], "big")).bit_length()


def select(candidates: Iterable[Address6], dst: bytes, outgoing: Interface) -> bytes | None:
    """The best source for packets to `dst` that leave by `outgoing`; None when no candidate will do.

    The rules in their order: the destination itself, a scope that is right, not deprecated, on the outgoing interface, the same
    label, a temporary address, the longest common prefix. Of equals the first is taken. A link-local address speaks only on its
    own link.
    """
    wanted = scope(dst)
    wanted_label = label(dst)
    best: bytes | None = None
    best_rank: tuple[int, ...] = ()
    for each in candidates:
        address = each.address
        if address[16:] and address[16:] != outgoing.zone:
            continue
        reach = scope(address)
        rank = (
            int(address == dst),
            16 - reach if reach >= wanted else reach - 16,
            int(not each.deprecated),
            int(each.interface is outgoing),
            int(label(address) == wanted_label),
            int(each.temporary),
            common_prefix(address, dst),
        )
        if best is None or rank > best_rank:
            best, best_rank = address, rank
    return best
