"""A TAP device that cannot be used is released."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.link.tap import TapDevice
from ustack.stack import Stack

if TYPE_CHECKING:
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("10.77.0.0/24", "names the network"),
        ("224.0.0.1/24", "cannot be the IPv4 address"),
        ("ff02::1/64", "cannot be the IPv6 address"),
        ("nonsense", "does not appear to be"),
    ],
)
def test_an_address_that_cannot_be_used_releases_the_device(netns: Namespace, address: str, reason: str) -> None:
    stack = Stack(memory=4 << 20)
    with pytest.raises(ValueError, match=reason):
        stack.add_interface(netns.open(TapDevice, "tap0"), address)
    again = netns.open(TapDevice, "tap0")  # EBUSY while somebody holds it
    again.close()
    stack.close()
    assert stack.pool.stats.requested == 0
