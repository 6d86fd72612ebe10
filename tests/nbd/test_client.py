"""The client against our server over the loopback, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.nbd import wire
from tests.nbd.servers import MIB, scripted, serving
from ustack import nbd
from ustack.nbd import strict
from ustack.nbd.client import NbdClient
from ustack.nbd.connection import Connection
from ustack.nbd.export import MemoryExport
from ustack.nbd.handshake import Aborted, ExportDescribed, Purpose

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ustack.mem.reserve import Demand
    from ustack.nbd.connection import Connector

GO_REQUEST = len(wire.asked())
"""Bytes that the client sends to get into the transmission phase of the default export."""
STEPS: tuple[bytes | int, ...] = (wire.GREETING, 20, wire.negotiation(MIB)[18:], GO_REQUEST - 20)
"""A negotiation as a script."""


async def test_what_is_written_is_read_back_also_when_calls_are_larger_than_any_payload() -> None:
    content = random.Random(1).randbytes(70 * MIB)
    async with serving(MemoryExport(80 * MIB)) as uri, nbd.connect(uri) as disk:
        await disk.pwrite(content, 12345)
        assert await disk.pread(len(content), 12345) == content
        small = bytearray(10)
        await disk.pread_into(small, 12345 + 40 * MIB)
        assert small == content[40 * MIB : 40 * MIB + 10]
        small.extend(b"nobody holds on to the caller's memory")
        assert await disk.pread(100, 80 * MIB - 100) == bytes(100)


async def test_commands_do_what_they_say() -> None:
    async with serving() as uri, nbd.connect(uri) as disk:
        await disk.pwrite(b"x" * MIB, 0, fua=True)
        await disk.zero(MIB // 2, 0)
        await disk.zero(10, MIB - 10, no_hole=True, fua=True)
        await disk.flush()
        await disk.cache(4096, 0)
        content = await disk.pread(MIB, 0, df=True)
        assert content == bytes(MIB // 2) + b"x" * (MIB // 2 - 10) + bytes(10)
        await disk.trim(MIB, 0, fua=True)
        assert await disk.pread(0, 0) == b""
        await disk.pwrite(b"", 5)


async def test_the_disk_tells_what_the_server_told() -> None:
    exports = MemoryExport(MIB, "a", description="the first"), MemoryExport(512, "b", read_only=True)
    async with serving(*exports) as uri, nbd.connect(f"{uri}/a") as a, nbd.connect(f"{uri}/b") as b:
        assert (a.name, a.size, a.description) == ("a", MIB, "the first")
        assert (a.minimum_block, a.preferred_block, a.maximum_payload) == (1, 4096, 32 * MIB)
        assert a.structured_replies
        assert a.can_flush
        assert a.can_fua
        assert a.can_trim
        assert a.can_zero
        assert a.can_cache
        assert a.can_df
        assert a.can_multi_conn
        assert not a.is_rotational
        assert (a.read_only, b.read_only) == (False, True)
        assert not b.can_flush
        listed = await nbd.list_exports(uri)
        assert [(e.name, e.description, e.info and e.info.size) for e in listed] == [("a", "the first", MIB), ("b", "", 512)]


async def test_an_unknown_export_is_enoent_in_the_servers_words() -> None:
    async with serving(MemoryExport(1, "only")) as uri:
        with pytest.raises(nbd.NbdOptionError, match="no export named 'other'") as caught:
            async with nbd.connect(f"{uri}/other"):
                pass
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda disk: disk.pread(1, 4096), errno.EINVAL),
        (lambda disk: disk.pread(1, -1), errno.EINVAL),
        (lambda disk: disk.zero(-1, 0), errno.EINVAL),
        (lambda disk: disk.pwrite(bytes(513), 4096 - 512), errno.ENOSPC),
        (lambda disk: disk.zero(512, 4096), errno.ENOSPC),
        (lambda disk: disk.trim(512, 4096), errno.EINVAL),
        (lambda disk: disk.pread(512, 1), errno.EINVAL),
        (lambda disk: disk.pread(511, 0), errno.EINVAL),
    ],
)
async def test_what_breaks_the_limits_is_refused_before_it_is_sent(
    call: Callable[[NbdClient], Awaitable[Any]], code: int
) -> None:
    negotiation = wire.negotiation(4096, blocks=(512, 4096, 4096))[18:]
    async with (
        scripted(*STEPS[:2], negotiation, GO_REQUEST - 20, then_close=False) as (connector, heard),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        with pytest.raises(OSError, match="bytes at") as caught:
            await call(disk)
        assert caught.value.errno == code
    # Nothing but the negotiation, and what `close` says.
    assert heard.endswith(wire.request(wire.DISC, 0))
    assert len(heard) == GO_REQUEST + 28


@pytest.mark.parametrize(
    ("flags", "call", "code"),
    [
        (wire.HAS_FLAGS | wire.READ_ONLY, lambda disk: disk.pwrite(b"x", 0), errno.EPERM),
        (wire.HAS_FLAGS | wire.READ_ONLY | wire.TRIM, lambda disk: disk.trim(1, 0), errno.EPERM),
        (wire.HAS_FLAGS, lambda disk: disk.flush(), errno.EOPNOTSUPP),
        (wire.HAS_FLAGS, lambda disk: disk.trim(1, 0), errno.EOPNOTSUPP),
        (wire.HAS_FLAGS, lambda disk: disk.zero(1, 0), errno.EOPNOTSUPP),
        (wire.HAS_FLAGS, lambda disk: disk.cache(1, 0), errno.EOPNOTSUPP),
        (wire.HAS_FLAGS, lambda disk: disk.pwrite(b"x", 0, fua=True), errno.EOPNOTSUPP),
        (wire.HAS_FLAGS, lambda disk: disk.pread(1, 0, df=True), errno.EOPNOTSUPP),
    ],
)
async def test_what_the_server_does_not_offer_is_not_sent(
    flags: int, call: Callable[[NbdClient], Awaitable[Any]], code: int
) -> None:
    async with (
        scripted(*STEPS[:2], wire.negotiation(4096, flags)[18:], GO_REQUEST - 20, then_close=False) as (connector, heard),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        with pytest.raises(OSError, match=r"read-only|does not offer") as caught:
            await call(disk)
        assert caught.value.errno == code
    assert len(heard) == GO_REQUEST + 28


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1, errno.EPERM),
        (5, errno.EIO),
        (12, errno.ENOMEM),
        (22, errno.EINVAL),
        (28, errno.ENOSPC),
        (75, errno.EOVERFLOW),
        (95, errno.ENOTSUP),
        (108, errno.ESHUTDOWN),
        (9999, errno.EINVAL),
    ],
)
async def test_every_error_of_the_server_becomes_an_oserror(value: int, code: int) -> None:
    async with (
        scripted(*STEPS, 28, wire.error(1, value, b"dust on the head"), then_close=False) as (connector, _),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        with pytest.raises(OSError, match=r'NBD_CMD_READ of 512 bytes at 1024 failed.*"dust on the head"') as caught:
            await disk.pread(512, 1024)
        assert caught.value.errno == code


async def test_eshutdown_lets_the_client_leave_politely() -> None:
    async with scripted(*STEPS, 28, wire.error(1, 108), then_close=False) as (connector, heard):
        disk = await NbdClient.open(connector, dead_after=0)
        with pytest.raises(OSError, match="ESHUTDOWN"):
            await disk.pread(512, 0)
        with pytest.raises(BrokenPipeError):
            await disk.pread(512, 0)
    assert heard.endswith(wire.request(wire.DISC, 0))
    await disk.close()


async def test_an_error_in_one_part_of_a_split_call_fails_the_call_after_all_parts_have_ended() -> None:
    steps = (*STEPS[:2], wire.negotiation(MIB, blocks=(1, 512, 512))[18:], GO_REQUEST - 20, 28 * 3)
    async with (
        scripted(*steps, wire.error(2, 5) + wire.data(3, 1024, b"c" * 512, 1) + wire.data(1, 0, b"a" * 512, 1), 28) as (
            connector,
            _,
        ),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        memory = bytearray(1536)
        with pytest.raises(OSError, match="512 bytes at 512"):
            await disk.pread_into(memory, 0)
        assert memory[:512] == b"a" * 512
        assert disk.requests_in_flight == 0


BAD_REPLIES: dict[str, bytes] = {
    "reply magic": b"x" * 20,
    "no request of ours": wire.data(9, 0, bytes(512), 1),
    "came twice": wire.data(1, 0, bytes(512)) + wire.data(1, 256, bytes(256), 1),
    "outside": wire.data(1, 0, bytes(513), 1),
    "ends after": wire.none(1),
    "unknown type": wire.chunk(77, 1, b"", 1),
}


@pytest.mark.parametrize("complaint", BAD_REPLIES)
async def test_a_server_that_breaks_the_protocol_loses_all_requests_at_once(complaint: str) -> None:
    async with scripted(*STEPS, 28 * 3, BAD_REPLIES[complaint], then_close=False) as (connector, _):
        disk = await NbdClient.open(connector, dead_after=0)
        results = await asyncio.gather(disk.pread(512, 0), disk.flush(), disk.trim(512, 0), return_exceptions=True)
        assert all(isinstance(result, nbd.NbdProtocolError) for result in results)
        assert complaint in str(results[0])
        with pytest.raises(nbd.NbdProtocolError, match=complaint):
            await disk.flush()
        await disk.close()


SESSION: list[bytes | int] = [
    b"NBDMAGIC",
    b"IHAVEOPT",
    b"\0\3",
    20,
    wire.chunks_offered(),
    GO_REQUEST - 20,
    wire.info_export(wire.GO, MIB),
    wire.info_blocks(wire.GO, 1, 4096, MIB),
    wire.reply(wire.GO, wire.ACK),
    28 + 28,
    wire.data(1, 0, b"a" * 256),
    wire.none(2),
    wire.chunk(1, 1, bytes(6) + b"\1\0" + b"b" * 256)[:30],
]


@pytest.mark.parametrize("messages", range(len(SESSION)))
async def test_a_connection_closed_at_any_message_boundary_is_a_clear_error(messages: int) -> None:
    async with scripted(*SESSION[:messages]) as (connector, _):
        with pytest.raises(ConnectionError, match=r"server closed the connection|[Cc]onnection reset|Broken pipe"):
            async with await NbdClient.open(connector, dead_after=0) as disk:
                # Both, whichever fails first: nothing may hang.
                results = await asyncio.gather(disk.pread(512, 0), disk.flush(), return_exceptions=True)
                assert isinstance(results[0], OSError)
                raise results[0]


@pytest.mark.parametrize("messages", [0, 1, 4, 8])
async def test_a_server_that_falls_silent_in_the_negotiation_is_a_timeout(messages: int) -> None:
    async with scripted(*SESSION[:messages], then_close=False) as (connector, _):
        with pytest.raises(TimeoutError, match=r"waited 0.25 s in vain for the (greeting|answer to NBD_OPT_\w+)") as caught:
            await NbdClient.open(connector, connect_timeout=0.25)
        assert caught.value.errno == errno.ETIMEDOUT


async def test_whoever_waits_for_the_end_hears_the_reason() -> None:
    async with scripted(*STEPS) as (connector, _), await NbdClient.open(connector, dead_after=0) as disk:
        reason = await disk.wait_lost()
        assert isinstance(reason, ConnectionResetError)
        assert "server closed the connection" in str(reason)


async def test_a_server_that_cannot_be_reached_is_a_timeout() -> None:
    async def nowhere(factory: object) -> tuple[Any, Any]:
        return await asyncio.Event().wait(), None

    with pytest.raises(TimeoutError, match="in vain for the connection"):
        await NbdClient.open(nowhere, connect_timeout=0.01)


async def test_a_server_that_falls_silent_later_fails_everybody_in_time_even_those_in_line() -> None:
    async with scripted(*STEPS, 28, wire.none(1)[:7], then_close=False) as (connector, _):
        disk = await NbdClient.open(connector, dead_after=0, request_timeout=0.05, queue_depth=2)
        async with asyncio.timeout(30):
            results = await asyncio.gather(*(disk.pread(512, 0) for _ in range(7)), return_exceptions=True)
        assert [type(result) for result in results] == [TimeoutError] * 7
        assert "no reply to NBD_CMD_READ(offset=0, length=512, cookie=1) within 0.05 s" in str(results[6])
        with pytest.raises(TimeoutError):
            await disk.flush()
        await disk.close()


async def test_a_cancelled_read_leaves_its_memory_alone_and_the_connection_in_step() -> None:
    async with (
        scripted(*STEPS, 28, wire.data(1, 0, b"x" * 256), 28, wire.data(1, 256, b"y" * 256, 1) + wire.none(2), 28) as (
            connector,
            _,
        ),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        memory = bytearray(512)
        task = asyncio.create_task(disk.pread_into(memory, 0))
        while memory[0] == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert disk.requests_in_flight == 1
        await disk.flush()
        assert memory == b"x" * 256 + bytes(256)
        assert disk.requests_in_flight == 0


async def test_no_more_is_in_flight_than_allowed_and_everybody_has_a_turn() -> None:
    async with serving() as uri, nbd.connect(uri, queue_depth=5, max_bytes_in_flight=3000) as disk:
        most = 0

        async def read(offset: int) -> None:
            nonlocal most
            await disk.pread(1000, offset)
            most = max(most, disk.requests_in_flight)

        tasks = [asyncio.create_task(read(n)) for n in range(50)]
        flushes = [asyncio.create_task(disk.flush()) for _ in range(50)]
        await asyncio.sleep(0)
        assert disk.requests_in_flight == 3
        tasks[40].cancel()
        await asyncio.gather(*tasks, *flushes, return_exceptions=True)
        assert [task.cancelled() for task in tasks].count(True) == 1
        assert most <= 5
        await disk.pread(5000, 0)
        assert disk.requests_in_flight == 0


async def test_close_waits_for_answers_and_says_goodbye() -> None:
    async with scripted(*STEPS, 28 + 28, wire.none(1) + wire.data(2, 0, b"z", 1), 28) as (connector, heard):
        disk = await NbdClient.open(connector, dead_after=0)
        pending = asyncio.gather(disk.flush(), disk.pread(1, 0))
        await asyncio.sleep(0)
        await disk.close()
        assert (await pending)[1] == b"z"
        with pytest.raises(BrokenPipeError, match="closed"):
            await disk.pread(1, 0)
        await disk.close()
    assert heard.endswith(wire.request(wire.DISC, 0))


async def test_close_does_not_wait_for_ever() -> None:
    async with scripted(*STEPS, 28, then_close=False) as (connector, _):
        disk = await NbdClient.open(connector, dead_after=0)
        pending = asyncio.create_task(disk.flush())
        await asyncio.sleep(0)
        await disk.close(grace=0.01)
        with pytest.raises(TimeoutError, match="still unanswered"):
            await pending


async def test_writes_wait_while_the_transport_has_enough() -> None:
    async with serving() as uri, nbd.connect(uri) as disk:
        disk._session._up[0].pause_writing()
        write = asyncio.create_task(disk.pwrite(b"late", 0))
        for _ in range(3):
            await asyncio.sleep(0)
        assert disk.requests_in_flight == 0
        disk._session._up[0].resume_writing()
        await write
        assert await disk.pread(4, 0) == b"late"


async def test_close_turns_away_those_who_wait_for_the_transport() -> None:
    async with serving() as uri, nbd.connect(uri) as disk:
        disk._session._up[0].pause_writing()
        write = asyncio.create_task(disk.pwrite(b"too late", 0))
        await asyncio.sleep(0)
        await disk.close()
        with pytest.raises(BrokenPipeError):
            await write


class Wrapped:
    """A transport that shows a socket of our own stack: one that can be marked memalloc."""

    def __init__(self, transport: asyncio.Transport, log: list[str]) -> None:
        self._transport = transport
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else self._transport.get_extra_info(name)

    @property
    def reserve(self) -> Any:
        return SimpleNamespace(may_begin=lambda: True, release=lambda owner: self._log.append("reserve released"))

    def set_memalloc(self, on: bool) -> None:
        self._log.append(f"memalloc {on}")

    def reserve_for(self, demand: Demand, owner: object) -> None:
        self._log.append(f"reserve for {demand.connections} * {demand.queue_depth} * {demand.request_size}")

    def write(self, data: bytes) -> None:
        self._log.append("write")
        self._transport.write(data)


def memalloc_connector(uri: str, log: list[str]) -> Connector:
    """A way to the server at `uri` by sockets that can be marked memalloc, and write down what is done with them."""
    port = int(uri.rpartition(":")[2])

    async def connector(factory: Callable[[], asyncio.BufferedProtocol]) -> tuple[Any, Any]:
        def wrapping() -> asyncio.BufferedProtocol:
            protocol = factory()
            made = protocol.connection_made
            protocol.connection_made = lambda transport: made(Wrapped(transport, log))  # type: ignore[arg-type,method-assign]
            return protocol

        return await asyncio.get_running_loop().create_connection(wrapping, "127.0.0.1", port)

    return connector


async def test_the_socket_is_marked_memalloc_before_the_first_byte_is_sent() -> None:
    log: list[str] = []
    async with serving() as uri, await NbdClient.open(memalloc_connector(uri, log), dead_after=0) as disk:
        await disk.flush()
        assert log[:3] == ["memalloc True", "reserve for 1 * 64 * 65536", "write"]
        assert "reserve released" not in log
    assert log.count("reserve released") == 1


async def test_the_reserve_is_released_when_the_export_cannot_be_had() -> None:
    log: list[str] = []
    async with serving() as uri:
        with pytest.raises(OSError, match="no such export"):
            await NbdClient.open(memalloc_connector(uri, log), "another", dead_after=0)
    assert log[0] == "memalloc True"
    assert log[-1] == "reserve released"


async def test_another_create_connection_is_asked_for_host_and_port() -> None:
    asked: list[tuple[str, int]] = []

    async def create(factory: Callable[[], asyncio.BufferedProtocol], host: str, port: int) -> tuple[Any, Any]:
        asked.append((host, port))
        return await asyncio.get_running_loop().create_connection(factory, "127.0.0.1", real)

    async with serving() as uri:
        real = int(uri.rpartition(":")[2])
        async with nbd.connect("nbd://10.77.0.1:99/", create_connection=create) as disk:
            assert disk.size == 4 * MIB
    assert asked == [("10.77.0.1", 99)]


async def test_a_refused_connection_names_the_uri() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"nbd://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(ConnectionRefusedError, match=uri):
            async with nbd.connect(uri):
                pass


async def test_info_without_use() -> None:
    async with serving() as uri:
        port = int(uri.rpartition(":")[2])
        loop = asyncio.get_running_loop()
        connection = await Connection.open(lambda f: loop.create_connection(f, "127.0.0.1", port), purpose=Purpose.INFO)
        await connection.close()
    described = next(event for event in connection.negotiation if isinstance(event, ExportDescribed))
    assert described.info.size == 4 * MIB
    assert connection.negotiation[-1] == Aborted()


@pytest.mark.parametrize(
    ("rule", "call", "sent"),
    [
        (strict.STRICT_BOUNDS, lambda disk: disk.pread(512, 4096), wire.request(wire.READ, 1, 4096, 512)),
        (strict.STRICT_ALIGN, lambda disk: disk.pread(100, 1), wire.request(wire.READ, 1, 1, 100)),
        (strict.STRICT_ZERO_SIZE, lambda disk: disk.trim(0, 0), wire.request(wire.CMD_TRIM, 1)),
        (strict.STRICT_COMMANDS, lambda disk: disk.cache(512, 0), wire.request(wire.CMD_CACHE, 1, 0, 512)),
        (strict.STRICT_COMMANDS, lambda disk: disk.flush(), wire.request(wire.CMD_FLUSH, 1)),
        (strict.STRICT_FLAGS, lambda disk: disk.zero(512, 0, fast=True), wire.request(wire.WRITE_ZEROES, 1, 0, 512, 16)),
        (strict.STRICT_PAYLOAD, lambda disk: disk.pread(2048, 0), wire.request(wire.READ, 1, 0, 2048)),
    ],
)
async def test_a_rule_that_is_switched_off_leaves_the_last_word_to_the_server(
    rule: int, call: Callable[[NbdClient], Awaitable[Any]], sent: bytes
) -> None:
    flags = wire.HAS_FLAGS | wire.TRIM | wire.ZEROES
    negotiation = wire.negotiation(4096, flags, blocks=(512, 1024, 1024))[18:]
    steps = (*STEPS[:2], negotiation, GO_REQUEST - 20, 28, wire.error(1, 22, b"I told you so"))
    async with (
        scripted(*steps, then_close=False) as (connector, heard),
        await NbdClient.open(connector, dead_after=0, strict=strict.STRICT & ~rule) as disk,
    ):
        with pytest.raises(OSError, match="I told you so"):
            await call(disk)
    assert heard[GO_REQUEST:].startswith(sent)


async def test_what_fits_no_header_is_refused_even_without_any_rule() -> None:
    async with (
        scripted(*STEPS, 28, then_close=False) as (connector, _),
        await NbdClient.open(connector, dead_after=0, strict=0) as disk,
    ):
        for offset, code in ((1 << 63, errno.EOVERFLOW), (-1, errno.EINVAL)):
            with pytest.raises(OSError, match="NBD_CMD_TRIM") as caught:
                await disk.trim(512, offset)
            assert caught.value.errno == code


async def test_a_read_that_failed_somewhere_says_how_much_of_it_is_good() -> None:
    reply = wire.data(1, 1024, b"x" * 512) + wire.error(1, 5, b"scratch", wire.DONE, offset=1324)
    async with (
        scripted(*STEPS, 28, reply, 28, wire.error(2, 5, b"void"), then_close=False) as (connector, _),
        await NbdClient.open(connector, dead_after=0) as disk,
    ):
        memory = bytearray(1024)
        with pytest.raises(nbd.NbdReadError, match="scratch") as caught:
            await disk.pread_into(memory, 1024)
        assert (caught.value.errno, caught.value.valid_bytes) == (errno.EIO, 300)
        assert memory[:300] == b"x" * 300
        with pytest.raises(OSError, match="void") as other:
            await disk.pread(512, 0)
        assert not isinstance(other.value, nbd.NbdReadError)
