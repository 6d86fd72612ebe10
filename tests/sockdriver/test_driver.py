"""Lines, and life from `init` to the end."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.sockdriver.bench import PATIENCE

if TYPE_CHECKING:
    from tests.sockdriver.bench import Bench

pytestmark = pytest.mark.e2e


def test_what_is_no_request_is_answered_with_an_error(idle_bench: Bench) -> None:
    for line in (b"{", b"[]", b"7", b"\xff\xfe", b'"init"', b"null", b"[" * 100_000):
        idle_bench.write(line + b"\n\n")
        reply = idle_bench.end(None)
        assert (reply["ret"], reply["errno"]) == (-1, "EINVAL"), line
    assert idle_bench.init()["errno"] == 0, "and everything goes on"


@pytest.mark.parametrize(
    "line",
    [
        b'{"id":99,"call":"read"}',
        b'{"id":99,"call":"read","args":[]}',
        b'{"id":99,"call":"read","args":{"fd":null,"len":1}}',
        b'{"id":99,"call":"read","args":{"fd":[],"len":1}}',
        b'{"id":99,"call":"read","args":{"fd":"three","len":1}}',
        b'{"id":99,"call":"read","args":{"fd":3,"len":{}}}',
        b'{"id":99,"call":"readv","args":{"fd":3,"lens":7}}',
        b'{"id":99,"call":"write","args":{"fd":3,"len":1,"data":"?"}}',
        b'{"id":99,"call":"write","args":{"fd":3,"len":1,"data":7}}',
        b'{"id":99,"call":"bind","args":{"fd":3,"addr":7,"port":99999}}',
        b'{"id":99,"call":"bind","args":{"fd":3,"addr":"","port":99999}}',
        b'{"id":99,"call":"setsockopt","args":{"fd":3,"level":6,"opt":1,"value":[]}}',
        b'{"id":99,"call":"setsockopt","args":{"fd":3,"level":6,"opt":1,"value":{"onoff":99999999999,"linger":1}}}',
        b'{"id":99,"call":"poll","args":{"fds":[7]}}',
        b'{"id":99,"call":"poll","args":{"fds":7,"timeout":"x"}}',
        b'{"id":99,"call":"recv","args":{"fd":3,"len":1,"flags":[{}]}}',
        b'{"id":99,"call":"recv","args":{"fd":3,"len":-1}}',
        b'{"id":99,"call":"hints","args":{"hints":7}}',
        b'{"id":99,"call":null,"args":{}}',
        b'{"id":99,"call":{},"args":{}}',
        b'{"id":99}',
        b'{"id":99,"call":"init","args":{}}',
    ],
)
def test_arguments_that_make_no_sense_are_an_error_and_nothing_worse(bench: Bench, line: bytes) -> None:
    bench.socket()
    bench.write(line + b"\n")
    reply = bench.end(99)
    assert reply["ret"] == -1
    assert reply["errno"] in ("EINVAL", "ENOSYS")
    assert reply["reason"]


def test_a_stack_that_cannot_be_made(idle_bench: Bench) -> None:
    bench = idle_bench
    bench.fails("EINVAL", "socket", domain="AF_INET", type="SOCK_STREAM")
    bench.fails("EINVAL", "init")
    bench.fails("EINVAL", "init", iface="tap0", local_ip="nowhere", prefix=24)
    bench.fails("EINVAL", "init", iface="tap0", local_ip="192.0.2.2", prefix=24, gateway="198.51.100.1")
    reply = bench.call("init", iface="tap0", ip_version=5, local_ip="2001:db8::2", prefix=64)
    assert (reply["errno"], reply["unsupported"]) == ("ENOSYS", True)
    assert bench.init()["started"] is True
    bench.fails("EINVAL", "init", iface="tap0")


def test_calls_may_come_in_pieces_and_in_heaps(idle_bench: Bench) -> None:
    bench = idle_bench
    bench.write(
        b'{"id":1,"call":"init","args":{"iface":"tap0","local_ip":"192.0.2.2","prefix":24}}\n'
        b'{"id":2,"call":"socket","args":{"domain":"AF_INET","type":"SOCK_STREAM"}}\n'
        b'{"id":3,"call":"fcntl","args":{"fd":3,'
    )
    assert bench.end(1)["ret"] == 0
    assert bench.end(2)["ret"] == 3
    bench.write(b'"cmd":"F_GETFL"}}\n')
    assert bench.end(3)["ret"] == 2


def test_a_call_that_need_not_wait_has_started_as_well(bench: Bench) -> None:
    assert bench.end(bench.begin("poll", fds=[], timeout=0, blocking=True))["ret"] == 0


def test_bye_ends_it(bench: Bench) -> None:
    bench.begin("accept", fd=bench.listen(), blocking=True)
    assert bench.ok("bye") == 0
    assert bench.program.wait(PATIENCE) == 0


def test_a_signal_ends_it(bench: Bench) -> None:
    bench.begin("accept", fd=bench.listen(), blocking=True)
    bench.program.send_signal(signal.SIGTERM)
    assert bench.program.wait(PATIENCE) == 0


def test_the_end_of_stdin_ends_it(bench: Bench) -> None:
    bench.begin("accept", fd=bench.listen(), blocking=True)
    assert bench.program.stdin is not None
    bench.program.stdin.close()
    assert bench.program.wait(PATIENCE) == 0


def test_the_device_is_there_for_the_next_driver(bench: Bench) -> None:
    """Persistent, and as it was: the next test opens it again."""
    bench.ok("bye")
    bench.program.wait(PATIENCE)
    assert bench.netns.index("tap0")
