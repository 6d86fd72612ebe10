"""The control socket of a stack without a device: calls, answers, errors, and who may listen where."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pools.gfp import ATOMIC
from tests import leaks
from ustack.cli.control import Control, open_tcp_through_daemon
from ustack.daemon.control import LINE_MAX, ControlServer
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@asynccontextmanager
async def serving(path: Path, mode: int = 0o600) -> AsyncIterator[Stack]:
    """A stack with a control socket at `path`."""
    async with Stack(memory=1 << 20) as stack:
        leaks.watch_pool(stack.pool)
        server = ControlServer(stack, lambda: {"fine": True})
        await server.listen(str(path), mode)
        try:
            yield stack
        finally:
            await server.close()


async def ask(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    """Send raw lines at once; return an answer for each."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.writelines(lines)
    answers = [json.loads(await reader.readline()) for _ in lines]
    writer.close()
    await writer.wait_closed()
    return answers


async def call(path: Path, name: str, **args: Any) -> Any:
    """One call by the command line's client."""

    def make() -> Any:
        with Control(str(path)) as control:
            return control.call(name, **args)

    return await asyncio.to_thread(make)


async def test_calls_are_answered_one_after_the_other(tmp_path: Path) -> None:
    async with serving(tmp_path / "c"):
        answers = await ask(tmp_path / "c", b'{"call":"status"}\n', b'{"call":"ss","args":{}}\n', b'{"call":"nstat"}\n')
    assert answers[:2] == [{"ok": {"fine": True}}, {"ok": []}]
    assert set(answers[2]["ok"]) == {"counters", "drops"}


async def test_a_client_that_ends_its_side_at_once_still_gets_its_answers(tmp_path: Path) -> None:
    """As `echo ... | socat - UNIX-CONNECT:...` does."""
    async with serving(tmp_path / "c"):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c"))
        writer.write(b'{"call":"status"}\n{"call":"connect","args":{"host":"10.0.0.1","port":1}}\n{"call":"status"}\n')
        writer.write_eof()
        answers = [json.loads(line) async for line in reader]
        writer.close()
        await writer.wait_closed()
    assert answers[0] == answers[2] == {"ok": {"fine": True}}
    assert answers[1]["error"]["errno"] == errno.EPIPE


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (b"hello\n", errno.EINVAL, "a request is a line"),
        (b"[]\n", errno.EINVAL, "a request is a line"),
        (b'{"call": 1}\n', errno.EINVAL, "a request is a line"),
        (b"\xff\xfe\n", errno.EINVAL, "a request is a line"),
        (b'{"call": "ss", "args": []}\n', errno.EINVAL, "args must be an object"),
        (b'{"call": "ss", "args": {"a": 1}}\n', errno.EINVAL, "ss takes no arguments"),
        (b'{"call": "reboot"}\n', errno.ENOSYS, "no call 'reboot'; there are add_class, capture, classes, compact, connect"),
        (b'{"call": "connect"}\n', errno.EINVAL, "host"),
        (b'{"call": "connect", "args": {"host": "10.0.0.1", "port": 1}}\n', errno.ENETUNREACH, "unreachable"),
        (b'{"call": "connect", "args": {"host": "name", "port": 1}}\n', errno.EINVAL, "is not an IPv4 address"),
        (b'{"call": "connect", "args": {"host": "10.0.0.1", "port": "http"}}\n', errno.EINVAL, "'http' is no port"),
        (b'{"call": "listen", "args": {"port": 65536}}\n', errno.EINVAL, "65536 is no port"),
        (b'{"call": "connect", "args": {"host": "10.0.0.1", "port": 1, "udp": true}}\n', errno.ENETUNREACH, "unreachable"),
        (b'{"call": "listen", "args": {"host": "10.0.0.1", "port": 1}}\n', errno.EADDRNOTAVAIL, "assign"),
        (b'{"call": "ping", "args": {"host": "10.0.0.1", "size": 70000}}\n', errno.EINVAL, "0 to 65507 bytes"),
        (b'{"call": "ping", "args": {"host": "10.0.0.1", "count": 1}}\n', errno.ENETUNREACH, "unreachable"),
        (b'{"call": "ping", "args": {"host": "10.0.0.1", "count": "1"}}\n', errno.EINVAL, ""),
    ],
)
async def test_a_request_that_cannot_be_served_is_an_error_and_not_the_end(
    tmp_path: Path, line: bytes, code: int, message: str
) -> None:
    async with serving(tmp_path / "c"):
        refused, served = await ask(tmp_path / "c", line, b'{"call":"status"}\n')
    assert message in refused["error"]["message"]
    assert refused["error"]["errno"] == code
    assert served == {"ok": {"fine": True}}


async def test_a_request_without_end_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "c"):
        (answer,) = await ask(tmp_path / "c", b"x" * (LINE_MAX + 1))
    assert answer["error"]["errno"] == errno.EMSGSIZE


async def test_errors_arrive_as_the_oserrors_that_they_were(tmp_path: Path) -> None:
    async with serving(tmp_path / "c"):
        with pytest.raises(OSError, match="unreachable") as refused:
            await call(tmp_path / "c", "connect", host="10.0.0.1", port=1)
        assert refused.value.errno == errno.ENETUNREACH
        with pytest.raises(OSError, match="unreachable"):
            await open_tcp_through_daemon(str(tmp_path / "c"), "10.0.0.1", 1, asyncio.Protocol)


async def test_listening_ends_with_the_client_that_asked_for_it(tmp_path: Path) -> None:
    async with serving(tmp_path / "c") as stack:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c"))
        writer.write(b'{"call":"listen","args":{"port":80}}\n{"call":"never"}\n')
        assert json.loads(await reader.readline()) == {"ok": {"local": ["0.0.0.0", 80]}}
        assert len(stack.tcp.listeners) == 1
        taken = await ask(tmp_path / "c", b'{"call":"listen","args":{"port":80}}\n')
        assert taken[0]["error"]["errno"] == errno.EADDRINUSE
        writer.transport.abort()
        await until(lambda: not stack.tcp.listeners)


async def test_a_datagram_listener_ends_with_its_client_too(tmp_path: Path) -> None:
    async with serving(tmp_path / "c") as stack:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c"))
        writer.write(b'{"call":"listen","args":{"port":80,"udp":true}}\n')
        assert json.loads(await reader.readline()) == {"ok": {"local": ["0.0.0.0", 80]}}
        assert len(stack.udp.sockets()) == 1
        writer.transport.abort()
        await until(lambda: not stack.udp.sockets())


async def until(fact: Callable[[], bool]) -> None:
    """Let the event loop run until `fact` is so."""
    async with asyncio.timeout(30):
        while not fact():
            await asyncio.sleep(0)


async def test_memory_adds_up(tmp_path: Path) -> None:
    async with serving(tmp_path / "c") as stack:
        memory = await call(tmp_path / "c", "memory")
        assert memory["size"] == 1 << 20
        assert memory["free"] + sum(memory["by_owner"].values()) == memory["size"]
        assert memory["reserve"]["size"] == stack.pages.min_pages * 4096
        assert memory["reserve"]["low_water"] == memory["reserve"]["free"] == memory["reserve"]["size"]


async def test_slabinfo_is_the_kernels_format(tmp_path: Path) -> None:
    async with serving(tmp_path / "c"):
        text = await call(tmp_path / "c", "slabinfo")
    assert text.startswith("slabinfo - version: 2.1\n# name ")
    assert "\nsize-64 " in text


@pytest.mark.parametrize("mode", [0o600, 0o660])
async def test_the_socket_has_the_mode_that_was_asked_for_and_is_gone_afterwards(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "folder" / "c"
    async with serving(path, mode):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert not path.exists()


async def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "c"))
    async with serving(tmp_path / "c"):
        assert await call(tmp_path / "c", "status") == {"fine": True}


async def test_a_living_daemons_socket_is_left_alone(tmp_path: Path) -> None:
    async with serving(tmp_path / "c"):
        with pytest.raises(OSError, match="another daemon is listening there"):
            async with serving(tmp_path / "c"):
                pass
        assert await call(tmp_path / "c", "status") == {"fine": True}


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("precious")
    with pytest.raises(OSError, match="is no socket"):
        async with serving(tmp_path / "c"):
            pass
    assert (tmp_path / "c").read_text() == "precious"


def test_without_a_daemon_it_is_said_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="start one with `ustack daemon"):
        Control(str(tmp_path / "none"))


async def test_the_adviser_learns_from_a_recording_and_adds_its_classes(tmp_path: Path) -> None:
    async with serving(tmp_path / "c") as stack:
        recording = asyncio.create_task(call(tmp_path / "c", "record", seconds=0.2))
        while stack.env.memory.pool is stack.pool:
            await asyncio.sleep(0)
        with pytest.raises(OSError, match="already"):
            await call(tmp_path / "c", "record", seconds=1)
        skb = stack.env.memory.alloc(1700, ATOMIC)
        assert skb is not None
        skb.free()
        assert await recording == [[0, 1700, 0], [0, 0, 0]]
        assert stack.env.memory.pool is stack.pool
        assert 1728 in await call(tmp_path / "c", "add_class", size=1700)
        with pytest.raises(OSError, match="no room for a class of 1728 bytes"):
            await call(tmp_path / "c", "add_class", size=1700)


@pytest.mark.parametrize("seconds", [0, -1, "long", None, 1e9])
async def test_a_recording_takes_a_time_that_is_one(tmp_path: Path, seconds: object) -> None:
    async with serving(tmp_path / "c"):
        with pytest.raises(OSError, match="is no time for a recording"):
            await call(tmp_path / "c", "record", seconds=seconds)


async def test_compacting_gives_back_what_a_burst_has_left(tmp_path: Path) -> None:
    async with serving(tmp_path / "c") as stack:
        skbs = [stack.env.memory.alloc(1500, ATOMIC) for _ in range(100)]
        kept = stack.udp.socket()
        kept.bind(bytes(4), 7)
        for index, skb in enumerate(skbs):
            assert skb is not None
            if index % 5:
                skb.free()
            else:
                skb.put(b"%04d" % index)
                skb.charge_to(stack.udp.account)
                kept._queue.append(skb)
        stack.pool.reap()
        before = stack.pool.held_pages()
        done = await call(tmp_path / "c", "compact")
        assert done == {"given_back": before - stack.pool.held_pages(), "held": stack.pool.held_pages()}
        assert done["given_back"] > 10
        assert [skb.tobytes() for skb in kept._queue] == [b"%04d" % index for index in range(0, 100, 5)]
