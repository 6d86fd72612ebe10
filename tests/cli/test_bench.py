"""`ustack bench serve` on a TAP that is there already, as the benchmarks use it."""

from __future__ import annotations

import random
import re
import sys
from typing import TYPE_CHECKING

import pytest

from tests.daemon.running import KERNEL, OURS, environment
from tests.e2e.peers import nc, nc_udp, ping, said
from tests.needs import require_tool

if TYPE_CHECKING:
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("options", [[], ["--mode", "linear"], ["--no-offload", "--memory", "16M"]], ids=" ".join)
async def test_it_serves_on_an_existing_interface(netns: Namespace, options: list[str]) -> None:
    netns.run(require_tool("ip"), "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    netns.set_up("tap0", f"{KERNEL}/24")
    serve = [sys.executable, "-m", "ustack", "bench", "serve", "--tap", "tap0", "--address", f"{OURS}/24"]
    program = netns.popen(*serve, *options, env=environment())
    await said(program, re.compile(b"serving"))
    data = random.Random(5).randbytes(1 << 20)
    assert await nc(netns, OURS, 7, data) == data
    assert await nc(netns, OURS, 9, data) == b""
    assert await nc_udp(netns, OURS, 7, b"datagram") == b"datagram"
    assert (await ping(netns, OURS)).received == 3
    program.terminate()
    assert program.wait(10) == 0
    assert netns.index("tap0"), "it was not ours to remove"


async def test_an_interface_that_is_in_use_is_an_error(netns: Namespace) -> None:
    serve = [sys.executable, "-m", "ustack", "bench", "serve", "--tap", "tap0", "--address", f"{OURS}/24"]
    program = netns.popen(*serve, env=environment())
    await said(program, re.compile(b"serving"))
    second = netns.run(
        *(require_tool("env"), *(f"{k}={v}" for k, v in environment().items() if k == "PYTHONPATH")), *serve, check=False
    )
    assert second.returncode == 1
    assert b"Error: tap0: " in second.stderr
