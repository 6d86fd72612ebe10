"""The kernel's nbd: telling it by netlink which socket leads to which device, and how large the disk is.

The generic netlink family "nbd" (include/uapi/linux/nbd-netlink.h): NBD_CMD_CONNECT hands over connected stream sockets, by
their descriptors in this process, with all that negotiation would have found out; NBD_CMD_DISCONNECT takes the device away.
Needs CAP_SYS_ADMIN. Since Linux 6.18 only TCP and unix sockets are taken; a socketpair is one of the latter.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Final

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

FAMILY: Final = "nbd"
VERSION: Final = 1
NBD_CMD_CONNECT: Final = 1
NBD_CMD_DISCONNECT: Final = 2
NBD_CMD_STATUS: Final = 5
NO_TIMEOUT: Final = 0
"""Seconds after which the kernel gives a request up: never. Whether the server is slow or dead, our client finds out."""
BLOCK_MAX: Final = 4096
"""Bytes of the largest logical block that a device may have: a page."""


class NbdMessage(genlmsg):  # type: ignore[misc]
    """A message of the family: the attributes NBD_ATTR_*, by the kernel's names."""

    prefix = "NBD_ATTR_"
    nla_map: ClassVar[tuple[tuple[str, str], ...]] = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "devices"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]  # noqa: D106 (pyroute2 finds it by the name in the map)
        nla_flags = NLA_F_NESTED
        nla_map: ClassVar[tuple[tuple[str, str], ...]] = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: D106
            nla_flags = NLA_F_NESTED
            nla_map: ClassVar[tuple[tuple[str, str], ...]] = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class devices(nla):  # type: ignore[misc]  # noqa: D106
        nla_flags = NLA_F_NESTED
        nla_map: ClassVar[tuple[tuple[str, str], ...]] = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: D106
            nla_flags = NLA_F_NESTED
            nla_map: ClassVar[tuple[tuple[str, str], ...]] = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


def device_index(path: str) -> int | None:
    """3 for `/dev/nbd3`, None for `auto`: any that is free."""
    return None if path == "auto" else int(path.removeprefix("/dev/nbd"))


def block_size_for(size: int, minimum_block: int) -> int:
    """Bytes of a device's logical blocks: pages where the disk consists of such, else sectors.

    Raises OSError EINVAL for a disk without blocks that the kernel could use: of more than a page, or with a part of a sector
    at the end.
    """
    for block in (BLOCK_MAX, 512):
        if minimum_block <= block and size % block == 0 and size:
            return block
    text = f"{size} bytes in blocks of {minimum_block} are no disk for the kernel: it has blocks of 512 to {BLOCK_MAX}"
    raise OSError(errno.EINVAL, text)


def connect_message(index: int | None, fd: int, size: int, block_size: int, flags: int) -> NbdMessage:
    """NBD_CMD_CONNECT: the socket `fd` leads to a disk of `size` bytes; `flags` are its transmission flags."""
    attributes: list[tuple[str, Any]] = [] if index is None else [("NBD_ATTR_INDEX", index)]
    attributes += [
        ("NBD_ATTR_SIZE_BYTES", size),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", block_size),
        ("NBD_ATTR_TIMEOUT", NO_TIMEOUT),
        ("NBD_ATTR_SERVER_FLAGS", flags),
        ("NBD_ATTR_SOCKETS", {"attrs": [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]})]}),
    ]
    return _message(NBD_CMD_CONNECT, attributes)


def disconnect_message(index: int) -> NbdMessage:
    """NBD_CMD_DISCONNECT."""
    return _message(NBD_CMD_DISCONNECT, [("NBD_ATTR_INDEX", index)])


def _message(command: int, attributes: list[tuple[str, Any]]) -> NbdMessage:
    message = NbdMessage()
    message["cmd"] = command
    message["version"] = VERSION
    message["attrs"] = attributes
    return message


def connect(index: int | None, fd: int, size: int, block_size: int, flags: int) -> int:
    """Make the socket a device; returns its number. Blocks. Raises OSError: EBUSY when the device is in use, ENODEV
    without the driver, EPERM without the capability."""
    with _family() as sock:
        for reply in _ask(sock, connect_message(index, fd, size, block_size, flags)):
            number = reply.get_attr("NBD_ATTR_INDEX")
            if number is not None:
                return int(number)
    if index is None:
        raise OSError(errno.EPROTO, "the kernel does not say which device it has made")
    return index


def disconnect(index: int) -> None:
    """Take the device away; its socket is closed. Blocks. Raises OSError like `connect`."""
    with _family() as sock:
        _ask(sock, disconnect_message(index))


def check_driver() -> None:
    """Raises OSError ENODEV where this kernel has no nbd, loaded as a module or built in."""
    _family().close()


def _family() -> Any:
    sock = GenericNetlinkSocket()
    try:
        sock.bind(FAMILY, NbdMessage)
    except (NetlinkError, OSError) as error:
        sock.close()
        if getattr(error, "code", error.args[0]) == errno.ENOENT:
            raise OSError(
                errno.ENODEV, "this kernel has no nbd driver: modprobe nbd, or use a unix socket instead of a device"
            ) from None
        raise OSError(getattr(error, "code", errno.EIO), f"netlink: {error}") from None
    return sock


def _ask(sock: Any, message: NbdMessage) -> tuple[Any, ...]:
    try:
        return tuple(sock.nlm_request(message, msg_type=sock.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK))
    except NetlinkError as error:
        code = int(error.code)
        raise OSError(code, _HINTS.get(code, f"the kernel's nbd refuses: {error.args[-1]}")) from None


_HINTS: Final = {
    errno.EPERM: "not permitted: configuring /dev/nbd needs CAP_SYS_ADMIN",
    errno.EBUSY: "the device is in use",
    errno.ENOENT: "there is no such device: the module's parameter nbds_max says how many there are",
    errno.EINVAL: "the kernel's nbd refuses: the device is not connected, or the socket is of a kind that it does not take",
}
"""What the kernel's errors mean."""
