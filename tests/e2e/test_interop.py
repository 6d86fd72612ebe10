"""Programs that everybody has, with our stack at the other end or in the middle: on a clean wire, and on a bad one."""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import asynccontextmanager
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Final

import pytest
import trustme

from tests.e2e.capture import capture
from tests.e2e.conftest import KERNEL, OURS, until
from tests.e2e.peers import curl, iperf3, iperf3_server, nc
from tests.e2e.relay import echo, relay
from tests.e2e.test_http import Responder, body
from tests.needs import require_tool
from ustack.lab.impaired import ImpairedTap
from ustack.link.simwire import Impairments

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.stack import Stack

pytestmark = pytest.mark.e2e

BAD_WIRE: Final = Impairments(delay=0.002, jitter=0.001, loss=0.01, duplicate=0.01, corrupt=0.005)
"""A wire that reorders, loses, doubles and damages."""


@asynccontextmanager
async def https(stack: Stack, folder: Path) -> AsyncIterator[Path]:
    """The responder of `test_http` behind TLS on port 443, and the file with the authority that vouches for it."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(OURS).configure_cert(context)
    trusted = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    server = await stack.start_server(Responder().serve, None, 443, ssl=context)
    yield trusted
    server.close()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_curl_fetches_over_tls(stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path, version: str) -> None:
    async with https(await stack_on_tap(), tmp_path) as trusted:
        arguments = ("--cacert", str(trusted), f"--tlsv{version}", "--tls-max", version)
        assert await curl(netns, f"https://{OURS}/bytes/3000000", *arguments) == (200, body(3_000_000))
        data = body(500_000)
        answered = await curl(netns, f"https://{OURS}/sha256", *arguments, "--data-binary", "@-", stdin=data)
    assert answered == (200, sha256(data).hexdigest().encode())


async def test_curl_fetches_over_tls_on_a_bad_wire(stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path) -> None:
    async with https(await stack_on_tap(wire=(BAD_WIRE, 7)), tmp_path) as trusted:
        answered = await curl(netns, f"https://{OURS}/bytes/1000000", "--cacert", str(trusted))
    assert answered == (200, body(1_000_000))


async def test_bytes_go_there_and_back_on_a_bad_wire(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(wire=(BAD_WIRE, 3))
    server = await stack.start_server(echo, None, 7)
    data = Random(1).randbytes(300_000)
    assert await nc(netns, OURS, 7, data) == data
    server.close()
    assert stack.mib.TcpInErrs > 0  # something was damaged, and noticed


async def test_a_connection_outlives_a_cut_of_the_wire(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap(wire=(Impairments(delay=0.001), 1))
    server = await stack.start_server(echo, None, 7)
    data = Random(2).randbytes(3_000_000)
    copying = asyncio.create_task(nc(netns, OURS, 7, data))
    wire = stack.interfaces[0].device
    assert isinstance(wire, ImpairedTap)
    await until(lambda: stack.mib.TcpInSegs > 100)
    for direction in (wire.there, wire.back):
        direction.impairments = Impairments(loss=1.0)
    lost = wire.there.drops.total()
    await until(lambda: wire.there.drops.total() + wire.back.drops.total() > lost + 3)
    for direction in (wire.there, wire.back):
        direction.impairments = Impairments(delay=0.001)
    assert await copying == data
    server.close()


async def test_socat_half_closes_and_still_reads(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()

    async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sha256(await reader.read()).hexdigest().encode())
        writer.close()

    server = await stack.start_server(digest, None, 9000)
    data = body(2_000_000)
    answered = await netns.arun(require_tool("socat"), "-t", "10", "-", f"TCP4:{OURS}:9000,shut-down", stdin=data)
    assert answered.stdout == sha256(data).hexdigest().encode()
    server.close()


@asynccontextmanager
async def ssh_server(netns: Namespace, folder: Path, port: int) -> AsyncIterator[list[str]]:
    """An sshd of the kernel's side with keys of its own; gives the options of a client that it knows."""
    for name in ("host", "user"):
        await netns.arun("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress {KERNEL}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    # sshd wants this folder of root's, which is there where it runs as a service.
    command = f"mkdir -p /run/sshd && exec {require_tool('sshd')} -D -e -f {folder}/sshd_config"
    server = netns.popen("sh", "-c", command)
    stderr = server.stderr
    assert stderr is not None
    assert b"listening" in await asyncio.to_thread(stderr.readline)
    yield [
        *("-F", "none", "-i", str(folder / "user"), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"),
        *("-o", f"UserKnownHostsFile={folder}/known", "-o", "LogLevel=ERROR", "-p", str(port)),
    ]
    server.terminate()
    await asyncio.to_thread(server.wait, 10)


@pytest.mark.parametrize("bad", [False, True], ids=["clean", "bad"])
async def test_ssh_runs_a_command_and_carries_its_data(
    stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path, bad: bool
) -> None:
    require_tool("sshd")
    stack = await stack_on_tap(wire=(BAD_WIRE, 11)) if bad else await stack_on_tap()
    data = Random(3).randbytes(100_000 if bad else 5_000_000)
    async with ssh_server(netns, tmp_path, 2222) as options, relay(stack, 2222):
        done = await netns.arun(require_tool("ssh"), *options, f"root@{OURS}", "sha256sum", stdin=data, timeout=60)
    assert done.stdout.split()[0].decode() == sha256(data).hexdigest()


async def test_dig_asks_dnsmasq_through_our_udp_and_tcp(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    server = netns.popen(
        *(require_tool("dnsmasq"), "--keep-in-foreground", "--log-facility=-", "--no-resolv", "--no-hosts", "--port=5353"),
        *(f"--listen-address={KERNEL}", "--bind-interfaces", "--user=root", "--address=/disk.example/192.0.2.7"),
        *("--pid-file=", "--conf-file=/dev/null", "--no-daemon"),
    )
    stderr = server.stderr
    assert stderr is not None
    assert b"started" in await asyncio.to_thread(stderr.readline)

    async def answer_one(asked: bytes, asker: tuple[str, int]) -> None:
        with stack.socket(type=2) as onward:
            await onward.sendto(asked, (KERNEL, 5353))
            answer, _ = await onward.recvfrom(4096)
            await dns.sendto(answer, asker)

    async def answer_all() -> None:
        while True:
            await answer_one(*await dns.recvfrom(4096))

    dig = (require_tool("dig"), "+short", "+tries=2", "+time=3", f"@{OURS}", "-p", "5353", "host.disk.example", "A")
    with stack.socket(type=2) as dns:
        dns.bind(("", 5353))
        answering = asyncio.create_task(answer_all())
        assert (await netns.arun(*dig)).stdout == b"192.0.2.7\n"
        async with relay(stack, 5353):
            assert (await netns.arun(*dig, "+tcp")).stdout == b"192.0.2.7\n"
        answering.cancel()
    server.terminate()
    await asyncio.to_thread(server.wait, 10)


@pytest.mark.parametrize("how", [(), ("-I",), ("-T", "-p", "80")], ids=["udp", "icmp", "tcp"])
async def test_traceroute_finds_us_after_one_hop(stack_on_tap: StackOnTap, netns: Namespace, how: tuple[str, ...]) -> None:
    await stack_on_tap()
    done = await netns.arun(require_tool("traceroute"), "-n", "-m", "3", "-w", "2", *how, OURS)
    hops = done.stdout.decode().splitlines()[1:]
    assert len(hops) == 1, hops
    assert re.match(rf" *1  {re.escape(OURS)}  [\d.]+ ms  [\d.]+ ms  [\d.]+ ms", hops[0]), hops


async def test_nmap_scans_and_nothing_is_the_worse_for_it(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    server = await stack.start_server(echo, None, 7)
    nmap = (require_tool("nmap"), "-n", "-Pn", "-T5", "--max-retries")
    done = await netns.arun(*nmap, "1", "-sS", "-sV", "-O", "--osscan-guess", "-p", "1-200", OURS, timeout=90)
    said = done.stdout.decode()
    assert re.search(r"^7/tcp +open +echo", said, re.MULTILINE), said
    assert "199 closed tcp ports (reset)" in said, said
    for kind in ("-sN", "-sF", "-sX", "-sM", "-sA", "-sW"):
        await netns.arun(*nmap, "0", kind, "-p", "1-50", OURS, timeout=60)
    await netns.arun(*nmap, "0", "-sU", "-p", "1-20", OURS, timeout=60)
    data = body(100_000)
    assert await nc(netns, OURS, 7, data) == data
    server.close()


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
async def test_tshark_finds_no_anomaly_of_ours(
    stack_on_tap: StackOnTap, netns: Namespace, tmp_path: Path, offload: bool
) -> None:
    stack = await stack_on_tap(offload=offload)
    async with capture(netns, "tap0", tmp_path / "clean.pcap", "tcp") as seen:
        async with iperf3_server(netns, KERNEL, 5201), relay(stack, 5201):
            await iperf3(netns, OURS, size=4 << 20)
            await iperf3(netns, OURS, "-R", size=4 << 20)
        server = await stack.start_server(echo, None, 7)
        data = body(1_000_000)
        assert await nc(netns, OURS, 7, data) == data
        server.close()
    # A tail loss probe that was not needed is no anomaly: the kernel was slow (RFC 8985, section 7).
    assert len(seen.anomalies(OURS)) <= stack.mib.TcpExtTCPLossProbes
    assert seen.complaints(offload=True) == []
