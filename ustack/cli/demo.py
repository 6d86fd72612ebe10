"""`ustack demo`: see the stack at work, and judge for yourself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ustack.cli.size import Size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from ustack.lab.demo import Findings


@click.command()
@click.option("--size", type=Size(), default="256M", show_default=True, help="Bytes of the disk image that is copied.")
def demo(size: int) -> None:
    """Copy a disk over NBD through our own TCP, then again with the memory full of packets that nobody reads.

    Runs in a network namespace of its own and leaves nothing behind. Exit code: 0 only when everything was verified.
    """
    if size < MINIMUM or size % MINIMUM:
        raise click.UsageError(f"--size: allowed is a multiple of {MINIMUM >> 20}M")
    from ustack.lab.netns import enter_own

    try:
        enter_own()
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    sys.exit(_run(size))


MINIMUM = 1 << 20
"""Bytes that the image is a multiple of."""


def _run(size: int) -> int:
    import asyncio
    import signal

    import uvloop
    from rich.console import Console

    from ustack.lab.demo import DemoFailure, run

    console = Console(highlight=False)

    async def until_interrupted() -> Findings:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await run(size, show)

    with Show(console) as show:
        try:
            findings = uvloop.run(until_interrupted())
        except asyncio.CancelledError:
            show.end("interrupted")
            return 130
        except (DemoFailure, OSError) as error:
            show.end(f"failed: {error}")
            return 1
    _summarize(console, findings)
    return 0


class Show:
    """Shows the steps, with a bar for what takes long on a terminal and with plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        self._console = console
        self._bars: Progress = Progress(
            "   ", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), console=console, transient=True
        )
        self._bar: TaskID | None = None

    def __enter__(self) -> Show:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def step(self, text: str) -> None:
        """Something begins."""
        self._remove_bar()
        self._console.print(text, soft_wrap=True)

    def fact(self, text: str) -> None:
        """Something was found."""
        self._remove_bar()
        self._console.print(f"    {text}", style="green", soft_wrap=True)

    def expect(self, total: int) -> None:
        """Work of `total` bytes begins."""
        self._remove_bar()
        self._bar = self._bars.add_task("", total=total)

    def advance(self, nbytes: int) -> None:
        """So much of it is done."""
        if self._bar is not None:
            self._bars.advance(self._bar, nbytes)

    def end(self, text: str) -> None:
        """It is over before its time."""
        self._remove_bar()
        self._console.print(text, style="red", soft_wrap=True)

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None


def _summarize(console: Console, findings: Findings) -> None:
    from rich.table import Table

    table = Table(title="What it came to", title_justify="left", show_header=False)
    table.add_row("copy to the server", f"{findings.write_rate / 1e6:.0f} MB/s")
    table.add_row("copy back", f"{findings.read_rate / 1e6:.0f} MB/s")
    table.add_row(
        "with the memory full", f"{findings.pressure_rate / 1e6:.0f} MB/s, slowest {findings.worst_latency * 1000:.0f} ms"
    )
    table.add_row("the same without reserve", f"stood still after {findings.standstill_requests} requests")
    table.add_row("reserve", f"{findings.reserve >> 10} KiB, never below {findings.reserve_low_water >> 10} KiB free")
    owners = sorted(findings.by_owner.items(), key=lambda item: -item[1])
    table.add_row("memory when full, by owner", "\n".join(f"{nbytes >> 10:6} KiB  {name}" for name, nbytes in owners))
    drops = sorted(findings.drops.items(), key=lambda item: -item[1])
    table.add_row("packets dropped, by reason", "\n".join(f"{count:6}  {reason}" for reason, count in drops) or "none")
    table.add_row("in the end", "every charge and every page returned")
    console.print()
    console.print(table)
    console.print("Verified.", style="bold green")
