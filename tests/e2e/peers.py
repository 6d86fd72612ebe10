"""The other side of an end-to-end test: Debian's programs on kernel sockets, in a namespace, and what they found as values."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.needs import require_tool

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator

    from tests.netns import Namespace

PING_SUMMARY: Final = re.compile(r"(\d+) packets transmitted, (\d+) received")
PING_RTT: Final = re.compile(r"= ([\d.]+)/([\d.]+)/([\d.]+)/")

LISTENING: Final = re.compile(rb"(?i)listening")


class Ping(NamedTuple):
    """What ping counted. Round trips in seconds, of those that came back; `output` is all that ping printed."""

    sent: int
    received: int
    rtt_min: float
    rtt_avg: float
    rtt_max: float
    output: str


async def ping(
    namespace: Namespace,
    address: str,
    *,
    count: int = 3,
    size: int = 56,
    interval: float = 0.01,
    patience: int = 10,
    dont_fragment: bool = False,
) -> Ping:
    """Send echo requests with `size` bytes of payload every `interval` seconds until `count` are answered, or for `patience`
    seconds. A reply lost is counted, not raised; when replies are late, ping sends more than it was to.
    """
    done = await namespace.arun(
        *(require_tool("ping"), "-n", "-c", str(count), "-s", str(size), "-i", str(interval), "-w", str(patience)),
        *(("-M", "do") if dont_fragment else ()),
        address,
        check=False,
        timeout=patience + 10,
    )
    output = (done.stdout + done.stderr).decode()
    counted = PING_SUMMARY.search(output)
    assert counted, output
    rtt = PING_RTT.search(output)
    times = [float(part) / 1000 for part in rtt.groups()] if rtt else [0.0, 0.0, 0.0]
    return Ping(int(counted[1]), min(int(counted[2]), count), times[0], times[1], times[2], output)


class Transfer(NamedTuple):
    """What iperf3 counted, in bytes and seconds; bytes still on their way at the end are sent and not received.

    `retransmits` is 0 where the kernel was not the sender.
    """

    sent: int
    received: int
    seconds: float
    retransmits: int

    @property
    def rate(self) -> float:
        """Bytes a second that arrived."""
        return self.received / self.seconds


@asynccontextmanager
async def iperf3_server(namespace: Namespace, address: str, port: int = 5201) -> AsyncIterator[None]:
    """An iperf3 server that listens when the context is entered and is gone after it."""
    server = namespace.popen(require_tool("iperf3"), "-s", "-B", address, "-p", str(port), "--forceflush")
    try:
        await said(server, LISTENING)
        yield
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait, 10)


async def iperf3(
    namespace: Namespace, address: str, *args: str, seconds: int = 2, size: int = 0, port: int = 5201, limit: float = 60
) -> Transfer:
    """Run iperf3's client until `size` bytes are sent or, without, for `seconds`; kill it after `limit` seconds.

    Fails with iperf3's error if it has one.
    """
    done = await namespace.arun(
        *(require_tool("iperf3"), "-c", address, "-p", str(port), "-J"),
        *(("-n", str(size)) if size else ("-t", str(seconds))),
        *args,
        check=False,
        timeout=limit,
    )
    report = json.loads(done.stdout)
    assert "error" not in report, report["error"]
    end = report["end"]
    if "sum_sent" in end:
        sent, received = end["sum_sent"], end["sum_received"]
        return Transfer(sent["bytes"], received["bytes"], received["seconds"], sent.get("retransmits", 0))
    total = end["sum"]  # UDP: one sum, and the share of datagrams that were lost
    arrived = round(total["bytes"] * (1 - total["lost_percent"] / 100))
    return Transfer(total["bytes"], arrived, total["seconds"], 0)


class Response(NamedTuple):
    """An HTTP response as curl saw it."""

    status: int
    body: bytes


async def curl(namespace: Namespace, url: str, *args: str, stdin: bytes = b"", timeout: float = 30.0) -> Response:
    """Fetch `url`; `args` as for the program, e.g. `--data-binary @-` with `stdin`. Fails with curl's error if it has one."""
    done = await namespace.arun(
        *(require_tool("curl"), "--silent", "--show-error", "--noproxy", "*", "--max-time", str(timeout)),
        *("--write-out", "%{stderr}%{http_code}", *args, url),
        stdin=stdin,
        timeout=timeout + 5,
    )
    return Response(int(done.stderr), done.stdout)


async def nc(namespace: Namespace, address: str, port: int, data: bytes = b"", *args: str, timeout: float = 30.0) -> bytes:
    """Connect, send `data` and a FIN, and return all that came back until the other side's FIN; `args` as for the program."""
    done = await namespace.arun(require_tool("nc"), "-N", *args, address, str(port), stdin=data, timeout=timeout)
    return done.stdout


async def nc_udp(namespace: Namespace, address: str, port: int, datagram: bytes, timeout: int = 5) -> bytes:
    """Send one datagram of up to 16 KiB and return the first that comes back; empty if none did within `timeout` seconds."""
    done = await namespace.arun(
        *(require_tool("nc"), "-u", "-W", "1", "-w", str(timeout), "-q", "-1", address, str(port)),
        stdin=datagram,
        check=False,
        timeout=timeout + 10,
    )
    return done.stdout


async def said(program: subprocess.Popen[bytes], pattern: re.Pattern[bytes], limit: float = 10.0) -> bytes:
    """Wait until `program` prints a line that matches, and return it: it is ready. Fails if it ends before, and kills it if
    it says nothing of the kind within `limit` seconds.
    """
    assert program.stdout is not None
    lines = []
    try:
        async with asyncio.timeout(limit):
            while line := await asyncio.to_thread(program.stdout.readline):
                lines.append(line)
                if pattern.search(line):
                    return line
    except BaseException:
        program.kill()  # or the thread that reads would wait for ever
        raise
    raise AssertionError(f"{program.args!r} ended before it was ready:\n{b''.join(lines).decode()}")
