"""A network namespace for this process alone: what happens inside is nobody else's business and is gone with the process.

It has no name and nothing keeps it but the processes inside, so nothing is left behind whatever kills them. An ordinary
user gets it inside a user namespace, in which the user is root.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000

_SYSCTLS: Final = (
    # path, the value that forbids, what to do about it
    ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=1000"),
    ("user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=1000"),
)


def enter_own() -> None:
    """Move this process, which must have one thread, into a new network namespace where it may make devices.

    Raises OSError that says what is missing and how to get it.
    """
    root = os.geteuid() == 0
    try:
        if not root or not _try_without_user_namespace():
            _enter_with_user_namespace()
    except OSError as error:
        raise OSError(error.errno, f"the kernel refuses a network namespace ({error.strerror}): {_remedy(root)}") from None
    _check_tun(root)


def _try_without_user_namespace() -> bool:
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:  # root of a container, perhaps
        return False
    return True


def _enter_with_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _unshare(CLONE_NEWUSER | CLONE_NEWNET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _remedy(root: bool) -> str:
    if root:
        return "root lacks CAP_SYS_ADMIN here, as in most containers; give it to the container (docker run --cap-add SYS_ADMIN)"
    for name, forbids, remedy in _SYSCTLS:
        path = Path("/proc/sys", name)
        if path.exists() and path.read_text().strip() == forbids:
            return f"user namespaces are off; run as root, or have root do `{remedy}`"
    return "user namespaces are forbidden here (by a container or a security module); run as root"


def _check_tun(root: bool) -> None:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            remedy = "load the module (modprobe tun), or give the device to the container (docker run --device /dev/net/tun)"
        elif root:
            remedy = "give the device to the container (docker run --device /dev/net/tun)"
        else:
            remedy = "run as root, or have root do `chmod 666 /dev/net/tun`"
        raise OSError(
            error.errno, f"no TAP devices, since /dev/net/tun cannot be opened ({error.strerror}): {remedy}"
        ) from None
