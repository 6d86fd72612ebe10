"""The kernel's side of a scenario in real time: an NBD server, senders on the kernel's sockets, and a raw socket for what no
honest kernel would send. A process of its own, like that of the demo.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from random import Random
from typing import Any

from pydantic import TypeAdapter
from pyroute2 import IPRoute

from ustack.lab.demo_peer import obey
from ustack.lab.pressure.frames import FloodTraffic, FrameSource
from ustack.lab.pressure.run import EXPORT
from ustack.lab.pressure.scenario import TcpBlocked
from ustack.lab.pressure.subject import ADDRESS, PEER, Repeat
from ustack.lab.pressure.virtual import Disk, announcement
from ustack.nbd.server import NbdServer

ZEROES = bytes(65536)


class _RealPeer:
    """What it can do. Sizes are bytes, times seconds, addresses hexadecimal."""

    def __init__(self) -> None:
        self._disk: Disk
        self._server: NbdServer | None = None
        self._port = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._repeats: list[Repeat] = []
        self._raw: socket.socket | None = None

    async def serve(self, size: int) -> int:
        """Export a disk; returns the port."""
        self._disk = Disk(size, EXPORT)
        return await self.start_server()

    async def start_server(self) -> int:
        """Serve the disk, on the same port as before if there was one; returns it."""
        self._server = NbdServer([self._disk])
        self._port = await self._server.listen_tcp("0.0.0.0", self._port)
        return self._port

    async def stop_server(self) -> None:
        """End the server and its connections."""
        if self._server is not None:
            await self._server.close()

    async def send(self, port: int, traffic: dict[str, Any], seed: int) -> None:
        """Connect and send as `traffic`, a `TcpBlocked`, says."""
        plan = TypeAdapter(TcpBlocked).validate_python(traffic)
        random = Random(seed)
        loop = asyncio.get_running_loop()
        self._tasks += [loop.create_task(_send(port, plan, random)) for _ in range(plan.count)]

    async def flood(self, device: str, subject_mac: str, traffic: dict[str, Any], seed: int, mtu: int, first_port: int) -> None:
        """Send the frames of `traffic`, of any kind that comes frame by frame, into `device`."""
        plan: FloodTraffic = TypeAdapter(FloodTraffic).validate_python(traffic)
        raw = self._raw_socket(device)
        source = FrameSource(
            plan,
            Random(seed),
            src=socket.inet_aton(PEER),
            src_mac=raw.getsockname()[4],
            dst=socket.inet_aton(ADDRESS),
            dst_mac=bytes.fromhex(subject_mac),
            mtu=mtu,
            first_port=first_port,
        )

        def step(count: int) -> None:
            with contextlib.suppress(BlockingIOError, InterruptedError):  # the queue of the device is full: that is its rate
                for _ in range(count):
                    for frame in source.next():
                        raw.send(frame)

        stop = None if plan.stop is None else plan.stop - plan.start
        self._repeats.append(Repeat(plan.rate, 0.0, stop, step))

    def _raw_socket(self, device: str) -> socket.socket:
        if self._raw is None:
            self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)  # of no protocol: it receives nothing
            self._raw.bind((device, 0))
            self._raw.setblocking(False)
        return self._raw

    async def change_mac(self, device: str, announce: bool) -> None:
        """Give `device` another Ethernet address, and tell everybody if wanted."""
        raw = self._raw_socket(device)
        old = raw.getsockname()[4]
        mac = b"\x02" + old[1:4] + ((int.from_bytes(old[4:], "big") + 0x100) & 0xFFFF).to_bytes(2, "big")
        await asyncio.to_thread(_set_mac, device, mac)
        if announce:
            for _ in range(2):
                raw.send(announcement(mac, socket.inet_aton(PEER)))

    async def end(self) -> None:
        """Stop everything."""
        for repeat in self._repeats:
            repeat.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.stop_server()


def _set_mac(device: str, mac: bytes) -> None:
    with IPRoute() as ip:
        ip.link("set", index=socket.if_nametoindex(device), address=mac.hex(":"))


async def _send(port: int, plan: TcpBlocked, random: Random) -> None:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(ADDRESS, port)
        try:
            left = plan.size
            while left is None or left > 0:
                size = random.randint(*plan.write)
                size = size if left is None else min(size, left)
                writer.write(ZEROES[:size])
                await writer.drain()
                if left is not None:
                    left -= size
            await asyncio.Event().wait()  # connected until the end
        finally:
            writer.transport.abort()


if __name__ == "__main__":
    import uvloop

    uvloop.run(obey(_RealPeer()))
