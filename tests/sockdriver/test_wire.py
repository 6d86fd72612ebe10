"""Packet by packet: what a call puts on the wire, and what a packet lets a call do."""

from __future__ import annotations

import time
from random import Random

import pytest
from dpkt.tcp import TCP_OPT_MSS, TCP_OPT_SACKOK, TCP_OPT_TIMESTAMP, TCP_OPT_WSCALE, parse_opts

from tests.sockdriver.bench import OURS, THEIRS, Bench

pytestmark = pytest.mark.e2e


def options(opts: bytes) -> set[int]:
    """The kinds of TCP options, padding left out."""
    return {kind for kind, _ in parse_opts(opts) if kind > 1}


def test_the_remote_host_connects(bench: Bench) -> None:
    listener = bench.listen()
    accept = bench.begin("accept", fd=listener, blocking=True)
    bench.inject("S", opts=b"\x02\x04\x05\xb4")
    bench.expect("S.")
    assert bench.pending(accept)
    assert bench.ok("fcntl", fd=listener, cmd="F_GETFL", arg=[]) == 2, "other calls go on meanwhile"
    bench.inject(".")
    reply = bench.end(accept)
    assert reply["addr"] == [THEIRS, 50000]
    assert reply["ret"] not in (-1, listener)
    bench.expect_silence()


def test_the_stack_connects(bench: Bench) -> None:
    fd = bench.socket()
    bench.ok("bind", fd=fd, addr=OURS, port=4000)
    connect = bench.begin("connect", fd=fd, addr=THEIRS, port=8080, blocking=True)
    syn = bench.expect("S")
    assert (syn.sport, syn.dport) == (4000, 8080)
    assert options(syn.opts) == {TCP_OPT_MSS, TCP_OPT_WSCALE, TCP_OPT_SACKOK, TCP_OPT_TIMESTAMP}
    bench.inject("S.")
    bench.expect(".")
    assert bench.end(connect)["errno"] == 0
    bench.fails("EISCONN", "connect", fd=fd, addr=THEIRS, port=8080)


def test_hints_change_what_a_syn_offers(idle_bench: Bench) -> None:
    bench = idle_bench
    bench.init(hints={"timestamps": 0, "window_scaling": 0, "rmem": [4096, 20000, 40000], "unheard_of": 7, "sack": "?"})
    first = bench.socket("SOCK_NONBLOCK")
    bench.fails("EINPROGRESS", "connect", fd=first, addr=THEIRS, port=8080)
    syn = bench.expect("S")
    assert options(syn.opts) == {TCP_OPT_MSS, TCP_OPT_SACKOK}
    assert syn.win == 10000
    bench.ok("close", fd=first)
    bench.ok("hints", hints={"sack": 0}, sysctl={})
    second = bench.socket("SOCK_NONBLOCK")
    bench.fails("EINPROGRESS", "connect", fd=second, addr=THEIRS, port=8080)
    assert options(bench.expect("S").opts) == {TCP_OPT_MSS}


def test_data_both_ways(bench: Bench) -> None:
    fd = bench.accepted()
    there, back = Random(1).randbytes(3000), Random(2).randbytes(2500)
    bench.inject("P.", there[:1000])
    bench.expect(".")
    bench.inject("P.", there[1000:2000])
    bench.expect(".")
    bench.inject("P.", there[2000:])
    bench.expect(".")
    assert bench.receive(fd, 1500) == there[:1500]
    assert bench.receive(fd, 100, "recv", flags=["MSG_PEEK"]) == there[1500:1600]
    assert bench.receive(fd, 9999, "recvfrom", flags=[]) == there[1500:]
    assert bench.send(fd, back) == 2500
    bench.expect(".", back[:1460])
    bench.expect("P.", back[1460:])
    bench.inject(".")
    bench.expect_silence()


def test_a_packet_is_not_put_together_with_the_next(bench: Bench) -> None:
    """Nothing is coalesced on the way in, and nothing leaves larger than the wire can carry."""
    fd = bench.accepted()
    assert bench.send(fd, bytes(14600)) == 14600
    for _ in range(9):
        bench.expect(".", bytes(1460))
    bench.expect("P.", bytes(1460))


def test_the_time_of_a_reply_is_that_of_the_packet_it_waited_for(bench: Bench) -> None:
    fd = bench.accepted()
    read = bench.begin("read", fd=fd, len=100, blocking=True)
    assert bench.pending(read)
    sent = time.monotonic()
    bench.inject("P.", b"late")
    reply = bench.end(read)
    assert reply["data"] == "bGF0ZQ=="
    assert sent < reply["t"] < sent + 0.05
    assert reply["t"] < time.monotonic()


def test_vectors_and_messages(bench: Bench) -> None:
    fd = bench.accepted()
    bench.inject("P.", b"0123456789")
    bench.expect(".")
    reply = bench.call("readv", fd=fd, lens=[2, 3])
    assert (reply["ret"], reply["data"]) == (5, "MDEyMzQ=")
    reply = bench.call("recvmsg", fd=fd, lens=[2, 100], flags=[], control=100)
    assert (reply["ret"], reply["data"], reply["msg_flags"], reply["cmsgs"]) == (5, "NTY3ODk=", 0, [])
    assert bench.ok("writev", fd=fd, lens=[2, 2], data="YWJjZA==") == 4
    bench.expect("P.", b"abcd")
    bench.inject(".")
    assert bench.ok("sendmsg", fd=fd, lens=[3], data="eHl6", flags=["MSG_NOSIGNAL"]) == 3
    bench.expect("P.", b"xyz")


def test_the_stack_closes_first(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("shutdown", fd=fd, how="SHUT_WR")
    bench.expect("F.")
    bench.inject(".")
    bench.inject("FP.", b"bye")
    bench.expect(".")
    assert bench.receive(fd, 10) == b"bye"
    assert bench.receive(fd, 10) == b""
    bench.fails("EPIPE", "write", fd=fd, len=1, data="eA==")
    bench.ok("close", fd=fd)
    bench.expect_silence()


def test_a_close_with_unread_data_resets(bench: Bench) -> None:
    fd = bench.accepted()
    bench.inject("P.", b"never read")
    bench.expect(".")
    bench.ok("close", fd=fd)
    bench.expect("R.")
    bench.fails("EBADF", "read", fd=fd, len=1)


def test_lingering_for_no_time_resets(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("setsockopt", fd=fd, level="SOL_SOCKET", opt="SO_LINGER", value={"onoff": 1, "linger": 0}, len=8)
    assert bench.call("getsockopt", fd=fd, level="SOL_SOCKET", opt="SO_LINGER", len=8)["value"] == [1, 0]
    bench.ok("close", fd=fd)
    bench.expect("R.")


def test_a_lingering_close_waits_until_the_fin_is_acknowledged(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("setsockopt", fd=fd, level="SOL_SOCKET", opt="SO_LINGER", value={"onoff": 1, "linger": 9})
    close = bench.begin("close", fd=fd, blocking=True)
    bench.expect("F.")
    assert bench.pending(close)
    bench.inject(".")
    assert bench.end(close)["errno"] == 0


def test_a_lingering_close_gives_up_in_time(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("setsockopt", fd=fd, level="SOL_SOCKET", opt="SO_LINGER", value={"onoff": 1, "linger": 1})
    begun = time.monotonic()
    close = bench.begin("close", fd=fd, blocking=True)
    assert 1.0 <= bench.end(close)["t"] - begun < 1.2


def test_a_reset_is_told_once(bench: Bench) -> None:
    fd = bench.accepted()
    read = bench.begin("read", fd=fd, len=100, blocking=True)
    bench.inject("R.")
    assert bench.end(read)["errno"] == "ECONNRESET"
    assert bench.receive(fd, 100) == b""
    bench.fails("EPIPE", "write", fd=fd, len=1, data="eA==")


def test_an_error_after_part_of_a_write_is_left_for_the_next_call(bench: Bench) -> None:
    fd = bench.accepted()
    write = bench.begin("write", fd=fd, len=1 << 20, blocking=True)
    assert bench.pending(write)
    bench.inject("R.")
    assert 0 < bench.end(write)["ret"] < 1 << 20
    bench.fails("ECONNRESET", "write", fd=fd, len=1)


def test_disconnecting_resets_and_the_socket_may_connect_again(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("connect", fd=fd, family="AF_UNSPEC")
    bench.expect("R.")
    bench.fails("ECONNRESET", "read", fd=fd, len=1)
    bench.fails("ENOTCONN", "read", fd=fd, len=1)
    bench.ok("fcntl", fd=fd, cmd="F_SETFL", arg=["O_RDWR", "O_NONBLOCK"])
    bench.fails("EINPROGRESS", "connect", fd=fd, addr=THEIRS, port=8080)
    bench.expect("S")
