"""From an NBD URI to a connected client."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Unpack

from ustack.nbd.client import NbdClient
from ustack.nbd.connection import (
    CONNECT_TIMEOUT,
    Connection,
    Connector,
    CreateConnection,
    ProtocolFactory,
)
from ustack.nbd.constants import NBD_REP_ERR_UNSUP
from ustack.nbd.errors import NbdNotFixedError, NbdOptionError
from ustack.nbd.handshake import ContextsListed, ExportDescribed, ExportListed, Negotiated, Purpose, Wishes
from ustack.nbd.tls import settings_for
from ustack.nbd.uri import NbdUri

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from ustack.nbd.export_info import ExportInfo
    from ustack.nbd.session_options import SessionOptions


_NO_CONTEXTS: Final = Wishes(meta_contexts=())


@dataclass(frozen=True, slots=True)
class ExportEntry:
    """One line of a server's list: the export, the text beside it, and its details if the server gives them (NBD_OPT_INFO),
    with its metadata contexts."""

    name: str
    description: str
    info: ExportInfo | None
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server says without being used: how it talks, and what it exports."""

    exports: list[ExportEntry]
    fixed_newstyle: bool
    structured_replies: bool
    extended_headers: bool
    tls: bool


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
    report = await ask_server(uri, Purpose.LIST, create_connection=create_connection, connect_timeout=connect_timeout)
    return report.exports


async def ask_server(
    uri: str | NbdUri,
    purpose: Purpose,
    *,
    create_connection: CreateConnection | None = None,
    connect_timeout: float | None = CONNECT_TIMEOUT,
) -> ServerReport:
    """What the server at `uri` says of the export there (Purpose.INFO) or of all (Purpose.LIST), without using any of them. A
    server too old to be asked is used for a moment. Raises like `connect`."""
    parsed = NbdUri.parse(uri) if isinstance(uri, str) else uri
    connector, tls = connector_for(parsed, create_connection), settings_for(parsed)
    try:
        connection = await Connection.open(
            connector, parsed.export, purpose=purpose, tls=tls, connect_timeout=connect_timeout, wishes=_NO_CONTEXTS
        )
    except OSError as error:
        old = isinstance(error, NbdOptionError) and error.reply == NBD_REP_ERR_UNSUP
        if purpose is not Purpose.INFO or not (old or isinstance(error, NbdNotFixedError)):
            raise
        connection = await Connection.open(
            connector, parsed.export, tls=tls, connect_timeout=connect_timeout, wishes=_NO_CONTEXTS
        )
    await connection.close()
    entries: dict[str, ExportEntry] = {}
    for event in connection.negotiation:
        if isinstance(event, ExportListed):
            entries[event.name] = ExportEntry(event.name, event.description, None)
        elif isinstance(event, ExportDescribed | Negotiated):
            known = entries.get(event.info.name) or ExportEntry(event.info.name, "", None)
            entries[event.info.name] = replace(known, info=event.info)
        elif isinstance(event, ContextsListed):
            entries[event.export] = replace(entries[event.export], contexts=event.names)
    return ServerReport(
        list(entries.values()),
        connection.fixed_newstyle,
        connection.structured_replies,
        connection.extended_headers,
        connection.tls,
    )
