"""`ustack slab`: record what a daemon's pool is asked for, find the size classes that would save most, add them, compact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ustack.cli.control import call, control_option

if TYPE_CHECKING:
    from ustack.lab.trace import Trace

COSTS: Final = {"pages": "the share of the pages that an object takes", "charge": "what an object is charged"}


@click.group()
def slab() -> None:
    """Look after the kmalloc pool of a running daemon."""


@slab.command()
@click.argument("file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True, help="How long.")
@control_option
def record(file: Path, seconds: float, control: str) -> None:
    """Record what packet memory is asked for, into FILE, as a trace that `ustack slab advise` reads."""
    trace = _record(control, seconds)
    file.write_text(trace.dumps())
    click.echo(f"{sum(step.size > 0 for step in trace.steps)} allocations in {seconds:g} s")


@slab.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("-k", "--count", type=click.IntRange(min=1, max=16), default=3, show_default=True, help="Classes at most.")
@click.option("--cost", type=click.Choice(list(COSTS)), default="pages", show_default=True, help="What is to become less.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True, help="Of recording.")
@click.option("--apply", is_flag=True, help="Add the classes to the daemon's pool.")
@control_option
def advise(file: Path | None, count: int, cost: str, seconds: float, apply: bool, control: str) -> None:
    """Say which size classes would save most for the traffic in FILE, or for that of the daemon in the next seconds."""
    from pools.adviser import advise as best
    from pools.adviser import page_share
    from pools.kmalloc import SIZES
    from ustack.lab.trace import loads

    if file is None:
        trace = _record(control, seconds)
    else:
        try:
            trace = loads(file.read_text())
        except ValueError as error:
            raise click.ClickException(f"{file}: {error}") from None
    live = trace.live_sizes() if trace.steps else {}
    if not live:
        raise click.ClickException("nothing was allocated: there is nothing to learn from")
    classes = call(control, "classes") if file is None or apply else SIZES
    advice = best(live, count, classes=classes, cost=page_share if cost == "pages" else float)
    if not advice.classes:
        click.echo("No class would save anything.")
        return
    saved = 1 - advice.after / advice.before
    sizes = " ".join(map(str, advice.classes))
    click.echo(f"{sizes}: {advice.after:.0f} instead of {advice.before:.0f} bytes on average ({saved:.1%} less)")
    if apply:
        for size in advice.classes:
            classes = call(control, "add_class", size=size)
        click.echo(f"added; the classes are {' '.join(map(str, classes))}")


@slab.command()
@control_option
def compact(control: str) -> None:
    """Move queued packets together and give back the pages that become empty."""
    done: dict[str, Any] = call(control, "compact")
    click.echo(f"{done['given_back']} pages given back, {done['held']} held")


def _record(control: str, seconds: float) -> Trace:
    from ustack.lab.trace import Step, Trace

    steps = call(control, "record", seconds=seconds)
    return Trace("recorded", tuple(Step(number, size, lane) for number, size, lane in steps), heads=False)
