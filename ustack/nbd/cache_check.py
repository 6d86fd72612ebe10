"""After an outage: does the server still have what it had answered? Samples of it are read back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final
from zlib import crc32

from ustack.nbd.call import Call
from ustack.nbd.constants import NBD_CMD_READ

if TYPE_CHECKING:
    from ustack.nbd.connection import Connection
    from ustack.nbd.unflushed import Sample

VERIFY_TIMEOUT: Final = 30.0
"""Seconds that reading the samples back may take."""


async def lost_samples(connection: Connection, samples: list[Sample]) -> list[Sample]:
    """Those of `samples` that are not on the export any more. Raises OSError when the connection is lost meanwhile, and
    TimeoutError."""
    async with asyncio.timeout(VERIFY_TIMEOUT):
        same = await asyncio.gather(*(_is_there(connection, sample) for sample in samples))
    return [sample for sample, there in zip(samples, same, strict=True) if not there]


async def _is_there(connection: Connection, sample: Sample) -> bool:
    data = memoryview(bytearray(sample.length))
    future = asyncio.get_running_loop().create_future()
    # A size of -1: it holds no place in the admission, and is not sent again.
    call = Call(NBD_CMD_READ, 0, sample.offset, sample.length, data, None, future, -1)
    if connection.closed.done():
        raise connection.error()
    connection.send(call)
    try:
        await future
    except asyncio.CancelledError:
        connection.abandon(call)
        raise
    return not call.error and crc32(data) == sample.crc
