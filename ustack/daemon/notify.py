"""Telling systemd how we are: sd_notify(3), datagrams to the unix socket that NOTIFY_SOCKET names.

The protocol is a few lines and stable; the packages that offer it are bindings of libsystemd or unmaintained.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*assignments: str) -> None:
    """Send `assignments`, such as "READY=1", to the service manager, if there is one. Nobody minds when it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto("\n".join(assignments).encode(), address)
