"""Memory pressure with a real kernel on the other side: who reads gets on, and afterwards everything is as it was."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import OURS, connected, kernel_socket, listen, until
from ustack.drops import DropReason
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e

CROWD = 12
DATA = Random(3).randbytes(1_000_000)
MEM = TcpConfig(mem_high=1 << 20)


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "plain"])
async def test_a_crowd_that_does_not_read_holds_up_nobody_else(
    stack_on_tap: StackOnTap, netns: Namespace, offload: bool
) -> None:
    stack = await stack_on_tap(offload=offload, tcp=MEM)
    mem = stack.tcp.mem
    loop = asyncio.get_running_loop()
    listener = listen(stack, 1234)
    crowd = [await connected(stack, netns, listener) for _ in range(CROWD)]
    reading, writing = await connected(stack, netns)
    floods = [asyncio.create_task(loop.sock_sendall(theirs, bytes(500_000))) for _, theirs in crowd]
    await until(mem.under_pressure)

    late = kernel_socket(netns)
    connecting = asyncio.create_task(loop.sock_connect(late, (OURS, 1234)))
    sending = asyncio.create_task(loop.sock_sendall(writing, DATA))
    received = bytearray()
    async with asyncio.timeout(30):
        while len(received) < len(DATA):
            received += await reading.recv(1 << 16)
    await sending
    assert received == DATA
    assert mem.under_pressure()
    assert mem.allocated <= mem.high + 17 * (CROWD + 1), "one packet each for who has nothing to read"
    await until(lambda: stack.drops[DropReason.MEM_PRESSURE] > 0)
    assert not connecting.done()

    async def read_it_all(number: int) -> None:
        ours, _ = crowd[number]
        left = 500_000
        while left:
            left -= len(await ours.recv(1 << 16))

    async with asyncio.timeout(30):
        await asyncio.gather(*(read_it_all(number) for number in range(CROWD)), *floods)
        await connecting
        accepted, _ = await listener.accept()
    assert not mem.under_pressure()
    assert mem.allocated == 0
    assert stack.mib.TcpExtTCPMemoryPressures > 0
    for ours, theirs in (*crowd, (reading, writing), (accepted, late)):
        ours.close()
        theirs.close()
    listener.close()
