"""A daemon as its users run it: a program with a configuration file, in a namespace, that says when it is ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tests.e2e.peers import said

if TYPE_CHECKING:
    import re

    from tests.netns import Namespace

ROOT: Final = Path(__file__).parents[2]
TAP: Final = "ut0"
OURS: Final = "10.77.0.2"
KERNEL: Final = "10.77.0.1"
OURS6: Final = "fd00:77::2"
KERNEL6: Final = "fd00:77::1"
READY_TIMEOUT: Final = 20.0
"""Seconds until a daemon must be ready: Python starts slowly on a machine that has other things to do."""

DEVICE: Final = f"""
[device]
name = "{TAP}"
[[address]]
address = "{OURS}/24"
"""


def environment(**more: str) -> dict[str, str]:
    """Our own, with the source tree to import from."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


class RunningDaemon:
    """A daemon in `namespace`; `config` is added to its device, its address and its control socket. Ready when entered."""

    def __init__(self, namespace: Namespace, folder: Path, config: str = "") -> None:
        self.namespace = namespace
        self.file = folder / "ustack.toml"
        self.control = folder / "control.sock"
        self._notify_path = folder / "notify"
        self.configure(config)
        self.program: subprocess.Popen[bytes]
        self._notify: socket.socket

    def configure(self, config: str) -> None:
        """Write the file."""
        self.file.write_text(f'{DEVICE}[control]\npath = "{self.control}"\n{config}')

    def __enter__(self) -> Self:
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._notify_path))
        self._notify.settimeout(READY_TIMEOUT)
        self.program = self.namespace.popen(
            *(sys.executable, "-m", "ustack", "daemon", "-c", self.file),
            env=environment(NOTIFY_SOCKET=str(self._notify_path)),
            stderr=subprocess.STDOUT,
        )
        try:
            self.until_notified("READY=1")
        except TimeoutError:
            self.program.kill()
            raise AssertionError(self.program.communicate()) from None
        self.namespace.add_address(TAP, f"{KERNEL}/24")
        return self

    def __exit__(self, *_: object) -> None:
        self._notify.close()
        if self.program.poll() is None:
            assert self.stop() == 0

    def until_notified(self, assignment: str) -> str:
        """Wait until the service manager would be told `assignment`; returns all that it was told with it."""
        while assignment not in (message := self._notify.recv(4096).decode()).splitlines():
            pass
        return message

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Tell it to end; returns its exit code."""
        self.program.send_signal(with_signal)
        return self.program.wait(20)

    async def said(self, pattern: re.Pattern[bytes]) -> bytes:
        """Wait for a line of its log."""
        return await said(self.program, pattern)

    async def ustack(
        self, *arguments: str, stdin: bytes = b"", check: bool = True, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `ustack` with these arguments against it."""
        return await self.namespace.arun(*self.command(*arguments), stdin=stdin, check=check, timeout=timeout)

    def command(self, *arguments: str) -> list[str]:
        """The command line of `ustack` with these arguments, against this daemon."""
        program = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); from ustack.cli import main; main()"]
        return [*program, str(ROOT), *arguments, "--control", str(self.control)]
