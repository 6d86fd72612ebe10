"""Our stack on a TAP device, with a kernel of its own on the other side."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Protocol

import pytest_asyncio
import uvloop

from tests import leaks
from ustack.link.tap import TapDevice
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.netns import Namespace

OURS: Final = "10.77.0.2"
KERNEL: Final = "10.77.0.1"


class StackOnTap(Protocol):
    """Makes a running stack with the address OURS on `tap0`, where the kernel of `netns` has the address KERNEL."""

    async def __call__(self, *, mode: str = "paged", offload: bool = True, mtu: int = 1500, **options: Any) -> Stack:
        """`mode`, `offload`: see TapDevice; `options`: see Stack; `mtu` in bytes, of both sides."""


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loop that the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def stack_on_tap(netns: Namespace) -> AsyncIterator[StackOnTap]:
    """See `StackOnTap`. When the test ends the stack is closed, and nothing may be left or have been complained about."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async with AsyncExitStack() as running:

        async def make(*, mode: str = "paged", offload: bool = True, mtu: int = 1500, **options: Any) -> Stack:
            netns.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
            netns.netlink(lambda ip: ip.link("add", ifname="tap0", kind="tuntap", mode="tap"))
            netns.set_up("tap0", f"{KERNEL}/24", mtu=mtu)
            stack = Stack(**options)
            leaks.watch(lambda: held_by(stack))
            leaks.watch_pool(stack.pool)
            await running.enter_async_context(stack)
            stack.add_interface(netns.open(TapDevice, "tap0", mode=mode, offload=offload), f"{OURS}/24")
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
