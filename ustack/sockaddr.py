"""Addresses as programs write them, (host, port) or (host, port, flowinfo, scope_id), and as the layers below handle them."""

from __future__ import annotations

import errno
import os
import socket as names
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final

from ustack.net import addresses
from ustack.net.addresses import ANY4, ANY6, V4_MAPPED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.net.interface import Interface

Address = tuple[Any, ...]
"""What the socket module takes and gives: for AF_INET host and port; for AF_INET6 also flow information and scope. The host is
an address in its usual form ("" for any, when binding)."""

_FOUR: Final = 4


def family_of(host: str) -> int:
    """AF_INET6 or AF_INET: which one the address `host` is written as. A name is taken for IPv4, which then refuses it."""
    return names.AF_INET6 if ":" in host else names.AF_INET


def _no_name(host: str, version: str) -> names.gaierror:
    return names.gaierror(names.EAI_NONAME, f"{host!r} is not an {version} address, and the stack has no name service")


def pack_host(host: str, interfaces: Iterable[Interface] = (), scope_id: int = 0) -> bytes:
    """The packed form (`net.addresses`) of an IPv4 or IPv6 address; an IPv4 address written as IPv6 becomes IPv4.

    The zone of a link-local address is `scope_id`, or stands behind it as "%", name or number of one of `interfaces`. Without
    one it is that of the only interface there is, if there is one. Raises gaierror for a name: there is no name service;
    OSError EINVAL or ENODEV for a zone that is missing or none of ours.
    """
    if ":" not in host:
        try:
            return IPv4Address(host).packed
        except AddressValueError:
            raise _no_name(host, "IPv4") from None
    try:
        parsed = IPv6Address(host)
    except AddressValueError:
        raise _no_name(host, "IPv6") from None
    packed = parsed.packed
    if packed.startswith(V4_MAPPED):
        return packed[12:]
    if not addresses.needs_zone(packed):
        return packed
    known = {each.index: each for each in interfaces}
    if parsed.scope_id:
        named = {each.device.name: each.index for each in known.values()}
        scope_id = named.get(parsed.scope_id) or (int(parsed.scope_id) if parsed.scope_id.isdigit() else -1)
    elif not scope_id and len(known) == 1:
        scope_id = next(iter(known))
    if not scope_id:
        raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: {host} needs a scope, such as %{_example(known)}")
    if scope_id not in known:
        raise OSError(errno.ENODEV, f"{os.strerror(errno.ENODEV)}: {host} is on none of our links")
    return packed + addresses.zone(scope_id)


def _example(known: dict[int, Interface]) -> str:
    return next((each.device.name for each in known.values()), "tap0")


def pack(family: int, address: Address, interfaces: Iterable[Interface]) -> tuple[bytes, int]:
    """`address` of a socket of `family`, with its host packed; 0.0.0.0 or :: for "".

    Raises gaierror for a name, OverflowError for a port that is none, TypeError for what is no address of that family.
    """
    if not 2 <= len(address) <= (2 if family == names.AF_INET else _FOUR):
        more = "" if family == names.AF_INET else " or (host, port, flowinfo, scope_id)"
        raise TypeError(f"an address is (host, port){more}")
    host, port = address[0], address[1]
    if not 0 <= port <= 65535:
        raise OverflowError("port must be 0-65535")
    if family == names.AF_INET:
        if ":" in host:
            raise _no_name(host, "IPv4")
        return pack_host(host) if host else ANY4, port
    if not host:
        return ANY6, port
    if ":" not in host:
        raise _no_name(host, "IPv6")
    return pack_host(host, interfaces, address[3] if len(address) == _FOUR else 0), port


def unpack_host(address: bytes | None) -> str:
    """The text of a packed address, without its zone; of one that was never set, 0.0.0.0."""
    return "0.0.0.0" if address is None else addresses.text(address[:16])


def unpack(family: int, address: bytes | None, port: int) -> Address:
    """The packed `address` and `port` as a socket of `family` says them; None is any address of either version."""
    if family == names.AF_INET:
        return unpack_host(address), port
    if address is None:
        return "::", port, 0, 0
    if len(address) == _FOUR:
        return f"::ffff:{addresses.text(address)}", port, 0, 0
    return addresses.text(address[:16]), port, 0, addresses.scope_id(address)
