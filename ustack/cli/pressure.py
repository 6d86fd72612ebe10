"""`ustack pressure`: what happens to packets when memory is short, as experiments that anybody can repeat."""

from __future__ import annotations

import json

import click


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
    """Experiments on packet memory: the claims of the dispute of 2006, measured.

    Every experiment says which command repeats it, and the same seed gives the same figures, times excepted.
    """


@pressure.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects instead of the table.")
@click.option("--only", type=Numbers(), help="Measure these claims only, such as 18,29.")
@click.option("--full", is_flag=True, help="Measure with more traffic, which takes minutes.")
@click.option("--seed", type=int, help="The seed of the traffic.")
def claims(as_json: bool, only: list[int] | None, full: bool, seed: int | None) -> None:
    """Measure what was claimed about memory for packets, and say what is true.

    Each claim has a number, who made it (EP: Evgeniy Polyakov, PZ: Peter Zijlstra), the word true, false or partly, and what
    was measured. Claims that need a running stack are not listed.
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
    for claim, report in measured:
        table.add_row(str(claim.number), claim.who, claim.text, str(report["verdict"]), in_words(report))
    Console().print(table)
