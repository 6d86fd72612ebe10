"""`ustack ss`: the sockets of a running daemon, in the columns of iproute2's ss."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from ustack.cli.control import call, control_option

SKMEM: Final = {
    "r": "rmem_alloc",
    "rb": "rcvbuf",
    "t": "wmem_alloc",
    "tb": "sndbuf",
    "f": "fwd_alloc",
    "w": "wmem_queued",
    "o": "optmem",
    "bl": "backlog",
    "d": "drops",
}
"""The figures of -m, in the order and with the letters of ss(8)."""


@click.command()
@click.option("-t", "--tcp", is_flag=True, help="TCP sockets.")
@click.option("-u", "--udp", is_flag=True, help="UDP sockets.")
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that listen.")
@click.option("-l", "--listening", is_flag=True, help="Only those that listen.")
@click.option("-n", "--numeric", is_flag=True, help="Numbers, not names; it is always so.")
@click.option("-m", "--memory", is_flag=True, help="What each is charged for packets, in bytes of truesize.")
@click.option("-i", "--info", is_flag=True, help="The inner state of TCP.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with everything.")
@control_option
def ss(
    tcp: bool,
    udp: bool,
    everything: bool,
    listening: bool,
    numeric: bool,
    memory: bool,
    info: bool,
    as_json: bool,
    control: str,
) -> None:
    """Show sockets: TCP and UDP unless one is asked for, connected ones unless told otherwise."""
    sockets = call(control, "ss")
    protocols = {name for name, wanted in (("tcp", tcp), ("udp", udp)) if wanted} or {"tcp", "udp"}
    chosen = [
        each
        for each in sockets
        if each["protocol"] in protocols and (everything or (each["state"] in ("LISTEN", "UNCONN")) == listening)
    ]
    if as_json:
        click.echo(json.dumps(chosen, indent=2))
        return
    with_protocol = len(protocols) > 1
    rows = [_row(each, with_protocol) for each in chosen]
    header = ["State", "Recv-Q", "Send-Q", "Local Address:Port", "Peer Address:Port"]
    header = ["Netid", *header] if with_protocol else header
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    click.echo(_aligned(header, widths))
    for each, row in zip(chosen, rows, strict=True):
        line = _aligned(row, widths)
        if memory and "memory" in each:
            line += f"\n\t{_memory(each['memory'])}"
        if info and "tcp" in each:
            line += f"\n\t{_info(each['tcp'])}"
        click.echo(line)


def _aligned(row: list[str], widths: list[int]) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(each: dict[str, Any], with_protocol: bool) -> list[str]:
    cells = [each["state"], str(each["recv_q"]), str(each["send_q"]), _address(each["local"]), _address(each["peer"])]
    return [each["protocol"], *cells] if with_protocol else cells


def _address(address: list[Any] | None) -> str:
    return "0.0.0.0:*" if address is None else f"{address[0]}:{address[1]}"


def _memory(memory: dict[str, Any]) -> str:
    text = ",".join(f"{letter}{memory[name]}" for letter, name in SKMEM.items())
    text = f"skmem:({text})"
    return f"{text} memalloc" if memory["memalloc"] else text


def _info(tcp: dict[str, Any]) -> str:
    words = [name for name, wanted in (("ts", tcp["timestamps"]), ("sack", tcp["sack"])) if wanted]
    words.append("wscale:{},{}".format(*tcp["wscale"]))
    words.append(f"rto:{tcp['rto'] * 1000:g}")
    if tcp["rtt"]:
        words.append(f"rtt:{tcp['rtt'] * 1000:.3f}/{tcp['rttvar'] * 1000:.3f}")
    words += [f"mss:{tcp['mss']}", f"pmtu:{tcp['pmtu']}", f"cwnd:{tcp['cwnd']}"]
    if tcp["ssthresh"] is not None:
        words.append(f"ssthresh:{tcp['ssthresh']}")
    words += [f"{name}:{tcp[name]}" for name in ("bytes_acked", "bytes_received", "unacked", "lost", "backoff") if tcp[name]]
    words += [f"snd_wnd:{tcp['snd_wnd']}", f"rcv_wnd:{tcp['rcv_wnd']}"]
    if tcp["rtt"]:
        words.append(f"minrtt:{tcp['minrtt'] * 1000:.3f}")
    return " ".join(words)
