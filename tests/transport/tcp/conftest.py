"""Scripted peers that are closed when their test ends."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.transport.tcp.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """Make a peer with a stack of its own; arguments are those of `Peer`."""
    with ExitStack() as peers:

        def make(**options: Any) -> Peer:
            peer = Peer(**options)
            peers.callback(peer.close)
            return peer

        yield make


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    """A peer of a stack with default settings, on a device without offloads."""
    return make_peer()
