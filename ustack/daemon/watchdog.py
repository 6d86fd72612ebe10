"""A watchdog for stalls, in a process of its own that is locked and has real-time priority, so that it can speak when the
daemon cannot: an ordinary one sleeps with the rest of the machine.

    python -m ustack.daemon.watchdog MEMFD ALIVE PID SECONDS

The daemon keeps the figures in memory that both have mapped (`Board`); to keep them costs it two stores a request. When a
request has been under way for SECONDS, or the daemon's event loop has not turned for as long, the watchdog says so to stderr
and to the kernel's log, with all it can see, again and again until it is over. It ends when the pipe ALIVE does.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import subprocess
import sys
from time import monotonic
from typing import Final

from ustack.daemon.arm import lock_all, set_io_flusher, set_oom_score_adj, set_real_time

BEAT: Final = 0
COMPLETED: Final = 1
RESERVE_FREE: Final = 2
RESERVE: Final = 3
DROPS: Final = 4
FIRST_SLOT: Final = 8
"""Where on the board is what, as doubles: the time of the daemon's last heartbeat (seconds, CLOCK_MONOTONIC), requests done,
pages of the reserve that are free, its pages, packets dropped; from `FIRST_SLOT` on, for each request slot, since when a
request is in it, or 0."""
SLOTS: Final = 2048
BOARD_SIZE: Final = (FIRST_SLOT + SLOTS) * 8
LOOKS: Final = 4
"""Looks in the time that a stall may last."""
PRIORITY: Final = 2


class Board:
    """The figures, in memory that can be mapped by its descriptor `fd`."""

    def __init__(self, fd: int = -1) -> None:
        if fd < 0:
            fd = os.memfd_create("ustack-watchdog")
            os.ftruncate(fd, BOARD_SIZE)
        self.fd = fd
        self._map = mmap.mmap(fd, BOARD_SIZE, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.cells: memoryview[float] = memoryview(self._map).cast("d")
        self._given: dict[str, tuple[int, int]] = {}

    def slots(self, name: str, count: int) -> memoryview[float]:
        """Cells for the `count` request slots of the export `name`, all 0. Raises OSError ENOSPC when there are none."""
        taken = sorted(cells for other, cells in self._given.items() if other != name)
        first = 0
        for start, stop in taken:
            if first + count <= start:
                break
            first = stop
        if first + count > SLOTS:
            raise OSError(errno.ENOSPC, f"the watchdog has room for {SLOTS} requests")
        self._given[name] = (first, first + count)
        cells = self.cells[FIRST_SLOT + first : FIRST_SLOT + first + count]
        for number in range(count):
            cells[number] = 0.0
        return cells


class Watchdog:
    """The daemon's hold on its watchdog. `start` before memory is locked, `close` at the end."""

    def __init__(self, seconds: float) -> None:
        self.board = Board()
        self._seconds = seconds
        self._alive = -1
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises OSError when the process cannot be made."""
        theirs, self._alive = os.pipe()
        arguments = [str(self.board.fd), str(theirs), str(os.getpid()), str(self._seconds)]
        self.board.cells[BEAT] = monotonic()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ustack.daemon.watchdog", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(self.board.fd, theirs),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        finally:
            os.close(theirs)

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def close(self) -> None:
        """End it."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


# -- its own process ---------------------------------------------------------------------------------------------------------


def _report(board: Board, now: float, seconds: float) -> str:
    """What is wrong, in one line; empty when nothing is."""
    cells = board.cells
    waiting = [since for since in cells[FIRST_SLOT:].tolist() if since]
    oldest = now - min(waiting) if waiting else 0.0
    silent = now - cells[BEAT]
    if oldest < seconds and silent < seconds:
        return ""
    return (
        f"stall: {len(waiting)} requests in flight, the oldest for {oldest:.1f} s; {cells[COMPLETED]:.0f} done;"
        f" event loop silent for {silent:.1f} s; reserve {cells[RESERVE_FREE]:.0f} of {cells[RESERVE]:.0f} pages free;"
        f" {cells[DROPS]:.0f} drops"
    )


class _Process:
    """What /proc says of the daemon; opened while it still can be."""

    def __init__(self, pid: int) -> None:
        self._fds = {}
        for name in ("stat", "wchan", "stack"):
            with contextlib.suppress(OSError):
                self._fds[name] = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def describe(self) -> str:
        """Its state, and where in the kernel it is."""
        said = []
        for name, fd in self._fds.items():
            with contextlib.suppress(OSError):
                text = os.pread(fd, 2048, 0).decode(errors="replace")
                said.append(
                    f"state={text.rpartition(')')[2].split()[0]}" if name == "stat" else f"{name}={' '.join(text.split())}"
                )
        return "; ".join(said)


def main(arguments: list[str]) -> int:
    """The watchdog's life."""
    board, alive, pid, seconds = Board(int(arguments[0])), int(arguments[1]), int(arguments[2]), float(arguments[3])
    process = _Process(pid)
    try:
        kmsg = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        kmsg = -1
    for step in (set_io_flusher, set_oom_score_adj, lock_all):
        with contextlib.suppress(OSError):
            step()
    with contextlib.suppress(OSError):
        set_real_time(PRIORITY)
    stalled = False
    said_at = 0.0
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    while not poll.poll(seconds / LOOKS * 1000):
        now = monotonic()
        text = _report(board, now, seconds)
        if text and (not stalled or now - said_at >= seconds):
            _say(kmsg, f"{text}; {process.describe()}")
            said_at = now
        elif stalled and not text:
            _say(kmsg, "the stall is over")
        stalled = bool(text)
    return 0


def _say(kmsg: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"ustack: {text}\n".encode())
    if kmsg >= 0:
        with contextlib.suppress(OSError):
            os.write(kmsg, f"<3>ustack: {text}\n".encode()[:900])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
