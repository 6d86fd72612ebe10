"""`ustack nbd copy`: between exports, files and devices, with the options of nbdcopy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ustack.cli.nbd_options import SCHEMES, connection_maker, human_size, parse_uri, run, via_options
from ustack.cli.size import Size

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ustack.nbd.copy import CopyResult
    from ustack.nbd.disks import Disk


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option(
    "-C",
    "--connections",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Connections to a server that says that they see one cache.",
)
@click.option("-R", "--requests", type=click.IntRange(1, 1024), default=64, show_default=True, help="Requests in flight.")
@click.option("--request-size", type=Size(), default="256K", show_default=True, help="Bytes in one request.")
@click.option(
    "-S", "--sparse", type=Size(), default="4K", show_default=True, help="Turn zeroes of this many bytes into holes; 0: never."
)
@click.option("--no-extents", is_flag=True, help="Do not ask the source where it is zero: read everything.")
@click.option("--allocated", is_flag=True, help="Make no holes in the destination.")
@click.option(
    "--destination-is-zero", "--target-is-zero", is_flag=True, help="The destination reads as zeroes already: leave them out."
)
@click.option("--flush/--no-flush", default=True, show_default=True, help="Bring the copy to stable storage in the end.")
@click.option("-p/-P", "--progress/--no-progress", default=None, help="Show a progress bar (default: on a terminal).")
@click.option("--json", "as_json", is_flag=True, help="Write what was done as JSON.")
@via_options
def copy(source: str, destination: str, progress: bool | None, as_json: bool, **options: Any) -> None:
    """Copy SOURCE to DESTINATION. Each is an NBD URI, a file or a block device.

    A file is made or replaced when all of it is there: until then it is DESTINATION.part, which is removed when the copy fails.
    """

    async def transfer(report: Callable[[int, int], object] | None) -> CopyResult:
        return await _transfer(source, destination, report, patience=options.pop("timeout"), **options)

    try:
        result: CopyResult = _run_with_bar(transfer, sys.stderr.isatty() if progress is None else progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        import json

        report = {"bytes": result.total_bytes, "data-bytes": result.data_bytes, "zero-bytes": result.zero_bytes}
        click.echo(json.dumps(report | {"seconds": round(result.seconds, 6)}, indent=2))
        return
    rate = result.total_bytes / result.seconds / (1 << 20) if result.seconds else 0.0
    click.echo(
        f"{result.total_bytes} bytes ({human_size(result.total_bytes)}) in {result.seconds:.2f} s, {rate:.0f} MiB/s; "
        f"{result.zero_bytes} of them as zeroes"
    )


async def _transfer(
    source: str,
    destination: str,
    report: Callable[[int, int], object] | None,
    *,
    connections: int,
    requests: int,
    request_size: int,
    sparse: int,
    no_extents: bool,
    allocated: bool,
    destination_is_zero: bool,
    flush: bool,
    via: str,
    control: str,
    patience: float,
) -> CopyResult:
    from ustack.nbd.copy import copy as copy_disk
    from ustack.nbd.disks import NewFile

    async def open_disk(name: str, create_size: int | None) -> Disk:
        return await _open_disk(name, create_size, via=via, control=control, seconds=patience, connections=connections)

    source_disk = await open_disk(source, None)
    try:
        target_disk = await open_disk(destination, source_disk.size)
        try:
            result = await copy_disk(
                source_disk,
                target_disk,
                requests=requests,
                request_size=request_size,
                sparse=sparse,
                flush=flush,
                extents=not no_extents,
                allocated=allocated,
                target_is_zero=destination_is_zero or isinstance(target_disk, NewFile),
                progress=report,
            )
            if isinstance(target_disk, NewFile):
                await target_disk.complete()
        finally:
            await target_disk.close()
    finally:
        await source_disk.close()
    return result


async def _open_disk(name: str, create_size: int | None, *, via: str, control: str, seconds: float, connections: int) -> Disk:
    """An NBD export or a local file; `create_size` makes it a target of that many bytes."""
    if name.startswith(SCHEMES):
        from ustack.nbd.connector import open_disk

        return await open_disk(
            [parse_uri(name)],
            create_connection=connection_maker(via, control),
            connect_timeout=seconds,
            request_timeout=seconds,
            connections=connections,
        )
    return _open_local(name, create_size)


def _open_local(name: str, create_size: int | None) -> Disk:
    from ustack.nbd.disks import LocalDisk, NewFile

    if create_size is None or Path(name).is_block_device():
        return LocalDisk(name, create_size=create_size)
    return NewFile(name, create_size)


def _run_with_bar(main: Callable[[Callable[[int, int], object] | None], Coroutine[Any, Any, Any]], show: bool) -> Any:
    if not show:
        return run(main(None))
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("copy", total=None)
        return run(main(lambda done, total: bar.update(task, completed=done, total=total)))
