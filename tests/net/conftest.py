"""Hosts that are closed when their test ends."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.net.host import BenchHost, Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make_host() -> Iterator[Callable[..., Host]]:
    """Make a host, to be put on a wire; arguments are those of `Host`."""
    with ExitStack() as hosts:

        def make(address: str, **options: Any) -> Host:
            host = Host(address, **options)
            hosts.callback(host.close)
            return host

        yield make


@pytest.fixture
def make_bench() -> Iterator[Callable[..., BenchHost]]:
    """Make a host whose network is the test; arguments are those of `BenchHost`."""
    with ExitStack() as hosts:

        def make(*address: str, **options: Any) -> BenchHost:
            host = BenchHost(*address, **options)
            hosts.callback(host.close)
            return host

        yield make


@pytest.fixture
def host(make_bench: Callable[..., BenchHost]) -> BenchHost:
    """The host 10.0.0.1/24, whose neighbour 10.0.0.2 the test plays."""
    return make_bench()
