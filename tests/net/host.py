"""A host for tests: IPv4 and UDP on simulated devices, with memory of its own that is empty again when the test has ended."""

from __future__ import annotations

from random import Random
from socket import AF_INET, inet_pton
from typing import TYPE_CHECKING, Any

from pools.arena import Arena
from pools.buddy import PageAllocator
from pools.kmalloc import KmallocPool
from tests import leaks
from ustack.drops import Drops
from ustack.env import Env
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO, NO_CSUM
from ustack.link.rxring import PagedRing
from ustack.link.simwire import SimDevice, WireFrame
from ustack.mib import Mib
from ustack.net.interface import Interface
from ustack.net.ip import Ip
from ustack.net.ipv4 import Ipv4
from ustack.net.ipv6 import Ipv6
from ustack.skb import SkbMemory
from ustack.timers import Timers
from ustack.transport.udp import Udp
from ustack.wire import arp, ethernet, ipv4

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.lab.world import World
    from ustack.link.device import Device
    from ustack.link.rxring import RxRing
    from ustack.net.neighbour import NeighbourParameters

OFFLOADS = FEATURE_CSUM | FEATURE_TSO


def ip(text: str) -> bytes:
    """The packed form of an IPv4 address."""
    return inet_pton(AF_INET, text)


def make_env(pages: int = 512, seed: int = 1) -> Env:
    """Surroundings with `pages` pages of memory, watched for leaks."""
    memory = SkbMemory(leaks.watch_pool(KmallocPool(PageAllocator(Arena(pages)))))
    leaks.watch(lambda: [f"{memory.live} skbs"] if memory.live else [])
    leaks.watch(lambda: [f"{name}: {n} pages" for name, n in memory.pages.pages_by_owner().items() if n])
    return Env(Timers(), memory, Drops(), Mib(), Random(seed))


class Host:
    """A host with one device and one address, e.g. `Host("10.0.0.1/24")`. Its MAC is 02:00 and the address."""

    def __init__(
        self,
        address: str,
        features: int = OFFLOADS,
        mtu: int = 1500,
        ring: Callable[..., RxRing] = PagedRing,
        pages: int = 512,
        parameters: NeighbourParameters | None = None,
    ) -> None:
        text, _, prefix_len = address.partition("/")
        self.address = ip(text)
        self.env = make_env(pages)
        self.device = SimDevice("sim0", b"\x02\x00" + self.address, mtu, features, ring)
        self.interface = Interface(self.env, self.device, self.address, int(prefix_len), parameters)
        self.device.attach(self.env.memory, self.env.drops, self.interface.input)
        self.ipv4 = Ipv4(self.env)
        self.ipv6 = Ipv6(self.env)
        self.ip = Ip(self.ipv4, self.ipv6)
        self.udp = Udp(self.env, self.ip)

    def up(self) -> Host:
        """Use the interface, once its device is on a wire."""
        self.ipv4.add_interface(self.interface)
        return self

    def live_in(self, world: World) -> Host:
        """Take part in `world` and use the interface."""
        world.add(self, self.device)
        return self.up()

    def receive(self, device: Device) -> None:
        """Receive a batch."""
        device.poll(64)

    def flush(self) -> None:
        """Wake the users of sockets."""
        self.udp.flush()

    def close(self) -> None:
        """Give everything back, also when the test has closed it already."""
        self.udp.close()
        self.ipv6.close()
        self.ipv4.close()
        self.device.close()


class BenchHost(Host):
    """A host without a wire: what it sends is collected in `sent`, and the test plays the rest of the network.

    `peer` is a neighbour with the MAC `peer_mac`; `now` is the host's clock.
    """

    def __init__(self, address: str = "10.0.0.1/24", peer: str = "10.0.0.2", **options: Any) -> None:
        super().__init__(address, **options)
        self.sent: list[bytes] = []
        self.peer = ip(peer)
        self.peer_mac = b"\x02\x99" + self.peer
        self.device.wire = lambda frame: self.sent.append(bytes(frame.data))
        self.up()
        self.env.timers.run(3.0)  # past the announcements
        self.sent.clear()

    def arrive(self, frame: bytes, csum_ok: bool = False) -> None:
        """Deliver a frame."""
        arriving = WireFrame(frame, 0, NO_CSUM, 0)
        arriving.csum_ok = csum_ok
        self.device.receive(arriving)
        self.device.poll(1)
        self.flush()

    def arrive_ip(
        self, proto: int, payload: bytes, *, csum_ok: bool = False, dst_mac: bytes | None = None, **fields: Any
    ) -> None:
        """Deliver an IP packet from the peer to the host; `fields` are those of `ipv4.build_header`."""
        src, dst = fields.pop("src", self.peer), fields.pop("dst", self.address)
        header = ipv4.build_header(src, dst, proto, len(payload), **fields)
        mac = self.device.mac if dst_mac is None else dst_mac
        self.arrive(ethernet.build_header(mac, self.peer_mac, ethernet.ETH_P_IP) + header + payload, csum_ok)

    def arrive_arp(
        self, op: int, spa: bytes, tpa: bytes, *, sha: bytes | None = None, dst_mac: bytes = ethernet.BROADCAST
    ) -> None:
        """Deliver an ARP packet."""
        sender = sha or self.peer_mac
        packet = arp.build(op, sender, spa, bytes(6), tpa)
        self.arrive(ethernet.build_header(dst_mac, sender, ethernet.ETH_P_ARP) + packet)

    def answer_arp(self) -> None:
        """The peer answers for its address."""
        self.arrive_arp(arp.ARPOP_REPLY, self.peer, self.address, dst_mac=self.device.mac)

    def take_sent(self) -> list[bytes]:
        """What was sent since the last time."""
        sent, self.sent[:] = self.sent[:], []
        return sent

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.env.timers.run(self.env.timers.now + seconds)
        self.flush()

    @property
    def drops(self) -> dict[str, int]:
        """Drops by reason."""
        return self.env.drops.by_name()
