"""Our stack on a TAP device, with a kernel of its own on the other side."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Protocol

import pytest_asyncio
import uvloop

from tests import leaks
from ustack.lab.impaired import ImpairedTap
from ustack.link.tap import TapDevice
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import pytest

    from tests.netns import Namespace
    from ustack.link.simwire import Impairments
    from ustack.net.ipv6 import Ipv6Config
    from ustack.socket import Socket

OURS: Final = "10.77.0.2"
KERNEL: Final = "10.77.0.1"
OURS6: Final = "fd00:77::2"
KERNEL6: Final = "fd00:77::1"

PROBES: Final = frozenset({"TCP_OLD_DATA"})
"""Drops that only mean that we were slow: the kernel has probed for a lost tail (RFC 8985, section 7)."""


class StackOnTap(Protocol):
    """Makes a running stack with the address OURS on `tap0`, where the kernel of `netns` has the address KERNEL."""

    async def __call__(
        self,
        *,
        mode: str = "paged",
        offload: bool = True,
        mtu: int = 1500,
        wire: tuple[Impairments, int] | None = None,
        ipv6: Ipv6Config | None = None,
        **options: Any,
    ) -> Stack:
        """`mode`, `offload`: see TapDevice; `options`: see Stack; `mtu` in bytes, of both sides. `wire`: what happens to frames
        in both directions, and the seed of that. With `ipv6` we have the address OURS6 as well, and the kernel has KERNEL6.
        """


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A test may ask for uvloop, on which the daemon runs, by `pytest.mark.asyncio(loop_factories=...)`. Others get asyncio's
    own loop, because pytest-timeout cannot interrupt uvloop.
    """
    marker = item.get_closest_marker("asyncio")
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if marker is not None and "loop_factories" in marker.kwargs:
        loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest_asyncio.fixture
async def stack_on_tap(netns: Namespace) -> AsyncIterator[StackOnTap]:
    """See `StackOnTap`. When the test ends the stack is closed, and nothing may be left or have been complained about."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async with AsyncExitStack() as running:

        async def make(
            *,
            mode: str = "paged",
            offload: bool = True,
            mtu: int = 1500,
            wire: tuple[Impairments, int] | None = None,
            ipv6: Ipv6Config | None = None,
            **options: Any,
        ) -> Stack:
            netns.sysctl("net.ipv6.conf.default.disable_ipv6", int(ipv6 is None))
            netns.netlink(lambda ip: ip.link("add", ifname="tap0", kind="tuntap", mode="tap"))
            netns.set_up("tap0", f"{KERNEL}/24", *([] if ipv6 is None else [f"{KERNEL6}/64"]), mtu=mtu)
            stack = Stack(ipv6=ipv6, **options)
            leaks.watch(lambda: held_by(stack))
            leaks.watch_pool(stack.pool)
            await running.enter_async_context(stack)
            tap = netns.open(TapDevice, "tap0", mode=mode, offload=offload and wire is None)
            if wire is None:
                stack.add_interface(tap, f"{OURS}/24")
            else:
                behind = ImpairedTap(tap, wire[0], seed=wire[1])
                stack.add_interface(behind, f"{OURS}/24")
                behind.start(stack)
            if ipv6 is not None:
                stack.add_address(stack.interfaces[0], f"{OURS6}/64")
            # A link whose carrier has just come loses what is sent to it until the kernel has noticed.
            await until(lambda: netns.netlink(lambda ip: ip.link("get", ifname="tap0"))[0].get("operstate") == "UP")
            return stack

        yield make
    await asyncio.sleep(0)  # callbacks of what was closed just now
    assert not complaints


def held_by(stack: Stack) -> list[str]:
    """What a closed stack still holds: skbs, what they are charged to, and pages; must be nothing."""
    found = [f"{account.name}: {account.bytes} bytes charged" for account in stack.accounts() if account.bytes]
    if stack.env.memory.live:
        found.append(f"{stack.env.memory.live} skbs alive")
    stack.pool.reap()
    found += [f"{owner}: {pages} pages" for owner, pages in stack.pages.pages_by_owner().items() if pages]
    return found


def listen(stack: Stack, port: int = 80, family: int = socket.AF_INET) -> Socket:
    """A socket of ours that listens on every address."""
    listener = stack.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", port))
    listener.listen()
    return listener


def kernel_socket(netns: Namespace, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
    """A socket of the kernel's for the event loop."""
    sock = netns.open(socket.socket, family, kind)
    sock.setblocking(False)
    return sock


async def connected(stack: Stack, netns: Namespace, listener: Socket | None = None) -> tuple[Socket, socket.socket]:
    """Our end and the kernel's end of one connection that the kernel has opened, to port 80 if there is no `listener` yet."""
    accepting = listener or listen(stack)
    theirs = kernel_socket(netns)
    await asyncio.get_running_loop().sock_connect(theirs, (OURS, accepting.getsockname()[1]))
    ours, _ = await accepting.accept()
    if listener is None:
        accepting.close()
    return ours, theirs


async def until(fact: Callable[[], bool]) -> None:
    """Wait until `fact` holds, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not fact():
            await asyncio.sleep(0.005)
