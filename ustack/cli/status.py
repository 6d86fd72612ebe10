"""`ustack status`: what a running daemon is, and how its memory and its exports are."""

from __future__ import annotations

import json
from typing import Any

import click

from ustack.cli.control import call, control_option


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@control_option
def status(as_json: bool, control: str) -> None:
    """Show the daemon's device, NBD exports and memory."""
    report = call(control, "status") | {"memory": call(control, "memory")}
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(
        f"ustack {report['version']}, process {report['pid']}, up {report['uptime']:.0f} s, configured by {report['config']}"
    )
    for link in report["devices"]:
        stats = link["stats"]
        addresses = "".join(f"{_address(own)}, " for own in link["addresses"])
        click.echo(f"{link['name']}: {addresses}{link['mac']}, mtu {link['mtu']}")
        click.echo(f"    received {stats['rx_packets']} frames, {stats['rx_bytes']} bytes; ", nl=False)
        click.echo(f"sent {stats['tx_packets']} frames, {stats['tx_bytes']} bytes, {stats['tx_errors']} errors")
        for neighbour in link["neighbours"]:
            click.echo(f"    neighbour {neighbour['address']} {neighbour['lladdr'] or ''} {neighbour['state']}")
    for route in report["routes"]:
        click.echo(f"route {route}")
    for export in report["nbd"]:
        size = f", {export['size']} bytes" if export["size"] else ""
        error = f": {export['error']}" if export["error"] else ""
        click.echo(f"nbd {export['name']} {export['uri']}: {export['state']} for {export['since']:.0f} s{size}{error}")
        for front_end in export["front_ends"]:
            click.echo(f"    at {front_end['path']}, {front_end['clients']} clients")
        if export["fuse"]:
            click.echo(f"    {_file(export['fuse'])}")
    if report["process"] is not None:
        click.echo(f"process: {_process(report['process'])}")
    _print_memory(report["memory"])


def _process(process: dict[str, Any]) -> str:
    """How the armed process fares."""
    faults = f"{process['minor_faults']} minor and {process['major_faults']} major faults since"
    lacking = f"; {len(process['missing'])} things missing (ustack doctor)" if process["missing"] else ""
    return f"armed{lacking}, {faults}; {process['waits']} waits, {process['preempted']} times preempted"


def _file(fuse: dict[str, Any]) -> str:
    """The disk as a file, and what it was asked for."""
    waiting = f", {fuse['in_flight']} waiting, the oldest for {fuse['oldest']:.1f} s" if fuse["in_flight"] else ""
    return f"file {fuse['path']}: {fuse['reads']} reads, {fuse['writes']} writes, {fuse['errors']} errors{waiting}"


def _address(own: dict[str, str]) -> str:
    return own["address"] if own["state"] == "preferred" else f"{own['address']} ({own['state']})"


def _print_memory(memory: dict[str, Any]) -> None:
    reserve = memory["reserve"]
    pressure = ", under pressure" if memory["under_pressure"] else ""
    click.echo(f"memory: {memory['free']} of {memory['size']} bytes free, at most {memory['peak_used']} used{pressure}")
    click.echo(
        f"    reserve: {reserve['free']} of {reserve['size']} bytes free, never below {reserve['low_water']};"
        f" {reserve['memalloc_sockets']} memalloc sockets"
    )
    for name in ("tcp", "udp"):
        click.echo(f"    {_protocol(name, memory[name])}")
    for owner, nbytes in memory["by_owner"].items():
        click.echo(f"    {owner}: {nbytes}")


def _protocol(name: str, memory: dict[str, Any]) -> str:
    """A line like those of /proc/net/sockstat, with the limits."""
    states = "".join(f", {memory[state]} {state}" for state in ("orphan", "tw") if memory.get(state))
    pressure = ", under pressure" if memory.get("under_pressure") else ""
    limits = "/".join(map(str, memory["limits"]))
    return f"{name}: {memory['inuse']} sockets{states}, {memory['mem']} pages of {limits}{pressure}"
