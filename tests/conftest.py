"""What every test shares: what the machine must have, and the rule that nothing is left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import leaks, needs

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hold a test marked `root` or `e2e` back where it cannot run."""
    if item.get_closest_marker("e2e"):
        needs.require_root()
        needs.require_tun()
    elif item.get_closest_marker("root"):
        needs.require_root()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After every test, whatever it registered with `tests.leaks` must be empty."""
    leaks.forget()
    yield
    leaks.check()
