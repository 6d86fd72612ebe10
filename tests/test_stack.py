"""The stack as a whole: what it refuses leaves nothing behind."""

from __future__ import annotations

import pytest

from ustack.link.simwire import SimDevice
from ustack.stack import Stack


@pytest.mark.parametrize(
    ("address", "gateway"),
    [
        ("10.0.0.0/24", None),
        ("10.0.0.1/24", "1.2.3.4"),
        ("10.0.0.1/24", "10.0.0.1"),
        ("10.0.0.1/24", "10.0.0.255"),
        ("10.0.0.1/24", "nowhere"),
        ("fd00::/64", None),
    ],
)
def test_an_interface_that_is_refused_leaves_nothing_behind(address: str, gateway: str | None) -> None:
    stack = Stack(memory=1 << 20)
    free = stack.pages.free_pages
    with pytest.raises(ValueError, match=r"10\.0\.0|1\.2\.3\.4|nowhere|fd00::"):
        stack.add_interface(SimDevice("left", b"\x02\0\0\0\0\1"), address, gateway)
    assert not stack.interfaces
    assert stack.pages.free_pages == free
    stack.add_interface(SimDevice("left", b"\x02\0\0\0\0\1"), "10.0.0.1/24", "10.0.0.2")
    stack.close()


@pytest.mark.parametrize("memory", [0, -5, 4095])
def test_less_memory_than_a_page_is_refused(memory: int) -> None:
    with pytest.raises(ValueError, match="less than a page"):
        Stack(memory=memory)
