"""`ustack nbd bench`: how fast an export is, for one pattern of requests, in the words of fio."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final

import click

from ustack.cli.nbd_options import connection_maker, human_size, parse_uri, run, via_options
from ustack.cli.size import Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.nbd import NbdClient

PATTERNS: Final = ("read", "write", "randread", "randwrite")
PERCENTILES: Final = (50.0, 99.0, 99.9)


@click.command()
@click.argument("uri")
@click.option("--rw", type=click.Choice(PATTERNS), default="randread", show_default=True, help="What to do.")
@click.option("--bs", type=Size(), default="4K", show_default=True, help="Bytes of each request.")
@click.option("--iodepth", type=click.IntRange(1, 4096), default=32, show_default=True, help="Requests in flight.")
@click.option("-C", "--connections", type=click.IntRange(1, 64), default=1, show_default=True, help="Connections, if allowed.")
@click.option("--runtime", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, help="Seconds.")
@click.option("--size", type=Size(), help="Stay within so many bytes at the start (default: all of it).")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the random offsets.")
@click.option("--overwrite", is_flag=True, help="Allow patterns that write: they destroy what the export holds.")
@click.option("--json", "as_json", is_flag=True, help="Write the result as JSON.")
@via_options
def bench(uri: str, as_json: bool, overwrite: bool, **options: Any) -> None:
    """Measure the export at URI: requests and bytes per second, and how long they take."""
    if options["rw"].endswith("write") and not overwrite:
        raise click.UsageError(f"--rw={options['rw']} destroys what the export holds; say --overwrite if you mean it")
    result: dict[str, Any] = run(_bench(uri, patience=options.pop("timeout"), **options))
    if as_json:
        import json

        click.echo(json.dumps(result, indent=2))
        return
    took = ", ".join(f"{percent:g}% {result['latency-us'][f'{percent:g}']} us" for percent in PERCENTILES)
    click.echo(
        f"{result['rw']}: {result['requests']} requests of {human_size(result['block-size'])} in {result['seconds']:.2f} s, "
        f"{result['iodepth']} in flight: {result['iops']:.0f} IOPS, {result['bytes-per-second'] / (1 << 20):.1f} MiB/s; {took}"
    )


async def _bench(
    uri: str,
    *,
    rw: str,
    bs: int,
    iodepth: int,
    connections: int,
    runtime: float,
    size: int | None,
    seed: int,
    via: str,
    control: str,
    patience: float,
) -> dict[str, Any]:
    import asyncio

    from ustack.nbd import connect

    options: Any = {
        "queue_depth": iodepth,
        "connections": connections,
        "connect_timeout": patience,
        "request_timeout": patience,
    }
    async with connect(parse_uri(uri), create_connection=connection_maker(via, control), **options) as disk:
        blocks = min(size or disk.size, disk.size) // bs if bs else 0
        if not blocks:
            raise click.UsageError(f"--bs={bs} leaves no block in the {disk.size} bytes of the export")
        offsets = _offsets(rw, bs, blocks, seed)
        times: list[float] = []
        started = time.perf_counter()
        await asyncio.gather(*(_work(disk, rw, bs, offsets, times, started + runtime) for _ in range(iodepth)))
        seconds = time.perf_counter() - started
    times.sort()
    micros = {f"{percent:g}": round(1e6 * times[int(len(times) * percent / 100)]) for percent in PERCENTILES}
    return {
        "rw": rw,
        "block-size": bs,
        "iodepth": iodepth,
        "connections": connections,
        "requests": len(times),
        "seconds": seconds,
        "iops": len(times) / seconds,
        "bytes-per-second": bs * len(times) / seconds,
        "latency-us": micros,
    }


def _offsets(rw: str, bs: int, blocks: int, seed: int) -> Iterator[int]:
    chance = random.Random(seed)
    block = 0
    while True:
        yield bs * (chance.randrange(blocks) if rw.startswith("rand") else block)
        block = (block + 1) % blocks


async def _work(disk: NbdClient, rw: str, bs: int, offsets: Iterator[int], times: list[float], until: float) -> None:
    buffer = bytearray(random.Random(bs).randbytes(bs))
    writes = rw.endswith("write")
    now = time.perf_counter()
    while now < until:
        offset = next(offsets)
        if writes:
            await disk.pwrite(buffer, offset)
        else:
            await disk.pread_into(buffer, offset)
        done = time.perf_counter()
        times.append(done - now)
        now = done
