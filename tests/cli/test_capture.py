"""`ustack capture` against a running daemon on a real TAP: what it writes is read by tcpdump, tshark and capinfos."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import dpkt
import pytest

from tests.daemon.running import KERNEL, OURS, TAP, RunningDaemon, environment
from tests.e2e.peers import nc, ping
from tests.needs import require_tool
from ustack.cli.control import Control, call

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e


@pytest.fixture
def daemon(netns: Namespace, tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with all its services."""
    netns.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    with RunningDaemon(netns, tmp_path, "[service]\necho = true\n") as running:
        yield running


class Running:
    """A capture that has begun."""

    def __init__(self, daemon: RunningDaemon, *arguments: str) -> None:
        self.program = daemon.namespace.popen(*daemon.command("capture", *arguments), env=environment())
        assert self.program.stderr is not None
        self.began = self.program.stderr.readline().decode()
        assert self.began.startswith("capturing on"), self.began

    def end(self, with_signal: int | None = signal.SIGINT) -> tuple[bytes, str]:
        """Ctrl-C; what it has printed and what it said at the end."""
        if with_signal is not None:
            self.program.send_signal(with_signal)
        out, err = self.program.communicate(timeout=20)
        assert self.program.returncode == 0, err
        return out, err.decode()


def shark(path: Path, *fields: str) -> list[list[str]]:
    """The fields of every frame, as tshark decodes them."""
    arguments = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(
        [require_tool("tshark"), "-n", "-r", str(path), "-T", "fields", *arguments], capture_output=True, check=True, timeout=60
    )
    return [line.split("\t") for line in done.stdout.decode().splitlines()]


async def test_a_file_that_every_decoder_reads_and_in_which_nothing_is_missing(daemon: RunningDaemon, tmp_path: Path) -> None:
    file = tmp_path / "all.pcapng"
    capture = Running(daemon, "-w", str(file))
    data = bytes(range(256)) * 4096
    assert await nc(daemon.namespace, OURS, 7, data) == data
    await ping(daemon.namespace, OURS, count=3)
    _, said = capture.end()
    count = int(said.split()[0])
    assert said == f"{count} packets captured, 0 missed\n"
    lines = subprocess.run([require_tool("tcpdump"), "-n", "-r", str(file)], capture_output=True, check=True, timeout=60)
    assert len(lines.stdout.splitlines()) == count
    infos = subprocess.run([require_tool("capinfos"), "-M", str(file)], capture_output=True, check=True, timeout=60)
    assert f"Number of packets:   {count}" in infos.stdout.decode()
    assert "nanoseconds" in infos.stdout.decode()
    fields = shark(file, "frame.interface_name", "frame.packet_flags_direction", "eth.src", "icmp.type", "tcp.len", "ip.src")
    assert {row[0] for row in fields} == {TAP}
    assert {row[1] for row in fields} == {"0x00000001", "0x00000002"}
    assert [row[3] for row in fields if row[3]] == ["8", "0"] * 3
    assert sum(int(row[4]) for row in fields if row[4] and row[5] == KERNEL) == len(data)
    assert sum(int(row[4]) for row in fields if row[4] and row[5] == OURS) == len(data)
    assert call(str(daemon.control), "memory")["captures"]["running"] == 0
    assert call(str(daemon.control), "memory")["captures"]["pinned"] == 0


async def test_a_dropped_packet_has_the_reason_as_its_comment(daemon: RunningDaemon, tmp_path: Path) -> None:
    file = tmp_path / "drops.pcapng"
    capture = Running(daemon, "-i", TAP, "-w", str(file), "-c", "1", "udp", "port", "4242")
    with daemon.namespace.open(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"nobody is here", (OURS, 4242))
    _, said = capture.end(None)
    assert said == "1 packets captured, 0 missed\n"
    assert shark(file, "frame.comment", "udp.dstport") == [["dropped: NO_SOCKET", "4242"]]


async def test_lines_are_those_of_tcpdump(daemon: RunningDaemon) -> None:
    capture = Running(daemon, "-c", "2", "icmp")
    await ping(daemon.namespace, OURS, count=1, size=56)
    out, _ = capture.end(None)
    request, reply = (line.split(" ", 3) for line in out.decode().splitlines())
    assert request[1:3] == [TAP, "In"]
    assert f"IP {KERNEL} > {OURS}: ICMP echo request, id " in request[3]
    assert request[3].endswith(", seq 1, length 64")
    assert reply[1:3] == [TAP, "Out"]
    assert f"IP {OURS} > {KERNEL}: ICMP echo reply" in reply[3]


async def test_standard_output_is_a_stream_for_tcpdump(daemon: RunningDaemon) -> None:
    capture = Running(daemon, "-w", "-", "-c", "4", "icmp")
    await ping(daemon.namespace, OURS, count=2)
    out, _ = capture.end(None)
    seen = subprocess.run([require_tool("tcpdump"), "-n", "-r", "-"], input=out, capture_output=True, check=True, timeout=60)
    assert len(seen.stdout.splitlines()) == 4


async def test_only_the_start_of_a_packet_and_its_true_length(daemon: RunningDaemon, tmp_path: Path) -> None:
    file = tmp_path / "short.pcapng"
    capture = Running(daemon, "-w", str(file), "-s", "60", "-c", "2", "icmp")
    await ping(daemon.namespace, OURS, count=1, size=1000)
    capture.end(None)
    assert shark(file, "frame.len", "frame.cap_len") == [["1042", "60"]] * 2


async def test_two_captures_do_not_disturb_each_other(daemon: RunningDaemon, tmp_path: Path) -> None:
    both = [Running(daemon, "-w", str(tmp_path / name), "-c", "6", "icmp") for name in "ab"]
    await ping(daemon.namespace, OURS, count=3)
    for each in both:
        assert each.end(None)[1] == "6 packets captured, 0 missed\n"


async def test_a_client_that_sleeps_hurts_nobody_and_leaves_nothing_when_it_is_killed(daemon: RunningDaemon) -> None:
    with Control(str(daemon.control)) as asleep:
        answer, fds = asleep.call_for_descriptors("capture", 4)
        assert len(fds) == 4
        data = bytes(16 << 20)
        assert await nc(daemon.namespace, OURS, 7, data) == data
        report = call(str(daemon.control), "memory")["captures"]
        assert report["running"] == 1
        assert 0 < report["pinned"] <= report["limit"] == answer["size"] // 16
        assert report["missed"] > 0
    for _ in range(200):
        report = call(str(daemon.control), "memory")["captures"]
        if not report["running"]:
            break
    assert report["pinned"] == 0
    for fd in fds:
        socket.close(fd)


async def test_what_cannot_be_captured_is_said_in_a_sentence(daemon: RunningDaemon, tmp_path: Path) -> None:
    for arguments, complaint in (
        (("-i", "eth9"), f"no interface 'eth9'; there are: {TAP}"),
        (("tcp", "prot", "80"), "filter 'tcp prot 80': can't parse filter expression: syntax error"),
        (("-w", str(tmp_path / "no" / "such")), f"{tmp_path}/no/such: No such file or directory"),
        (("--mirror", "ftp://10.0.0.1"), "allowed are erspan://HOST?session=N"),
        (("--mirror", "vxlan://10.0.0.1?vni=16777216"), "vni is a number from 0 to 16777215, not '16777216'"),
    ):
        done = await daemon.ustack("capture", *arguments, check=False)
        assert done.returncode != 0
        assert complaint in done.stderr.decode().replace("\n", " ")
    listed = await daemon.ustack("capture", "-D")
    assert listed.stdout.decode() == f"1.{TAP}\n"


async def test_a_daemon_may_keep_its_memory_to_itself(netns: Namespace, tmp_path: Path) -> None:
    with RunningDaemon(netns, tmp_path, "[memory]\ncapture = 0\n") as daemon:
        done = await daemon.ustack("capture", check=False)
        assert "the packet memory is private" in done.stderr.decode()


async def test_only_root_and_the_daemons_user_may_capture(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.control.chmod(0o666)
    daemon.control.parent.chmod(0o755)
    monkeypatch.chdir(daemon.control.parent)  # the folders above are not open to everybody
    os.seteuid(65534)
    try:
        with Control(daemon.control.name) as nobody, pytest.raises(PermissionError, match="only root and the user"):
            nobody.call_for_descriptors("capture", 4)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("kind", ["erspan", "tzsp", "vxlan"])
async def test_a_mirror_carries_the_frames_to_another_host(
    daemon: RunningDaemon, netns: Namespace, tmp_path: Path, kind: str
) -> None:
    number, options = {"erspan": (47, "?session=77"), "tzsp": (37008, ":37008"), "vxlan": (4789, "?vni=1234567")}[kind]
    flags = (socket.SOCK_RAW, number) if kind == "erspan" else (socket.SOCK_DGRAM, 0)
    with netns.open(socket.socket, socket.AF_INET, *flags) as collector:
        collector.bind(("127.0.0.1", 0 if kind == "erspan" else number))
        collector.settimeout(10)
        capture = Running(daemon, "--mirror", f"{kind}://127.0.0.1{options}", "-c", "2", "icmp")
        await ping(daemon.namespace, OURS, count=1, size=100)
        _, said = capture.end(None)
        assert said.endswith("2 packets mirrored, 0 cut, 0 lost\n")
        packets = [collector.recv(65535) for _ in range(2)]
    # What arrived, put back into Ethernet frames for a decoder that is not ours.
    if kind != "erspan":
        packets = [
            bytes(dpkt.ip.IP(p=17, src=b"\x7f\0\0\1", dst=b"\x7f\0\0\1", ttl=64, data=dpkt.udp.UDP(
                sport=40000, dport=number, ulen=8 + len(each), data=each
            )))
            for each in packets
        ]  # fmt: skip
    file = tmp_path / "mirrored.pcap"
    with file.open("wb") as out:
        writer = dpkt.pcap.Writer(out)
        for each in packets:
            writer.writepkt(bytes(12) + b"\x08\x00" + each, 1.0)
    inner = {"erspan": "erspan.spanid", "tzsp": "tzsp.version", "vxlan": "vxlan.vni"}[kind]
    rows = shark(file, inner, "icmp.type", "ip.src", "_ws.malformed")
    assert [row[0] for row in rows] == [{"erspan": "77", "tzsp": "1", "vxlan": "1234567"}[kind]] * 2
    assert [row[1] for row in rows] == ["8", "0"]
    assert rows[0][2].endswith(KERNEL)
    assert rows[1][2].endswith(OURS)
    assert [row[3] for row in rows] == ["", ""]
