"""The kernel's side of a TAP interface, by way of netlink."""

from __future__ import annotations

import errno
import os
import socket

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError


def exists(name: str) -> bool:
    """Whether there is an interface `name` in our network namespace."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def bring_up(name: str, address: str | None = None) -> None:
    """Bring the interface `name` up, and give it `address` ("10.0.0.1/24") if one is named. Not from within an event loop:
    netlink has one of its own. Raises OSError.
    """
    try:
        with IPRoute() as ip:
            index = socket.if_nametoindex(name)
            if address is not None:
                host, _, prefix_len = address.partition("/")
                ip.addr("add", index=index, address=host, prefixlen=int(prefix_len))
            ip.link("set", index=index, state="up")
    except NetlinkError as error:
        raise OSError(error.code or errno.EIO, os.strerror(error.code or errno.EIO), name) from None
