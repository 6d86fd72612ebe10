"""Servers that go and come back: callers only wait, nothing is lost, and what cannot be kept is said."""

from __future__ import annotations

import asyncio
import errno
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nbd import wire
from tests.nbd.servers import MIB
from ustack import nbd
from ustack.lab.world import VirtualLoop, World
from ustack.link.simwire import Impairments, SimDevice, SimWire
from ustack.nbd.call import Call
from ustack.nbd.client import NbdClient
from ustack.nbd.export import FileExport, MemoryExport
from ustack.nbd.reconnection import MAX_FRUITLESS
from ustack.nbd.server import NbdServer
from ustack.nbd.unflushed import UnflushedWrites
from ustack.nbd.write_order import WriteOrder
from ustack.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from ustack.nbd.connection import Connector, ProtocolFactory


class Fickle:
    """Our server on an image file, which can be killed and started again, each time on another port."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.server: NbdServer | None = None
        self.port = 0
        self.starts = 0

    async def start(self) -> None:
        self.server = NbdServer([FileExport(self.image)])
        self.port = await self.server.listen_tcp()
        self.starts += 1

    async def kill(self) -> None:
        assert self.server is not None
        await self.server.close()

    async def connect(self, factory: ProtocolFactory) -> tuple[Any, Any]:
        """A connector: the address is looked up anew each time."""
        return await asyncio.get_running_loop().create_connection(factory, "127.0.0.1", self.port)


@asynccontextmanager
async def fickle(image: Path, **options: Any) -> AsyncIterator[tuple[Fickle, NbdClient]]:
    server = Fickle(image)
    await server.start()
    async with await NbdClient.open(server.connect, **options) as disk:
        yield server, disk
    await server.kill()


@pytest.mark.parametrize("connections", [1, 3])
async def test_twenty_restarts_amid_a_verified_storm_and_nobody_notices(connections: int, tmp_path: Path) -> None:
    chance = random.Random(7)
    size = 2 * MIB
    model = bytearray(size)
    (tmp_path / "image").write_bytes(model)
    async with fickle(tmp_path / "image", queue_depth=8, connections=connections) as (server, disk):
        done = False

        async def storm(start: int, stop: int) -> None:
            while not done:
                length = chance.choice([512, 4096, 30_000])
                offset = chance.randrange(start, stop - length)
                if chance.random() < 0.5:
                    data = chance.randbytes(length)
                    model[offset : offset + length] = data
                    await disk.pwrite(data, offset)
                elif chance.random() < 0.1:
                    await disk.flush()
                else:
                    assert await disk.pread(length, offset) == model[offset : offset + length]

        step = size // 16
        storms = [asyncio.create_task(storm(start, start + step)) for start in range(0, size, step)]
        for _ in range(20):
            before = await disk.pread(512, 0)
            await server.kill()
            await server.start()
            assert await disk.pread(512, 0) is not before
        done = True
        await asyncio.gather(*storms)
        assert await disk.pread(size, 0) == model
        counters = disk.counters()
        assert server.starts == 21
        assert counters["connected"] >= 21
        assert counters["outages"] >= 20
        assert counters["replayed"] > 0
        assert counters["samples_checked"] > 0
        assert counters["samples_lost"] == 0
        while disk.connections < connections:
            await disk.pread(512, 0)
        await disk.flush()
        assert disk.unflushed == (0, 0)


async def test_callers_wait_while_the_server_is_away_and_the_first_who_gives_up_hurts_nobody(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    async with fickle(tmp_path / "image") as (server, disk):
        await disk.pwrite(b"before", 0)
        await server.kill()
        data = bytearray(b"cancelled")
        first = asyncio.create_task(disk.pwrite(data, 100))
        write = asyncio.create_task(disk.pwrite(b"after", 100))
        read = asyncio.create_task(disk.pread(6, 0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not write.done()
        assert disk.connections == 0
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        data[:] = b"forbidden"
        await server.start()
        await write
        assert await read == b"before"
        assert await disk.pread(10, 100) == b"after" + bytes(5)


# -- by script: exact orders ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def acts(*scripts: list[bytes | int]) -> AsyncIterator[tuple[Connector, list[bytearray]]]:
    """A server that follows one script per connection, and closes it at the end of all but the last; and what it has read."""
    heard: list[bytearray] = []
    left = list(scripts)

    async def follow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = left.pop(0) if left else []
        said = bytearray()
        heard.append(said)
        try:
            for step in script:
                if isinstance(step, int):
                    said.extend(await reader.readexactly(step))
                else:
                    writer.write(step)
                    await writer.drain()
            if not left and script:
                said.extend(await reader.read())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(follow, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()

    async def connector(factory: ProtocolFactory) -> tuple[Any, Any]:
        return await asyncio.get_running_loop().create_connection(factory, host, port)

    try:
        yield connector, heard
    finally:
        server.close()
        await server.wait_closed()


GO_REQUEST = len(wire.asked())


def opening(size: int = MIB, flags: int = wire.ALL_FLAGS) -> list[bytes | int]:
    return [wire.GREETING, 20, wire.negotiation(size, flags)[18:], GO_REQUEST - 20]


async def test_unanswered_requests_are_sent_again_in_their_order_and_answered_ones_are_not() -> None:
    async with acts(
        [*opening(), 28 + 4 + 28 + 4 + 28 + 28, wire.none(2)],
        [*opening(), 28, wire.data(1, 8, b"BBBB", wire.DONE), 28 + 4 + 28 + 28, wire.none(2) + wire.none(3), wire.none(4)],
    ) as (connector, heard):
        async with await NbdClient.open(connector) as disk:
            calls = disk.pwrite(b"AAAA", 0), disk.pwrite(b"BBBB", 8), disk.trim(4, 100), disk.flush()
            await asyncio.gather(*calls)
            counters = disk.counters()
        again = heard[1][GO_REQUEST:]
        # What was answered but not flushed is looked at first: a sample of BBBB.
        assert again[:28] == wire.request(wire.READ, 1, 8, 4)
        assert again[28:].startswith(
            wire.request(wire.WRITE, 2, 0, 4, payload=b"AAAA") + wire.request(wire.CMD_TRIM, 3, 100, 4)
        )
        assert again[28 + 60 :].startswith(wire.request(wire.CMD_FLUSH, 4))
        assert (counters["replayed"], counters["unflushed_at_outage"], counters["samples_lost"]) == (3, 1, 0)


async def test_a_write_waits_for_an_older_one_that_it_overlaps_so_that_sending_again_undoes_nothing() -> None:
    async with (
        acts(
            [*opening(), 28 + 4 + 28 + 4, wire.none(2)],
            [*opening(), 28, wire.data(1, 100, b"else", wire.DONE), 28 + 4, wire.none(2), 28 + 4, wire.none(3)],
        ) as (connector, heard),
        await NbdClient.open(connector) as disk,
    ):
        await asyncio.gather(disk.pwrite(b"old!", 0), disk.pwrite(b"new!", 2), disk.pwrite(b"else", 100))
        # The newer is not sent before the older is answered: neither on the first connection nor on the second.
        assert b"new!" not in heard[0]
        assert heard[1].index(b"old!") < heard[1].index(b"new!")


async def test_a_server_that_lost_its_cache_is_noticed_and_said_once() -> None:
    events: list[str] = []
    async with acts(
        [*opening(), 28 + 8, wire.none(1), 28],
        [*opening(), 28, wire.data(1, 64, bytes(8), wire.DONE), 28, wire.none(2), 28, wire.none(3)],
    ) as (connector, _):
        disk = await NbdClient.open(connector, on_event=lambda event, _: events.append(event))
        await disk.pwrite(b"precious", 64)
        assert disk.unflushed == (1, 8)
        with pytest.raises(OSError, match=r"has lost data .*1 of 1 writes.* at 64") as caught:
            await disk.flush()
        assert caught.value.errno == errno.EIO
        await disk.flush()
        assert disk.counters()["samples_lost"] == 1
        await disk.close()
    assert events == ["lost", "data lost", "attached"]


@pytest.mark.parametrize(
    ("again", "complaint"),
    [
        (opening(2 * MIB), "size was 1048576 and is 2097152"),
        (opening(flags=wire.ALL_FLAGS & ~wire.FLUSH), "flags was"),
        (
            [wire.GREETING, 20, wire.negotiation(MIB, blocks=(512, 4096, 1 << 20))[18:], GO_REQUEST - 20],
            "minimum_block was 1 and is 512",
        ),
    ],
)
async def test_an_export_that_is_not_the_same_any_more_is_not_written_to(again: list[bytes | int], complaint: str) -> None:
    async with acts([*opening(), 28], again) as (connector, heard):
        disk = await NbdClient.open(connector)
        with pytest.raises(OSError, match=f"the export has changed: {complaint}") as caught:
            await disk.flush()
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(OSError, match="has changed"):
            await disk.pread(1, 0)
        await disk.close()
    assert len(heard[1]) <= GO_REQUEST


async def test_a_server_that_can_do_more_than_before_is_welcome() -> None:
    before, after = wire.HAS_FLAGS | wire.FLUSH, wire.HAS_FLAGS | wire.FLUSH | wire.TRIM | wire.CACHE
    async with (
        acts([*opening(flags=before), 28], [*opening(flags=after), 28, wire.none(1)]) as (connector, _),
        await NbdClient.open(connector) as disk,
    ):
        await disk.flush()
        assert disk.counters()["outages"] == 1


async def test_eshutdown_means_wait_for_the_next_server() -> None:
    async with (
        acts([*opening(), 28, wire.error(1, 108), 28], [*opening(), 28, wire.data(1, 0, b"x", wire.DONE)]) as (
            connector,
            heard,
        ),
        await NbdClient.open(connector) as disk,
    ):
        assert await disk.pread(1, 0) == b"x"
        assert heard[0].endswith(wire.request(wire.DISC, 0))


async def test_a_server_that_never_answers_anything_is_given_up_soon() -> None:
    async with acts(*([*opening(), 28] for _ in range(MAX_FRUITLESS + 5))) as (connector, heard):
        disk = await NbdClient.open(connector)
        async with asyncio.timeout(15):
            with pytest.raises(ConnectionResetError, match=f"{MAX_FRUITLESS} connections in a row"):
                await disk.flush()
        assert len(heard) == MAX_FRUITLESS + 1
        await disk.close()


async def test_a_server_that_breaks_the_protocol_is_not_asked_again() -> None:
    async with acts([*opening(), 28, b"nonsense" * 10], opening()) as (connector, heard):
        disk = await NbdClient.open(connector)
        with pytest.raises(nbd.NbdProtocolError):
            await disk.flush()
        await disk.close()
    assert len(heard) == 1


async def test_with_no_time_to_wait_a_lost_connection_is_the_end_at_once() -> None:
    async with acts([*opening(), 28], opening()) as (connector, heard):
        disk = await NbdClient.open(connector, dead_after=0)
        with pytest.raises(ConnectionResetError):
            await disk.flush()
        await disk.close()
    assert len(heard) == 1


async def test_fail_over_goes_to_the_next_address_that_works(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"same disk, two servers".ljust(4096))
    one, two = Fickle(tmp_path / "image"), Fickle(tmp_path / "image")
    await two.start()
    uris = [f"nbd://127.0.0.1:{1 if port is None else port}" for port in (None, two.port)]
    async with nbd.connect(uris) as disk:
        await one.start()
        assert (await disk.pread(9, 0)) == b"same disk"
    await one.kill()
    await two.kill()
    with pytest.raises(ValueError, match="same export"):
        async with nbd.connect(["nbd://localhost/a", "nbd://localhost/b"]):
            pass


# -- in virtual time, over our own TCP ---------------------------------------------------------------------------------------


def in_a_world(main: Callable[[Stack, Stack, SimWire], Awaitable[None]], seed: int = 3) -> None:
    world = World(seed=seed)
    devices = SimDevice("left", b"\x02\0\0\0\0\1"), SimDevice("right", b"\x02\0\0\0\0\2")
    wires = SimWire(world, *devices)
    stacks = Stack(memory=8 << 20), Stack(memory=8 << 20)
    for stack, device, address in zip(stacks, devices, ("10.0.0.1/24", "10.0.0.2/24"), strict=True):
        world.add(stack, device)
        stack.add_interface(device, address)

    async def run() -> None:
        await main(*stacks, wires)
        for stack in stacks:
            stack.close()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(world)) as runner:
        runner.run(run())


def reaching(stack: Stack) -> Connector:
    async def connector(factory: ProtocolFactory) -> tuple[Any, Any]:
        return await stack.create_connection(factory, "10.0.0.2", 10809)

    return connector


@pytest.mark.parametrize("minutes", [1, 10])
def test_a_link_cut_for_minutes_is_only_a_long_wait(minutes: int) -> None:
    async def story(ours: Stack, theirs: Stack, link: SimWire) -> None:
        loop = asyncio.get_running_loop()
        export = MemoryExport(MIB)
        server = NbdServer([export])
        await theirs.create_server(server.protocol, None, 10809)
        async with nbd.connect("nbd://10.0.0.2/", create_connection=ours.create_connection, dead_after=None) as disk:
            await disk.pwrite(b"a" * 4096, 0)
            link.impair(Impairments(loss=1.0))
            writes = [asyncio.create_task(disk.pwrite(bytes([n]) * 4096, 4096 * n)) for n in range(1, 40)]
            await asyncio.sleep(60 * minutes)
            assert not any(write.done() for write in writes)
            began = loop.time()
            link.impair(Impairments())
            await asyncio.gather(*writes)
            assert loop.time() - began < 30
            assert disk.counters()["lost"] >= 1
            for n in range(1, 40):
                assert await disk.pread(4096, 4096 * n) == bytes([n]) * 4096
        await server.close()

    in_a_world(story)


def test_a_dead_server_is_told_after_the_users_deadline_and_not_before() -> None:
    async def story(ours: Stack, theirs: Stack, link: SimWire) -> None:
        loop = asyncio.get_running_loop()
        server = NbdServer([MemoryExport(MIB)])
        await theirs.create_server(server.protocol, None, 10809)
        disk = await NbdClient.open(reaching(ours), dead_after=300, request_timeout=20)
        link.impair(Impairments(loss=1.0))
        began = loop.time()
        results = await asyncio.gather(disk.pread(1, 0), disk.pwrite(b"x", 0), disk.flush(), return_exceptions=True)
        assert all(isinstance(result, TimeoutError) and "no answer for 300 s" in str(result) for result in results)
        assert 300 <= loop.time() - began <= 325
        with pytest.raises(TimeoutError):
            await disk.flush()
        assert disk.requests_in_flight == 0
        await disk.close()
        await server.close()

    in_a_world(story)


def test_a_silent_peer_is_noticed_by_keepalive_though_nothing_is_asked() -> None:
    async def story(ours: Stack, theirs: Stack, link: SimWire) -> None:
        loop = asyncio.get_running_loop()
        server = NbdServer([MemoryExport(MIB)])
        await theirs.create_server(server.protocol, None, 10809)
        disk = await NbdClient.open(reaching(ours), dead_after=0)
        link.impair(Impairments(loss=1.0))
        began = loop.time()
        reason = await disk.wait_lost()
        assert reason.errno == errno.ETIMEDOUT
        assert loop.time() - began <= 40
        await disk.close()
        await server.close()

    in_a_world(story)


# -- the parts -----------------------------------------------------------------------------------------------------------------

RANGES = st.tuples(st.integers(0, 1 << 21), st.one_of(st.integers(1, 4096), st.integers(1, 1 << 21)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(RANGES, st.booleans()), max_size=30))
def test_write_order_finds_exactly_what_overlaps(steps: list[tuple[tuple[int, int], bool]]) -> None:
    loop = asyncio.new_event_loop()
    order = WriteOrder()
    filed: list[Call] = []
    for (offset, length), remove in steps:
        if remove and filed:
            order.remove(filed.pop(offset % len(filed)))
            continue
        call = Call(wire.WRITE, 0, offset, length, None, None, loop.create_future(), 0)
        expected = [other for other in filed if other.offset < offset + length and offset < other.offset + other.length]
        found = order.add(call) or []
        assert sorted(map(id, found)) == sorted(map(id, expected))
        filed.append(call)
    for call in filed:
        order.remove(call)
    assert not order
    loop.close()


def test_samples_are_only_of_what_nothing_newer_has_touched() -> None:
    loop = asyncio.new_event_loop()
    log = UnflushedWrites(1)

    def answered(command: int, offset: int, data: bytes, flags: int = 0) -> None:
        payload = memoryview(data) if command == wire.WRITE else None
        log.answered(Call(command, flags, offset, len(data), None, payload, loop.create_future(), 0))

    answered(wire.WRITE, 0, b"x" * 1000)
    answered(wire.WRITE, 4096, b"y" * 1000)
    answered(wire.WRITE, 8192, b"z" * 1000, 1)
    answered(wire.WRITE_ZEROES, 12288, bytes(100))
    answered(wire.CMD_TRIM, 500, bytes(100))
    assert log.count == 4  # what was written with FUA is durable
    newer = Call(wire.WRITE, 0, 4500, 10, None, None, loop.create_future(), 0)
    assert [sample.offset for sample in log.samples([newer])] == [12288, 8192]
    mark = log.mark()
    answered(wire.WRITE, 0, b"later")
    log.flushed(mark)
    assert (log.count, log.nbytes) == (1, 5)
    loop.close()
