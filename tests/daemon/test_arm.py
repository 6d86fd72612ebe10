"""An armed daemon: what is in force, that serving a disk costs no page fault, and a watchdog that speaks in a stall."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.running import KERNEL, RunningDaemon, environment
from tests.daemon.test_fuse import SIZE, Storage, attached, listen
from tests.needs import require_path
from ustack.cli.control import call
from ustack.daemon.arm import stock_stack
from ustack.daemon.doctor import CAPABILITIES

if TYPE_CHECKING:
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

PAGE = 4096
ARMED = '[arm]\nenabled = true\nstock = "8M"\nwatchdog = 1\n[memory]\nsize = "16M"\n'


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require_path(Path("/dev/fuse"), "modprobe fuse, or give it to the container")


def exchange(path: Path, count: int, seed: int) -> None:
    """Write and read pages at random places."""
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    page = bytearray(2 * PAGE)
    try:
        for _ in range(count):
            offset = rng.randrange(SIZE // PAGE) * PAGE
            if rng.random() < 0.5:
                os.pwrite(fd, rng.randbytes(PAGE), offset)
            else:
                os.preadv(fd, [page], offset)
    finally:
        os.close(fd)


def process(daemon: RunningDaemon) -> dict[str, Any]:
    """What status says of the process."""
    return dict(call(str(daemon.control), "status")["process"])


async def test_serving_a_disk_costs_no_page_fault_and_everything_is_in_force(netns: Namespace, tmp_path: Path) -> None:
    server, port = await listen(netns, Storage(SIZE))
    disk = tmp_path / "disk"
    config = f'{ARMED}[[nbd]]\nname = "d"\nuri = "nbd://{KERNEL}:{port}/"\nfuse = "{disk}"\nrequests = 16\n'
    with RunningDaemon(netns, tmp_path, config) as daemon:
        await attached(daemon)
        await asyncio.to_thread(exchange, disk, 300, 1)
        before = await asyncio.to_thread(process, daemon)
        await asyncio.to_thread(exchange, disk, 600, 2)
        after = await asyncio.to_thread(process, daemon)
        # Containers often lack one of the capabilities; what it is for is then missing, and nothing else.
        effective = int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
        resources = effective >> CAPABILITIES["CAP_SYS_RESOURCE"][0] & 1
        lacking = [] if resources else ["CAP_SYS_RESOURCE, and Linux 5.6", "CAP_SYS_RESOURCE"]
        assert [line.partition("needs ")[2] for line in after["missing"]] == lacking
        assert (after["major_faults"], after["demotions"]) == (0, 0)
        assert after["minor_faults"] == before["minor_faults"]
        # Seven for a request that is alone (docs/swap.md); the rest is heartbeats, ARP and the questions themselves.
        calls = sum(after[key] - before[key] for key in ("read_calls", "write_calls"))
        assert calls / 600 < 9
        done = await daemon.ustack("doctor", "--json", check=False)
        checks = {check["name"]: check for check in json.loads(done.stdout)}
        for name in ["armed", "memory locked", "real-time priority", "garbage collector", "watchdog", "file descriptors"]:
            assert checks[name]["ok"], checks[name]
        for name in ["PR_SET_IO_FLUSHER", "oom_score_adj", "capabilities"]:
            assert checks[name]["ok"] == (not lacking), checks[name]
        assert done.returncode == 1
        assert checks["server of d"]["found"] == "on this machine"
        text = (await daemon.ustack("doctor", check=False)).stdout.decode()
        assert "MISSING  server of d: on this machine" in text
    await server.close()


async def test_a_daemon_that_is_not_armed_says_so(netns: Namespace, tmp_path: Path) -> None:
    with RunningDaemon(netns, tmp_path) as daemon:
        done = await daemon.ustack("doctor", check=False)
        assert done.returncode == 1
        assert "MISSING  armed: no" in done.stdout.decode()
        assert call(str(daemon.control), "status")["process"] is None


async def test_the_watchdog_speaks_when_requests_are_stuck_and_when_the_daemon_is(netns: Namespace, tmp_path: Path) -> None:
    memory = Storage(SIZE)
    server, port = await listen(netns, memory)
    disk = tmp_path / "disk"
    config = f'{ARMED}[[nbd]]\nname = "d"\nuri = "nbd://{KERNEL}:{port}/"\nfuse = "{disk}"\nrequests = 16\n'
    with RunningDaemon(netns, tmp_path, config) as daemon:
        await attached(daemon)
        await server.close()
        waiting = asyncio.create_task(asyncio.to_thread(exchange, disk, 1, 3))
        line = await daemon.said(re.compile(rb"stall: 1 .*\n"))
        assert re.search(rb"1 requests in flight, the oldest for \d+\.\d s; \d+ done; event loop silent for \d+\.\d s", line), (
            line
        )
        assert re.search(rb"reserve \d+ of [1-9]\d* pages free; \d+ drops; state=[RSD]", line), line
        server, _ = await listen(netns, memory, port)
        await waiting
        await daemon.said(re.compile(rb"the stall is over"))
        daemon.program.send_signal(signal.SIGSTOP)
        try:
            line = await daemon.said(re.compile(rb"stall: 0 requests .*\n"))
            assert b"state=T" in line
        finally:
            daemon.program.send_signal(signal.SIGCONT)
    await server.close()


SPINS = """
import asyncio, os, time, uvloop
from ustack.daemon import arm
from ustack.daemon.config import Arm

async def main():
    arm.DEMOTED_FOR = 0.2
    arming = arm.Arming(Arm(stock=1 << 20))
    arming.lock(bool)
    print(policy())
    until = time.monotonic() + 20
    while not arming.demotions and time.monotonic() < until:
        pass
    print(arming.demotions, policy())
    while not policy() and time.monotonic() < until:
        await asyncio.sleep(0.05)
    print(policy())
    arming.disarm()
    print(policy())

def policy():
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK

uvloop.run(main())
"""


def test_a_process_that_spins_loses_its_priority_for_a_while() -> None:
    done = subprocess.run([sys.executable, "-c", SPINS], env=environment(), capture_output=True, timeout=60, check=False)
    fifo, other = os.SCHED_FIFO, os.SCHED_OTHER
    assert done.stdout.decode().split() == list(map(str, [fifo, 1, other, fifo, other])), done


def test_the_stack_is_there_before_it_is_needed() -> None:
    def stack_kib() -> int:
        return int(re.findall(r"VmStk:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])

    stock_stack(512 << 10)
    assert stack_kib() >= 512
