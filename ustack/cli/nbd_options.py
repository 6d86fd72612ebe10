"""What the subcommands of `ustack nbd` have in common: URIs, sizes, whose TCP to use, how errors end the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from ustack.cli.control import control_option, open_tcp_through_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ustack.nbd import NbdUri
    from ustack.nbd.connection import CreateConnection

SCHEMES: Final = ("nbd:", "nbds:", "nbd+unix:", "nbds+unix:")


def human_size(nbytes: int) -> str:
    """`1G` for 1073741824, as nbdinfo writes sizes: the largest unit that divides them."""
    units = ["", "K", "M", "G", "T", "P", "E"]
    while nbytes >= 1024 and nbytes % 1024 == 0:
        nbytes //= 1024
        units.pop(0)
    return f"{nbytes}{units[0]}"


def via_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the options --via, --control and --timeout."""
    options = (
        click.option(
            "--via",
            type=click.Choice(["kernel", "daemon"]),
            default="kernel",
            show_default=True,
            help="Whose TCP: the kernel's, or our own stack in a running daemon.",
        ),
        control_option,
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=30.0,
            show_default=True,
            help="Seconds to wait for the connection and for each reply.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def connection_maker(via: str, control: str) -> CreateConnection | None:
    """How connections are made for the option --via; None stands for the kernel."""
    if via == "kernel":
        return None

    async def through_daemon(factory: Any, host: str, port: int) -> tuple[Any, Any]:
        return await open_tcp_through_daemon(control, host, port, factory, memalloc=True)

    return through_daemon


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run on uvloop; errors of the operating system and of the server end the program with their text."""
    import asyncio

    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}") from error


def parse_uri(text: str) -> NbdUri:
    """The URI, or a mistake in the use of the program."""
    from ustack.nbd import NbdUri

    try:
        return NbdUri.parse(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
