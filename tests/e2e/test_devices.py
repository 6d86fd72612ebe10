"""A TAP device that cannot be used is released."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.link.tap import TapDevice
from ustack.stack import Stack

if TYPE_CHECKING:
    from tests.netns import Namespace

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("address", ["10.77.0.0/24", "224.0.0.1/24", "fd00::1/64", "nonsense"])
def test_an_address_that_cannot_be_used_releases_the_device(netns: Namespace, address: str) -> None:
    stack = Stack(memory=4 << 20)
    with pytest.raises(ValueError):
        stack.add_interface(netns.open(TapDevice, "tap0"), address)
    again = netns.open(TapDevice, "tap0")  # EBUSY while somebody holds it
    again.close()
    stack.close()
    assert stack.pool.stats.requested == 0
