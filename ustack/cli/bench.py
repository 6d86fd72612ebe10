"""`ustack bench`: the stack as something to measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ustack.cli.size import Size

if TYPE_CHECKING:
    from ustack.stack import Stack


@click.group()
def bench() -> None:
    """Serve what benchmarks talk to."""


@bench.command()
@click.option("--tap", metavar="NAME", required=True, help="TAP interface to attach to.")
@click.option("--address", metavar="ADDRESS/LENGTH", required=True, help="The stack's address, such as 10.77.0.2/24.")
@click.option(
    "--mode", type=click.Choice(["paged", "linear"]), default="paged", show_default=True, help="How frames are received."
)
@click.option("--offload/--no-offload", default=True, show_default=True, help="Checksum offload and super-frames.")
@click.option("--pool", metavar="NAME", default="kmalloc", show_default=True, help="Allocator of packet memory.")
@click.option("--memory", type=Size(), default="64M", show_default=True, help="Packet memory.")
@click.option(
    "--congestion",
    type=click.Choice(["reno", "cubic", "bbr"]),
    default="cubic",
    show_default=True,
    help="Congestion control.",
)
def serve(tap: str, address: str, mode: str, offload: bool, pool: str, memory: int, congestion: str) -> None:
    """Serve TCP and UDP echo on port 7, TCP discard on 9 and TCP chargen on 19, until interrupted."""
    import gc

    import uvloop

    from ustack.link.tap import TapDevice
    from ustack.stack import Stack
    from ustack.transport.tcp.config import TcpConfig

    try:
        stack = Stack(memory=memory, pool=pool, tcp=TcpConfig(congestion=congestion))
        stack.add_interface(TapDevice(tap, mode=mode, offload=offload), address)
    except KeyError as error:
        raise click.UsageError(error.args[0]) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{tap}: {error.strerror}") from None
    gc.freeze()
    uvloop.run(_serve(stack))


async def _serve(stack: Stack) -> None:
    from ustack.cli.signals import until_signal
    from ustack.daemon.services import Services

    async with stack:
        await Services(stack).set(echo=True, discard=True, chargen=True)
        click.echo("serving")
        await until_signal()
