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
    local = each["local"]
    peer = each["peer"] or ["*" if local[0] == "*" else "::" if ":" in local[0] else "0.0.0.0", "*"]
    cells = [each["state"], str(each["recv_q"]), str(each["send_q"]), _address(local), _address(peer)]
    return [each["protocol"], *cells] if with_protocol else cells


def _address(address: list[Any]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _memory(memory: dict[str, Any]) -> str:
    text = ",".join(f"{letter}{memory[name]}" for letter, name in SKMEM.items())
    text = f"skmem:({text})"
    return f"{text} memalloc" if memory["memalloc"] else text


def _info(tcp: dict[str, Any]) -> str:
    """The words of iproute2's `ss -i`, in its order."""
    info = tcp["info"]
    flags = (("ts", tcp["timestamps"]), ("sack", tcp["sack"]), ("ecn", info["tcpi_options"] & 8))
    words = [name for name, wanted in flags if wanted]
    words += [info["congestion"], "wscale:{},{}".format(*tcp["wscale"]), f"rto:{tcp['rto'] * 1000:g}"]
    if tcp["backoff"]:
        words.append(f"backoff:{tcp['backoff']}")
    if tcp["rtt"]:
        words.append(f"rtt:{tcp['rtt'] * 1000:.3f}/{tcp['rttvar'] * 1000:.3f}")
    words += [f"ato:{info['tcpi_ato'] // 1000}", f"mss:{tcp['mss']}", f"pmtu:{tcp['pmtu']}"]
    words += [f"rcvmss:{info['tcpi_rcv_mss']}", f"advmss:{info['tcpi_advmss']}", f"cwnd:{tcp['cwnd']}"]
    if tcp["ssthresh"] is not None:
        words.append(f"ssthresh:{tcp['ssthresh']}")
    words += _counted(info, "bytes_sent", "bytes_retrans", "bytes_acked", "bytes_received")
    if tcp["rtt"]:
        words.append(f"send {_rate(tcp['cwnd'] * tcp['mss'] / tcp['rtt'])}")
    words += [f"lastsnd:{info['tcpi_last_data_sent']}", f"lastrcv:{info['tcpi_last_data_recv']}"]
    words.append(f"lastack:{info['tcpi_last_ack_recv']}")
    if info["tcpi_pacing_rate"]:
        words.append(f"pacing_rate {_rate(info['tcpi_pacing_rate'])}")
    if info["tcpi_delivery_rate"]:
        words.append(f"delivery_rate {_rate(info['tcpi_delivery_rate'])}")
    words += _counted(info, "delivered")
    if info["tcpi_delivery_rate_app_limited"]:
        words.append("app_limited")
    words += _counted(info, "unacked")
    if info["tcpi_retrans"] or info["tcpi_total_retrans"]:
        words.append(f"retrans:{info['tcpi_retrans']}/{info['tcpi_total_retrans']}")
    words += _counted(info, "lost", "sacked", "dsack_dups")
    if info["tcpi_reordering"] != 3:
        words.append(f"reordering:{info['tcpi_reordering']}")
    words += _counted(info, "reord_seen", "rcv_space", "notsent_bytes")
    if tcp["rtt"]:
        words.append(f"minrtt:{tcp['minrtt'] * 1000:.3f}")
    words += [f"snd_wnd:{tcp['snd_wnd']}", f"rcv_wnd:{tcp['rcv_wnd']}"]
    return " ".join(words)


def _counted(info: dict[str, Any], *names: str) -> list[str]:
    return [f"{name}:{info[f'tcpi_{name}']}" for name in names if info[f"tcpi_{name}"]]


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8:.0f}bps"
