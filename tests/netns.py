"""A network namespace for one test: kernel sockets, links and programs that nobody else sees, gone when the test ends.

A namespace here has no name in /run/netns: a thread of its own lives in it and keeps it alive. The pytest process stays
outside, no namespace is left on the machine even when that process is killed, and tests running at the same time cannot meet.
What has to happen inside is handed to that thread (`open`), or is a program that the thread starts and that therefore lives
inside too (`run`, `popen`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pyroute2 import IPRoute

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000
IFA_F_NODAD: Final = 0x02

TERMINATION_GRACE: Final = 2.0
"""Seconds that a program has to end after SIGTERM before it is killed."""


class Namespace:
    """A new, empty network namespace with `lo` up. `path` names it to `nsenter --net=` and pyroute2 while it lives."""

    def __init__(self, label: str = "netns") -> None:
        self.label = label
        self.path = ""
        self._inode = 0
        self._programs: list[subprocess.Popen[bytes]] = []
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._live_inside, name=label, daemon=True)
        self._thread.start()
        try:
            self.open(self._enter)
            self.set_up("lo")
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Namespace {self.label} {self.path}>"

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every program inside, also those in the background, and leave; then the kernel removes the namespace."""
        for program in self._programs:
            program.terminate()
        for program in self._programs:
            _end(program)
        while pids := self.pids():  # again, because one may have forked while we looked
            for pid in pids:
                _kill(pid)
        self._jobs.put(None)
        self._thread.join(TERMINATION_GRACE)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.label}: a callable given to open() has not returned")

    def pids(self) -> list[int]:
        """The processes that live in this namespace now."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if (entry / "ns/net").stat().st_ino == self._inode:
                        found.append(int(entry.name))
        return found

    # Inside, in this process.

    def open(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call `function` inside and return what it returns: a TAP or a socket opened there stays there for good."""
        result: Future[T] = Future()

        def job() -> None:
            try:
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        self._jobs.put(job)
        return result.result()

    # Inside, as programs.

    def popen(self, *argv: str | os.PathLike[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        """Start a program inside, with pipes for output and errors unless told otherwise. It is ended with the namespace."""
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        kwargs.setdefault("stdout", subprocess.PIPE)
        kwargs.setdefault("stderr", subprocess.PIPE)
        program: subprocess.Popen[bytes] = self.open(subprocess.Popen, argv, **kwargs)
        self._programs.append(program)
        return program

    def run(
        self, *argv: str | os.PathLike[str], stdin: bytes = b"", check: bool = True, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program inside to its end. Fails, with all it printed, if it takes longer than `timeout` seconds or, with
        `check`, if it exits with an error.
        """
        program = self.popen(*argv, stdin=subprocess.PIPE)
        command = " ".join(map(str, argv))
        try:
            out, err = program.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            program.kill()
            out, err = program.communicate()
            raise AssertionError(f"{self.label}: `{command}` did not end in {timeout} s\n{_said(out, err)}") from None
        finally:
            _end(program)
            self._programs.remove(program)
        if check and program.returncode:
            raise AssertionError(f"{self.label}: `{command}` exited with {program.returncode}\n{_said(out, err)}")
        return subprocess.CompletedProcess(argv, program.returncode, out, err)

    async def arun(
        self, *argv: str | os.PathLike[str], stdin: bytes = b"", check: bool = True, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[bytes]:
        """`run` for a test whose event loop, and the stack on it, must go on meanwhile."""
        return await asyncio.to_thread(self.run, *argv, stdin=stdin, check=check, timeout=timeout)

    # Links, addresses, settings.

    def netlink(self, function: Callable[[IPRoute], T]) -> T:
        """Call `function` inside with a fresh `IPRoute`. Works under a running event loop, which pyroute2 alone does not."""

        def call() -> T:
            with IPRoute() as ip:
                return function(ip)

        return self.open(call)

    def index(self, ifname: str) -> int:
        """The interface index of `ifname`. Raises `LookupError` if there is no such link."""
        found: list[int] = self.netlink(lambda ip: ip.link_lookup(ifname=ifname))
        if not found:
            raise LookupError(f"{self.label}: no link {ifname}")
        return found[0]

    def mac(self, ifname: str) -> str:
        """The hardware address of `ifname`, as aa:bb:cc:dd:ee:ff."""
        index = self.index(ifname)
        mac: str = self.netlink(lambda ip: ip.get_links(index)[0].get("address"))
        return mac

    def set_up(self, ifname: str, *addresses: str, mtu: int | None = None) -> None:
        """Give `ifname` its `addresses`, each as 10.0.0.1/24 or fd00::1/64, its `mtu` in bytes, and bring it up."""
        index = self.index(ifname)
        self.netlink(lambda ip: ip.link("set", index=index, state="up", **({} if mtu is None else {"mtu": mtu})))
        for address in addresses:
            self.add_address(ifname, address)

    def add_address(self, ifname: str, address: str) -> None:
        """Give `ifname` one more address, as 10.0.0.1/24 or fd00::1/64: usable at once, without duplicate address detection."""
        index = self.index(ifname)
        host, _, prefix = address.partition("/")
        flags = {"flags": IFA_F_NODAD} if ":" in host else {}
        self.netlink(lambda ip: ip.addr("add", index=index, address=host, prefixlen=int(prefix), **flags))

    def add_route(self, destination: str, gateway: str) -> None:
        """Route `destination`, as 10.9.0.0/16 or default, by way of `gateway`."""
        self.netlink(lambda ip: ip.route("add", dst=destination, gateway=gateway))

    def add_veth(self, ifname: str, other: Namespace, other_ifname: str) -> None:
        """Make a cable: a veth pair with one end here and the other end in `other`. Both ends are down."""
        self.netlink(
            lambda ip: ip.link("add", ifname=ifname, kind="veth", peer={"ifname": other_ifname, "net_ns_fd": other.path})
        )

    def sysctl(self, key: str, value: str | int) -> None:
        """Set `net.ipv4.ip_forward` and its like, here only."""
        path = Path("/proc/sys", *key.split("."))
        self.open(path.write_text, f"{value}\n")

    # The thread.

    def _live_inside(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"unshare(CLONE_NEWNET): {os.strerror(number)}")
        self.path = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        self._inode = Path(self.path).stat().st_ino


def _end(program: subprocess.Popen[bytes]) -> None:
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(TERMINATION_GRACE)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
    for pipe in (program.stdin, program.stdout, program.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _kill(pid: int) -> None:
    """Kill a process that need not be our child, and wait until it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ended, _, _ = select.select([pidfd], [], [], TERMINATION_GRACE)
        if not ended:
            raise TimeoutError(f"process {pid} does not end")
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def _said(out: bytes | None, err: bytes | None) -> str:
    parts = (("stdout", out), ("stderr", err))
    return "\n".join(f"--- {name}\n{text.decode(errors='replace')}" for name, text in parts if text) or "it printed nothing"
