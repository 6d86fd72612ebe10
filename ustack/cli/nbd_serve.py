"""`ustack nbd serve`: files, memory and disks that are elsewhere, for whoever speaks NBD."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ustack.cli.control import control_option
from ustack.cli.nbd_options import SCHEMES, connection_maker, human_size, parse_uri, run
from ustack.cli.size import Size

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ustack.nbd import NbdClient, NbdUri
    from ustack.nbd.export import Export
    from ustack.nbd.server import NbdServer


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the command line asks for."""

    sources: tuple[str, ...]
    memory: tuple[int, ...]
    address: str
    port: int
    unix_path: str | None
    read_only: bool
    tls: str | None
    certificates: str | None
    verify_peer: bool
    stall_timeout: float
    via: str
    control: str
    connections: int
    contexts: tuple[str, ...]
    dead_after: float


@click.command()
@click.argument("sources", nargs=-1, metavar="[FILE|URI]...")
@click.option("--memory", "memory", multiple=True, type=Size(), help="Export this much memory; may be repeated.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=10809, show_default=True, help="TCP port; 0: any free one.")
@click.option("--unix", "unix_path", type=click.Path(resolve_path=True), help="Listen on a unix socket instead.")
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "--tls",
    type=click.Choice(["off", "on", "require"]),
    help="Whether clients may or must use TLS.  [default: require with --tls-certificates, else off]",
)
@click.option(
    "--tls-certificates",
    "certificates",
    type=click.Path(exists=True, file_okay=False),
    help="Directory with server-cert.pem, server-key.pem and ca-cert.pem.",
)
@click.option("--tls-verify-peer", "verify_peer", is_flag=True, help="Clients need a certificate that ca-cert.pem has signed.")
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Seconds after which a client that stops amid a message, or takes no replies, is dropped; 0: never.",
)
@click.option(
    "--via",
    type=click.Choice(["kernel", "daemon"]),
    default="kernel",
    show_default=True,
    help="Whose TCP leads to a URI: the kernel's, or our own stack in a running daemon.",
)
@control_option
@click.option("--connections", type=click.IntRange(1, 16), default=1, show_default=True, help="Connections to a URI's server.")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    help="A metadata context of a URI's disk to pass on besides base:allocation; may be repeated.",
)
@click.option(
    "--dead-after",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds that clients wait for a URI's server when it is away; 0: until it is back.",
)
def serve(**options: Any) -> None:
    """Serve files, memory, and disks of other servers until interrupted, over the kernel's sockets.

    FILEs are exported under their names, memory as memory, memory2 and so on, the disk at a URI under the name that it has
    there. A client that asks for no export by name gets the first one: memory comes first, then what is named, in its order.
    Without --tls there is no access control: anybody who reaches the address may read and write. A unix socket belongs to its
    owner. Sockets that systemd or libnbd hand down (LISTEN_FDS) are used instead of any address.
    """
    wanted = _Wanted(**options)
    if not wanted.sources and not wanted.memory:
        raise click.UsageError("nothing to serve: name a file or a URI, or give --memory SIZE")
    if wanted.tls in ("on", "require") and wanted.certificates is None:
        raise click.UsageError("--tls needs --tls-certificates")
    if wanted.verify_peer and (wanted.certificates is None or wanted.tls == "off"):
        raise click.UsageError("--tls-verify-peer needs --tls-certificates")
    run(_serve(wanted))


async def _serve(wanted: _Wanted) -> None:
    from ustack.nbd.server import inherited_sockets

    inherited = inherited_sockets()
    disks: list[NbdClient] = []
    try:
        exports = await _exports(wanted, disks)
        server = _server(wanted, exports)
        try:
            uri = await _listen(server, wanted, inherited)
            for export in exports:
                click.echo(f"{_uri_of(uri, export.info.name)}\t{human_size(export.info.size)}")
            sys.stdout.flush()
            await _until_over(disks)
        finally:
            await server.close()
    finally:
        for disk in disks:
            await disk.close()


async def _until_over(disks: list[NbdClient]) -> None:
    """Wait to be told to stop. Raises OSError when a disk is given up, since there is nothing to serve then."""
    import asyncio

    from ustack.cli.signals import until_signal

    told = asyncio.ensure_future(until_signal())
    lost = [asyncio.ensure_future(disk.wait_lost()) for disk in disks]
    try:
        await asyncio.wait((told, *lost), return_when=asyncio.FIRST_COMPLETED)
        for each in lost:
            if each.done():
                raise each.result()
    finally:
        for waiting in (told, *lost):
            waiting.cancel()


def _server(wanted: _Wanted, exports: list[Export]) -> NbdServer:
    from ustack.nbd.server import NbdServer
    from ustack.nbd.server_handshake import TlsPolicy
    from ustack.nbd.tls import server_context

    policy = wanted.tls or ("off" if wanted.certificates is None else "require")
    context = None if wanted.certificates is None else server_context(wanted.certificates, verify_peer=wanted.verify_peer)
    try:
        return NbdServer(exports, tls=TlsPolicy(policy), tls_context=context, stall_timeout=wanted.stall_timeout or None)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


async def _exports(wanted: _Wanted, disks: list[NbdClient]) -> list[Export]:
    """The exports; the remote ones' disks, which are to be closed in the end, are appended to `disks`."""
    from ustack.nbd.connector import open_disk
    from ustack.nbd.constants import BASE_ALLOCATION
    from ustack.nbd.export import FileExport, MemoryExport
    from ustack.nbd.remote_export import RemoteExport

    read_only = wanted.read_only
    exports: list[Export] = []
    for number, size in enumerate(wanted.memory, 1):
        exports.append(MemoryExport(size, "memory" if number == 1 else f"memory{number}", read_only=read_only))
    for source in wanted.sources:
        if source.startswith(SCHEMES):
            disk = await open_disk(
                [parse_uri(source)],
                create_connection=connection_maker(wanted.via, wanted.control),
                connections=wanted.connections,
                meta_contexts=(BASE_ALLOCATION, *wanted.contexts),
                dead_after=wanted.dead_after or None,
                on_event=_reporter(source),
            )
            disks.append(disk)
            exports.append(RemoteExport(disk, read_only=read_only))
        else:
            exports.append(FileExport(source, Path(source).name, read_only=read_only))
    return exports


def _reporter(source: str) -> Callable[[str, OSError | None], None]:
    def report(event: str, reason: OSError | None) -> None:
        click.echo(f"{source}: {event}" + (f": {reason.strerror or reason}" if reason is not None else ""), err=True)

    return report


async def _listen(server: NbdServer, wanted: _Wanted, inherited: list[socket.socket]) -> NbdUri:
    """Listen; where, as a URI."""
    from ustack.nbd import NbdUri

    plain = server.tls_context is None
    if inherited:
        name = inherited[0].getsockname()
        for sock in inherited:
            await server.listen_socket(sock)
        if isinstance(name, tuple):
            return NbdUri("nbd" if plain else "nbds", name[0], name[1])
        path = name.decode() if isinstance(name, bytes) else name
        return NbdUri("nbd+unix" if plain else "nbds+unix", socket=path)
    if wanted.unix_path is not None:
        await server.listen_unix(wanted.unix_path)
        return NbdUri("nbd+unix" if plain else "nbds+unix", socket=wanted.unix_path)
    return NbdUri("nbd" if plain else "nbds", wanted.address, await server.listen_tcp(wanted.address, wanted.port))


def _uri_of(uri: NbdUri, export: str) -> str:
    from dataclasses import replace

    return str(replace(uri, export=export))
