"""From an NBD URI to a connected client."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

from ustack.nbd.client import NbdClient
from ustack.nbd.connection import (
    CONNECT_TIMEOUT,
    Connection,
    Connector,
    CreateConnection,
    ProtocolFactory,
)
from ustack.nbd.handshake import ExportDescribed, ExportListed, Purpose
from ustack.nbd.tls import settings_for
from ustack.nbd.uri import NbdUri

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from ustack.nbd.export_info import ExportInfo
    from ustack.nbd.session import SessionOptions


@dataclass(frozen=True, slots=True)
class ExportEntry:
    """One line of a server's list: the export, the text beside it, and its details if the server gives them (NBD_OPT_INFO)."""

    name: str
    description: str
    info: ExportInfo | None


def connector_for(uri: NbdUri, create_connection: CreateConnection | None = None) -> Connector:
    """How to reach the server of `uri`: `create_connection` (default: the running loop's) for TCP, the kernel for unix sockets.

    It knows nothing of TLS: give what `tls.settings_for` says to the session as well, as `open_disk` does.
    """
    loop = asyncio.get_running_loop()
    create = create_connection or loop.create_connection

    async def reach(factory: ProtocolFactory) -> tuple[Any, Any]:
        try:
            if uri.socket is not None:
                return await loop.create_unix_connection(factory, uri.socket)
            return await create(factory, uri.host, uri.port)
        except OSError as error:
            raise type(error)(error.errno, f"{uri}: cannot connect: {error.strerror or error}") from error

    return reach


@asynccontextmanager
async def connect(
    uri: str | NbdUri | Sequence[str | NbdUri],
    *,
    create_connection: CreateConnection | None = None,
    context: ssl.SSLContext | None = None,
    **options: Unpack[SessionOptions],
) -> AsyncIterator[NbdClient]:
    """The export at `uri` as a disk, for `async with`. Several URIs are several ways to the same export, tried in turn
    (fail-over); they must name the export alike. nbds: URIs demand TLS, with what their parameters say or with `context`.
    `options` are those of `NbdClient.open`, and so are the errors; a malformed URI is a ValueError."""
    uris = [uri] if isinstance(uri, str | NbdUri) else uri
    async with await open_disk(uris, create_connection=create_connection, context=context, **options) as disk:
        yield disk


async def open_disk(
    uris: Sequence[str | NbdUri],
    *,
    create_connection: CreateConnection | None = None,
    context: ssl.SSLContext | None = None,
    **options: Unpack[SessionOptions],
) -> NbdClient:
    """What `connect` does, for those who close the disk themselves."""
    parsed = [NbdUri.parse(each) if isinstance(each, str) else each for each in uris]
    if len({each.export for each in parsed}) != 1:
        raise ValueError("fail-over needs one or more URIs of the same export")
    options["tls"] = [settings_for(each, context) for each in parsed]
    return await NbdClient.open([connector_for(each, create_connection) for each in parsed], parsed[0].export, **options)


async def list_exports(
    uri: str | NbdUri, *, create_connection: CreateConnection | None = None, connect_timeout: float | None = CONNECT_TIMEOUT
) -> list[ExportEntry]:
    """What the server at `uri` exports (NBD_OPT_LIST, then NBD_OPT_INFO for each). Raises like `connect`."""
    parsed = NbdUri.parse(uri) if isinstance(uri, str) else uri
    connection = await Connection.open(
        connector_for(parsed, create_connection),
        purpose=Purpose.LIST,
        tls=settings_for(parsed),
        connect_timeout=connect_timeout,
    )
    await connection.close()
    entries: dict[str, ExportEntry] = {}
    for event in connection.negotiation:
        if isinstance(event, ExportListed):
            entries[event.name] = ExportEntry(event.name, event.description, None)
        elif isinstance(event, ExportDescribed):
            entries[event.info.name] = replace(entries[event.info.name], info=event.info)
    return list(entries.values())
