"""iperf3 on the kernel's side, both directions through our TCP.

iperf3 speaks only with iperf3, so a relay on our stack takes the client's connections and connects each, over our stack
again, to an iperf3 server that is on the kernel's side as well. Every byte passes our TCP twice: received, and sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import KERNEL, OURS
from tests.e2e.peers import iperf3, iperf3_server
from tests.e2e.relay import relay

if TYPE_CHECKING:
    from tests.e2e.conftest import StackOnTap
    from tests.netns import Namespace

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])]

PORT = 5201
MEGABYTE = 1 << 20


@pytest.mark.parametrize("mode", ["paged", "linear"])
@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
@pytest.mark.parametrize("direction", [[], ["-R"]], ids=["up", "down"])
async def test_iperf3_sends_through_us(
    stack_on_tap: StackOnTap, netns: Namespace, mode: str, offload: bool, direction: list[str]
) -> None:
    stack = await stack_on_tap(mode=mode, offload=offload)
    async with iperf3_server(netns, KERNEL, PORT), relay(stack, PORT):
        measured = await iperf3(netns, OURS, *direction, size=20 * MEGABYTE)
    assert measured.sent >= 20 * MEGABYTE
    assert measured.received > 0


async def test_iperf3_with_parallel_streams_both_ways_at_once(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    async with iperf3_server(netns, KERNEL, PORT), relay(stack, PORT):
        measured = await iperf3(netns, OURS, "--bidir", "-P", "4", seconds=2)
    assert measured.received > MEGABYTE


async def test_iperf3_with_small_writes(stack_on_tap: StackOnTap, netns: Namespace) -> None:
    stack = await stack_on_tap()
    async with iperf3_server(netns, KERNEL, PORT), relay(stack, PORT):
        measured = await iperf3(netns, OURS, "-N", "-l", "200", size=MEGABYTE)
    assert measured.sent >= MEGABYTE
