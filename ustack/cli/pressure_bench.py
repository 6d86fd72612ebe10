"""`ustack pressure classification`: what rules about memory cost and save, in figures of this machine."""

from __future__ import annotations

import json

import click


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
