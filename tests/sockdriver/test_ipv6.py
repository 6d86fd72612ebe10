"""Packet by packet over IPv6: the calls and options that IPv6 adds, and a round of those that are for both versions."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.sockdriver.bench import Bench6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns import Namespace

pytestmark = pytest.mark.e2e


@pytest.fixture
def bench(netns: Namespace) -> Iterator[Bench6]:
    """A bench with a stack that runs, over IPv6."""
    bench = Bench6(netns)
    try:
        assert bench.init()["errno"] == 0
        yield bench
    finally:
        code, log = bench.close()
    assert code == 0, log
    assert "Traceback" not in log, log


def test_the_remote_host_connects_and_both_send_and_close(bench: Bench6) -> None:
    listener = bench.listen()
    accept = bench.begin("accept", fd=listener, blocking=True)
    bench.handshake()
    reply = bench.end(accept)
    assert reply["addr"] == [bench.theirs, 50000]
    fd = reply["ret"]
    there, back = Random(1).randbytes(1000), Random(2).randbytes(2500)
    bench.inject("P.", there)
    bench.expect(".")
    assert bench.receive(fd, 1500) == there
    assert bench.send(fd, back) == 2500
    bench.expect(".", back[:1440])
    bench.expect("P.", back[1440:])
    bench.inject(".")
    bench.ok("close", fd=fd)
    bench.expect("F.")
    bench.inject("F.")
    bench.expect(".")
    bench.expect_silence()


def test_the_stack_connects_from_an_address_of_its_own(bench: Bench6) -> None:
    fd = bench.socket()
    bench.ok("bind", fd=fd, addr=bench.ours, port=4000)
    connect = bench.begin("connect", fd=fd, addr=bench.theirs, port=8080, blocking=True)
    syn = bench.expect("S")
    assert (syn.sport, syn.dport) == (4000, 8080)
    assert syn.opts[:4] == b"\x02\x04\x05\xa0", "an MSS of 1440"
    bench.inject("S.", opts=b"\x02\x04\x05\xa0")
    bench.expect(".")
    assert bench.end(connect)["errno"] == 0
    bench.fails("EISCONN", "connect", fd=fd, addr=bench.theirs, port=8080)


def test_a_socket_that_does_not_block(bench: Bench6) -> None:
    fd = bench.socket("SOCK_NONBLOCK")
    bench.fails("EINPROGRESS", "connect", fd=fd, addr=bench.theirs, port=8080)
    bench.expect("S")
    bench.inject("R.")
    assert bench.poll(fd, "POLLOUT", timeout=5000) != 0
    assert bench.call("getsockopt", fd=fd, level="SOL_SOCKET", opt="SO_ERROR", len=4)["value"] in (111, "ECONNREFUSED")


def test_options_of_ipv6(bench: Bench6) -> None:
    fd = bench.socket()
    for option, value in (("IPV6_V6ONLY", 1), ("IPV6_UNICAST_HOPS", 9), ("IPV6_TCLASS", 0x20), (23, 2)):
        bench.ok("setsockopt", fd=fd, level="IPPROTO_IPV6", opt=option, value=value, len=4)
        assert bench.call("getsockopt", fd=fd, level="IPPROTO_IPV6", opt=option, len=4)["value"] == value
    bench.fails("EINVAL", "setsockopt", fd=fd, level="IPPROTO_IPV6", opt="IPV6_UNICAST_HOPS", value=256, len=4)
    bench.ok("bind", fd=fd, addr="::", port=8080)
    bench.fails("EINVAL", "setsockopt", fd=fd, level="IPPROTO_IPV6", opt="IPV6_V6ONLY", value=0, len=4)
    other = bench.ok("socket", domain="AF_INET", type="SOCK_STREAM", flags=[], proto="IPPROTO_TCP")
    assert bench.call("setsockopt", fd=other, level="IPPROTO_IPV6", opt="IPV6_V6ONLY", value=1, len=4)["errno"] == "ENOSYS"


def test_addresses_that_cannot_be(bench: Bench6) -> None:
    fd = bench.socket()
    bench.fails("EADDRNOTAVAIL", "bind", fd=fd, addr="2001:db8::3", port=80)
    bench.fails("EINVAL", "bind", fd=fd, addr="192.0.2.2", port=80)
    bench.fails("ENETUNREACH", "connect", fd=fd, addr="::ffff:192.0.2.1", port=80)


def test_too_big_makes_segments_smaller(bench: Bench6) -> None:
    fd = bench.accepted()
    data = Random(3).randbytes(1440)
    bench.send(fd, data)
    whole = bench.expect("P.", data)
    bench.too_big(1280, whole, 20 + 1440)
    bench.ack -= 1440
    bench.expect(".", data[:1220])
    bench.expect("P.", data[1220:])
    bench.inject(".")
    assert bench.call("getsockopt", fd=fd, level="IPPROTO_IPV6", opt=24, len=4)["value"] == 1280


def test_too_big_about_what_was_never_sent_is_ignored(bench: Bench6) -> None:
    """RFC 5927, section 4: the sequence number that is quoted must be in flight."""
    fd = bench.accepted()
    data = Random(4).randbytes(1440)
    bench.send(fd, data)
    whole = bench.expect("P.", data)
    whole.seq = (whole.seq + 100_000) & 0xFFFFFFFF
    bench.too_big(1280, whole, 20 + 1440)
    bench.inject(".")
    assert bench.call("getsockopt", fd=fd, level="IPPROTO_IPV6", opt=24, len=4)["value"] == 1500
