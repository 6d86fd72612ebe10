"""`ustack pressure`: what happens to packets when memory is short, as experiments that anybody can repeat."""

from __future__ import annotations

import json

import click

from ustack.cli.pressure_bench import classification, reserve, throughput
from ustack.cli.pressure_runs import list_scenarios, report, run, show


class Numbers(click.ParamType[list[int], str]):
    """Numbers with commas between them."""

    name = "N,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers."""
        try:
            return [int(number) for number in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 18,29", param, ctx)


@click.group()
def pressure() -> None:
    """Experiments on packet memory: scenarios of pressure and faults, and the claims of the dispute of 2006, measured.

    Every experiment says which command repeats it, and the same seed gives the same figures, times excepted.
    """


for command in (run, list_scenarios, show, report, classification, throughput, reserve):
    pressure.add_command(command)


@pressure.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of the table.")
@click.option("--only", type=Numbers(), help="Measure these claims only, such as 18,29.")
@click.option("--full", is_flag=True, help="Measure with more traffic, for about a minute.")
@click.option("--seed", type=int, help="The seed of the traffic.")
def claims(as_json: bool, only: list[int] | None, full: bool, seed: int | None) -> None:
    """Measure what was claimed about memory for packets, and say what is true.

    Each claim has a number, who made it (EP: Evgeniy Polyakov, PZ: Peter Zijlstra), the word true, false or partly, and what
    was measured.
    """
    from rich.console import Console
    from rich.table import Table

    from ustack.lab.claims.registry import SEED, Terms, in_words
    from ustack.lab.claims.registry import claims as measurable

    try:
        wanted = measurable(only or ())
    except KeyError as unknown:
        raise click.BadParameter(unknown.args[0], param_hint="--only") from None
    terms = Terms(SEED if seed is None else seed, full)
    measured = []
    progress = Console(stderr=True)
    with progress.status("") as status:
        for claim in wanted:
            status.update(f"claim {claim.number}: {claim.text}")
            measured.append((claim, claim.report(terms)))
    if as_json:
        click.echo(json.dumps([report for _, report in measured], indent=1, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("who")
    table.add_column("claim", ratio=2)
    table.add_column("verdict")
    table.add_column("measured", ratio=3)
    for claim, found in measured:
        table.add_row(str(claim.number), claim.who, claim.text, str(found["verdict"]), in_words(found))
    Console().print(table)


@pressure.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--trace", is_flag=True, help="Print the way to where it stands still.")
def model(names: tuple[str, ...], trace: bool) -> None:
    """Explore every state of a small model of the reserve, and say whether NBD always makes progress.

    Each configuration has all rules, or all but one; NAME chooses those whose name begins so, such as "linear, no". In a trace
    one page is one frame. A posted buffer is o, or r when it is from the reserve; received is in order plus out of order.
    """
    from rich.console import Console
    from rich.table import Table

    from ustack.lab.model.checker import check
    from ustack.lab.model.report import trace_lines
    from ustack.lab.model.reserve_model import configurations

    chosen = [each for each in configurations() if not names or each.name.startswith(names)]
    if not chosen:
        raise click.BadParameter(f"no configuration begins with {names[0]!r}", param_hint="NAME")
    results = [(each, check(each)) for each in chosen]
    table = Table(box=None, pad_edge=False)
    table.add_column("configuration", no_wrap=True)
    for heading in ("reserve", "states", "steps"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    for each, result in results:
        table.add_row(each.name, str(each.reserve), str(result.states), str(result.steps), result.verdict.value)
    Console().print(table)
    if trace:
        for each, result in results:
            if result.trace:
                click.echo(f"\n{each.name}: {result.verdict.value}")
                click.echo("\n".join(trace_lines(each, result)))
