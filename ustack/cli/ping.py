"""`ustack ping`: output and exit codes are those of iputils."""

from __future__ import annotations

import sys
from math import sqrt
from typing import Any

import click

from ustack.cli.control import Control, control_option


@click.command()
@click.argument("host", metavar="ADDRESS")
@click.option("-c", "count", type=click.IntRange(min=1), help="Stop after this many requests.")
@click.option(
    "-i", "interval", type=click.FloatRange(min=0.002), default=1.0, show_default=True, help="Seconds between two requests."
)
@click.option("-s", "size", type=click.IntRange(0, 65507), default=56, show_default=True, help="Bytes of payload.")
@click.option(
    "-W", "timeout", type=click.FloatRange(min=0), default=10.0, show_default=True, help="Seconds to wait for the last reply."
)
@click.option("-t", "ttl", type=click.IntRange(1, 255), default=64, show_default=True, help="Time to live.")
@click.option(
    "-M",
    "pmtudisc",
    type=click.Choice(["do", "want", "dont", "probe"]),
    default="want",
    show_default=True,
    help="What is longer than the path MTU: refused (do), cut here (want), cut anywhere (dont); probe knows the device's only.",
)
@click.option("-q", "quiet", is_flag=True, help="Only the summary.")
@control_option
def ping(
    host: str, count: int | None, interval: float, size: int, timeout: float, ttl: int, pmtudisc: str, quiet: bool, control: str
) -> None:
    """Send echo requests to ADDRESS over the daemon's stack.

    Exit code: 0 when there was a reply, 1 when there was none, 2 for an error.
    """
    try:
        with Control(control) as daemon:
            whole = f"{size} data bytes" if ":" in host else f"{size}({size + 28}) bytes of data."
            click.echo(f"PING {host} ({host}) {whole}")
            daemon.send(
                "ping", host=host, count=count, interval=interval, size=size, timeout=timeout, ttl=ttl, pmtudisc=pmtudisc
            )
            summary, times = _follow(daemon, quiet)
    except OSError as error:
        click.echo(f"ping: {error.strerror or error}", err=True)
        sys.exit(2)
    _summarize(host, summary, times)
    sys.exit(0 if summary["received"] else 1)


def _follow(daemon: Control, quiet: bool) -> tuple[dict[str, Any], list[float]]:
    """Print what happens until it is over. An interrupt tells the daemon that we have no more to ask, so it sums up at once."""
    import signal
    from socket import SHUT_WR

    signal.signal(signal.SIGINT, lambda *_: daemon.socket.shutdown(SHUT_WR))
    times: list[float] = []
    while "ok" not in (message := daemon.receive()):
        event = message["event"]
        if event.get("time") is not None:
            times.append(event["time"] * 1000)
        if not quiet:
            click.echo(_line(event))
    return message["ok"], times


def _line(event: dict[str, Any]) -> str:
    if "bytes" not in event:
        if "from" in event:
            return f"From {event['from']} icmp_seq={event['seq']} {event['error']}"
        return f"To {event['to']} icmp_seq={event['seq']} {event['error']}"
    line = f"{event['bytes']} bytes from {event['from']}: icmp_seq={event['seq']} ttl={event['ttl']}"
    if event["time"] is not None:
        line += f" time={_milliseconds(event['time'] * 1000)} ms"
    if event["duplicate"]:
        line += " (DUP!)"
    return line + (f" ({event['error']})" if "error" in event else "")


def _milliseconds(value: float) -> str:
    """Three digits that count, as ping shows times."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _summarize(host: str, summary: dict[str, Any], times: list[float]) -> None:
    sent, received = summary["sent"], summary["received"]
    extra = "".join(f", +{summary[kind]} {kind}" for kind in ("duplicates", "errors") if summary[kind])
    loss = 100 * (sent - received) / sent if sent else 0
    click.echo(f"\n--- {host} ping statistics ---")
    click.echo(
        f"{sent} packets transmitted, {received} received{extra}, {loss:.6g}% packet loss, time {summary['time'] * 1000:.0f}ms"
    )
    if times:
        mean = sum(times) / len(times)
        deviation = sqrt(max(sum(each * each for each in times) / len(times) - mean * mean, 0))
        click.echo(f"rtt min/avg/max/mdev = {min(times):.3f}/{mean:.3f}/{max(times):.3f}/{deviation:.3f} ms")
