"""The demo, as a newcomer runs it; and what is left when it is cut short, which is nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.running import environment
from tests.e2e.peers import said

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e


@pytest.fixture
def demo() -> Iterator[subprocess.Popen[bytes]]:
    """`ustack demo` with a small image, just started."""
    command = [sys.executable, "-m", "ustack", "demo", "--size", "16M"]
    program = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield program
    program.kill()
    program.communicate()


def network_of(pid: int) -> int:
    """The inode that names the network namespace of a process."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def inhabitants(network: int) -> list[int]:
    """Processes that live in a network namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and network_of(int(entry.name)) == network:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_it_verifies_everything_and_says_so(demo: subprocess.Popen[bytes]) -> None:
    out, _ = await asyncio.to_thread(demo.communicate, timeout=90)
    shown = out.decode()
    assert demo.returncode == 0, shown
    assert "original, the server's and the copy are the same" in shown
    assert re.search(r"NBD went on: 1000 reads and writes of 64 KiB, \d+ MB/s", shown)
    assert "NBD stands still" in shown
    assert "holds exactly what was written to it" in shown
    assert "every charge and every page returned" in shown
    assert shown.endswith("Verified.\n")


@pytest.mark.parametrize("moment", ["ustack0", "Copy", "reserve on", "stands still"])
@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL])
async def test_cut_short_it_leaves_nothing_behind(
    demo: subprocess.Popen[bytes], moment: str, with_signal: signal.Signals
) -> None:
    await said(demo, re.compile(moment.encode()))
    network = network_of(demo.pid)
    assert network != network_of(os.getpid())
    processes = inhabitants(network)
    assert demo.pid in processes
    demo.send_signal(with_signal)
    code = await asyncio.to_thread(demo.wait, 60)
    assert code == (130 if with_signal == signal.SIGINT else -signal.SIGKILL)
    async with asyncio.timeout(60):
        while inhabitants(network):
            await asyncio.sleep(0.05)
