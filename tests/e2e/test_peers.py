"""The kernel-side programs and the capture check, kernel to kernel: what they say is true before our stack is judged by it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import dpkt
import pytest

from tests.e2e.capture import Capture, Complaint, capture, is_checksum_partial
from tests.e2e.peers import curl, iperf3, iperf3_server, nc, nc_udp, ping
from tests.needs import require_tool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

ALICE, BOB = "10.77.1.1", "10.77.1.2"


@pytest.fixture
def cable(make_netns: Callable[[str], Namespace]) -> tuple[Namespace, Namespace]:
    """Alice and Bob, two kernels with a cable between them."""
    alice, bob = make_netns("alice"), make_netns("bob")
    alice.add_veth("eth0", bob, "eth0")
    for namespace, address in ((alice, ALICE), (bob, BOB)):
        namespace.sysctl("net.ipv6.conf.eth0.disable_ipv6", 1)
        namespace.set_up("eth0", f"{address}/24")
    return alice, bob


async def listen(
    namespace: Namespace, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> tuple[AbstractAsyncContextManager[object], int]:
    """A server on the kernel's sockets of `namespace`, on our event loop, and its port."""
    listener = namespace.open(socket.create_server, ("0.0.0.0", 0))
    return await asyncio.start_server(answer, sock=listener), listener.getsockname()[1]


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.read()).upper())
    writer.close()


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 5\r\n\r\nhello")
    writer.close()


async def test_ping_counts_what_came_back(cable: tuple[Namespace, Namespace]) -> None:
    answered = await ping(cable[0], BOB, count=5, size=1000)
    assert (answered.sent, answered.received) == (5, 5)
    assert 0 < answered.rtt_min <= answered.rtt_avg <= answered.rtt_max < 5


async def test_ping_counts_what_did_not_come_back(cable: tuple[Namespace, Namespace]) -> None:
    lost = await ping(cable[0], "10.77.1.99", count=1, interval=1, patience=1)
    assert (lost.sent, lost.received) == (1, 0)


async def test_iperf3_measures_both_directions_and_udp(cable: tuple[Namespace, Namespace]) -> None:
    alice, bob = cable
    async with iperf3_server(bob, BOB):
        up = await iperf3(alice, BOB, size=8 << 20)
        down = await iperf3(alice, BOB, "-R", size=8 << 20)
        udp = await iperf3(alice, BOB, "-u", "-b", "10M", seconds=1)
    for transfer in (up, down):
        assert transfer.sent >= 8 << 20
        assert 0 < transfer.received <= transfer.sent
        assert transfer.rate > 1e6
    assert 0 < udp.received <= udp.sent


async def test_iperf3_without_a_server_is_a_failure(cable: tuple[Namespace, Namespace]) -> None:
    with pytest.raises(AssertionError, match="Connection refused"):
        await iperf3(cable[0], BOB)


async def test_curl_gives_status_and_body(cable: tuple[Namespace, Namespace]) -> None:
    alice, bob = cable
    server, port = await listen(bob, hello)
    async with server:
        assert await curl(alice, f"http://{BOB}:{port}/") == (418, b"hello")


async def test_curl_fails_with_its_own_words(cable: tuple[Namespace, Namespace]) -> None:
    with pytest.raises(AssertionError, match=r"exited with 7(.|\n)*Couldn't connect to server"):
        await curl(cable[0], f"http://{BOB}:9/")


async def test_nc_sends_a_fin_and_reads_to_the_others(cable: tuple[Namespace, Namespace]) -> None:
    alice, bob = cable
    server, port = await listen(bob, shout)
    async with server:
        assert await nc(alice, BOB, port, b"syn ack " * 10_000) == b"SYN ACK " * 10_000


async def test_nc_exchanges_datagrams(cable: tuple[Namespace, Namespace]) -> None:
    alice, bob = cable

    class Shout(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data.upper(), addr)

    sock = bob.open(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((BOB, 0))
    port = sock.getsockname()[1]
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Shout, sock=sock)
    try:
        assert await nc_udp(alice, BOB, port, b"datagram") == b"DATAGRAM"
    finally:
        transport.close()


async def test_a_capture_holds_everything_until_its_end(cable: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    alice, bob = cable
    async with capture(bob, "eth0", tmp_path / "ping.pcap", "icmp") as seen:
        await ping(alice, BOB, count=20)
    assert len(seen.frames()) == 40
    assert seen.complaints() == []


async def test_real_checksums_are_found_correct(cable: tuple[Namespace, Namespace], tmp_path: Path) -> None:
    for namespace in cable:
        namespace.run(require_tool("ethtool"), "-K", "eth0", "tx", "off")
    seen = await captured_transfer(cable, tmp_path)
    assert seen.complaints() == []


async def test_checksums_left_to_the_device_are_wrong_unless_offload_is_granted(
    cable: tuple[Namespace, Namespace], tmp_path: Path
) -> None:
    seen = await captured_transfer(cable, tmp_path)
    assert max(map(len, seen.frames())) > 10_000, "no super-frame: offload is not on"
    assert seen.complaints()
    assert all("Bad checksum" in what for _, what in seen.complaints())
    assert seen.complaints(offload=True) == []


async def captured_transfer(cable: tuple[Namespace, Namespace], tmp_path: Path) -> Capture:
    """A megabyte of TCP through the cable, and what was seen of it at Bob's end."""
    alice, bob = cable
    server, port = await listen(bob, shout)
    async with server, capture(bob, "eth0", tmp_path / "tcp.pcap", f"tcp port {port}") as seen:
        assert len(await nc(alice, BOB, port, b"x" * 1_000_000)) == 1_000_000
    return seen


def a_good_frame() -> bytearray:
    tcp = dpkt.tcp.TCP(sport=1000, dport=443, seq=1, flags=dpkt.tcp.TH_ACK, data=b"not TLS at all" * 9)
    ip = dpkt.ip.IP(src=b"\x0a\0\0\1", dst=b"\x0a\0\0\2", p=dpkt.ip.IP_PROTO_TCP, data=tcp)
    ip.len = len(ip)
    return bytearray(
        bytes(dpkt.ethernet.Ethernet(src=b"\2" * 6, dst=b"\4" * 6, type=dpkt.ethernet.ETH_TYPE_IP, data=bytes(ip)))
    )


def judged(path: Path, *frames: bytes | bytearray, offload: bool = False) -> list[Complaint]:
    with path.open("wb") as file:
        writer = dpkt.pcap.Writer(file)
        for number, frame in enumerate(frames):
            writer.writepkt(frame, number)
    return Capture(path).complaints(offload)


def test_a_good_frame_passes_whatever_its_port(tmp_path: Path) -> None:
    assert judged(tmp_path / "x.pcap", a_good_frame()) == []


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("position", "what"),
    [(-1, "Bad checksum"), (14 + 8, "Bad checksum"), (14 + 10, "Bad checksum"), (14 + 20 + 17, "Bad checksum")],
    ids=["payload", "ttl", "ip-checksum", "tcp-checksum"],
)
def test_one_wrong_bit_is_found(tmp_path: Path, position: int, what: str, offload: bool) -> None:
    good, bad = a_good_frame(), a_good_frame()
    bad[position] ^= 1
    found = judged(tmp_path / "x.pcap", good, bad, good, offload=offload)
    assert [complaint.frame for complaint in found] == [2]
    assert what in found[0].what


def test_a_truncated_header_is_malformed(tmp_path: Path) -> None:
    found = judged(tmp_path / "x.pcap", a_good_frame()[: 14 + 20 + 12], offload=True)
    assert [complaint.frame for complaint in found] == [1]
    assert "Malformed" in found[0].what


def test_only_the_sum_of_the_pseudo_header_counts_as_partial() -> None:
    frame = a_good_frame()
    assert not is_checksum_partial(frame)
    length = len(frame) - 14 - 20
    frame[14 + 20 + 16 : 14 + 20 + 18] = (0x0A00 + 0x0001 + 0x0A00 + 0x0002 + 6 + length).to_bytes(2)
    assert is_checksum_partial(frame)
