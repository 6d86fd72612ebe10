"""What every test shares: what the machine must have, and the rule that nothing is left behind."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests import leaks, needs
from tests.netns import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for tests that take a `seed`."""
    group = parser.getgroup("simulator")
    group.addoption("--seeds", type=int, default=20, metavar="N", help="run each test that takes a seed with the seeds 0..N-1")
    group.addoption("--seed", type=int, metavar="SEED", help="run each test that takes a seed with this one only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `seed` runs once for every seed; its id names the seed, so that a failure can be repeated."""
    if "seed" in metafunc.fixturenames:
        only = metafunc.config.getoption("--seed")
        seeds = range(metafunc.config.getoption("--seeds")) if only is None else [only]
        metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed={seed}")


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


@pytest.fixture
def make_netns() -> Iterator[Callable[[str], Namespace]]:
    """Make a network namespace with that label, as many as the test needs; all end with the test."""
    needs.require_root()
    with ExitStack() as namespaces:
        yield lambda label: namespaces.enter_context(Namespace(label))


@pytest.fixture
def netns(make_netns: Callable[[str], Namespace]) -> Namespace:
    """The kernel's side of a test: a network namespace of its own (see `tests.netns`)."""
    return make_netns("kernel")
