"""Swap on this machine: a daemon on a TAP, an NBD server on the kernel's end of it, FUSE, a loop device, swapon; and a program
in a small memory cgroup that must find every page as it left it, while the server is killed and the link is cut.

Everything that is made here is made for one run and taken away after it, whatever happens, within a bounded time. No swap and
no device that was there before is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
HOG: Final = Path(__file__).with_name("hog.py")
TAP: Final = "tap0"
KERNEL: Final = "10.77.0.1"
OURS: Final = "10.77.0.2"
PORT: Final = 10809
SWAP_OFF_TIMEOUT: Final = 120.0
"""Seconds that bringing everything back may take; then the daemon is killed, which fails what waits for it."""
READY_TIMEOUT: Final = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. Sizes in MiB, times in seconds; `seconds` bounds the program's life."""

    pool: str = "kmalloc"
    limit: int = 64
    hog: int = 256
    passes: int = 3
    seed: int = 1
    direct_io: bool = True
    disturb: bool = True
    away: float = 1.0
    seconds: float = 300.0
    disk: int = 512


@dataclass(slots=True)
class Result:
    """What came of a run: `verdict` is "VERIFIED" or what went wrong, `passes` the hog's own words, `rate` the pages/s of its
    quickest undisturbed pass, `swapped` pages in and out, `process` and `disk` the daemon's words in the end."""

    plan: Plan
    verdict: str = "not run"
    passes: list[dict[str, Any]] = field(default_factory=list)
    rate: int = 0
    swapped: tuple[int, int] = (0, 0)
    disturbances: list[str] = field(default_factory=list)
    process: dict[str, Any] = field(default_factory=dict)
    disk: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """For people."""
        worst = max((each["worst"] for each in self.passes), default=0.0)
        faults = f"{self.process.get('minor_faults')}+{self.process.get('major_faults')} faults"
        replayed = self.disk.get("counters", {}).get("replayed", 0)
        return (
            f"{self.plan.pool}: {self.verdict}; {self.rate} pages/s at best, worst page {worst:.3f} s;"
            f" {self.swapped[0]} pages in, {self.swapped[1]} out; {len(self.disturbances)} disturbances,"
            f" {replayed} requests sent again; daemon: {faults}"
        )


class Lab:
    """One run's surroundings, in a network namespace that the calling process has entered (`ustack.lab.netns.enter_own`)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folder = Path(tempfile.mkdtemp(prefix="ustack-swaplab-"))
        # On tmpfs where there is one: the "disk" survives its server, and costs only what is written.
        shared = Path("/dev/shm")  # noqa: S108 (a file of our own, by mkstemp)
        fd, name = tempfile.mkstemp(prefix="ustack-swaplab-", dir=shared if shared.is_dir() else None)
        os.ftruncate(fd, plan.disk << 20)
        os.close(fd)
        self.image = Path(name)
        self.control = self.folder / "control.sock"
        self.log = (self.folder / "daemon.log").open("wb")
        self.cgroup: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._hog: subprocess.Popen[bytes] | None = None
        self._timers: list[Timer] = []
        self._swap_on = False

    # -- in order --

    def __enter__(self) -> Self:
        try:
            self._start_daemon()
            _ip("addr", "add", f"{KERNEL}/24", "dev", TAP)
            self.start_server()
            self.cgroup = make_cgroup(self.plan.limit << 20)
            self._swap_on = True
            direct = "--direct-io" if self.plan.direct_io else "--no-direct-io"
            uri = f"nbd://{KERNEL}:{PORT}/"
            self.ustack("swap", "on", uri, "--front-end", "fuse", "--force", "--priority", "32000", direct, timeout=60)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything away, last first: never the daemon before what swaps over it."""
        for timer in self._timers:
            timer.cancel()
            timer.join()
        # What waits for a page ends only when the page comes: first the link and the server, then the program.
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            _ip("link", "set", TAP, "up")
        if self._swap_on:
            self.start_server()
        if self._hog is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _end(self._hog, signal.SIGKILL)
        if self._swap_on:
            try:
                self.ustack("swap", "off", timeout=SWAP_OFF_TIMEOUT)
            except subprocess.SubprocessError as error:
                print(f"swaplab: {error}", file=sys.stderr)
                if self._daemon is not None:
                    self._daemon.kill()
        for process, number in ((self._daemon, signal.SIGTERM), (self._server, signal.SIGKILL)):
            if process is not None:
                _end(process, number)
        self.log.close()
        if self.cgroup is not None:
            remove_cgroup(self.cgroup)
        self.image.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- parts --

    def _start_daemon(self) -> None:
        config = self.folder / "ustack.toml"
        config.write_text(
            f'[device]\nname = "{TAP}"\n[[address]]\naddress = "{OURS}/24"\n[memory]\npool = "{self.plan.pool}"\nsize = "64M"\n'
            f'[arm]\nenabled = true\n[control]\npath = "{self.control}"\n'
        )
        self._daemon = subprocess.Popen(
            [sys.executable, "-m", "ustack", "daemon", "-c", config], env=environment(), stdout=self.log, stderr=self.log
        )
        wait_for(lambda: self.control.exists() or self._daemon_ended())

    def _daemon_ended(self) -> bool:
        if self._daemon is not None and self._daemon.poll() is not None:
            raise RuntimeError(f"the daemon has ended: {(self.folder / 'daemon.log').read_text()}")
        return False

    def start_server(self) -> None:
        """The NBD server, if it does not run."""
        if self._server is not None and self._server.poll() is None:
            return
        nbdkit = shutil.which("nbdkit")
        if nbdkit is not None:
            command = [nbdkit, "-f", "-p", str(PORT), "-i", KERNEL, "file", str(self.image)]
        else:
            command = [sys.executable, "-m", "ustack", "nbd", "serve", str(self.image), "--address", KERNEL]
        self._server = subprocess.Popen(command, env=environment(), stdout=self.log, stderr=self.log)

    def kill_server(self) -> None:
        """As a machine that loses its power, but for the disk."""
        if self._server is not None:
            _end(self._server, signal.SIGKILL)

    def ustack(self, *arguments: str, timeout: float = 30.0) -> str:
        """Run `ustack` against the daemon."""
        command = [sys.executable, "-m", "ustack", *arguments, "--control", str(self.control)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise subprocess.SubprocessError(f"ustack {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def said(self) -> str:
        """What the daemon, its watchdog and the server have said."""
        return (self.folder / "daemon.log").read_text(errors="replace")

    # -- the run --

    def run(self) -> Result:
        """Run the program, and disturb it between its passes."""
        plan, result = self.plan, Result(self.plan)
        before = _swapped()
        assert self.cgroup is not None
        procs = self.cgroup / "cgroup.procs"
        command = [sys.executable, str(HOG), str(plan.hog), str(plan.passes), str(plan.seed)]
        self._hog = hog = subprocess.Popen(
            ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs), *command],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        self._later(plan.seconds, hog.kill)
        for line in self._lines(hog):
            said = json.loads(line)
            if "what" in said:
                result.passes.append(said | {"disturbed": len(result.disturbances) > 0 and said["what"] != "fill"})
                if plan.disturb and said["what"] == "pass 1":
                    self._disturb(result)
            else:
                result.verdict = "VERIFIED" if "verified" in said else f"WRONG PAGE {said['wrong']}"
        code = hog.wait()
        if result.verdict == "not run" or code:
            result.verdict = f"{result.verdict}, exit code {code}" if result.verdict != "not run" else f"DIED, exit code {code}"
        after = _swapped()
        result.swapped = after[0] - before[0], after[1] - before[1]
        result.rate = max(
            (each["rate"] for each in result.passes if each["what"] != "fill" and not each["disturbed"]), default=0
        )
        status = json.loads(self.ustack("status", "--json"))
        result.process = status["process"]
        result.disk = next(disk for disk in status["nbd"] if disk["name"] == "swap-0")
        if result.disk["fuse"]["errors"]:
            result.verdict += f", {result.disk['fuse']['errors']} errors reached the machine"
        return result

    @staticmethod
    def _lines(hog: subprocess.Popen[bytes]) -> Iterator[bytes]:
        assert hog.stdout is not None
        with hog.stdout:
            yield from hog.stdout

    def _disturb(self, result: Result) -> None:
        """The second pass begins: kill the server, restart it, then cut the link, and mend it."""
        away = self.plan.away

        steps: list[tuple[str, Callable[[], object]]] = [
            ("server killed", self.kill_server),
            ("server started", self.start_server),
            ("link cut", lambda: _ip("link", "set", TAP, "down")),
            ("link mended", lambda: _ip("link", "set", TAP, "up")),
        ]

        def one_after_the_other() -> None:  # on a busy machine a server takes long to die
            for what, step in steps:
                step()
                result.disturbances.append(what)
                time.sleep(away)

        self._later(0.2, one_after_the_other)

    def _later(self, seconds: float, step: Callable[[], object]) -> None:
        timer = Timer(seconds, step)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()


# -- the machine -------------------------------------------------------------------------------------------------------------


def make_cgroup(limit: int) -> Path:
    """A memory cgroup with that many bytes, v1 or v2. Raises OSError."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, name = (v1, "memory.limit_in_bytes") if v1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"ustack-swaplab-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit))
    except OSError:
        group.rmdir()
        raise
    return group


def remove_cgroup(group: Path) -> None:
    """Remove it when the last process is gone, which may take a moment."""
    with contextlib.suppress(FileNotFoundError):
        wait_for(lambda: not (group / "cgroup.procs").read_text().strip())
        group.rmdir()


def environment() -> dict[str, str]:
    """Our own, with the source tree to import from."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds. Raises TimeoutError."""
    deadline = time.monotonic() + READY_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.02)


def _ip(*arguments: str) -> None:
    path = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    subprocess.run([path or "ip", *arguments], check=True, timeout=20, capture_output=True)


def _swapped() -> tuple[int, int]:
    """Pages that the machine has swapped in and out."""
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(lines["pswpin"]), int(lines["pswpout"])


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
