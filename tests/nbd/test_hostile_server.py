"""A server that is as bad as hypothesis can make it: whatever it sends, and however, the client ends in time with OSErrors,
or with data that the server did send."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.nbd import wire
from ustack.nbd.block_status import Extent
from ustack.nbd.client import NbdClient

if TYPE_CHECKING:
    from ustack.nbd.connection import ProtocolFactory

SIZE = 1 << 20
LENGTH = 5000
DATA = bytes(range(250)) * 20
OFFSETS = {1: 0, 2: 0, 3: 1000, 4: 2000, 5: 0, 6: 0}
"""Of the six requests: changes that overlap would not be in flight together."""
Mischief: TypeAlias = tuple[str, int, int]


def conversation(extended: bool) -> tuple[list[bytes], list[bytes]]:
    """An honest server's messages: of the negotiation, and in reply to six requests with the cookies 1 to 6."""
    greeting = [b"NBDMAGIC", b"IHAVEOPT", b"\0\3"]
    options = [wire.reply(wire.EXTENDED, wire.ACK if extended else wire.UNSUP)]
    options += [] if extended else [wire.reply(wire.STRUCTURED, wire.ACK)]
    options += [wire.context(wire.SET_CONTEXTS, 9, "base:allocation"), wire.reply(wire.SET_CONTEXTS, wire.ACK)]
    options += [wire.info_export(wire.GO, SIZE), wire.info_blocks(wire.GO, 1, 4096, 1 << 20), wire.reply(wire.GO, wire.ACK)]

    def chunk(kind: int, cookie: int, payload: bytes = b"", flags: int = wire.DONE) -> bytes:
        if extended:
            return wire.extended_chunk(kind, cookie, OFFSETS[cookie], payload, flags)
        return wire.chunk(kind, cookie, payload, flags)

    wide = wire.wide_status_payload(9, (4096, 3), (1 << 33, 0))
    status = wide if extended else wire.status_payload(9, (4096, 3), (1 << 30, 0))
    replies = [
        chunk(1, 1, struct.pack(">Q", 0) + DATA[:3000], 0),
        chunk(0, 2),
        chunk(6 if extended else 5, 6, status),
        chunk(2, 1, struct.pack(">QI", 3000, 1000), 0),
        chunk(0x8001, 3, struct.pack(">IH", 28, 4) + b"full"),
        chunk(1, 1, struct.pack(">Q", 4000) + DATA[4000:]),
        chunk(0, 4),
        chunk(0, 5),
    ]
    return greeting + options, replies


def spoil(messages: list[bytes], mischief: list[Mischief]) -> tuple[list[bytes], int | None]:
    """The messages after some mischief, and before which of them the server falls silent."""
    stalled: int | None = None
    for kind, where, value in mischief:
        at = where % len(messages)
        message = messages[at]
        place = value % max(len(message), 1)
        match kind:
            case "change":
                messages[at] = message[:place] + bytes([where & 255]) + message[place + 1 :]
            case "large":
                messages[at] = message[: place & ~3] + b"\xff\xff\xff\xff" + message[(place & ~3) + 4 :]
            case "cut":
                messages[at] = message[:place]
            case "insert":
                messages[at] = message[:place] + bytes([value & 255]) * (where % 40) + message[place:]
            case "twice":
                messages.insert(at, message)
            case "swap":
                messages[at], messages[value % len(messages)] = messages[value % len(messages)], message
            case "endless":
                messages[at] = message * 200
            case "stall":
                stalled = at
            case "close":
                del messages[at:]
                messages.append(b"")
    return messages, stalled


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, plan: dict[str, Any]) -> None:
    """Send the plan, in pieces of `trickle` bytes, when the client has said as much as it should have by then."""
    heard = 0

    async def hear(count: int) -> None:
        nonlocal heard
        while heard < count:
            data = await reader.read(1 << 16)
            if not data:
                raise ConnectionResetError
            heard += len(data)

    async def send(messages: list[bytes], stalled: int | None) -> None:
        for number, message in enumerate(messages):
            if number == stalled:
                await hear(1 << 30)
            step = plan["trickle"] or max(len(message), 1)
            for at in range(0, min(len(message), 40 * step), step):
                writer.write(message[at : at + step])
                await writer.drain()
            writer.write(message[40 * step :])

    try:
        await send(plan["options"][:3], None)
        await hear(20)
        await send(*plan["negotiation"])
        await hear(len(wire.asked(extended=plan["extended"])) + 6 * (32 if plan["extended"] else 28) + 100)
        await send(*plan["replies"])
        if not plan["closes"]:
            await hear(1 << 30)
    except ConnectionError:
        pass
    finally:
        writer.close()


async def meet(plan: dict[str, Any], patience: float = 0.1) -> list[Any]:
    """Use such a server for one of each request; what came of them."""
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(serve(reader, writer, plan)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def connector(factory: ProtocolFactory) -> tuple[Any, Any]:
        return await asyncio.get_running_loop().create_connection(factory, "127.0.0.1", port)

    results: list[Any] = []
    try:
        async with asyncio.timeout(60):
            try:
                disk = await NbdClient.open(connector, connect_timeout=2 * patience, request_timeout=patience, dead_after=0)
            except OSError as error:
                return [error]
            assert disk.size <= (1 << 63) - 1
            calls = (
                disk.pread(LENGTH, 0),
                disk.pwrite(b"x" * 100, 0),
                disk.zero(100, 1000),
                disk.trim(100, 2000),
                disk.flush(),
                disk.block_status(8192, 0) if disk.can_block_status else disk.flush(),
            )
            results = list(await asyncio.gather(*calls, return_exceptions=True))
            await disk.close(0.05)
            assert disk.requests_in_flight == 0
    finally:
        server.close()
        await server.wait_closed()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return results


def plan_of(extended: bool, mischief: list[Mischief], later: list[Mischief], trickle: int, closes: bool) -> dict[str, Any]:
    options, replies = conversation(extended)
    return {
        "extended": extended,
        "options": options,
        "negotiation": spoil(options[3:], mischief),
        "replies": spoil(replies, later),
        "trickle": trickle,
        "closes": closes,
    }


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("trickle", [0, 1])
def test_the_same_server_when_it_is_honest(extended: bool, trickle: int) -> None:
    read, *rest = asyncio.run(meet(plan_of(extended, [], [], trickle, False), patience=9))
    assert read == DATA[:3000] + bytes(1000) + DATA[4000:]
    assert rest[0] is None
    assert isinstance(rest[1], OSError)
    assert rest[2:4] == [None, None]
    assert rest[4] == [Extent(0, 4096, 3), Extent(4096, 4096, 0)]


KINDS = ["change", "large", "cut", "insert", "twice", "swap", "endless", "stall", "close"]
MISCHIEF = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(0, 5000)), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.one_of(st.just([]), MISCHIEF), MISCHIEF, st.sampled_from([0, 0, 1, 7]), st.booleans())
def test_whatever_it_does_calls_end_in_time_with_errors_of_the_system_or_with_what_was_sent(
    extended: bool, mischief: list[Mischief], later: list[Mischief], trickle: int, closes: bool
) -> None:
    plan = plan_of(extended, mischief, later, trickle, closes)
    for number, result in enumerate(asyncio.run(meet(plan))):
        if isinstance(result, BaseException):
            assert isinstance(result, OSError), repr(result)
            assert result.errno is not None
        elif number == 0:
            assert len(result) == LENGTH
        elif isinstance(result, list):
            assert sum(extent.length for extent in result) == 8192
