"""Real swap over a daemon: on, used, off again; what refuses, and what is undone."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.running import KERNEL, RunningDaemon, environment
from tests.daemon.test_fuse import Storage, listen
from tests.needs import require_path, require_tool
from tools.swaplab.host import HOG, make_cgroup, remove_cgroup
from ustack.cli.control import Control, call
from ustack.daemon.swap import SwapOn, SwapRecord, active_swaps, swaps_on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

MIB = 1 << 20
DISK = 64 * MIB


@pytest.fixture(autouse=True)
def _machine() -> Iterator[None]:
    """What swap needs; and nothing of ours is swap afterwards, whatever has failed."""
    require_path(Path("/dev/fuse"), "modprobe fuse, or give it to the container")
    require_path(Path("/dev/loop-control"), "modprobe loop, or give it to the container")
    for program in ("losetup", "mkswap", "swapon", "swapoff", "blkid"):
        require_tool(program)
    yield
    left = [swap.device for swap in active_swaps() if ours(swap.device)]
    for device in left:
        subprocess.run(["swapoff", device], timeout=60, check=False)
        subprocess.run(["losetup", "--detach", device], timeout=60, check=False)
    assert not left


async def run(*command: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end."""

    def to_its_end() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, capture_output=True, timeout=timeout, check=False)

    return await asyncio.to_thread(to_its_end)


def ours(device: str) -> bool:
    """A swap device on a file of a test of this process."""
    backing = Path("/sys/block", Path(device).name, "loop", "backing_file")
    return backing.exists() and "/pytest-" in backing.read_text()


async def report(daemon: RunningDaemon) -> dict[str, Any]:
    """What the daemon says of its disk."""
    return dict((await asyncio.to_thread(call, str(daemon.control), "status"))["nbd"][0])


def detach(control: str, name: str) -> None:
    """The call `detach` of the daemon."""
    with Control(control) as connection:
        connection.call("detach", name=name)


async def test_from_a_uri_to_swap_that_is_used_and_back(netns: Namespace, tmp_path: Path) -> None:
    storage = Storage(DISK)
    server, port = await listen(netns, storage)
    uri = f"nbd://{KERNEL}:{port}/"
    with RunningDaemon(
        netns, tmp_path, '[arm]\nenabled = true\nstock = "4M"\nwatchdog = 0\n[memory]\nsize = "32M"\n'
    ) as daemon:
        try:
            said = (
                await daemon.ustack("swap", "on", uri, "--front-end", "fuse", "--force", "--priority", "31000")
            ).stdout.decode()
            assert re.search(r"MISSING  server of the swap: on this machine", said)
            device = re.findall(r"^(/dev/loop\d+): swap with priority 31000$", said, re.MULTILINE)[0]
            (area,) = [swap for swap in active_swaps() if swap.device == device]
            assert (area.priority, area.size) == (31000, DISK - 4096)
            assert swaps_on({str(tmp_path / "swap-0.disk")}) == [device]

            group = make_cgroup(16 * MIB)
            try:
                script = 'echo $$ > "$0" && exec "$@"'
                hog = (sys.executable, HOG, "32", "1", "1")
                running = asyncio.create_task(run("/bin/sh", "-c", script, group / "cgroup.procs", *hog))
                # Its server is killed and comes back while pages are on it.
                while not running.done() and (await report(daemon))["fuse"]["writes"] < 200:
                    await asyncio.sleep(0.02)
                await server.close()
                server, _ = await listen(netns, storage, port)
                done = await running
            finally:
                remove_cgroup(group)
            assert json.loads(done.stdout.splitlines()[-1]) == {"verified": 32 * 256}, done
            disk = await report(daemon)
            assert disk["counters"]["lost"] == 1
            assert disk["fuse"]["errors"] == 0

            text = (await daemon.ustack("swap", "status")).stdout.decode()
            assert re.search(
                rf"^0: {device}: \d+ of {(DISK - 4096) >> 10} KiB used, priority 31000; fuse, {uri}: attached", text
            )
            again = await daemon.ustack("swap", "on", uri, "--force", check=False)
            assert (again.returncode, b"there is a swap area '0' already" in again.stderr) == (1, True)

            # Nobody takes it away by mistake.
            with pytest.raises(OSError, match="is swap: /dev/loop"):
                await asyncio.to_thread(detach, str(daemon.control), "swap-0")
            daemon.program.send_signal(signal.SIGTERM)
            await daemon.said(re.compile(rb"swap, and would be lost: run `ustack swap off`"))
        finally:
            off = await daemon.ustack("swap", "off", timeout=60)
        assert off.stdout.decode().splitlines()[-1] == f"{uri}: detached"
        assert device not in [swap.device for swap in active_swaps()]
        assert not Path("/sys/block", device[5:], "loop", "backing_file").exists()
        assert (await daemon.ustack("swap", "status")).stdout == b""
    await server.close()


async def test_it_refuses_where_swapping_could_deadlock_and_says_why(netns: Namespace, tmp_path: Path) -> None:
    server, port = await listen(netns, Storage(DISK))
    with RunningDaemon(netns, tmp_path) as daemon:
        done = await daemon.ustack("swap", "on", f"nbd://{KERNEL}:{port}/", "--request-size", "1M", check=False)
        assert done.returncode == 1
        said = done.stdout.decode()
        for name in ("armed: no", "memory locked", "server of the swap: on this machine", "packet memory: "):
            assert f"MISSING  {name}" in said
        assert said.count("why: ") == said.count("MISSING") > 3
        assert b"--force swaps over it all the same" in done.stderr
        assert call(str(daemon.control), "status")["nbd"] == []
    await server.close()


async def test_what_fails_half_way_is_undone(netns: Namespace, tmp_path: Path) -> None:
    precious = Storage(DISK)
    image = tmp_path / "image"
    image.write_bytes(bytes(DISK // 8))
    assert (await run(require_tool("mkfs.ext2"), "-q", image)).returncode == 0
    content = image.read_bytes()
    precious.destination(0, len(content))[:] = content
    server, port = await listen(netns, precious)
    with RunningDaemon(netns, tmp_path) as daemon:

        def calling(method: str, /, **args: object) -> object:
            with Control(str(daemon.control)) as control:
                return control.call(method, **args)

        record = SwapRecord("x", f"nbd://{KERNEL}:{port}/", "fuse", "test", 1)
        said: list[str] = []
        with pytest.raises(OSError, match="the disk holds ext2, which would be lost"):
            await asyncio.to_thread(SwapOn(calling, tmp_path, said.append).run, record)
        assert len(said) == 2
        assert call(str(daemon.control), "status")["nbd"] == []
        assert not Path("/sys/block", said[1].partition(":")[0][5:], "loop", "backing_file").exists()
        assert not list(tmp_path.glob("swap-*"))
    assert precious.read(0, len(content)) == content
    await server.close()


def test_off_without_on_says_so(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "ustack", "swap", "off", "--control", str(tmp_path / "c")]
    done = subprocess.run(program, capture_output=True, timeout=30, check=False, env=environment())
    assert done.returncode == 1
    assert b"there is no swap area '0' of ours" in done.stderr
