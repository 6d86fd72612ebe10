"""`ustack nbd attach` and `detach`: remote disks of a running daemon, at a device, a unix socket or a file of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ustack.cli.control import Control, control_option
from ustack.cli.nbd_options import human_size, parse_uri
from ustack.cli.size import Size

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command()
@click.argument("uri")
@click.option("--name", help="What to call it.  [default: the export's name, or nbd]")
@click.option(
    "--device",
    is_flag=False,
    flag_value="auto",
    metavar="[/dev/nbdN]",
    help="A device of the kernel's nbd, or any that is free.",
)
@click.option("--unix", "unix_path", type=click.Path(resolve_path=True), help="A unix socket that speaks NBD.")
@click.option("--fuse", "file", type=click.Path(resolve_path=True), help="A file.")
@click.option("-R", "--requests", type=click.IntRange(1, 1024), help="Requests in flight.  [default: 64]")
@click.option("--request-size", type=Size(), help="Bytes of a request that the reserve is made for.  [default: 64K]")
@click.option(
    "--dead-after", type=click.FloatRange(min=0), help="Seconds to wait for a server that is away.  [default: until it is back]"
)
@control_option
def attach(
    uri: str,
    name: str | None,
    device: str | None,
    unix_path: str | None,
    file: str | None,
    requests: int | None,
    request_size: int | None,
    dead_after: float | None,
    control: str,
) -> None:
    """Attach the disk at URI to this machine, over the stack of a running daemon, until it stops or is told to detach.

    Without --device, --unix and --fuse it becomes a device of the kernel's nbd, and where the kernel has none, a unix socket
    beside the daemon's control socket. Writes what it has become.
    """
    parsed = parse_uri(uri)
    wanted: dict[str, Any] = {"name": name or parsed.export or "nbd", "uri": uri}
    given: dict[str, Any] = {"requests": requests, "request_size": request_size, "dead_after": dead_after}
    given |= {"device": device, "unix": unix_path, "fuse": file}
    wanted |= {key: value for key, value in given.items() if value is not None}
    try:
        with Control(control) as daemon:
            if not (device or unix_path or file):
                report = _attach_somewhere(daemon, wanted, control)
            else:
                report = daemon.call("attach", **wanted)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    for place in _places(report):
        click.echo(f"{report['name']}\t{place}\t{human_size(report['size'])}")


def _attach_somewhere(daemon: Control, wanted: dict[str, Any], control: str) -> Any:
    """To a device, or where there are none, to a socket."""
    import errno
    from pathlib import Path

    try:
        return daemon.call("attach", **wanted, device="auto")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        click.echo(f"no device: {error.strerror}", err=True)
    file = wanted["name"].replace("/", "_") + ".sock"
    return daemon.call("attach", **wanted, unix=str(Path(control).resolve().with_name(file)))


def _places(report: dict[str, Any]) -> Iterator[str]:
    for front_end in report["front_ends"]:
        yield front_end["path"]
    if report["fuse"] is not None:
        yield report["fuse"]["path"]


@click.command()
@click.argument("name")
@control_option
def detach(name: str, control: str) -> None:
    """Let go of the attached disk NAME, and take its device, socket or file away.

    A disk of the configuration file comes back with the next reload.
    """
    try:
        with Control(control) as daemon:
            report = daemon.call("detach", name=name)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    for place in _places(report):
        click.echo(f"{report['name']}\t{place}\tgone")
