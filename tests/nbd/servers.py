"""Servers for tests of the client: our own, and one that follows a script and so can be as bad as needed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ustack.nbd.export import Export, MemoryExport
from ustack.nbd.server import NbdServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ustack.nbd.connection import Connector, ProtocolFactory

MIB = 1 << 20


@asynccontextmanager
async def serving(*exports: Export) -> AsyncIterator[str]:
    """Our server on a free port of the loopback; gives the start of its URIs. Without exports it has 4 MiB of memory."""
    server = NbdServer(exports or [MemoryExport(4 * MIB)])
    try:
        yield f"nbd://127.0.0.1:{await server.listen_tcp()}"
    finally:
        await server.close()


@asynccontextmanager
async def scripted(*script: bytes | int, then_close: bool = True) -> AsyncIterator[tuple[Connector, bytearray]]:
    """A server that sends the bytes of its script; a number means to read so many bytes from the client first.

    In the end it closes the connection, or falls silent. Gives what connects to it and the bytes that it has read.
    """
    loop = asyncio.get_running_loop()
    heard = bytearray()
    done = loop.create_future()

    async def follow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for step in script:
                if isinstance(step, int):
                    heard.extend(await reader.readexactly(step))
                else:
                    writer.write(step)
                    await writer.drain()
            if not then_close:
                heard.extend(await reader.read())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            if not done.done():
                done.set_result(None)

    server = await asyncio.start_server(follow, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()

    async def connector(factory: ProtocolFactory) -> tuple[asyncio.Transport, asyncio.BufferedProtocol]:
        return await loop.create_connection(factory, host, port)

    try:
        yield connector, heard
        await asyncio.wait_for(done, 10)
    finally:
        server.close()
        await server.wait_closed()
