"""A stack with several devices: each neighbour is reached by its own, VLANs are links of their own, and sources are checked."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests import leaks
from tests.sim.network import left_behind
from ustack.lab.world import VirtualLoop, World
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.simwire import Impairments, SimDevice, SimWire
from ustack.net.ipv4 import RP_LOOSE, RP_OFF, RP_STRICT, Ipv4Config
from ustack.net.ipv6 import Ipv6Config
from ustack.stack import Stack
from ustack.wire import ethernet, icmp, ipv4

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Random(4).randbytes(400_000)


class Lan:
    """Stacks and wires in virtual time."""

    def __init__(self) -> None:
        self.world = World(3)
        self.loop = VirtualLoop(self.world)
        self.stacks: list[Stack] = []
        self._macs = 0

    def stack(self, **config: Any) -> Stack:
        """One more stack."""
        stack = Stack(memory=8 << 20, random=Random(len(self.stacks)), ipv6=Ipv6Config(dad_transmits=0), **config)
        self.world.add(stack)
        leaks.watch_pool(stack.pool)
        leaks.watch(partial(left_behind, stack))
        self.stacks.append(stack)
        return stack

    def wire(self, a: Stack, b: Stack, features: int = FEATURE_CSUM | FEATURE_TSO) -> tuple[SimDevice, SimDevice]:
        """A cable between two stacks: a device for each, not used yet."""
        devices = []
        for _ in range(2):
            self._macs += 1
            devices.append(SimDevice(f"sim{self._macs}", bytes((2, 0, 0, 0, 0, self._macs)), 1500, features))
        SimWire(self.world, devices[0], devices[1], Impairments())
        for stack, device in ((a, devices[0]), (b, devices[1])):
            self.world._devices.append((stack, device))
        return devices[0], devices[1]

    def sent(self, sender: Stack, receiver: Stack, host: str) -> Any:
        """Send DATA to `host`, which is an address of `receiver`; the sender's name there."""

        async def transfer() -> Any:
            with receiver.socket(10 if ":" in host else 2) as listener, sender.socket(10 if ":" in host else 2) as client:
                listener.bind((host, 0))
                listener.listen()
                await client.connect(listener.getsockname()[:2])
                accepted, peer = await listener.accept()
                with accepted:
                    sending = self.loop.create_task(client.sendall(DATA))
                    received = bytearray()
                    while len(received) < len(DATA):
                        received += await accepted.recv(1 << 20)
                    await sending
                    assert received == DATA
                    return peer[0]

        return self.loop.run_until_complete(transfer())


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Nothing yet."""
    lan = Lan()
    yield lan
    for stack in lan.stacks:
        stack.close()
    lan.loop.close()


def test_each_network_is_reached_by_its_own_device(lan: Lan) -> None:
    a, b, c = lan.stack(), lan.stack(), lan.stack()
    to_b, from_a = lan.wire(a, b)
    to_c, also_a = lan.wire(a, c)
    a.add_interface(to_b, "10.1.0.1/24")
    second = a.add_interface(to_c, "10.2.0.1/24")
    a.add_address(second, "fd02::1/64")
    b.add_interface(from_a, "10.1.0.2/24", "10.1.0.1")
    far = c.add_interface(also_a, "10.2.0.2/24")
    c.add_address(far, "fd02::2/64")
    assert lan.sent(a, b, "10.1.0.2") == "10.1.0.1"
    assert lan.sent(a, c, "10.2.0.2") == "10.2.0.1"
    assert lan.sent(a, c, "fd02::2") == "fd02::1"
    a.add_route("10.9.0.0/16", "10.2.0.2")
    c.add_address(far, "10.9.0.1/16")
    c.add_route("10.1.0.0/16", "10.2.0.1")
    assert lan.sent(a, c, "10.9.0.1") == "10.2.0.1"


@pytest.mark.parametrize("features", [FEATURE_CSUM | FEATURE_TSO, 0])
def test_a_vlan_is_a_link_of_its_own(lan: Lan, features: int) -> None:
    a, b = lan.stack(), lan.stack()
    here, there = lan.wire(a, b, features)
    plain_a, plain_b = a.add_interface(here, "10.1.0.1/24"), b.add_interface(there, "10.1.0.2/24")
    mtu = 0 if features else 1496  # without super-frames the simulated device takes 1514 bytes, the tag included
    tagged_a = a.add_vlan(plain_a, 5, "10.5.0.1/24", mtu=mtu)
    tagged_b = b.add_vlan(plain_b, 5, "10.5.0.2/24", mtu=mtu)
    a.add_address(tagged_a, "fd05::1/64")
    b.add_address(tagged_b, "fd05::2/64")
    a.add_vlan(plain_a, 6, "10.6.0.1/24")
    assert lan.sent(a, b, "10.1.0.2") == "10.1.0.1"
    assert lan.sent(a, b, "10.5.0.2") == "10.5.0.1"
    assert lan.sent(b, a, "fd05::1") == "fd05::2"
    assert tagged_b.device.name == "sim2.5"
    assert tagged_b.device.stats.rx_packets > 5
    with a.socket() as nobody, pytest.raises(OSError, match="No route to host"):
        lan.loop.run_until_complete(nobody.connect(("10.6.0.9", 80)))
    assert b.drops.by_name()["UNHANDLED_PROTO"] > 0, "a tag that it has no interface for"
    with pytest.raises(ValueError, match="VLAN 5 is in use"):
        a.add_vlan(plain_a, 5, "10.7.0.1/24")
    for vid in (0, 4095, -1):
        with pytest.raises(ValueError, match="a VLAN identifier is 1 to 4094"):
            a.add_vlan(plain_a, vid)


def echo_request(src: bytes, dst: bytes, mac: bytes, tags: bytes = b"") -> bytes:
    message = icmp.build_header(icmp.ICMP_ECHO, 0, 1, 1, [b"x"]) + b"x"
    packet = ipv4.build_header(src, dst, 1, len(message)) + message
    plain = ethernet.build_header(mac, b"\2\0\0\0\0\x77", ethernet.ETH_P_IP)
    return plain[:12] + tags + plain[12:] + packet


def deliver(stack: Stack, device: SimDevice, frame: bytes) -> None:
    from ustack.link.device import NO_CSUM
    from ustack.link.simwire import WireFrame

    device.receive(WireFrame(frame, 0, NO_CSUM, 0))
    stack.receive(device)


def test_tags_that_are_cut_doubled_or_only_say_how_urgent(lan: Lan) -> None:
    a, b = lan.stack(), lan.stack()
    here, _ = lan.wire(a, b)
    interface = a.add_interface(here, "10.1.0.1/24")
    a.add_vlan(interface, 5, "10.5.0.1/24")
    us, peer = bytes((10, 1, 0, 1)), bytes((10, 1, 0, 2))
    deliver(a, here, echo_request(peer, us, here.mac, b"\x81\0\xe0\0"))
    assert a.mib.IcmpInEchos == 1, "a priority tag is no VLAN"
    deliver(a, here, echo_request(bytes((10, 5, 0, 2)), bytes((10, 5, 0, 1)), here.mac, b"\x81\0\xe0\5"))
    assert a.mib.IcmpInEchos == 2
    deliver(a, here, echo_request(peer, us, here.mac, b"\x81\0\0\5\x81\0\0\5"))
    deliver(a, here, echo_request(peer, us, here.mac, b"\x81\0\0\7"))
    for length in (14, 15, 17):
        deliver(a, here, echo_request(peer, us, here.mac, b"\x81\0\0\5")[:length])
    assert a.mib.IcmpInEchos == 2
    assert a.drops.by_name() == {"UNHANDLED_PROTO": 2, "PKT_TOO_SMALL": 3}


@pytest.mark.parametrize(
    ("policy", "answered"),
    [(RP_OFF, {"neighbour", "elsewhere", "nowhere"}), (RP_STRICT, {"neighbour"}), (RP_LOOSE, {"neighbour", "elsewhere"})],
)
def test_the_way_back_to_a_source_is_checked_as_configured(lan: Lan, policy: int, answered: set[str]) -> None:
    """RFC 3704; rp_filter of Linux."""
    a, b = lan.stack(ipv4=Ipv4Config(rp_filter=policy)), lan.stack()
    first, _ = lan.wire(a, b)
    second, _ = lan.wire(a, b)
    a.add_interface(first, "10.1.0.1/24")
    a.add_interface(second, "10.2.0.1/24")
    us = bytes((10, 1, 0, 1))
    seen = set()
    for name, src in (("neighbour", (10, 1, 0, 2)), ("elsewhere", (10, 2, 0, 2)), ("nowhere", (192, 0, 2, 1))):
        before = a.mib.IcmpInEchos
        deliver(a, first, echo_request(bytes(src), us, first.mac))
        if a.mib.IcmpInEchos > before:
            seen.add(name)
    assert seen == answered
    assert a.drops.by_name().get("IP_RPFILTER", 0) == a.mib.TcpExtIPReversePathFilter == 3 - len(answered)


def test_loopback_addresses_from_the_wire_are_martians(lan: Lan) -> None:
    a, b = lan.stack(), lan.stack()
    here, _ = lan.wire(a, b)
    a.add_interface(here, "10.1.0.1/24")
    deliver(a, here, echo_request(bytes((10, 1, 0, 2)), bytes((127, 0, 0, 1)), here.mac))
    deliver(a, here, echo_request(bytes((127, 0, 0, 1)), bytes((10, 1, 0, 1)), here.mac))
    assert a.drops.by_name() == {"IP_INADDRERRORS": 2}
