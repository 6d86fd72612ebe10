"""asyncio's streams over our transports."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from ustack.aio.transport import create_connection, create_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ustack.aio.transport import Server, SocketMaker

LIMIT: Final = 64 << 10
"""Bytes that a reader buffers before it pauses its transport; as asyncio's own."""


async def open_connection(
    stack: SocketMaker, host: str, port: int, *, limit: int = LIMIT, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect over `stack` and return a reader and a writer (`asyncio.open_connection`); `options` are
    `create_connection`'s.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(stack, lambda: protocol, host, port, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(
    stack: SocketMaker,
    client_connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    host: str | None,
    port: int,
    *,
    limit: int = LIMIT,
    **options: Any,
) -> Server:
    """Listen over `stack` and call `client_connected(reader, writer)` for each connection (`asyncio.start_server`)."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected, loop=loop)

    return await create_server(stack, factory, host, port, **options)
