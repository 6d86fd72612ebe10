"""The calls as Linux has them: what waits and what does not, flags, options, poll, and what the stack does not have."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.sockdriver.bench import THEIRS

if TYPE_CHECKING:
    from tests.sockdriver.bench import Bench

pytestmark = pytest.mark.e2e

ALL = ("POLLIN", "POLLOUT", "POLLRDHUP")
IN_OUT = select.POLLIN | select.POLLOUT


def test_connecting_without_waiting(bench: Bench) -> None:
    fd = bench.socket("SOCK_NONBLOCK")
    bench.fails("EINPROGRESS", "connect", fd=fd, addr=THEIRS, port=8080)
    bench.expect("S")
    bench.fails("EALREADY", "connect", fd=fd, addr=THEIRS, port=8080)
    bench.fails("EAGAIN", "write", fd=fd, len=1)
    assert bench.poll(fd, *ALL) == 0
    poll = bench.begin("poll", fds=[{"fd": fd, "events": ["POLLOUT"]}], timeout=4000, blocking=True)
    assert bench.pending(poll)
    bench.inject("S.")
    bench.expect(".")
    assert bench.end(poll)["revents"] == [select.POLLOUT]
    assert bench.call("getsockopt", fd=fd, level="SOL_SOCKET", opt="SO_ERROR")["value"] == 0
    bench.ok("connect", fd=fd, addr=THEIRS, port=8080)
    bench.fails("EISCONN", "connect", fd=fd, addr=THEIRS, port=8080)


def test_a_connection_that_is_refused(bench: Bench) -> None:
    fd = bench.socket("SOCK_NONBLOCK")
    bench.fails("EINPROGRESS", "connect", fd=fd, addr=THEIRS, port=8080)
    bench.expect("S")
    bench.inject("R.")
    assert bench.poll(fd, *ALL, timeout=4000) == IN_OUT | select.POLLRDHUP | select.POLLERR | select.POLLHUP
    assert bench.call("getsockopt", fd=fd, level="SOL_SOCKET", opt="SO_ERROR", len=4)["value"] == 111
    bench.ok("close", fd=fd)
    waiting = bench.begin("connect", fd=bench.socket(), addr=THEIRS, port=8080, blocking=True)
    bench.expect("S")
    bench.inject("R.")
    assert bench.end(waiting)["errno"] == "ECONNREFUSED"


def test_a_nonblocking_listener_and_what_it_accepts(bench: Bench) -> None:
    listener = bench.listen()
    bench.ok("fcntl", fd=listener, cmd="F_SETFL", arg=["O_RDWR", "O_NONBLOCK"])
    bench.fails("EAGAIN", "accept", fd=listener)
    assert bench.poll(listener, *ALL) == 0
    bench.handshake()
    assert bench.poll(listener, *ALL, timeout=4000) == select.POLLIN
    fd = bench.ok("accept", fd=listener)
    assert bench.ok("fcntl", fd=fd, cmd="F_GETFL") == 2, "O_NONBLOCK is not inherited"
    bench.fails("EAGAIN", "recv", fd=fd, len=1, flags=["MSG_DONTWAIT"])
    bench.ok("fcntl", fd=fd, cmd="F_SETFL", arg=["O_RDWR", "O_NONBLOCK"])
    assert bench.ok("fcntl", fd=fd, cmd="F_GETFL") == 2 | 0o4000
    bench.fails("EAGAIN", "read", fd=fd, len=1)


def test_closing_a_listener_ends_an_accept_that_waits(bench: Bench) -> None:
    listener = bench.listen()
    accept = bench.begin("accept", fd=listener, blocking=True)
    bench.ok("shutdown", fd=listener, how="SHUT_RDWR")
    assert bench.end(accept)["errno"] == "EINVAL"


def test_numbers_are_the_lowest_that_are_free(bench: Bench) -> None:
    first, second, third = (bench.socket() for _ in range(3))
    assert (first, second, third) == (3, 4, 5)
    bench.ok("close", fd=second)
    assert bench.socket() == second
    bench.fails("EBADF", "close", fd=17)


def test_a_blocking_write_takes_everything_and_a_nonblocking_one_what_fits(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("setsockopt", fd=fd, level="SOL_SOCKET", opt="SO_SNDBUF", value=10000)
    bench.ok("fcntl", fd=fd, cmd="F_SETFL", arg=["O_NONBLOCK"])
    part = bench.send(fd, bytes(100_000))
    assert 0 < part < 100_000
    bench.fails("EAGAIN", "write", fd=fd, len=1)
    assert bench.poll(fd, *ALL) == 0
    assert bench.call("ioctl", fd=fd, cmd="SIOCOUTQ")["value"] == part
    bench.ok("fcntl", fd=fd, cmd="F_SETFL", arg=["O_RDWR"])
    write = bench.begin("write", fd=fd, len=20_000, blocking=True)
    poll = bench.begin("poll", fds=[{"fd": fd, "events": ["POLLOUT"]}], timeout=-1, blocking=True)
    assert bench.pending(write)
    taken = 0
    while taken < part + 20_000:
        taken += len(bench.take_data())
    assert bench.end(write)["ret"] == 20_000
    assert bench.end(poll)["revents"] == [select.POLLOUT]
    assert bench.call("ioctl", fd=fd, cmd="SIOCOUTQ")["value"] == 0


def test_waiting_for_all_of_it(bench: Bench) -> None:
    fd = bench.accepted()
    read = bench.begin("recv", fd=fd, len=8, flags=["MSG_WAITALL"], blocking=True)
    bench.inject("P.", b"half")
    bench.expect(".")
    assert bench.pending(read)
    bench.inject("P.", b"whole")
    assert bench.end(read)["data"] == "aGFsZndob2w="
    bench.expect(".")
    rest = bench.begin("recv", fd=fd, len=8, flags=["MSG_WAITALL"], blocking=True)
    assert bench.pending(rest)
    bench.inject("F.")
    assert bench.end(rest)["data"] == "ZQ=="


def test_what_is_truncated_is_thrown_away(bench: Bench) -> None:
    fd = bench.accepted()
    bench.inject("P.", b"0123456789")
    bench.expect(".")
    reply = bench.call("recv", fd=fd, len=4, flags=["MSG_TRUNC"], null=True)
    assert reply["ret"] == 4
    assert "data" not in reply
    bench.fails("EFAULT", "read", fd=fd, len=4, null=True)
    bench.fails("EFAULT", "write", fd=fd, len=4, null=True)
    assert bench.receive(fd, 100) == b"456789"


def test_how_much_waits(bench: Bench) -> None:
    fd = bench.accepted()
    bench.inject("P.", b"0123456789")
    bench.expect(".")
    assert bench.call("ioctl", fd=fd, cmd="SIOCINQ")["value"] == 10
    bench.receive(fd, 4)
    assert bench.call("ioctl", fd=fd, cmd="FIONREAD")["value"] == 6


def test_more_to_come(bench: Bench) -> None:
    fd = bench.accepted()
    bench.send(fd, b"first, ", "send", flags=["MSG_MORE"])
    bench.send(fd, b"last", "send", flags=[])
    bench.expect("P.", b"first, last")


def test_polling_a_connection_to_its_end(bench: Bench) -> None:
    fd = bench.accepted()
    assert bench.poll(fd, *ALL) == select.POLLOUT
    bench.inject("P.", b"x")
    bench.expect(".")
    assert bench.poll(fd, *ALL) == IN_OUT
    bench.inject("F.")
    bench.expect(".")
    assert bench.poll(fd, *ALL) == IN_OUT | select.POLLRDHUP
    bench.ok("shutdown", fd=fd, how="SHUT_WR")
    bench.expect("F.")
    assert bench.poll(fd, "POLLIN") == select.POLLIN | select.POLLHUP


def test_polling_several_waits_for_the_first_or_the_time(bench: Bench) -> None:
    fd, other = bench.accepted(), bench.listen(8081)
    bench.port = 8080
    fds: list[dict[str, Any]] = [
        {"fd": other, "events": ["POLLIN"]},
        {"fd": fd, "events": ["POLLIN", "POLLRDNORM"]},
        {"fd": -1, "events": ["POLLIN"]},
    ]
    begun = time.monotonic()
    reply = bench.call("poll", fds=fds, timeout=100)
    assert (reply["ret"], reply["revents"]) == (0, [0, 0, 0])
    assert 0.1 <= reply["t"] - begun < 0.15
    poll = bench.begin("poll", fds=fds, timeout=-1, blocking=True)
    bench.inject("P.", b"x")
    assert bench.end(poll)["revents"] == [0, select.POLLIN | select.POLLRDNORM, 0]
    assert bench.call("poll", fds=[{"fd": 99, "events": []}], timeout=0)["revents"] == [select.POLLNVAL]


@pytest.mark.parametrize(
    ("level", "opt", "value", "read"),
    [
        ("SOL_TCP", "TCP_NODELAY", 1, 1),
        ("IPPROTO_TCP", "TCP_CORK", 1, 1),
        ("SOL_TCP", "TCP_KEEPIDLE", 7, 7),
        ("SOL_TCP", "TCP_USER_TIMEOUT", 3000, 3000),
        ("SOL_TCP", "TCP_DEFER_ACCEPT", 5, 7),
        ("SOL_TCP", "TCP_WINDOW_CLAMP", 7000, 7000),
        ("SOL_TCP", "TCP_LINGER2", 5, 5),
        ("SOL_TCP", "TCP_LINGER2", 121, -1),
        ("SOL_TCP", "TCP_NOTSENT_LOWAT", 4000, 4000),
        ("SOL_TCP", "TCP_INQ", 1, 1),
        ("SOL_TCP", "TCP_MAXSEG", 1000, 1000),
        ("SOL_SOCKET", "SO_RCVLOWAT", 500, 500),
        ("SOL_SOCKET", "SO_KEEPALIVE", 1, 1),
        ("SOL_SOCKET", "SO_RCVBUF", 20000, 40000),
        ("SOL_IP", "IP_TTL", 9, 9),
        ("IPPROTO_IP", 1, 16, 16),
    ],
)
def test_options(bench: Bench, level: str, opt: str | int, value: int, read: int) -> None:
    fd = bench.socket()
    bench.ok("setsockopt", fd=fd, level=level, opt=opt, value=value, len=4)
    assert bench.call("getsockopt", fd=fd, level=level, opt=opt, len=4)["value"] == read


def test_a_read_waits_for_as_much_as_so_rcvlowat_says(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("setsockopt", fd=fd, level="SOL_SOCKET", opt="SO_RCVLOWAT", value=3, len=4)
    read = bench.begin("read", fd=fd, len=10, blocking=True)
    bench.inject("P.", b"ab")
    bench.inject("P.", b"cd")
    assert bench.end(read)["ret"] == 4


def test_recvmsg_says_how_much_is_left(bench: Bench) -> None:
    fd = bench.accepted()
    bench.ok("setsockopt", fd=fd, level="SOL_TCP", opt="TCP_INQ", value=1, len=4)
    bench.inject("P.", b"abcd")
    bench.expect(".")
    reply = bench.call("recvmsg", fd=fd, lens=[3], flags=[])
    assert reply["cmsgs"] == [{"level": 6, "type": 36, "data": "01000000"}]


def test_quick_acknowledgments(bench: Bench) -> None:
    fd = bench.accepted()
    option = {"fd": fd, "level": "SOL_TCP", "opt": "TCP_QUICKACK", "len": 4}
    bench.ok("setsockopt", value=0, **option)
    assert bench.call("getsockopt", **option)["value"] == 0
    bench.ok("setsockopt", value=1, **option)
    assert bench.call("getsockopt", **option)["value"] == 1


def test_an_option_of_the_wrong_size_is_invalid(bench: Bench) -> None:
    fd = bench.socket()
    bench.fails("EINVAL", "setsockopt", fd=fd, level="SOL_TCP", opt="TCP_NODELAY", value=1, len=2)
    bench.fails("EFAULT", "setsockopt", fd=fd, level="SOL_TCP", opt="TCP_NODELAY", value=None, len=4)
    bench.fails("EINVAL", "getsockopt", fd=fd, level="SOL_TCP", opt="TCP_NODELAY", len=-1)


@pytest.mark.parametrize(
    ("call", "args"),
    [
        ("socket", {"domain": "AF_UNIX", "type": "SOCK_STREAM"}),
        ("socket", {"domain": "AF_INET", "type": "SOCK_RAW"}),
        ("socket", {"domain": "AF_INET", "type": "SOCK_STREAM", "proto": "IPPROTO_SCTP"}),
        ("setsockopt", {"fd": 3, "level": "SOL_TCP", "opt": "TCP_REPAIR", "value": 1}),
        ("setsockopt", {"fd": 3, "level": "SOL_TCP", "opt": 12345, "value": 1}),
        ("getsockopt", {"fd": 3, "level": "SOL_TCP", "opt": "TCP_NEVER_HEARD_OF"}),
        ("recv", {"fd": 3, "len": 1, "flags": ["MSG_OOB"]}),
        ("send", {"fd": 3, "len": 1, "flags": ["MSG_OOB"]}),
        ("ioctl", {"fd": 3, "cmd": "SIOCATMARK"}),
        ("fcntl", {"fd": 3, "cmd": "F_SETOWN", "arg": []}),
        ("epoll_create", {}),
        ("splice", {}),
    ],
)
def test_what_the_stack_does_not_have(bench: Bench, call: str, args: dict[str, Any]) -> None:
    bench.socket()
    reply = bench.call(call, **args)
    assert (reply["ret"], reply["errno"], reply["unsupported"]) == (-1, "ENOSYS", True)
    assert reply["reason"]


def test_a_socket_that_is_not_connected(bench: Bench) -> None:
    fd = bench.socket()
    bench.fails("ENOTCONN", "read", fd=fd, len=1)
    bench.fails("EPIPE", "write", fd=fd, len=1)
    bench.fails("ENOTCONN", "shutdown", fd=fd, how="SHUT_RDWR")
    bench.fails("EINVAL", "accept", fd=fd)
    bench.fails("EINVAL", "bind", fd=fd, addr="somewhere", port=1)
    bench.fails("EADDRNOTAVAIL", "bind", fd=fd, addr="198.51.100.1", port=1)
