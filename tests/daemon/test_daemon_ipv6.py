"""The daemon with IPv6 addresses and a VLAN, its commands against it, and a disk over IPv6."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.daemon.running import KERNEL6, OURS6, TAP, RunningDaemon
from tests.e2e.peers import nc, ping
from tests.needs import require_tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

OURS_TAGGED = "fd00:5::2"
DATA = Random(5).randbytes(100_000)

CONFIG = f"""
[service]
echo = true
[ipv6]
dad_transmits = 0
[[address]]
address = "{OURS6}/64"
gateway = "{KERNEL6}"
[[address]]
address = "{OURS_TAGGED}/64"
vlan = 5
"""


@pytest.fixture
def daemon(netns: Namespace, tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with both versions and VLAN 5; the kernel has its side of all of it."""
    with RunningDaemon(netns, tmp_path, CONFIG) as daemon:
        netns.add_address(TAP, f"{KERNEL6}/64")
        yield daemon


async def test_commands_take_ipv6_addresses(daemon: RunningDaemon) -> None:
    for host in (KERNEL6, OURS6, OURS_TAGGED, "::1", "127.0.0.1"):
        pinged = (await daemon.ustack("ping", "-c", "2", "-i", "0.01", host)).stdout.decode()
        assert pinged.startswith(f"PING {host} ({host}) 56")
        assert f"64 bytes from {host}: icmp_seq=1 ttl=64 time=" in pinged
        assert "2 packets transmitted, 2 received, 0% packet loss" in pinged
    large = await daemon.ustack("ping", "-c", "1", "-s", "3000", "-M", "do", KERNEL6, check=False)
    assert b"message too long" in large.stdout
    listener = daemon.namespace.open(socket.create_server, (KERNEL6, 0), family=socket.AF_INET6)
    with listener:
        talking = asyncio.create_task(daemon.ustack("nc", KERNEL6, str(listener.getsockname()[1]), stdin=b"hello"))
        accepted, peer = await asyncio.to_thread(listener.accept)
        with accepted:
            assert peer[0] == OURS6
            assert await asyncio.to_thread(accepted.recv, 100) == b"hello"
            connected = (await daemon.ustack("ss", "-t")).stdout.decode()
            assert re.search(rf"(ESTAB|FIN-WAIT1|FIN-WAIT2) .*\[{OURS6}\]:\d+ +\[{KERNEL6}\]:\d+", connected)
        await talking
    listening = (await daemon.ustack("ss", "-l")).stdout.decode()
    assert re.search(r"tcp   LISTEN 0 +100 +0\.0\.0\.0:7 +0\.0\.0\.0:\*", listening)
    assert re.search(r"tcp   LISTEN 0 +100 +\[::\]:7 +\[::\]:\*", listening)
    assert re.search(r"udp   UNCONN 0 +0 +\*:7 +\*:\*", listening)


async def test_the_echo_service_answers_and_status_shows_addresses_links_and_routes(daemon: RunningDaemon) -> None:
    assert (await ping(daemon.namespace, OURS6)).received >= 3
    assert await nc(daemon.namespace, OURS6, 7, DATA) == DATA
    report = json.loads((await daemon.ustack("status", "--json")).stdout)
    plain, tagged = report["devices"]
    assert {"address": f"{OURS6}/64", "state": "preferred"} in plain["addresses"]
    assert tagged["name"] == f"{TAP}.5"
    assert any(route.startswith(f"::/0 via {KERNEL6} dev {TAP} ") for route in report["routes"])
    text = (await daemon.ustack("status")).stdout.decode()
    assert f"{OURS6}/64, " in text


async def test_a_disk_is_read_and_written_over_ipv6(daemon: RunningDaemon, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(DATA)
    server = daemon.namespace.popen(
        *(require_tool("nbdkit"), "--foreground", "--ipaddr", KERNEL6, "--port", "10811", "--exit-with-parent", "-v"),
        *("file", str(image)),
    )
    try:
        assert server.stderr is not None
        while b"bound to" not in await asyncio.to_thread(server.stderr.readline):
            assert server.poll() is None
        uri = f"nbd://[{KERNEL6}]:10811/"
        shown = json.loads((await daemon.ustack("nbd", "info", "--via", "daemon", "--json", uri)).stdout)
        assert shown["exports"][0]["export-size"] == len(DATA)
        copy = tmp_path / "copy"
        await daemon.ustack("nbd", "copy", "--via", "daemon", uri, str(copy))
        assert sha256(copy.read_bytes()).digest() == sha256(DATA).digest()
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait, 10)
