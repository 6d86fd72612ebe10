"""`ustack swap`: from an NBD URI to active swap, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ustack.cli.control import Control, control_option
from ustack.cli.size import Size

if TYPE_CHECKING:
    from collections.abc import Callable


@click.group()
def swap() -> None:
    """Swap on a remote disk, over a running daemon."""


def _caller(control: str) -> Callable[..., Any]:
    def call(method: str, /, **args: Any) -> Any:
        with Control(control) as connection:
            return connection.call(method, **args)

    return call


def _folder(control: str) -> Path:
    """Records and mount points are beside the control socket."""
    return Path(control).absolute().parent


@swap.command()
@click.argument("uri")
@click.option("--name", default="0", show_default=True, help="Name of the swap area, for `off` and `status`.")
@click.option(
    "--front-end",
    type=click.Choice(["auto", "nbd", "fuse"]),
    default="auto",
    show_default=True,
    help="The kernel's nbd, or a FUSE file with a loop device; auto: nbd where the kernel has it.",
)
@click.option("--priority", type=click.IntRange(-1, 32767), default=100, show_default=True, help="Priority of the swap.")
@click.option("--label", default="ustack", show_default=True, help="Label of the swap area.")
@click.option("--requests", type=click.IntRange(1, 1024), default=64, show_default=True, help="Requests in flight.")
@click.option("--request-size", type=Size(), default="64K", show_default=True, help="Bytes of the largest request.")
@click.option("--direct-io/--no-direct-io", default=True, show_default=True, help="Of the loop device.")
@click.option("--force", is_flag=True, help="Go on when the guarantee does not hold, or the disk holds something else.")
@control_option
def on(
    uri: str,
    name: str,
    front_end: str,
    priority: int,
    label: str,
    requests: int,
    request_size: int,
    direct_io: bool,
    force: bool,
    control: str,
) -> None:
    """Make the export at URI swap: attach it, make it a block device, mkswap, swapon. What fails half-way is undone.

    Refuses, and says why, when swapping over it could deadlock: see `ustack doctor`.
    """
    from ustack.cli.doctor import print_check
    from ustack.daemon.swap import SwapOn, SwapRecord, checks, nbd_driver_there

    call = _caller(control)
    try:
        missing = [check for check in checks(call, uri, requests, request_size) if not check.ok]
        for check in missing:
            print_check(check.as_dict())
        if missing and not force:
            raise click.ClickException(f"{len(missing)} things are missing; --force swaps over it all the same")
        chosen = front_end if front_end != "auto" else "nbd" if nbd_driver_there() else "fuse"
        record = SwapRecord(name, uri, chosen, label, priority)
        steps = SwapOn(call, _folder(control), click.echo, requests, request_size, direct_io, overwrite=force)
        steps.run(record)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None


@swap.command()
@click.argument("name", default="0")
@control_option
def off(name: str, control: str) -> None:
    """End the swap area NAME (0): swapoff, and undo the rest of what `on` has done.

    Takes as long as it takes to bring back what is swapped out.
    """
    from ustack.daemon.swap import load_record, undo

    try:
        undo(load_record(_folder(control), name), _caller(control), _folder(control), click.echo)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None


@swap.command()
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@control_option
def status(as_json: bool, control: str) -> None:
    """Show the swap areas that `on` has made."""
    from dataclasses import asdict

    from ustack.daemon.swap import active_swaps, records

    active = {swap.device: swap for swap in active_swaps()}
    try:
        disks = {disk["name"]: disk for disk in _caller(control)("status")["nbd"]}
    except OSError:
        disks = {}
    areas = []
    for record in records(_folder(control)):
        used = active.get(record.device)
        disk = disks.get(f"swap-{record.name}")
        areas.append(
            asdict(record)
            | {
                "size": used.size if used is not None else None,
                "used": used.used if used is not None else None,
                "disk": disk,
            }
        )
    if as_json:
        click.echo(json.dumps(areas, indent=2))
        return
    for area in areas:
        click.echo(_line(area))


def _line(area: dict[str, Any]) -> str:
    device = area["device"] or "no device"
    if area["size"] is None:
        use = "not active"
    else:
        use = f"{area['used'] >> 10} of {area['size'] >> 10} KiB used, priority {area['priority']}"
    disk = area["disk"]
    if disk is None:
        state = "the daemon does not have it"
    else:
        file = disk["fuse"]
        waiting = f", {file['in_flight']} requests waiting, the oldest for {file['oldest']:.1f} s" if file else ""
        state = f"{disk['state']}{waiting}"
    return f"{area['name']}: {device}: {use}; {area['front_end']}, {area['uri']}: {state}"
