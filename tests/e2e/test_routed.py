"""A network behind the kernel: packets go through a router, which may lose them or have no room for them."""

from __future__ import annotations

import socket
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING, Final

import pytest

from tests.e2e.conftest import KERNEL, OURS
from tests.e2e.peers import nc, ping
from tests.needs import require_tool
from ustack.net.path import PMTUDISC_DO
from ustack.socket_options import IP_MTU_DISCOVER

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace
    from ustack.stack import Stack

pytestmark = pytest.mark.e2e

FAR: Final = "10.78.0.2"
ROUTER: Final = "10.78.0.1"
DATA: Final = Random(3).randbytes(4_000_000)

modes = pytest.mark.parametrize("mode", ["paged", "linear"])


@pytest.fixture
def far(netns: Namespace, make_netns: Callable[[str], Namespace]) -> Namespace:
    """A host with the address FAR on a cable behind the kernel of `netns`, which is its router and ours."""
    host = make_netns("far")
    netns.add_veth("eth0", host, "eth0")
    for namespace, address in ((netns, ROUTER), (host, FAR)):
        namespace.sysctl("net.ipv6.conf.eth0.disable_ipv6", 1)
        namespace.set_up("eth0", f"{address}/24")
    netns.sysctl("net.ipv4.ip_forward", 1)
    host.add_route("default", ROUTER)
    return host


def lose(router: Namespace, *, to_us: int = 0, from_us: int = 0) -> None:
    """Let the router drop one packet in so many of those for us and of those from us; 0: none."""
    rules = [
        f"add rule ip loss forward {direction} tap0 numgen inc mod {every} == {every - 1} drop"
        for direction, every in (("oifname", to_us), ("iifname", from_us))
        if every
    ]
    chain = ["add table ip loss", "add chain ip loss forward { type filter hook forward priority 0; }"]
    router.run(require_tool("nft"), "-f", "-", stdin="\n".join(chain + rules).encode())


def narrow(router: Namespace, mtu: int) -> None:
    """Let the router send no more than `mtu` bytes towards FAR. What comes from there may still be larger."""
    router.run("ip", "route", "replace", "10.78.0.0/24", "dev", "eth0", "mtu", "lock", str(mtu))


async def echoed(stack: Stack, host: Namespace, data: bytes) -> bytes:
    """`data`, sent to us by `host` and back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while part := await reader.read(1 << 16):
                writer.write(part)
                await writer.drain()

    server = await stack.start_server(echo, None, 1003)
    arrived = await nc(host, OURS, 1003, data, timeout=60)
    server.close()
    return arrived


async def routed_stack(stack_on_tap: StackOnTap, *, mode: str = "paged", offload: bool = True) -> Stack:
    """A stack that knows the way to FAR."""
    stack = await stack_on_tap(mode=mode, offload=offload)
    stack.add_route("10.78.0.0/24", KERNEL)
    return stack


async def test_a_host_behind_the_router_is_reached(stack_on_tap: StackOnTap, far: Namespace) -> None:
    stack = await routed_stack(stack_on_tap)
    answered = await ping(far, OURS)
    assert answered.received == 3
    assert "ttl=63 " in answered.output
    assert await echoed(stack, far, DATA) == DATA


async def test_a_host_that_we_have_no_route_to_is_unreachable(stack_on_tap: StackOnTap, far: Namespace) -> None:
    stack = await stack_on_tap()
    with stack.socket() as ours, pytest.raises(OSError, match="Network is unreachable"):
        await ours.connect((FAR, 80))
    assert (await ping(far, OURS, count=1, patience=1)).received == 0
    assert "IP_OUTNOROUTES" in stack.drops.by_name()


async def test_a_host_that_the_router_does_not_find_is_unreachable(stack_on_tap: StackOnTap, far: Namespace) -> None:
    stack = await routed_stack(stack_on_tap)
    with stack.socket() as ours, pytest.raises(OSError, match="No route to host"):
        await ours.connect(("10.78.0.99", 80))
    assert far.pids() == []


@modes
@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
async def test_what_we_send_arrives_though_some_of_it_is_lost(
    stack_on_tap: StackOnTap, netns: Namespace, far: Namespace, mode: str, offload: bool
) -> None:
    stack = await routed_stack(stack_on_tap, mode=mode, offload=offload)
    lose(netns, from_us=20 if offload else 50)
    assert await echoed(stack, far, DATA) == DATA
    assert stack.mib.TcpRetransSegs > 0


@modes
async def test_what_is_sent_to_us_arrives_though_some_of_it_is_lost(
    stack_on_tap: StackOnTap, netns: Namespace, far: Namespace, mode: str
) -> None:
    stack = await routed_stack(stack_on_tap, mode=mode)
    far.run(require_tool("ethtool"), "-K", "eth0", "tso", "off", "gso", "off")  # so that single segments are lost
    lose(netns, to_us=50)
    assert await echoed(stack, far, DATA) == DATA
    assert stack.mib.TcpExtTCPOFOQueue > 0


async def test_both_ways_lose_one_packet_in_ten(stack_on_tap: StackOnTap, netns: Namespace, far: Namespace) -> None:
    stack = await routed_stack(stack_on_tap)
    lose(netns, to_us=10, from_us=10)
    assert await echoed(stack, far, DATA[:300_000]) == DATA[:300_000]


async def test_a_narrow_link_makes_our_segments_smaller(stack_on_tap: StackOnTap, netns: Namespace, far: Namespace) -> None:
    """Path MTU discovery (RFC 1191): the router says what fits, and all arrives. The far host offers segments for 1500."""
    stack = await routed_stack(stack_on_tap)
    narrow(netns, 1200)
    assert await echoed(stack, far, DATA) == DATA
    path = stack.ip.path(bytes((10, 78, 0, 2)))
    assert path.mtu == 1200


async def test_a_datagram_too_large_for_the_path_is_refused_once_that_is_known(
    stack_on_tap: StackOnTap, netns: Namespace, far: Namespace
) -> None:
    stack = await routed_stack(stack_on_tap)
    narrow(netns, 1200)
    assert await echoed(stack, far, DATA[:100_000]) == DATA[:100_000]
    with stack.socket(type=2) as ours:
        ours.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        with pytest.raises(OSError, match="Message too long"):
            await ours.sendto(bytes(1173), (FAR, 9))
        await ours.sendto(bytes(1172), (FAR, 9))


async def test_a_slow_link_with_a_short_queue(stack_on_tap: StackOnTap, netns: Namespace, far: Namespace) -> None:
    """Congestion: what comes too fast is lost, in both directions, and both senders slow down."""
    stack = await routed_stack(stack_on_tap)
    shape = ("root", "tbf", "rate", "40mbit", "burst", "32k", "latency", "5ms")
    for device in ("tap0", "eth0"):
        netns.run(require_tool("tc"), "qdisc", "replace", "dev", device, *shape)
    assert await echoed(stack, far, DATA) == DATA
    assert stack.mib.TcpRetransSegs > 0
