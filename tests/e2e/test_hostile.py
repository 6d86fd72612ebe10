"""Frames that nobody should send, put on the TAP by a raw socket: each is dropped and counted, and the stack lives on."""

from __future__ import annotations

import asyncio
import socket
from random import Random
from typing import TYPE_CHECKING, Final

import dpkt
import pytest

from tests.e2e.conftest import KERNEL, OURS, listen, until
from tests.e2e.peers import nc, ping

if TYPE_CHECKING:
    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

ETH_P_ALL: Final = 3
FRAMES: Final = 3000


def good_frames(dst: bytes, src: bytes) -> list[bytes]:
    """One of each kind that the stack understands."""
    here, there = socket.inet_aton(KERNEL), socket.inet_aton(OURS)
    tcp = dpkt.tcp.TCP(
        sport=4000, dport=80, seq=7, flags=dpkt.tcp.TH_SYN, opts=bytes.fromhex("020405b40402080a0000000100000000")
    )
    tcp.off = 9
    udp = dpkt.udp.UDP(sport=4000, dport=7, data=b"datagram", ulen=16)
    echo = dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=1, seq=1, data=b"echo"))
    arp = dpkt.arp.ARP(sha=src, spa=here, tpa=there)
    frames = [dpkt.ethernet.Ethernet(dst=dst, src=src, type=dpkt.ethernet.ETH_TYPE_ARP, data=bytes(arp))]
    for proto, payload in ((dpkt.ip.IP_PROTO_TCP, tcp), (dpkt.ip.IP_PROTO_UDP, udp), (dpkt.ip.IP_PROTO_ICMP, echo)):
        packet = dpkt.ip.IP(src=here, dst=there, p=proto, data=payload, ttl=64)
        packet.len = len(packet)
        frames.append(dpkt.ethernet.Ethernet(dst=dst, src=src, type=dpkt.ethernet.ETH_TYPE_IP, data=bytes(packet)))
    return [bytes(frame) for frame in frames]


def spoilt(frame: bytes, random: Random) -> bytes:
    """The frame with some bytes changed behind the addresses, or cut short, or with rubbish at its end."""
    broken = bytearray(frame)
    for _ in range(random.randrange(4)):
        broken[random.randrange(12, len(broken))] = random.randrange(256)
    match random.randrange(3):
        case 0:
            del broken[random.randrange(14, len(broken)) :]
        case 1:
            broken += random.randbytes(random.randrange(1400))
    return bytes(broken)


@pytest.mark.parametrize("mode", ["paged", "linear"])
async def test_the_stack_survives_whatever_is_on_the_wire(stack_on_tap: StackOnTap, netns: Namespace, mode: str) -> None:
    stack = await stack_on_tap(mode=mode)
    device = stack.interfaces[0].device
    random = Random(77)
    good = good_frames(device.mac, bytes.fromhex(netns.mac("tap0").replace(":", "")))
    with listen(stack), netns.open(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL) as wire:
        wire.bind(("tap0", 0))
        for _ in range(FRAMES // 50):
            before = device.stats.rx_packets
            for _ in range(50):
                wire.send(spoilt(random.choice(good), random))
            await until(lambda: device.stats.rx_packets >= before + 50)  # noqa: B023 (called before the loop goes on)
    assert stack.drops.total() > FRAMES // 4
    assert (await ping(netns, OURS)).received == 3


async def test_a_super_frame_of_rubbish_is_dropped(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    """As large as a frame can be, and for us, but not even IP."""
    stack = await stack_on_tap(mtu=65521)
    device = stack.interfaces[0].device
    with netns.open(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL) as wire:
        wire.bind(("tap0", 0))
        for size in (1500, 2048, 2049, 4096, 65521):
            wire.send(device.mac + bytes(6) + b"\x08\x00" + b"\xff" * size)
    await until(lambda: stack.drops.total() == 5)
    assert stack.drops.by_name() == {"IP_INHDR": 5}


async def test_rubbish_on_one_connection_does_not_disturb_another(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    device = stack.interfaces[0].device
    random = Random(78)
    good = good_frames(device.mac, bytes.fromhex(netns.mac("tap0").replace(":", "")))
    data = random.randbytes(3_000_000)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1 << 16):
            writer.write(part)
            await writer.drain()
        writer.close()

    server = await stack.start_server(echo, None, 1003)
    transfer = asyncio.create_task(nc(netns, OURS, 1003, data))
    with netns.open(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL) as wire:
        wire.bind(("tap0", 0))
        while not transfer.done():
            wire.send(spoilt(random.choice(good), random))
            await asyncio.sleep(0)
    assert await transfer == data
    server.close()
