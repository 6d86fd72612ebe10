"""`ustack slabinfo`: the caches of a running daemon's pool."""

from __future__ import annotations

import click

from ustack.cli.control import call, control_option


@click.command()
@control_option
def slabinfo(control: str) -> None:
    """Show the pool's caches in the format of /proc/slabinfo, version 2.1."""
    click.echo(call(control, "slabinfo"), nl=False)
