"""The call `capture` of the control socket: a client gets the packet memory to read, and a ring of descriptors.

    -> {"call": "capture", "args": {"interface": "ut0", "snaplen": 262144}}
    <- {"ok": {"size": 67108864, "slots": 1024, "interfaces": [{"name": "ut0", "mac": ..., "mtu": 1500}], "reasons": [...]}}

With the answer come four descriptors (SCM_RIGHTS): the arena of `size` bytes and the slots, which can be read and nothing else,
the release index, and the pipe that says how many descriptors have come; see `ustack.link.descriptor_ring`. A descriptor's
interface is an index into `interfaces`, its reason one into `reasons`. `interface` limits the capture to one, `snaplen` to the
start of each frame.

Whoever sees the arena sees the bytes of every connection. So besides the permission bits of the control socket, which are the
access control of everything else, the client must be root or the user who runs the daemon (SO_PEERCRED).
"""

from __future__ import annotations

import errno
import json
import socket
from contextlib import contextmanager
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from ustack.drops import DropReason
from ustack.link.descriptor_ring import shared_fds
from ustack.link.sniffer import uid_may_sniff

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.link.device import Device
    from ustack.stack import Stack

_UCRED: Final = Struct("3i")


@contextmanager
def sniffer(stack: Stack, transport: Any, interface: object, snaplen: object) -> Iterator[None]:
    """A sniffer of `stack` for the client behind `transport`, who is told so; gone, with all it pinned, after the context.

    Raises OSError: EPERM for a client who may not, ENODEV for an `interface` that there is not, EINVAL for no `snaplen`, and
    those of `Sniffers.add`.
    """
    sock = transport.get_extra_info("socket")
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if not uid_may_sniff(uid):
        raise OSError(errno.EPERM, "only root and the user who runs the daemon may capture: a capture sees all packet memory")
    if not isinstance(snaplen, int) or isinstance(snaplen, bool) or snaplen < 1:
        raise OSError(errno.EINVAL, f"{snaplen!r} is no length of what to capture of a frame")
    devices = stack.sniffers.devices
    new = stack.sniffers.add(None if interface is None else _named(devices, interface), snaplen)
    try:
        ok = {
            "size": stack.arena.size,
            "slots": new.ring.slots,
            "interfaces": [{"name": each.name, "mac": each.mac.hex(":"), "mtu": each.mtu} for each in devices],
            "reasons": [reason.name for reason in DropReason],
        }
        line = json.dumps({"ok": ok}, separators=(",", ":")).encode() + b"\n"
        if transport.get_write_buffer_size():
            raise OSError(errno.EAGAIN, "the client has not read what it was told before")
        with socket.socket(fileno=socket.dup(sock.fileno())) as own:
            own.setblocking(False)
            socket.send_fds(own, [line], shared_fds(stack.arena, new.ring))
        yield
    finally:
        stack.sniffers.remove(new)


def _named(devices: list[Device], name: object) -> Device:
    for device in devices:
        if device.name == name:
            return device
    known = ", ".join(device.name for device in devices) or "none"
    raise OSError(errno.ENODEV, f"no interface {name!r}; there are: {known}")
