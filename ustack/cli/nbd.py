"""`ustack nbd`: look at NBD exports, copy them, serve some."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from ustack.cli.control import control_option, open_tcp_through_daemon
from ustack.cli.size import Size

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ustack.nbd import ExportEntry, ExportInfo, NbdUri
    from ustack.nbd.connection import CreateConnection
    from ustack.nbd.copy import CopyResult, Disk

SCHEMES: Final = ("nbd:", "nbds:", "nbd+unix:", "nbds+unix:")


def human_size(nbytes: int) -> str:
    """`1G` for 1073741824, as nbdinfo writes sizes: the largest unit that divides them."""
    units = ["", "K", "M", "G", "T", "P", "E"]
    while nbytes >= 1024 and nbytes % 1024 == 0:
        nbytes //= 1024
        units.pop(0)
    return f"{nbytes}{units[0]}"


def _via_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--via",
            type=click.Choice(["kernel", "daemon"]),
            default="kernel",
            show_default=True,
            help="Whose TCP: the kernel's, or our own stack in a running daemon.",
        ),
        control_option,
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=30.0,
            show_default=True,
            help="Seconds to wait for the connection and for each reply.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _create_connection(via: str, control: str) -> CreateConnection | None:
    if via == "kernel":
        return None

    async def through_daemon(factory: Any, host: str, port: int) -> tuple[Any, Any]:
        return await open_tcp_through_daemon(control, host, port, factory, memalloc=True)

    return through_daemon


def _run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run on uvloop; errors of the operating system and of the server end the program with their text."""
    import asyncio

    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}") from error


def _parse_uri(text: str) -> NbdUri:
    from ustack.nbd import NbdUri

    try:
        return NbdUri.parse(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@click.group()
def nbd() -> None:
    """Network block devices: look, copy, serve."""


# -- info --------------------------------------------------------------------------------------------------------------------


@nbd.command()
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the keys of nbdinfo.")
@click.option("--list", "list_all", is_flag=True, help="Show all exports of the server.")
@click.option("--size", "only_size", is_flag=True, help="Write nothing but the size in bytes.")
@_via_options
def info(uri: str, as_json: bool, list_all: bool, only_size: bool, via: str, control: str, timeout: float) -> None:
    """Show what the server at URI says about an export."""
    from ustack.nbd import connect, list_exports

    parsed = _parse_uri(uri)

    async def ask() -> tuple[list[ExportEntry], bool]:
        from ustack.nbd import ExportEntry

        create = _create_connection(via, control)
        if list_all:
            return await list_exports(parsed, create_connection=create, connect_timeout=timeout), True
        async with connect(parsed, create_connection=create, connect_timeout=timeout) as disk:
            return [ExportEntry(disk.name, disk.description or "", disk.info)], disk.structured_replies

    exports, structured = _run(ask())
    if only_size:
        for export in exports:
            click.echo(export.info.size if export.info else "")
    elif as_json:
        _print_json(parsed, exports, structured)
    else:
        _print_text(parsed, exports, structured)


def _uri_of(uri: NbdUri, export: str) -> str:
    from dataclasses import replace

    return str(replace(uri, export=export))


def _facts(info: ExportInfo) -> dict[str, bool | int]:
    facts: dict[str, bool | int] = {
        "is_rotational": info.is_rotational,
        "is_read_only": info.read_only,
        "can_cache": info.can_cache,
        "can_df": info.can_df,
        "can_fast_zero": info.can_fast_zero,
        "can_flush": info.can_flush,
        "can_fua": info.can_fua,
        "can_multi_conn": info.can_multi_conn,
        "can_trim": info.can_trim,
        "can_zero": info.can_zero,
    }
    if info.block_sizes_advertised:
        facts |= {
            "block_size_minimum": info.minimum_block,
            "block_size_preferred": info.preferred_block,
            "block_size_maximum": info.maximum_payload,
        }
    return facts


def _print_json(uri: NbdUri, exports: list[ExportEntry], structured: bool) -> None:
    import json

    entries = []
    for export in exports:
        entry: dict[str, Any] = {"export-name": export.name}
        description = export.description or (export.info.description if export.info else None)
        if description:
            entry["description"] = description
        entry["uri"] = _uri_of(uri, export.name)
        if export.info is not None:
            entry |= _facts(export.info)
            entry |= {"export-size": export.info.size, "export-size-str": human_size(export.info.size)}
        entries.append(entry)
    click.echo(
        json.dumps({"protocol": "newstyle-fixed", "TLS": uri.tls, "structured": structured, "exports": entries}, indent=2)
    )


def _print_text(uri: NbdUri, exports: list[ExportEntry], structured: bool) -> None:
    packets = "structured" if structured else "simple"
    click.echo(f"protocol: newstyle-fixed {'with' if uri.tls else 'without'} TLS, using {packets} packets")
    for export in exports:
        click.echo(f'export="{export.name}":')
        description = export.description or (export.info.description if export.info else None)
        if description:
            click.echo(f"\tdescription: {description}")
        if export.info is not None:
            click.echo(f"\texport-size: {export.info.size} ({human_size(export.info.size)})")
        click.echo(f"\turi: {_uri_of(uri, export.name)}")
        if export.info is not None:
            for key, value in _facts(export.info).items():
                click.echo(f"\t{key}: {str(value).lower() if isinstance(value, bool) else value}")


# -- copy --------------------------------------------------------------------------------------------------------------------


@nbd.command()
@click.argument("source")
@click.argument("destination")
@click.option("-R", "--requests", type=click.IntRange(1, 1024), default=16, show_default=True, help="Requests in flight.")
@click.option("--request-size", type=Size(), default="256K", show_default=True, help="Bytes in one request.")
@click.option(
    "-S", "--sparse", type=Size(), default="4K", show_default=True, help="Turn zeroes of this many bytes into holes; 0: never."
)
@click.option("--flush/--no-flush", default=True, show_default=True, help="Bring the copy to stable storage in the end.")
@click.option("-p/-P", "--progress/--no-progress", default=None, help="Show a progress bar (default: on a terminal).")
@_via_options
def copy(
    source: str,
    destination: str,
    requests: int,
    request_size: int,
    sparse: int,
    flush: bool,
    progress: bool | None,
    via: str,
    control: str,
    timeout: float,
) -> None:
    """Copy SOURCE to DESTINATION. Each is an NBD URI, a file or a block device; a file is made or overwritten."""
    from ustack.nbd.copy import copy as copy_disk

    async def transfer(report: Callable[[int, int], object] | None) -> CopyResult:
        source_disk = await _open_disk(source, None, via, control, timeout)
        try:
            target_disk = await _open_disk(destination, source_disk.size, via, control, timeout)
            try:
                return await copy_disk(
                    source_disk,
                    target_disk,
                    requests=requests,
                    request_size=request_size,
                    sparse=sparse,
                    flush=flush,
                    progress=report,
                )
            finally:
                await target_disk.close()
        finally:
            await source_disk.close()

    try:
        result: CopyResult = _run_with_bar(transfer, sys.stderr.isatty() if progress is None else progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    rate = result.total_bytes / result.seconds / (1 << 20) if result.seconds else 0.0
    click.echo(
        f"{result.total_bytes} bytes ({human_size(result.total_bytes)}) in {result.seconds:.2f} s, {rate:.0f} MiB/s; "
        f"{result.zero_bytes} of them as zeroes"
    )


async def _open_disk(name: str, create_size: int | None, via: str, control: str, seconds: float) -> Disk:
    """An NBD export or a local file; `create_size` makes it a target of that many bytes."""
    if name.startswith(SCHEMES):
        from ustack.nbd.connector import open_disk

        uri = _parse_uri(name)
        create = _create_connection(via, control)
        return await open_disk([uri], create_connection=create, connect_timeout=seconds, request_timeout=seconds)
    from ustack.nbd.copy import LocalDisk

    return LocalDisk(name, create_size=create_size)


def _run_with_bar(main: Callable[[Callable[[int, int], object] | None], Coroutine[Any, Any, Any]], show: bool) -> Any:
    if not show:
        return _run(main(None))
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("copy", total=None)
        return _run(main(lambda done, total: bar.update(task, completed=done, total=total)))


# -- serve -------------------------------------------------------------------------------------------------------------------


@nbd.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.option("--memory", "memory", multiple=True, type=Size(), help="Export this much memory; may be repeated.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=10809, show_default=True, help="TCP port; 0: any free one.")
@click.option("--unix", "unix_path", type=click.Path(resolve_path=True), help="Listen on a unix socket instead.")
@click.option("--read-only", is_flag=True, help="Refuse writes.")
def serve(
    files: tuple[str, ...], memory: tuple[int, ...], address: str, port: int, unix_path: str | None, read_only: bool
) -> None:
    """Serve FILES and memory over the kernel's sockets until interrupted.

    Files are exported under their names, memory as memory, memory2 and so on. A client that asks for no export by name gets the
    first one. There is no access control: anybody who reaches the address may read and write.
    """
    if not files and not memory:
        raise click.UsageError("nothing to serve: name a file or give --memory SIZE")
    _run(_serve(files, memory, address, port, unix_path, read_only))


async def _serve(
    files: tuple[str, ...], memory: tuple[int, ...], address: str, port: int, unix_path: str | None, read_only: bool
) -> None:
    from pathlib import Path

    from ustack.cli.signals import until_signal
    from ustack.nbd import NbdUri
    from ustack.nbd.export import Export, FileExport, MemoryExport
    from ustack.nbd.server import NbdServer

    exports: list[Export] = []
    for number, size in enumerate(memory, 1):
        exports.append(MemoryExport(size, "memory" if number == 1 else f"memory{number}", read_only=read_only))
    exports.extend(FileExport(path, Path(path).name, read_only=read_only) for path in files)
    try:
        server = NbdServer(exports)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if unix_path is not None:
        await server.listen_unix(unix_path)
        uri = NbdUri("nbd+unix", socket=unix_path)
    else:
        uri = NbdUri("nbd", address, await server.listen_tcp(address, port))
    for export in exports:
        click.echo(f"{_uri_of(uri, export.info.name)}\t{human_size(export.info.size)}")
    sys.stdout.flush()
    try:
        await until_signal()
    finally:
        await server.close()
