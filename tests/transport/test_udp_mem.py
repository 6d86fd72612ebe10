"""udp_mem and the receive limit of a datagram socket: what is refused, why, and that it is all given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.net.host import BenchHost
from tests.transport.test_udp import arrive, bound
from ustack.drops import DropReason
from ustack.transport.udp import UdpConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

DATAGRAM = bytes(1400)
TRUESIZE = 2048 + 256
"""Of such a datagram: a buffer of 2048 bytes and a head."""


@pytest.fixture
def host() -> Iterator[BenchHost]:
    host = BenchHost()
    yield host
    assert host.udp.mem.allocated == sum(sock.account.bytes + sock.charges.forward_alloc for sock in host.udp.sockets()) >> 12
    host.close()
    assert host.udp.mem.allocated == host.udp.mem.sockets == 0


def test_sockets_are_counted_while_they_are_bound(host: BenchHost) -> None:
    one, two = bound(host, 1000), bound(host, 1001)
    assert host.udp.mem.sockets == 2
    one.close()
    one.close()
    assert host.udp.mem.sockets == 1
    two.close()


def test_beyond_low_a_socket_gets_its_minimum_and_no_more(host: BenchHost) -> None:
    mem = host.udp.mem
    mem.low, mem.pressure, mem.high = 4, 1000, 2000
    one, two = bound(host, 1000), bound(host, 1001)
    for _ in range(20):
        arrive(host, DATAGRAM, dport=1000)
    assert mem.allocated == 4
    refused = host.env.mib.UdpMemErrors
    assert refused == 20 - one.account.bytes // TRUESIZE > 0
    assert host.env.drops[DropReason.PROTO_MEM] == host.env.mib.UdpInErrors == one.charges.drops == refused
    arrive(host, DATAGRAM, dport=1001)
    assert two.readable, "who has less than 4096 bytes gets more"
    while two.account.bytes < 4096:
        arrive(host, DATAGRAM, dport=1001)
    arrive(host, DATAGRAM, dport=1001)  # fits what is left of its pages
    arrive(host, DATAGRAM, dport=1001)
    assert two.charges.drops > 0
    while one.readable:
        one.recvfrom_nowait(2000)
    arrive(host, DATAGRAM, dport=1000)
    assert one.recvfrom_nowait(2000)[0] == DATAGRAM


def test_the_receive_limit_is_counted_as_the_kernel_counts_it(host: BenchHost) -> None:
    sock = bound(host, 1000, rcvbuf=2304)
    arrive(host, DATAGRAM)
    arrive(host, DATAGRAM)
    assert sock.account.bytes == 2 * TRUESIZE, "one may overrun"
    arrive(host, DATAGRAM)
    assert host.env.mib.UdpRcvbufErrors == host.env.mib.UdpInErrors == 1
    assert host.env.drops[DropReason.SOCKET_RCVBUFF] == sock.charges.drops == 1


def test_a_memalloc_socket_passes(host: BenchHost) -> None:
    mem = host.udp.mem
    mem.low = mem.pressure = mem.high = 1
    sock = bound(host, 1000, memalloc=True)
    for _ in range(20):
        arrive(host, DATAGRAM)
    assert host.env.drops.total() == 0
    for _ in range(20):
        assert sock.recvfrom_nowait(2000)[0] == DATAGRAM


def test_the_default_limit_is_that_of_linux() -> None:
    assert UdpConfig().rmem_default == UdpConfig().wmem_default == 212992
