"""A running daemon, from outside: it appears, serves, reads its file again, and goes away without a trace."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.running import DEVICE, KERNEL, OURS, ROOT, TAP, RunningDaemon, environment
from tests.e2e.peers import nc, nc_udp, ping
from tests.needs import require_tool
from ustack.cli.control import call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e


@pytest.fixture
def daemon(netns: Namespace, tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with all its services."""
    with RunningDaemon(netns, tmp_path, "[service]\necho = true\ndiscard = true\nchargen = true\n") as running:
        yield running


def run_to_its_end(netns: Namespace, file: Path) -> subprocess.CompletedProcess[bytes]:
    """Start a daemon that cannot run."""
    program = netns.popen(sys.executable, "-m", "ustack", "daemon", "-c", file, env=environment())
    out, err = program.communicate(timeout=20)
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


async def test_the_kernel_pings_it(daemon: RunningDaemon) -> None:
    answered = await ping(daemon.namespace, OURS, count=5, size=1400)
    assert answered.received == 5


async def test_echo_gives_back_streams_and_datagrams(daemon: RunningDaemon) -> None:
    data = random.Random(1).randbytes(3 << 20)
    assert await nc(daemon.namespace, OURS, 7, data) == data
    assert await nc_udp(daemon.namespace, OURS, 7, b"datagram") == b"datagram"


async def test_discard_takes_everything_and_says_nothing(daemon: RunningDaemon) -> None:
    assert await nc(daemon.namespace, OURS, 9, bytes(3 << 20)) == b""


async def test_chargen_sends_the_pattern_of_the_rfc_for_as_long_as_it_is_read(daemon: RunningDaemon) -> None:
    with daemon.namespace.open(socket.create_connection, (OURS, 19)) as sock:
        data = sock.makefile("rb").read(1 << 20)
    lines = data.split(b"\r\n")
    assert lines[0] == bytes(range(0x20, 0x20 + 72))
    assert lines[1] == bytes(range(0x21, 0x21 + 72))
    assert {len(line) for line in lines[:-1]} == {72}
    assert (await ping(daemon.namespace, OURS, count=1)).received == 1


async def test_sigterm_ends_connections_in_order_and_removes_everything(netns: Namespace, tmp_path: Path) -> None:
    with RunningDaemon(netns, tmp_path, "[service]\necho = true\n") as daemon:
        with netns.open(socket.create_connection, (OURS, 7)) as sock:
            sock.settimeout(10)
            sock.sendall(b"still there?")
            assert sock.recv(100) == b"still there?"
            daemon.program.send_signal(signal.SIGTERM)
            assert sock.recv(100) == b"", "a FIN, not a reset"
        assert await asyncio.to_thread(daemon.program.wait, 10) == 0
        daemon.until_notified("STOPPING=1")
        assert not daemon.control.exists()
        with pytest.raises(LookupError):
            netns.index(TAP)


async def test_a_peer_that_does_not_close_cannot_hold_it_up(netns: Namespace, tmp_path: Path) -> None:
    with (
        RunningDaemon(netns, tmp_path, "[service]\nchargen = true\n") as daemon,
        netns.open(socket.create_connection, (OURS, 19)) as sock,
    ):
        assert sock.recv(1)
        assert await asyncio.to_thread(daemon.stop, signal.SIGINT) == 0
        with pytest.raises(ConnectionResetError):
            while sock.recv(1 << 20):
                pass


def status(daemon: RunningDaemon) -> dict[str, Any]:
    answer: dict[str, Any] = call(str(daemon.control), "status")
    return answer


async def test_sighup_applies_what_can_change(daemon: RunningDaemon) -> None:
    daemon.configure(
        '[memory]\nreserve = "2M"\n[tcp]\nrmem_default = "64K"\n[service]\ndiscard = true\n'
        f'[[route]]\nnetwork = "10.9.0.0/16"\nvia = "{KERNEL}"\n'
    )
    daemon.program.send_signal(signal.SIGHUP)
    daemon.until_notified("READY=1")
    assert call(str(daemon.control), "memory")["reserve"]["size"] == 2 << 20
    assert [each["local"][1] for each in call(str(daemon.control), "ss")] == [9]
    assert f"10.9.0.0/16 via {KERNEL} dev {TAP} metric 0" in status(daemon)["routes"]
    daemon.configure("")
    daemon.program.send_signal(signal.SIGHUP)
    daemon.until_notified("READY=1")
    assert call(str(daemon.control), "ss") == []
    assert not any("10.9.0.0" in route for route in status(daemon)["routes"])


async def test_sighup_refuses_as_a_whole_what_cannot_change(daemon: RunningDaemon) -> None:
    daemon.configure('[memory]\nsize = "32M"\nreserve = "2M"\n[service]\ndiscard = true\n')
    daemon.program.send_signal(signal.SIGHUP)
    line = await daemon.said(re.compile(rb"cannot change"))
    assert b"ustack.toml: [memory] size cannot change while the daemon runs: restart it" in line
    assert len(call(str(daemon.control), "ss")) == 4
    assert call(str(daemon.control), "memory")["reserve"]["size"] != 2 << 20


async def test_sighup_with_a_broken_file_changes_nothing(daemon: RunningDaemon) -> None:
    daemon.configure("[memory\n")
    daemon.program.send_signal(signal.SIGHUP)
    await daemon.said(re.compile(rb"not TOML"))
    await daemon.said(re.compile(rb"not reloaded, nothing was changed"))
    assert len(call(str(daemon.control), "ss")) == 4


async def test_a_configuration_error_is_exit_code_2(netns: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(DEVICE + "[memory]\nsize = true\n")
    ended = run_to_its_end(netns, file)
    assert ended.returncode == 2
    assert ended.stderr.decode().startswith(f"{file}: [memory] size = true: allowed is ")


async def test_an_address_that_is_no_hosts_is_a_configuration_error(netns: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(DEVICE.replace(f"{OURS}/24", "10.77.0.255/24"))
    ended = run_to_its_end(netns, file)
    assert ended.returncode == 2
    assert b"names the network or everybody in it, not a host" in ended.stderr


async def test_an_interface_that_must_exist_and_does_not_is_exit_code_1(netns: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(DEVICE.replace(f'"{TAP}"\n', f'"{TAP}"\ncreate = false\n'))
    ended = run_to_its_end(netns, file)
    assert ended.returncode == 1
    assert b"Error: ut0: no such interface; make it (ip tuntap add ut0 mode tap)" in ended.stderr


async def test_a_second_daemon_on_the_same_interface_is_told_so(daemon: RunningDaemon, tmp_path: Path) -> None:
    ended = run_to_its_end(daemon.namespace, daemon.file)
    assert ended.returncode == 1
    assert b"ut0: another process holds it" in ended.stderr


async def test_exports_are_attached_lost_and_attached_again(netns: Namespace, tmp_path: Path) -> None:
    """The daemon starts before the server, sees it come, go and come back."""

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ustack", "nbd", "serve", "--memory", "8M", "--address", "0.0.0.0"]
        return netns.popen(*command, env=environment())

    config = f'[[nbd]]\nname = "disk"\nuri = "nbd://{KERNEL}/memory"\n'
    with RunningDaemon(netns, tmp_path, config) as daemon:
        (export,) = status(daemon)["nbd"]
        assert export["state"] == "connecting"
        server = serve()
        assert "1 of 1 exports attached" in await asyncio.to_thread(daemon.until_notified, attached(1))
        (export,) = status(daemon)["nbd"]
        assert (export["state"], export["size"]) == ("attached", 8 << 20)
        assert call(str(daemon.control), "memory")["reserve"]["memalloc_sockets"] == 1
        server.kill()
        await asyncio.to_thread(daemon.until_notified, attached(0))
        (export,) = status(daemon)["nbd"]
        assert export["state"] == "lost"
        assert export["error"]
        server = serve()
        await asyncio.to_thread(daemon.until_notified, attached(1))
        assert status(daemon)["nbd"][0]["state"] == "attached"


def attached(count: int) -> str:
    return f"STATUS={OURS}/24 on {TAP}, {count} of 1 exports attached"


# -- the tools --


async def test_ping_looks_like_ping(daemon: RunningDaemon) -> None:
    done = await daemon.ustack("ping", "-c", "3", "-i", "0.01", "-s", "1000", KERNEL)
    lines = done.stdout.decode().splitlines()
    assert lines[0] == f"PING {KERNEL} ({KERNEL}) 1000(1028) bytes of data."
    for seq, line in enumerate(lines[1:4], 1):
        assert re.fullmatch(rf"1008 bytes from {KERNEL}: icmp_seq={seq} ttl=64 time=[\d.]+ ms", line)
    assert re.fullmatch(r"3 packets transmitted, 3 received, 0% packet loss, time \d+ms", lines[6])
    assert re.fullmatch(r"rtt min/avg/max/mdev = [\d.]+/[\d.]+/[\d.]+/[\d.]+ ms", lines[7])


async def test_ping_of_nobody_is_exit_code_1_and_of_nonsense_2(daemon: RunningDaemon) -> None:
    done = await daemon.ustack("ping", "-c", "1", "-W", "0.1", "10.77.0.99", check=False)
    assert done.returncode == 1
    assert b"1 packets transmitted, 0 received, 100% packet loss" in done.stdout
    assert (await daemon.ustack("ping", "-c", "1", "10.99.0.1", check=False)).returncode == 2


async def test_an_interrupted_ping_sums_up(daemon: RunningDaemon) -> None:
    program = daemon.namespace.popen(*daemon.command("ping", "-i", "0.05", KERNEL), env=environment())
    assert program.stdout is not None
    for _ in range(3):
        await asyncio.to_thread(program.stdout.readline)
    program.send_signal(signal.SIGINT)
    out, _ = await asyncio.to_thread(program.communicate, timeout=10)
    assert b"ping statistics" in out
    assert program.returncode == 0


async def test_nc_connects_and_both_directions_end_by_themselves(daemon: RunningDaemon) -> None:
    data = random.Random(2).randbytes(2 << 20)
    listener = daemon.namespace.open(socket.create_server, (KERNEL, 0))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])  # only after the FIN, so the other direction must still be open
        writer.close()

    async with await asyncio.start_server(answer, sock=listener):
        done = await daemon.ustack("nc", KERNEL, str(listener.getsockname()[1]), stdin=data)
    assert done.stdout == data[::-1]


async def test_a_connection_through_it_leaves_no_descriptor_open(daemon: RunningDaemon) -> None:
    def descriptors() -> int:
        return len(list(Path(f"/proc/{daemon.program.pid}/fd").iterdir()))

    listener = daemon.namespace.open(socket.create_server, (KERNEL, 0))
    before = descriptors()
    async with await asyncio.start_server(shout, sock=listener):
        for _ in range(3):
            await daemon.ustack("nc", KERNEL, str(listener.getsockname()[1]), stdin=b"hello")
    async with asyncio.timeout(30):
        while descriptors() > before:
            await asyncio.sleep(0.01)


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.read()).upper())
    writer.close()


async def test_nc_listens(daemon: RunningDaemon) -> None:
    data = random.Random(3).randbytes(2 << 20)
    listening = asyncio.create_task(daemon.ustack("nc", "-l", "5000", stdin=data))
    while not any(each["local"][1] == 5000 for each in call(str(daemon.control), "ss")):
        await asyncio.sleep(0.01)
    assert await nc(daemon.namespace, OURS, 5000, b"hello") == data
    assert (await listening).stdout == b"hello"


async def test_nc_exchanges_datagrams(daemon: RunningDaemon) -> None:
    done = await daemon.ustack("nc", "-u", "-w", "1", KERNEL, str(shouting_datagrams(daemon.namespace)), stdin=b"datagram")
    assert done.stdout == b"DATAGRAM"


def shouting_datagrams(namespace: Namespace) -> int:
    """A kernel socket that answers one datagram; returns its port."""
    sock = namespace.open(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((KERNEL, 0))

    def answer() -> None:
        data, peer = sock.recvfrom(1000)
        sock.sendto(data.upper(), peer)
        asyncio.get_running_loop().remove_reader(sock)
        sock.close()

    port: int = sock.getsockname()[1]
    asyncio.get_running_loop().add_reader(sock, answer)
    return port


async def test_nc_to_a_closed_port_is_refused_with_a_sentence(daemon: RunningDaemon) -> None:
    done = await daemon.ustack("nc", KERNEL, "9", check=False)
    assert done.returncode == 1
    assert done.stderr.decode() == f"Error: {KERNEL}:9: Connection refused\n"


async def test_ss_shows_sockets_in_the_columns_of_ss(daemon: RunningDaemon) -> None:
    with daemon.namespace.open(socket.create_connection, (OURS, 7)) as sock:
        port = sock.getsockname()[1]
        sock.sendall(b"x")
        sock.recv(1)
        connected = (await daemon.ustack("ss", "-t")).stdout.decode()
        assert connected.splitlines()[0].split() == [
            "State",
            "Recv-Q",
            "Send-Q",
            "Local",
            "Address:Port",
            "Peer",
            "Address:Port",
        ]
        assert connected.splitlines()[1].split() == ["ESTAB", "0", "0", f"{OURS}:7", f"{KERNEL}:{port}"]
        detailed = (await daemon.ustack("ss", "-tmi")).stdout.decode()
        assert re.search(r"skmem:\(r\d+,rb131072,t0,tb\d+,f\d+,w\d+,o0,bl0,d0\)", detailed)
        assert re.search(r"ts sack cubic wscale:\d+,\d+ rto:\S+ rtt:\S+ ato:40 mss:1448 pmtu:1500 .*cwnd:\d+", detailed)
    listening = (await daemon.ustack("ss", "-l")).stdout.decode()
    assert "tcp   LISTEN 0      100    0.0.0.0:7          0.0.0.0:*" in listening
    assert "udp   UNCONN 0      0      0.0.0.0:7          0.0.0.0:*" in listening
    both = json.loads((await daemon.ustack("ss", "-a", "--json")).stdout)
    assert {(each["protocol"], each["state"]) for each in both} >= {("tcp", "LISTEN"), ("udp", "UNCONN")}


async def test_nstat_shows_what_counted_and_all_if_asked(daemon: RunningDaemon) -> None:
    await ping(daemon.namespace, OURS, count=2)
    await nc_udp(daemon.namespace, OURS, 4444, b"nobody", timeout=1)
    shown = (await daemon.ustack("nstat")).stdout.decode()
    assert re.search(r"^IcmpInEchos +2$", shown, re.MULTILINE)
    assert re.search(r"^#drops$", shown, re.MULTILINE)
    assert re.search(r"^NO_SOCKET +[1-9]", shown, re.MULTILINE)
    assert "TcpExtTCPTimeouts" not in shown
    assert "TcpExtTCPTimeouts" in (await daemon.ustack("nstat", "-a")).stdout.decode()
    assert json.loads((await daemon.ustack("nstat", "--json")).stdout)["counters"]["IcmpInEchos"] == 2


async def test_slabinfo_and_status(daemon: RunningDaemon) -> None:
    assert (await daemon.ustack("slabinfo")).stdout.startswith(b"slabinfo - version: 2.1\n")
    top = (await daemon.ustack("slabtop", "--once", "-s", "name")).stdout.decode().splitlines()
    assert top[1].split()[-1] == "NAME"
    assert [line.split()[-1] for line in top[2:]] == sorted(line.split()[-1] for line in top[2:])
    assert (await daemon.ustack("slab", "compact")).stdout.endswith(b" held\n")
    shown = (await daemon.ustack("status")).stdout.decode()
    assert f"{TAP}: {OURS}/24" in shown
    assert "reserve: " in shown
    assert json.loads((await daemon.ustack("status", "--json")).stdout)["devices"][0]["name"] == TAP


async def test_the_adviser_records_advises_and_applies(daemon: RunningDaemon, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    lines = [f"+ {number} 1700 0 0" for number in range(50)]
    trace.write_text("\n".join(["ustack-trace-1 by-hand data", *lines]) + "\n")
    advised = (await daemon.ustack("slab", "advise", str(trace), "-k", "1", "--cost", "charge", "--apply")).stdout.decode()
    assert advised.startswith("1728: ")
    assert " 1728 " in advised.splitlines()[1]
    assert (await daemon.ustack("slabinfo")).stdout.count(b"size-1728") == 1
    await daemon.ustack("slab", "record", str(trace), "--seconds", "0.05")
    assert trace.read_text().startswith("ustack-trace-1 recorded data\n")


async def test_a_disk_is_copied_through_the_daemon(daemon: RunningDaemon, tmp_path: Path) -> None:
    data = random.Random(4).randbytes(4 << 20)
    (tmp_path / "in").write_bytes(data)
    server = daemon.namespace.popen(
        *(sys.executable, "-m", "ustack", "nbd", "serve", "--memory", "4M", "--address", KERNEL, "--port", "0"),
        env=environment(),
    )
    assert server.stdout is not None
    uri = (await asyncio.to_thread(server.stdout.readline)).decode().split("\t")[0]
    await daemon.ustack("nbd", "copy", "--via", "daemon", str(tmp_path / "in"), uri)
    await daemon.ustack("nbd", "copy", "--via", "daemon", uri, str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data


async def test_nothing_speaks_for_a_daemon_that_is_not_there(netns: Namespace, tmp_path: Path) -> None:
    done = await netns.arun(
        *(require_tool("env"), f"PYTHONPATH={ROOT}", sys.executable, "-m", "ustack", "ss", "--control", tmp_path / "none"),
        check=False,
    )
    assert done.returncode == 1
    assert b"no daemon listens there; start one with `ustack daemon -c FILE`" in done.stderr
