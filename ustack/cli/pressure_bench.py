"""`ustack pressure classification`, `throughput` and `reserve`: what the rules cost and save, and what is enough."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ustack.cli.size import Size

if TYPE_CHECKING:
    from ustack.lab.throughput import Throughput


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of the table.")
@click.option("--pool", "pools", multiple=True, metavar="NAME", help="Only this pool; may be given several times.")
def classification(as_json: bool, pools: tuple[str, ...]) -> None:
    """Measure what it saves to look in the receive ring for whom a frame is, before anything is allocated for it.

    Memory is full. Batches of 64 frames for a socket that nobody reads come, and at the end of each one frame for a memalloc
    socket. Held is the memory that a batch takes until it is dropped, reserve the smallest with which that last frame is never
    lost, time that of dropping one frame. The first figure of each pair is with classification in the ring, the second with
    packets that are made first, as most drivers do.
    """
    from rich.console import Console
    from rich.table import Table

    from pools.base import names
    from ustack.lab.classification import FRAMES, measure

    for pool in pools:
        if pool not in names():
            raise click.BadParameter(f"there is no pool {pool!r}; there are {', '.join(names())}", param_hint="--pool")
    measured = []
    progress = Console(stderr=True)
    with progress.status("") as status:
        for pool in pools or names():
            for frame in FRAMES:
                status.update(f"{pool}: {frame}")
                measured.append(measure(pool, frame))
    if as_json:
        click.echo(json.dumps([each._asdict() for each in measured], indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("pool", "frame"):
        table.add_column(heading, no_wrap=True)
    for heading in ("held, KiB", "reserve, pages", "time, µs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in measured:
        table.add_row(
            each.pool,
            each.frame,
            f"{each.held_in_ring >> 10} | {each.held_after >> 10}",
            f"{each.reserve_in_ring} | {each.reserve_after}",
            f"{each.seconds_in_ring * 1e6:.0f} | {each.seconds_after * 1e6:.0f}",
        )
    Console().print(table)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of the table.")
@click.option("--pool", "pools", multiple=True, metavar="NAME", default=("kmalloc", "srog"), show_default=True, help="Pools.")
@click.option(
    "--mode", type=click.Choice(["paged", "linear"]), default="paged", show_default=True, help="How frames are received."
)
@click.option("--request-size", type=Size(), default="64K", show_default=True, help="Bytes of a request.")
@click.option("--requests", type=click.IntRange(1, 1024), default=8, show_default=True, help="Requests in flight.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Length of each part of a round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds with each pool.")
def throughput(
    as_json: bool, pools: tuple[str, ...], mode: str, request_size: int, requests: int, seconds: float, rounds: int
) -> None:
    """Measure how fast NBD is while the memory is full of packets that nobody reads, on a TAP with the kernel's TCP behind it.

    A round is the same work with the memory free, full and free again. The ratio is the throughput with it full to the mean of
    the others; that of a pool is the median of its rounds. Runs in a network namespace of its own.
    """
    import uvloop
    from rich.console import Console
    from rich.table import Table

    from pools.base import names
    from ustack.lab.demo import DemoFailure
    from ustack.lab.netns import enter_own
    from ustack.lab.throughput import DISK, measure

    for pool in pools:
        if pool not in names():
            raise click.BadParameter(f"there is no pool {pool!r}; there are {', '.join(names())}", param_hint="--pool")
    if not 512 <= request_size <= DISK or request_size % 512:
        raise click.BadParameter(f"allowed is a multiple of 512 up to {DISK >> 20}M", param_hint="--request-size")
    measured: list[Throughput] = []
    try:
        enter_own()
        for pool in pools:
            work = measure(pool, mode=mode, size=request_size, depth=requests, seconds=seconds, rounds=rounds)
            measured.append(uvloop.run(work))
    except DemoFailure as failure:
        raise click.ClickException(str(failure)) from None
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    if as_json:
        rows = [
            {"pool": each.pool, "ratio": each.ratio, "rounds": [one._asdict() | {"ratio": one.ratio} for one in each.rounds]}
            for each in measured
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("pool", no_wrap=True)
    for heading in ("free, MB/s", "full, MB/s", "free again, MB/s", "slowest request, ms", "ratio"):
        table.add_column(heading, justify="right")
    for each in measured:
        for one in each.rounds:
            rates = (f"{rate / 1e6:.0f}" for rate in (one.before, one.pressed, one.after))
            table.add_row(each.pool, *rates, f"{one.worst * 1e3:.0f}", f"{one.ratio:.2f}")
        table.add_row(each.pool, "", "", "", "median", f"{each.ratio:.2f}")
    Console().print(table)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of the table.")
@click.option("--pool", "pools", multiple=True, metavar="NAME", help="Only this pool; may be given several times.")
@click.option("--requests", type=click.IntRange(1, 1024), default=16, show_default=True, help="Requests in flight.")
@click.option("--request-size", type=Size(), default="16K", show_default=True, help="Bytes of a request.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Seeds that each size must do for.")
def reserve(as_json: bool, pools: tuple[str, ...], requests: int, request_size: int, seeds: int) -> None:
    """Find by bisection how small the reserve may be, in virtual time, and compare it with what "auto" works out.

    Memory is full. A disk is read and written with all requests in flight, while the wire loses what hurts most. With `lives`
    pages all work is done, however slowly. With `serves` nothing of the disk's connection ever waits for memory: that is what
    the reserve is for. The ratio, of worked out to serves, must be from 1 to 2; the exit code is 1 when it is not.
    """
    from rich.console import Console
    from rich.table import Table

    from ustack.lab import reserve_bisection
    from ustack.mem.reserve import Demand

    if not 512 <= request_size <= 1 << 20 or request_size % 512:
        raise click.BadParameter("allowed is a multiple of 512 up to 1M", param_hint="--request-size")
    known = reserve_bisection.POOLS
    for pool in pools:
        if pool not in known:
            raise click.BadParameter(f"there is no pool {pool!r}; there are: {'; '.join(known)}", param_hint="--pool")
    found = []
    progress = Console(stderr=True)
    with progress.status("") as status:
        for pool in pools or known:
            for linear in (False, True):
                status.update(f"{pool}, {'linear' if linear else 'paged'}")
                found.append(reserve_bisection.find(pool, linear, range(seeds), Demand(requests, request_size)))
    if as_json:
        click.echo(json.dumps([each._asdict() | {"ratio": each.ratio} for each in found], indent=1))
    else:
        table = Table(box=None, pad_edge=False)
        table.add_column("pool", no_wrap=True)
        table.add_column("ring", no_wrap=True)
        for heading in ("worked out, pages", "serves", "lives", "ratio"):
            table.add_column(heading, justify="right")
        for each in found:
            ring = "linear" if each.linear else "paged"
            table.add_row(each.pool, ring, str(each.worked_out), str(each.serves), str(each.lives), f"{each.ratio:.2f}")
        Console().print(table)
    if not all(1 <= each.ratio <= 2 for each in found):
        raise SystemExit(1)
