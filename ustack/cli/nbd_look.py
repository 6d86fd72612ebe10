"""`ustack nbd info`, `list` and `map`: what a server says of its exports, in the words of nbdinfo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from ustack.cli.nbd_options import connection_maker, human_size, parse_uri, run, via_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ustack.nbd import ExportInfo, Extent, NbdUri
    from ustack.nbd.connector import ServerReport

BASE_ALLOCATION: Final = "base:allocation"
MAP_WINDOW: Final = 8 << 30
"""Bytes of an export that are asked about at a time."""


@click.command()
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the keys of nbdinfo.")
@click.option("--list", "everything", is_flag=True, help="Show all exports of the server, as `ustack nbd list` does.")
@click.option("--size", "only_size", is_flag=True, help="Write nothing but the size in bytes.")
@via_options
def info(uri: str, as_json: bool, everything: bool, only_size: bool, via: str, control: str, timeout: float) -> None:
    """Show what the server at URI says about an export."""
    parsed = parse_uri(uri)
    report = _ask(parsed, everything, via, control, timeout)
    if only_size:
        for export in report.exports:
            click.echo(export.info.size if export.info else "")
    else:
        _print(parsed, report, as_json)


@click.command("list")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the keys of nbdinfo.")
@via_options
def list_all(uri: str, as_json: bool, via: str, control: str, timeout: float) -> None:
    """Show all exports of the server at URI."""
    parsed = parse_uri(uri)
    _print(parsed, _ask(parsed, True, via, control, timeout), as_json)


def _ask(uri: NbdUri, everything: bool, via: str, control: str, timeout: float) -> ServerReport:
    async def ask() -> ServerReport:
        from ustack.nbd.connector import ask_server
        from ustack.nbd.handshake import Purpose

        purpose = Purpose.LIST if everything else Purpose.INFO
        return await ask_server(uri, purpose, create_connection=connection_maker(via, control), connect_timeout=timeout)

    report: ServerReport = run(ask())
    return report


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


def _print(uri: NbdUri, report: ServerReport, as_json: bool) -> None:
    if as_json:
        _print_json(uri, report)
    else:
        _print_text(uri, report)


def _protocol(report: ServerReport) -> str:
    return "newstyle-fixed" if report.fixed_newstyle else "newstyle"


def _print_json(uri: NbdUri, report: ServerReport) -> None:
    import json

    entries = []
    for export in report.exports:
        entry: dict[str, Any] = {"export-name": export.name}
        description = export.description or (export.info.description if export.info else None)
        if description:
            entry["description"] = description
        entry["uri"] = _uri_of(uri, export.name)
        if export.contexts:
            entry["contexts"] = list(export.contexts)
        if export.info is not None:
            entry |= _facts(export.info)
            entry |= {"export-size": export.info.size, "export-size-str": human_size(export.info.size)}
        entries.append(entry)
    header = {
        "protocol": _protocol(report),
        "TLS": report.tls,
        "structured": report.structured_replies,
        "extended": report.extended_headers,
    }
    click.echo(json.dumps(header | {"exports": entries}, indent=2))


def _print_text(uri: NbdUri, report: ServerReport) -> None:
    packets = "extended" if report.extended_headers else "structured" if report.structured_replies else "simple"
    click.echo(f"protocol: {_protocol(report)} {'with' if report.tls else 'without'} TLS, using {packets} packets")
    for export in report.exports:
        click.echo(f'export="{export.name}":')
        description = export.description or (export.info.description if export.info else None)
        if description:
            click.echo(f"\tdescription: {description}")
        if export.info is not None:
            click.echo(f"\texport-size: {export.info.size} ({human_size(export.info.size)})")
        click.echo(f"\turi: {_uri_of(uri, export.name)}")
        if export.contexts:
            click.echo("\tcontexts:")
            for context in export.contexts:
                click.echo(f"\t\t{context}")
        if export.info is not None:
            for key, value in _facts(export.info).items():
                click.echo(f"\t{key}: {str(value).lower() if isinstance(value, bool) else value}")


# -- map ---------------------------------------------------------------------------------------------------------------------


@click.command("map")
@click.argument("uri")
@click.option("--context", default=BASE_ALLOCATION, show_default=True, help="The metadata context to ask about.")
@click.option("--totals", is_flag=True, help="Write the sums of each kind instead of every extent.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with the keys of nbdinfo.")
@via_options
def map_extents(uri: str, context: str, totals: bool, as_json: bool, via: str, control: str, timeout: float) -> None:
    """Show which parts of the export at URI are data, holes and zeroes, as `nbdinfo --map` does."""
    import json

    async def look() -> None:
        from ustack.nbd import connect

        sums: dict[int, int] = {}
        lines = 0
        create = connection_maker(via, control)
        options: Any = {"connect_timeout": timeout, "request_timeout": timeout, "meta_contexts": [context]}
        async with connect(parsed, create_connection=create, **options) as disk:
            if as_json:
                click.echo("[", nl=False)
            async for extent in _joined(disk, context):
                sums[extent.flags] = sums.get(extent.flags, 0) + extent.length
                if totals:
                    continue
                said = describe_flags(context, extent.flags)
                if as_json:
                    entry = {"offset": extent.offset, "length": extent.length, "type": extent.flags, "description": said}
                    click.echo(f"{',' if lines else ''}\n{json.dumps(entry)}", nl=False)
                else:
                    click.echo(f"{extent.offset:10}  {extent.length:10}  {extent.flags:3}  {said}")
                lines += 1
            for flags, size in sorted(sums.items()) if totals else ():
                said, percent = describe_flags(context, flags), 100 * size / disk.size
                if as_json:
                    entry = {"size": size, "percent": float(f"{percent:g}"), "type": flags, "description": said}
                    click.echo(f"{',' if lines else ''}\n{json.dumps(entry)}", nl=False)
                else:
                    click.echo(f"{size:10} {percent:5.1f}% {flags:3} {said}")
                lines += 1
            if as_json:
                click.echo("\n]")

    parsed = parse_uri(uri)
    run(look())


async def _joined(disk: Any, context: str) -> AsyncIterator[Extent]:
    """The extents of the whole disk, those that go on beyond a window in one piece."""
    held: Extent | None = None
    for offset in range(0, disk.size, MAP_WINDOW):
        for extent in await disk.block_status(min(MAP_WINDOW, disk.size - offset), offset, context):
            if held is not None and held.flags == extent.flags:
                held = held._replace(length=held.length + extent.length)
                continue
            if held is not None:
                yield held
            held = extent
    if held is not None:
        yield held


def describe_flags(context: str, flags: int) -> str:
    """What flags mean in a context that we know, in nbdinfo's words; empty in others."""
    words: dict[int, str]
    if context == BASE_ALLOCATION:
        words = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}
    elif context.startswith("qemu:dirty-bitmap:"):
        words = {0: "clean", 1: "dirty"}
    elif context == "qemu:allocation-depth":
        words = {0: "absent", 1: "local"}
        return words.get(flags, f"backing depth {flags}")
    else:
        words = {}
    return words.get(flags, "")
