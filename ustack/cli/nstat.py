"""`ustack nstat`: the counters of a running daemon."""

from __future__ import annotations

import json

import click

from ustack.cli.control import call, control_option


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Also counters that are zero.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@control_option
def nstat(everything: bool, as_json: bool, control: str) -> None:
    """Show the stack's counters, under the kernel's names, and why packets were dropped."""
    report = call(control, "nstat")
    if not everything:
        report["counters"] = {name: value for name, value in report["counters"].items() if value}
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo("#ustack")
    for name, value in report["counters"].items():
        click.echo(f"{name:<32}{value}")
    if report["drops"]:
        click.echo("#drops")
        for name, value in report["drops"].items():
            click.echo(f"{name:<32}{value}")
