"""Swap on a remote disk: the steps from an NBD URI to active swap, what they need, and how they are undone.

Runs in the process of `ustack swap`, never in the daemon, which would wait for itself. Each step is recorded in a file before
the next, so that `off` undoes what was done, in order, also after a crash or a failure half-way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ustack.daemon.doctor import Check, export_checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND_TIMEOUT: Final = 60.0
"""Seconds that each program may take; swapoff may take as long as it needs."""
SYSTEM_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
MEMORY_FACTOR: Final = 4
"""Packet memory must be so many times the data of all requests in flight: sent and received, with headers, and as much again
for everybody else."""


@dataclass(slots=True)
class SwapRecord:
    """What was done for one swap area. `front_end` is "fuse" or "nbd"; an empty `loop` or False means that the step was not
    reached, or is undone."""

    name: str
    uri: str
    front_end: str
    label: str
    priority: int
    file: str = ""
    attached: bool = False
    loop: str = ""
    device: str = ""
    active: bool = False

    def save(self, folder: Path) -> None:
        """Write it down; in place at once, or not at all."""
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = record_path(folder, self.name)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=2) + "\n")
        fresh.replace(path)


def record_path(folder: Path, name: str) -> Path:
    """Where the record of the area `name` is."""
    return folder / f"swap-{name}.json"


def load_record(folder: Path, name: str) -> SwapRecord:
    """Raises OSError ENOENT when there is none."""
    try:
        return SwapRecord(**json.loads(record_path(folder, name).read_text()))
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"there is no swap area {name!r} of ours: see `ustack swap status`") from None


def records(folder: Path) -> list[SwapRecord]:
    """All there are."""
    return [SwapRecord(**json.loads(path.read_text())) for path in sorted(folder.glob("swap-*.json"))]


# -- what the kernel says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ActiveSwap:
    """A line of /proc/swaps; sizes in bytes."""

    device: str
    size: int
    used: int
    priority: int


def active_swaps() -> Iterator[ActiveSwap]:
    """What is swapped to now."""
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        device, _, size, used, priority = line.split()
        yield ActiveSwap(device, int(size) << 10, int(used) << 10, int(priority))


def swaps_on(paths: set[str]) -> list[str]:
    """The active swap devices that are one of `paths`, or a loop device on one of them."""
    found = []
    for swap in active_swaps():
        backing = Path("/sys/block", Path(swap.device).name, "loop", "backing_file")
        file = swap.device
        with contextlib.suppress(OSError):
            file = backing.read_text().strip()
        if file in paths or swap.device in paths:
            found.append(swap.device)
    return found


def nbd_driver_there() -> bool:
    """Whether the kernel has nbd."""
    return Path("/sys/module/nbd").exists() or Path("/dev/nbd0").exists()


# -- may it be? --------------------------------------------------------------------------------------------------------------


def checks(call: Callable[..., Any], uri: str, requests: int, request_size: int) -> list[Check]:
    """All that the guarantee needs: the daemon's own checks, where the server is, and room for the requests. `call` calls the
    daemon."""
    found = [Check(**each) for each in call("doctor") if not each["name"].startswith("server of ")]
    found += export_checks([("the swap", uri)])
    size = call("memory")["size"]
    wanted = MEMORY_FACTOR * requests * request_size
    found.append(
        Check(
            "packet memory",
            size >= wanted,
            f"{size} bytes",
            f"at least {wanted}: [memory] size, or fewer or smaller requests",
            "the reserve for the requests must fit, and something must be left for everybody else",
        )
    )
    return found


# -- on ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class SwapOn:
    """Turns a remote disk into swap, step by step. `call` calls the daemon, records are in `folder`, `say` is told what is
    done. `overwrite` lets a disk that holds something else be made swap."""

    call: Callable[..., Any]
    folder: Path
    say: Callable[[str], object]
    requests: int = 64
    request_size: int = 64 << 10
    direct_io: bool = True
    overwrite: bool = False

    def run(self, record: SwapRecord) -> None:
        """From URI to active swap. Raises OSError; what was done until then is undone."""
        if record_path(self.folder, record.name).exists():
            raise OSError(
                errno.EEXIST, f"there is a swap area {record.name!r} already: `ustack swap off {record.name}` ends it"
            )
        record.save(self.folder)
        try:
            self._attach(record)
            if record.front_end == "fuse":
                self._make_loop_device(record)
            self._make_swap(record)
            _run("swapon", "-p", str(record.priority), record.device)
            record.active = True
            record.save(self.folder)
            self.say(f"{record.device}: swap with priority {record.priority}")
        except BaseException:
            with contextlib.suppress(OSError):
                undo(record, self.call, self.folder, _nothing)
            raise

    def _attach(self, record: SwapRecord) -> None:
        where: dict[str, Any] = {"device": "auto"}
        if record.front_end == "fuse":
            record.file = str(self.folder / f"swap-{record.name}.disk")
            where = {"fuse": record.file}
        sizes = {"requests": self.requests, "request_size": self.request_size}
        report = self.call("attach", name=f"swap-{record.name}", uri=record.uri, **sizes, **where)
        record.attached = True
        if record.front_end == "nbd":
            record.device = report["front_ends"][0]["path"]
        record.save(self.folder)
        self.say(f"{record.uri}: attached, {report['size']} bytes, {record.file or record.device}")

    def _make_loop_device(self, record: SwapRecord) -> None:
        direct = "on" if self.direct_io else "off"
        record.loop = record.device = _run("losetup", f"--direct-io={direct}", "--show", "--find", record.file).strip()
        record.save(self.folder)
        self.say(f"{record.loop}: loop device on {record.file}, direct I/O {direct}")

    def _make_swap(self, record: SwapRecord) -> None:
        there = _run("blkid", "-p", "-o", "value", "-s", "TYPE", record.device, may_fail=True).split()
        if there not in ([], ["swap"]) and not self.overwrite:
            raise OSError(errno.EEXIST, f"the disk holds {there[0]}, which would be lost; --force makes it swap all the same")
        _run("mkswap", "-L", record.label, record.device)
        self.say(f"{record.device}: swap area with the label {record.label}")


# -- off ---------------------------------------------------------------------------------------------------------------------


def undo(record: SwapRecord, call: Callable[..., Any], folder: Path, say: Callable[[str], object]) -> None:
    """Undo what was done, last first. Raises OSError at the first step that fails; what is left stays recorded."""
    if record.device and any(swap.device == record.device for swap in active_swaps()):
        say(f"{record.device}: bringing back what is swapped out")
        _run("swapoff", record.device, timeout=None)
        say(f"{record.device}: no swap any more")
    record.active = False
    record.save(folder)
    if record.loop:
        if _backing_file(record.loop) == record.file:
            _run("losetup", "--detach", record.loop)
            say(f"{record.loop}: no loop device any more")
        record.loop = ""
        record.save(folder)
    if record.attached:
        try:
            call("detach", name=f"swap-{record.name}")
            say(f"{record.uri}: detached")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):  # the daemon has let go of it, or is gone itself
                raise
    record_path(folder, record.name).unlink(missing_ok=True)


def _backing_file(loop: str) -> str:
    try:
        return Path("/sys/block", Path(loop).name, "loop", "backing_file").read_text().strip()
    except OSError:
        return ""


def _nothing(_: str) -> None:
    pass


def _run(*command: str, timeout: float | None = COMMAND_TIMEOUT, may_fail: bool = False) -> str:
    """Run a program and return what it prints. Raises OSError with what it says when it fails."""
    path = os.environ.get("PATH", "") + ":" + SYSTEM_PATH
    program = shutil.which(command[0], path=path)
    if program is None:
        raise OSError(errno.ENOENT, f"no program {command[0]}")
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"{' '.join(command)} did not end in {timeout:g} s") from None
    if done.returncode and not may_fail:
        raise OSError(errno.EIO, f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
