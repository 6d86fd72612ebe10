"""Arming the process: what others swap over must not wait for memory itself.

`Arming` has two steps. `before_threads`, first of all: PR_SET_IO_FLUSHER (allocations in the kernel on our behalf start no
I/O, which would wait for us; threads that come later inherit it), oom_score_adj -1000, the cgroup, the limits. `lock`, when
all is built: heap and stack are stocked with memory for what follows and nothing is given back to the kernel any more, every
page is locked (mlockall(2)), the garbage collector looks at nothing that exists and runs only when no request is under way, and
the process gets real-time priority. A process that uses the CPU for `RTTIME` without a pause loses that priority for a while
(RLIMIT_RTTIME, SIGXCPU), so that a mistake of ours does not take the machine with it.

What could not be had is kept in `missing`; `ustack.daemon.doctor` looks at what is in force.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import resource
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.daemon.config import Arm

PR_SET_IO_FLUSHER: Final = 57
PR_GET_IO_FLUSHER: Final = 58
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
M_TRIM_THRESHOLD: Final = -1
M_TOP_PAD: Final = -2
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
MMAP_THRESHOLD_MAX: Final = 32 << 20
"""The largest allocation that glibc takes from its heap and not from the kernel (mallopt(3))."""
OOM_SCORE_ADJ_MIN: Final = -1000
RTTIME: Final = 1_000_000
"""Microseconds of CPU without a pause after which real-time priority is taken away."""
DEMOTED_FOR: Final = 5.0
"""Seconds for which it is."""
COLLECT_EVERY: Final = 5.0
"""Seconds between two looks at whether garbage can be collected because nobody waits."""
STACK: Final = 512 << 10
"""Bytes of stack that are there before they are needed."""
THREAD_STACK: Final = 256 << 10
"""Bytes of stack of a thread that is started later: all of it is locked."""
PYMALLOC_OBJECT: Final = 512
PYMALLOC_ARENA: Final = 1 << 20
"""Bytes of the largest object that Python's own allocator serves, and of the pieces in which it takes memory."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.free.argtypes = (ctypes.c_void_p,)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


# -- what the kernel is asked for, one by one --------------------------------------------------------------------------------


def set_io_flusher() -> None:
    """PR_SET_IO_FLUSHER for this thread and those it starts; read back. Raises OSError: EPERM without CAP_SYS_RESOURCE."""
    if _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        raise _error("PR_SET_IO_FLUSHER needs CAP_SYS_RESOURCE, and Linux 5.6")
    if not io_flusher():
        raise OSError(errno.EIO, "PR_SET_IO_FLUSHER was accepted, and is not in force")


def io_flusher() -> bool:
    """Whether it is in force for this thread."""
    return bool(_libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1)


def set_oom_score_adj() -> None:
    """The OOM killer spares this process. Raises OSError: EACCES without CAP_SYS_RESOURCE."""
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{OOM_SCORE_ADJ_MIN}\n")
    except OSError as error:
        raise OSError(error.errno, "oom_score_adj -1000 needs CAP_SYS_RESOURCE") from None


def raise_limits() -> None:
    """RLIMIT_MEMLOCK as high as it may be. Raises OSError."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError:
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def enter_cgroup(path: str) -> None:
    """Move this process to the cgroup whose folder is `path`. Raises OSError."""
    try:
        Path(path, "cgroup.procs").write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot move to the cgroup: {error.strerror}", path) from None


def lock_all() -> None:
    """mlockall(2) for what is there and what will be. Raises OSError: EPERM without CAP_IPC_LOCK, ENOMEM at the limit."""
    if _libc.mlockall(MCL_CURRENT | MCL_FUTURE):
        raise _error("mlockall needs CAP_IPC_LOCK, or a higher RLIMIT_MEMLOCK")


def set_real_time(priority: int) -> None:
    """SCHED_FIFO for this thread, and not for those that it starts. Raises OSError: EPERM without CAP_SYS_NICE."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError as error:
        raise OSError(error.errno, "SCHED_FIFO needs CAP_SYS_NICE, or RLIMIT_RTPRIO") from None


def _error(hint: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{os.strerror(code)}: {hint}")


# -- memory for what follows -------------------------------------------------------------------------------------------------


def stock_heap(nbytes: int) -> None:
    """See to it that the next `nbytes` bytes of malloc(3), and as many of Python's small objects, need nothing of the kernel:
    they are taken, touched and given back to an allocator that from now on keeps what it has."""
    _libc.mallopt(M_ARENA_MAX, 1)
    _libc.mallopt(M_TRIM_THRESHOLD, -1)
    _libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_MAX)
    left = nbytes
    taken = []
    while left > 0:
        size = min(left, MMAP_THRESHOLD_MAX // 2)
        address = _libc.malloc(size)
        if address:
            _libc.memset(address, 0, size)
            taken.append(address)
        left -= size
    for address in taken:
        _libc.free(address)
    # An arena of Python's is given back when it is empty: one object in each keeps it.
    objects = [bytes(PYMALLOC_OBJECT - 64) for _ in range(nbytes // PYMALLOC_OBJECT)]
    _kept.extend(objects[:: PYMALLOC_ARENA // PYMALLOC_OBJECT // 2])


_kept: Final[list[bytes]] = []


def stock_stack(nbytes: int) -> None:
    """Touch `nbytes` bytes of this thread's stack. sort() keeps two kilobytes and more there, and calls us again."""

    def deeper(left: int) -> int:
        if left > 0:
            [left - 2048].sort(key=deeper)
        return 0

    deeper(min(nbytes, 2048 * 400))


# -- the process -------------------------------------------------------------------------------------------------------------


class Arming:
    """Arms this process as `config` says. `missing` says what could not be had, one line each."""

    def __init__(self, config: Arm) -> None:
        self.config = config
        self.missing: list[str] = []
        self.locked = False
        """`lock` has been done."""
        self.demotions = 0
        """How often real-time priority was taken away."""
        self._faults = (0, 0)
        self._collecting: asyncio.TimerHandle | None = None
        self._busy: Callable[[], bool] = bool

    def before_threads(self) -> None:
        """What later threads and allocations depend on. Raises nothing."""
        if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208 (names only)
            self.missing.append("PR_SET_IO_FLUSHER: threads run already that do not have it")
        self._try(set_io_flusher)
        self._try(set_oom_score_adj)
        self._try(raise_limits)
        if self.config.cgroup is not None:
            self._try(enter_cgroup, self.config.cgroup)
        threading.stack_size(THREAD_STACK)

    def lock(self, busy: Callable[[], bool]) -> None:
        """Stock, lock, freeze, and take priority, in the running event loop. While `busy` says that requests wait, no garbage
        is collected. Raises nothing."""
        stock_stack(STACK)
        stock_heap(self.config.stock)
        gc.collect()
        gc.freeze()
        gc.disable()
        self._busy = busy
        self._collect_later()
        self._try(lock_all)
        if self.config.priority:
            self._promote()
            signal.signal(signal.SIGXCPU, self._demote)
        self.locked = True
        self.settle()

    def settle(self) -> None:
        """Something was built that will stay, such as a disk that is served: from now on faults count."""
        if not self.locked:
            return
        gc.collect()
        gc.freeze()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._faults = (usage.ru_minflt, usage.ru_majflt)

    def disarm(self) -> None:
        """The daemon ends: no more timers, and the ordinary priority."""
        if self._collecting is not None:
            self._collecting.cancel()
        if self.locked and self.config.priority:
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def report(self) -> dict[str, Any]:
        """What has happened since, for `ustack status`. Faults are those of the whole process since `settle`; of system calls
        the kernel counts those that read and write."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        calls = _read_and_write_calls()
        return {
            "locked": self.locked,
            "missing": self.missing,
            "demotions": self.demotions,
            "minor_faults": usage.ru_minflt - self._faults[0],
            "major_faults": usage.ru_majflt - self._faults[1],
            "read_calls": calls[0],
            "write_calls": calls[1],
            "cpu": usage.ru_utime + usage.ru_stime,
            "waits": usage.ru_nvcsw,
            "preempted": usage.ru_nivcsw,
        }

    def _try(self, step: Callable[..., None], *args: Any) -> None:
        try:
            step(*args)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self.missing.append(f"{where}{error.strerror}")

    # -- garbage --

    def _collect_later(self) -> None:
        self._collecting = asyncio.get_running_loop().call_later(COLLECT_EVERY, self._collect)

    def _collect(self) -> None:
        if not self._busy():
            gc.collect()
        self._collect_later()

    # -- priority --

    def _promote(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        self._try(_set_rttime, RTTIME, hard)
        self._try(set_real_time, self.config.priority)

    def _demote(self, *_: object) -> None:
        """SIGXCPU: we have not paused for too long."""
        self.demotions += 1
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        asyncio.get_running_loop().call_soon_threadsafe(self._promote_later)

    def _promote_later(self) -> None:
        asyncio.get_running_loop().call_later(DEMOTED_FOR, self._promote)


def _set_rttime(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))


def _read_and_write_calls() -> tuple[int, int]:
    """System calls of this process that have read and that have written (/proc/self/io)."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0, 0
    return int(lines["syscr"]), int(lines["syscw"])
