"""Ports for sockets that name none (RFC 6056)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

EPHEMERAL: Final = range(32768, 61000)
"""The ports to choose from (net.ipv4.ip_local_port_range)."""


def ephemeral_ports(random: Random) -> Iterator[int]:
    """Every ephemeral port once, from a random one on (RFC 6056, section 3.3.1, algorithm 1)."""
    count = len(EPHEMERAL)
    start = random.randrange(count)
    for offset in range(count):
        yield EPHEMERAL[(start + offset) % count]
