"""What is in force and what is missing for others to swap over this process, and why each of it matters.

Every check looks at the machine or the process as it is now, not at what was once asked for.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ustack.daemon.arm import OOM_SCORE_ADJ_MIN, io_flusher
from ustack.nbd.uri import NbdUri

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ustack.daemon.arm import Arming

MIN_FREE_KBYTES: Final = 8192
"""KiB of vm.min_free_kbytes that were enough in every run; the kernel's default was not, for other ways to swap."""
DESCRIPTORS: Final = 64
"""File descriptors that should be free: reconnecting takes some."""
CAPABILITIES: Final = {
    "CAP_NET_ADMIN": (12, "to open the TAP device"),
    "CAP_IPC_LOCK": (14, "to lock memory"),
    "CAP_SYS_ADMIN": (21, "to mount the FUSE export"),
    "CAP_SYS_NICE": (23, "for real-time priority"),
    "CAP_SYS_RESOURCE": (24, "for PR_SET_IO_FLUSHER, oom_score_adj and limits"),
}
PROGRAMS: Final = ("losetup", "mkswap", "swapon", "swapoff")
NO_LIMIT: Final = 1 << 60
"""A memory limit of a cgroup (v1) that is none."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: whether it is as it should be, what was found, what is wanted, and why it matters."""

    name: str
    ok: bool
    found: str
    wanted: str
    why: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def machine_checks() -> Iterator[Check]:
    """What this machine must have."""
    found = int(Path("/proc/sys/vm/min_free_kbytes").read_text())
    yield Check(
        "vm.min_free_kbytes",
        found >= MIN_FREE_KBYTES,
        f"{found} KiB",
        f"at least {MIN_FREE_KBYTES} KiB: sysctl vm.min_free_kbytes={MIN_FREE_KBYTES}",
        "the kernel's own allocations behind TAP and FUSE come from it when memory is out; with too little of it, swapping"
        " waits for swapping",
    )
    yield _file("/dev/fuse", "the disk is exported as a file: modprobe fuse")
    yield _file("/dev/loop-control", "a loop device makes the file a block device: modprobe loop")
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    yield Check(
        "programs",
        not missing,
        f"missing: {', '.join(missing)}" if missing else "all there",
        ", ".join(PROGRAMS),
        "`ustack swap` runs them (Debian: mount, util-linux)",
    )


def process_checks(arming: Arming | None, watchdog: int | None, wanted_priority: int) -> Iterator[Check]:
    """What this process must have. `watchdog` is the process that watches over it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    armed = arming is not None and arming.locked
    yield Check(
        "armed",
        armed,
        "yes" if armed else "no",
        "[arm] enabled = true",
        "memory that is not stocked and locked beforehand has to be asked for when there is none",
    )
    locked, resident = (int(status[name].split()[0]) for name in ("VmLck", "VmRSS"))
    yield Check(
        "memory locked",
        locked >= resident // 2 and armed,
        f"{locked} KiB locked, {resident} KiB resident",
        "everything (mlockall)",
        "a page of this process that was swapped out, or a file page of its program that was dropped, can only come back"
        " through this process",
    )
    yield Check(
        "PR_SET_IO_FLUSHER",
        io_flusher(),
        "in force" if io_flusher() else "not in force",
        "in force",
        "without it, a system call of ours may start I/O to free memory, and wait for it: for us",
    )
    adjusted = int(Path("/proc/self/oom_score_adj").read_text())
    yield Check(
        "oom_score_adj",
        adjusted == OOM_SCORE_ADJ_MIN,
        str(adjusted),
        str(OOM_SCORE_ADJ_MIN),
        "if this process is killed, so is everybody who has a page in the swap",
    )
    policy = os.sched_getscheduler(0)
    real_time = policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    limit = resource.getrlimit(resource.RLIMIT_RTTIME)[0]
    guard = "no guard" if limit == resource.RLIM_INFINITY else f"guard after {limit / 1e6:g} s"
    yield Check(
        "real-time priority",
        real_time,
        f"SCHED_FIFO {os.sched_getparam(0).sched_priority}, {guard}" if real_time else "none",
        f"SCHED_FIFO {wanted_priority}" if wanted_priority else "SCHED_FIFO ([arm] priority)",
        "when memory is out all processes spin to find some; one that must make progress must run before them, and may use"
        " pages below the min watermark",
    )
    yield Check(
        "garbage collector",
        not gc.isenabled() and gc.get_freeze_count() > 0,
        f"{'on' if gc.isenabled() else 'off'}, {gc.get_freeze_count()} objects frozen",
        "off while requests wait, and what exists frozen",
        "a collection in the way of a request is a pause, and touches memory all over the process",
    )
    yield _cgroup()
    yield from _descriptors()
    effective = int(status["CapEff"], 16)
    lacking = [f"{name} ({what})" for name, (bit, what) in CAPABILITIES.items() if not effective >> bit & 1]
    yield Check(
        "capabilities",
        not lacking,
        f"missing: {', '.join(lacking)}" if lacking else "all there",
        ", ".join(CAPABILITIES),
        "each of them is needed for a part of the above",
    )
    yield Check(
        "watchdog",
        watchdog is not None,
        f"process {watchdog}" if watchdog is not None else "none",
        "[arm] watchdog",
        "a machine that hangs says nothing; the watchdog says what it hangs on",
    )


def export_checks(exports: Iterable[tuple[str, str]]) -> Iterator[Check]:
    """Where the servers are of `exports`, names and URIs."""
    for name, text in exports:
        uri = NbdUri.parse(text)
        here = uri.socket is not None or is_local(uri.host)
        yield Check(
            f"server of {name}",
            not here,
            "on this machine" if here else f"{uri.host}, another machine",
            "another machine",
            "a server needs memory to take a page that is to be freed; on the same machine there is none",
        )


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine, in the network namespace that we are in."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
    except OSError:  # only an address of ours can be bound
        return False
    return True


def _file(path: str, why: str) -> Check:
    there = os.access(path, os.R_OK | os.W_OK)
    return Check(path, there, "there" if there else "missing, or not ours to open", "there", why)


def _cgroup() -> Check:
    limits = list(_memory_limits())
    return Check(
        "cgroup",
        not limits,
        "; ".join(limits) if limits else "no memory limit",
        "no memory limit: [arm] cgroup names another group",
        "in a group that is at its limit, every allocation waits until pages of the group are swapped out",
    )


def _memory_limits() -> Iterator[str]:
    """The memory limits of our cgroup and those above it, v1 or v2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif not controllers:
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root and root in folder.parents:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                text = "max"
            if text != "max" and int(text) < NO_LIMIT:
                yield f"{folder}: {text} bytes"
            folder = folder.parent


def _descriptors() -> Iterator[Check]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names only)
    yield Check(
        "file descriptors",
        soft - used >= DESCRIPTORS,
        f"{used} of {soft}",
        f"{DESCRIPTORS} free",
        "without one no lost connection is made again",
    )
