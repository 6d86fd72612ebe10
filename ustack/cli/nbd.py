"""`ustack nbd`: look at NBD exports, copy them, serve and attach some."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ustack.cli.nbd_attach import attach, detach
from ustack.cli.nbd_options import SCHEMES, connection_maker, human_size, parse_uri, run, via_options
from ustack.cli.nbd_serve import serve
from ustack.cli.size import Size

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ustack.nbd import ExportEntry, ExportInfo, NbdUri
    from ustack.nbd.copy import CopyResult, Disk


@click.group()
def nbd() -> None:
    """Network block devices: look, copy, serve, attach."""


# -- info --------------------------------------------------------------------------------------------------------------------


@nbd.command()
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the keys of nbdinfo.")
@click.option("--list", "list_all", is_flag=True, help="Show all exports of the server.")
@click.option("--size", "only_size", is_flag=True, help="Write nothing but the size in bytes.")
@via_options
def info(uri: str, as_json: bool, list_all: bool, only_size: bool, via: str, control: str, timeout: float) -> None:
    """Show what the server at URI says about an export."""
    from ustack.nbd import connect, list_exports

    parsed = parse_uri(uri)

    async def ask() -> tuple[list[ExportEntry], bool]:
        from ustack.nbd import ExportEntry

        create = connection_maker(via, control)
        if list_all:
            return await list_exports(parsed, create_connection=create, connect_timeout=timeout), True
        async with connect(parsed, create_connection=create, connect_timeout=timeout) as disk:
            return [ExportEntry(disk.name, disk.description or "", disk.info)], disk.structured_replies

    exports, structured = run(ask())
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
@via_options
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

        uri = parse_uri(name)
        create = connection_maker(via, control)
        return await open_disk([uri], create_connection=create, connect_timeout=seconds, request_timeout=seconds)
    from ustack.nbd.copy import LocalDisk

    return LocalDisk(name, create_size=create_size)


def _run_with_bar(main: Callable[[Callable[[int, int], object] | None], Coroutine[Any, Any, Any]], show: bool) -> Any:
    if not show:
        return run(main(None))
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("copy", total=None)
        return run(main(lambda done, total: bar.update(task, completed=done, total=total)))


nbd.add_command(serve)
nbd.add_command(attach)
nbd.add_command(detach)
