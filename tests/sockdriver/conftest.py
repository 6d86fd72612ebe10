"""Benches for tests of the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.sockdriver.bench import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns import Namespace


@pytest.fixture
def idle_bench(netns: Namespace) -> Iterator[Bench]:
    """A bench whose driver waits for `init`. It must end in good order when stdin does, and have complained about nothing."""
    bench = Bench(netns)
    try:
        yield bench
    finally:
        code, log = bench.close()
    assert code == 0, log
    assert "Traceback" not in log, log


@pytest.fixture
def bench(idle_bench: Bench) -> Bench:
    """A bench with a stack that runs."""
    assert idle_bench.init()["errno"] == 0
    return idle_bench
