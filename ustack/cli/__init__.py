"""The program `ustack`. Each subcommand is a module of this package with a click command of its own name.

A module imports nothing heavy before its command runs, so that help and completion are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

COMMANDS: Final = (
    "demo",
    "daemon",
    "status",
    "doctor",
    "ping",
    "nc",
    "capture",
    "ss",
    "nstat",
    "slabinfo",
    "slabtop",
    "slab",
    "nbd",
    "swap",
    "bench",
    "pressure",
)
"""The subcommands, in the order in which help shows them."""


class Program(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """What there is."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None for one that there is not."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"ustack.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ustack", message="%(prog)s %(version)s")
def main() -> None:
    """A TCP/IP stack in user space: run it as a daemon, look into it, and see it at work in the demo."""
