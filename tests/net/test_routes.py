"""Routes: the longest prefix wins, then the metric; what cannot work is refused with the reason."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.net.host import BenchHost, ip, make_env
from ustack.link.simwire import SimDevice
from ustack.net.interface import Interface
from ustack.net.routes import RouteTable

NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)


@given(st.lists(NETWORKS, unique=True, max_size=12), st.integers(0, 2**32 - 1), st.data())
def test_the_longest_prefix_wins(networks: list[IPv4Network], address: int, data: st.DataObject) -> None:
    interface = Interface(make_env(pages=16), SimDevice("sim0", bytes(6)), ip("10.0.0.1"), 24)
    changes = []
    table = RouteTable(lambda: changes.append(1))
    routes = {network: table.add(network.network_address.packed, network.prefixlen, interface) for network in networks}
    if networks:
        gone = data.draw(st.sampled_from(networks))
        table.remove(routes.pop(gone))
    assert len(changes) == len(networks) + bool(networks)
    matching = [network for network in routes if IPv4Address(address) in network]
    expected = routes[max(matching, key=lambda network: network.prefixlen)] if matching else None
    assert table.lookup(IPv4Address(address).packed) is expected
    assert {id(route) for route in table} == {id(route) for route in routes.values()}


def test_of_two_routes_to_a_network_the_lower_metric_is_taken(host: BenchHost) -> None:
    routes = host.ipv4.routes
    second = routes.add(bytes(4), 0, host.interface, ip("10.0.0.253"), metric=100)
    first = routes.add(bytes(4), 0, host.interface, ip("10.0.0.254"), metric=10)
    assert routes.lookup(ip("192.0.2.1")) is first
    routes.remove(first)
    assert routes.lookup(ip("192.0.2.1")) is second
    routes.remove(second)
    assert routes.lookup(ip("192.0.2.1")) is None


@pytest.mark.parametrize(
    ("network", "prefix_len", "via", "metric", "reason"),
    [
        ("10.1.0.1", 16, None, 0, r"10\.1\.0\.1/16 has bits set behind its prefix"),
        ("10.1.0.0", 33, None, 0, "prefix length 33 is not between 0 and 32"),
        ("10.1.0.0", 16, "192.0.2.1", 0, r"gateway 192\.0\.2\.1 is not on the link of sim0"),
        ("10.1.0.0", 16, "10.0.0.1", 0, r"gateway 10\.0\.0\.1 is no other host"),
        ("10.1.0.0", 16, "10.0.0.255", 0, r"gateway 10\.0\.0\.255 is no other host"),
        ("10.1.0.0", 16, None, -1, "metric -1 is negative"),
        ("10.0.0.0", 24, None, 0, r"there is a route with that metric already: 10\.0\.0\.0/24 dev sim0 metric 0"),
    ],
)
def test_a_route_that_cannot_work_is_refused(
    host: BenchHost, network: str, prefix_len: int, via: str | None, metric: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        host.ipv4.routes.add(ip(network), prefix_len, host.interface, None if via is None else ip(via), metric)


def test_a_network_or_gateway_of_another_family_is_refused(host: BenchHost) -> None:
    with pytest.raises(ValueError, match="a network of 16 bytes is not an IPv4 network"):
        host.ipv4.routes.add(bytes(16), 0, host.interface)
    with pytest.raises(ValueError, match="is not on the link"):
        host.ipv4.routes.add(bytes(4), 0, host.interface, bytes(16))


def test_a_route_is_removed_once(host: BenchHost) -> None:
    route = host.ipv4.routes.add(ip("10.1.0.0"), 16, host.interface, host.peer)
    host.ipv4.routes.remove(route)
    with pytest.raises(ValueError, match=r"no such route: 10\.1\.0\.0/16 via 10\.0\.0\.2 dev sim0 metric 0"):
        host.ipv4.routes.remove(route)


def test_the_default_gateway_is_the_next_hop_of_everything_else(host: BenchHost) -> None:
    host.ipv4.routes.add(bytes(4), 0, host.interface, host.peer)
    host.ipv4.path(ip("192.0.2.1")).send(253, 0, (), 0)
    host.answer_arp()
    frame = host.take_sent()[-1]
    assert frame[:6] == host.peer_mac
    assert frame[30:34] == ip("192.0.2.1")
