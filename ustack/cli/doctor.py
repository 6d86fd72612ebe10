"""`ustack doctor`: is everything in force for swapping over the daemon?"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from ustack.cli.control import call, control_option


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option("--machine", is_flag=True, help="Look only at this machine, without a daemon.")
@control_option
def doctor(as_json: bool, machine: bool, control: str) -> None:
    """Say what is in force for swapping over a running daemon, what is missing, and why it matters.

    Exit code: 0 when nothing is missing, 1 otherwise.
    """
    checks: list[dict[str, Any]]
    if machine:
        from ustack.daemon.doctor import machine_checks

        checks = [check.as_dict() for check in machine_checks()]
    else:
        checks = call(control, "doctor")
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    else:
        for check in checks:
            print_check(check)
    sys.exit(not all(check["ok"] for check in checks))


def print_check(check: dict[str, Any]) -> None:
    """One line for what is as it should be, three for what is not."""
    click.echo(f"{'ok     ' if check['ok'] else 'MISSING'}  {check['name']}: {check['found']}")
    if not check["ok"]:
        click.echo(f"         wanted: {check['wanted']}")
        click.echo(f"         why: {check['why']}")
