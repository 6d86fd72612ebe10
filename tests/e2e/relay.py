"""A relay on our stack: what comes to a port of ours goes on, over our stack again, to a program on the kernel's side.

So programs that speak only with their own kind are tried with both ends of every byte on our TCP.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.e2e.conftest import KERNEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ustack.stack import Stack


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything from `reader` to `writer`, and the end of the stream."""
    try:
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except ConnectionError:  # a way to end that some programs have: close without reading all
        writer.transport.abort()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything back, and then the end."""
    await forward(reader, writer)
    writer.close()


@asynccontextmanager
async def relay(stack: Stack, port: int, to: int | None = None, host: str = KERNEL) -> AsyncIterator[None]:
    """Our `port` leads to the kernel's port `to` on its address `host`, or to the same port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await stack.open_connection(host, to or port)
        await asyncio.gather(forward(reader, onward_writer), forward(onward_reader, writer))
        onward_writer.close()
        writer.close()

    server = await stack.start_server(serve, None, port)
    yield
    server.close()
