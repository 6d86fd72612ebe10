"""What a request costs in the protocol alone, without I/O. Medians, in seconds; the limits leave room for a busy machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.nbd import wire
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.server_transmission import ServerTransmission
from ustack.nbd.transmission import ClientTransmission, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark_only

BATCH = 15
"""4 KiB replies in one receive buffer."""


def median(benchmark: BenchmarkFixture, call: Callable[[], None]) -> float:
    """Seconds for one of the `BATCH` requests that a call handles."""
    benchmark.pedantic(call, iterations=10, rounds=500, warmup_rounds=10)  # type: ignore[no-untyped-call]
    assert benchmark.stats is not None
    return float(benchmark.stats.stats.median) / BATCH


@pytest.mark.parametrize("structured", [True, False])
def test_a_4_kib_read(benchmark: BenchmarkFixture, structured: bool) -> None:
    transmission: ClientTransmission[Request] = ClientTransmission(structured)
    memory = memoryview(bytearray(4096))
    content = bytes(4096)
    replies = [
        bytearray(wire.data(0, 0, content, wire.DONE) if structured else wire.simple(0, 0, content)) for _ in range(BATCH)
    ]
    size = len(replies[0])

    def read() -> None:
        buffer = transmission.get_buffer()
        for number, reply in enumerate(replies):
            request = Request(wire.READ, 0, 0, 4096, memory)
            transmission.submit(request)
            reply[8:16] = request.cookie.to_bytes(8, "big")
            buffer[number * size : (number + 1) * size] = reply
        transmission.buffer_updated(BATCH * size)
        transmission.completed.clear()

    assert median(benchmark, read) < 8e-6


def test_a_4_kib_write_at_the_server(benchmark: BenchmarkFixture) -> None:
    disk = memoryview(bytearray(1 << 20))
    transmission = ServerTransmission(ExportInfo("", len(disk)), lambda offset, length: disk[offset : offset + length])
    stream = b"".join(wire.request(wire.WRITE, n, n * 4096, 4096, payload=bytes(4096)) for n in range(BATCH))

    def write() -> None:
        transmission.get_buffer()[: len(stream)] = stream
        transmission.buffer_updated(len(stream))
        while transmission.next_command() is not None:
            pass

    assert median(benchmark, write) < 8e-6
