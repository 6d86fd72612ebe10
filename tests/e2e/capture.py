"""What tcpdump saw on a link, and what a decoder that is not ours has to say about it."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import struct
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import dpkt

from tests.needs import require_tool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.netns import Namespace

SETTLE_TRIES: Final = 200
SETTLE_PAUSE: Final = 0.02
"""Seconds between two looks at whether tcpdump has written all that the kernel gave it."""

COUNTS: Final = re.compile(rb"(\d+) packets? captured.*?(\d+) packets? received by filter.*?(\d+) packets? dropped", re.DOTALL)

# Payload is taken for data, whatever the ports are: it is random in many tests, and not the subject here.
TSHARK: Final = (
    *("-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE"),
    *("-o", "tcp.analyze_sequence_numbers:FALSE", "-d", "tcp.port==1-65535,data", "-d", "udp.port==1-65535,data"),
)
MANGLED_ZERO: Final = "0xffff instead of 0x0000"
"""What the kernel sends for a TCP checksum of zero where it computes it late (CSUM_MANGLED_0): the other zero, as good."""

CHECKSUMS: Final = ("ip", "tcp", "udp", "icmp", "icmpv6")


class Complaint(NamedTuple):
    """A frame that is malformed or has a wrong checksum. Frames count from 1, as in tshark."""

    frame: int
    what: str


class Capture:
    """A finished capture file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def frames(self) -> list[bytes]:
        """The frames in the order of the capture, each from its Ethernet header on."""
        with self.path.open("rb") as file:
            return [frame for _, frame in dpkt.pcap.UniversalReader(file)]

    def anomalies(self, source: str) -> list[str]:
        """What a protocol analyser flags in the TCP segments from `source`: sent again, out of order, unseen, and the like. A
        full window, a closed one and keepalives are no anomalies.
        """
        flags = (
            "retransmission",
            "fast_retransmission",
            "spurious_retransmission",
            "out_of_order",
            "lost_segment",
            "ack_lost_segment",
        )
        wanted = " or ".join(f"tcp.analysis.{flag}" for flag in flags)
        shark = subprocess.run(
            [require_tool("tshark"), "-n", "-r", str(self.path), "-Y", f"ip.src == {source} and ({wanted})"],
            capture_output=True,
            timeout=300,
        )
        assert shark.returncode == 0, shark.stderr.decode()
        return shark.stdout.decode().splitlines()

    def complaints(self, offload: bool = False) -> list[Complaint]:
        """Every malformed frame and every wrong checksum that tshark finds.

        With `offload`, a TCP or UDP checksum may also be the bare sum of the pseudo-header: that is how a frame looks whose
        checksum the sender has left to the device (CHECKSUM_PARTIAL).
        """
        wrong = " or ".join(f'{protocol}.checksum.status == "Bad"' for protocol in CHECKSUMS)
        fields = ("frame.number", "_ws.malformed", "tcp.checksum.status", "udp.checksum.status", "_ws.expert.message")
        shark = subprocess.run(
            [
                *(require_tool("tshark"), "-n", "-r", str(self.path), *TSHARK, "-Y", f"_ws.malformed or {wrong}"),
                *("-T", "fields", "-E", "separator=|", *(word for field in fields for word in ("-e", field))),
            ],
            capture_output=True,
            timeout=300,
        )
        assert shark.returncode == 0, shark.stderr.decode()
        found = []
        frames = self.frames()
        for line in shark.stdout.decode().splitlines():
            number, malformed, tcp, udp, message = line.split("|", 4)
            if offload and not malformed and "0" in (tcp, udp) and is_checksum_partial(frames[int(number) - 1]):
                continue
            if MANGLED_ZERO in message:
                continue
            found.append(Complaint(int(number), message or "malformed"))
        return found


def is_checksum_partial(frame: bytes | bytearray) -> bool:
    """Whether the TCP or UDP checksum of this IP frame is the folded, not inverted sum of its pseudo-header."""
    packet = frame[14:]
    if packet[0] >> 4 == 4:
        proto, addresses = packet[9], packet[12:20]
        segment = packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4])]
    else:
        proto, addresses = packet[6], packet[8:40]
        segment = packet[40 : 40 + int.from_bytes(packet[4:6])]
    offset = {socket.IPPROTO_TCP: 16, socket.IPPROTO_UDP: 6}.get(proto)
    if offset is None:
        return False
    total: int = sum(struct.unpack(f"!{len(addresses) // 2}H", addresses)) + proto + len(segment)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return bytes(segment[offset : offset + 2]) == total.to_bytes(2)


@asynccontextmanager
async def capture(namespace: Namespace, ifname: str, path: Path, filters: str = "") -> AsyncIterator[Capture]:
    """Let tcpdump write the frames on `ifname` that match `filters` to `path` for as long as the context is open.

    The capture may be looked at after the context, and then holds everything that was on the link before its end: frames that
    the kernel dropped before tcpdump read them fail the test.
    """
    program = namespace.popen(
        *(require_tool("tcpdump"), "-i", ifname, "-n", "-s", "0", "-B", "65536", "--immediate-mode"),
        *("-Z", "root", "-w", str(path), *filters.split()),
    )
    stderr = program.stderr
    assert stderr is not None
    said = b""
    while b"listening on" not in said:
        line = await asyncio.to_thread(stderr.readline)
        assert line, f"tcpdump: {said.decode()}"
        said += line
    yield Capture(path)
    dropped = 0
    for _ in range(SETTLE_TRIES):
        program.send_signal(signal.SIGUSR1)
        report = b""
        while not (counts := COUNTS.search(report)):
            line = await asyncio.to_thread(stderr.readline)
            assert line, f"tcpdump: {report.decode()}"
            report += line
        captured, received, dropped = map(int, counts.groups())
        if captured == received:
            break
        await asyncio.sleep(SETTLE_PAUSE)
    program.send_signal(signal.SIGINT)
    await asyncio.to_thread(program.wait, 10)
    assert dropped == 0, f"tcpdump missed {dropped} frames: the capture is not complete"
