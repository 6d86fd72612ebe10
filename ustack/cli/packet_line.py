"""One line for a frame, in the words of `tcpdump -n`. The decoder is dpkt's; nothing of the payload is shown."""

from __future__ import annotations

from ipaddress import ip_address
from time import localtime, strftime
from typing import Any, Final

import dpkt

_FLAGS: Final = (
    (dpkt.tcp.TH_FIN, "F"),
    (dpkt.tcp.TH_SYN, "S"),
    (dpkt.tcp.TH_RST, "R"),
    (dpkt.tcp.TH_PUSH, "P"),
    (dpkt.tcp.TH_URG, "U"),
    (dpkt.tcp.TH_ECE, "E"),
    (dpkt.tcp.TH_CWR, "W"),
    (dpkt.tcp.TH_ACK, "."),
)
_ICMP: Final = {
    0: "echo reply",
    3: "unreachable",
    5: "redirect",
    8: "echo request",
    11: "time exceeded",
    12: "parameter problem",
}
_ICMP6: Final = {
    1: "unreachable",
    2: "packet too big",
    3: "time exceeded",
    4: "parameter problem",
    128: "echo request",
    129: "echo reply",
    133: "router solicitation",
    134: "router advertisement",
    135: "neighbor solicitation",
    136: "neighbor advertisement",
}
_ECHOES: Final = (0, 8)


def line(stamp: int, interface: str, outgoing: bool, frame: bytes, length: int, comment: str = "") -> str:
    """When (`stamp` in nanoseconds since 1970), where, which way, and what: the frame begins with `frame`, and has `length`
    bytes.
    """
    clock = strftime("%H:%M:%S", localtime(stamp // 1_000_000_000))
    shown = f"{clock}.{stamp % 1_000_000_000:09} {interface} {'Out' if outgoing else 'In '} {describe(frame, length)}"
    return f"{shown} [{comment}]" if comment else shown


def describe(frame: bytes, length: int) -> str:
    """What is in a frame."""
    try:
        ethernet = dpkt.ethernet.Ethernet(frame)
    except (dpkt.UnpackError, IndexError, ValueError):
        return f"[malformed], length {length}"
    content = ethernet.data
    if isinstance(content, dpkt.arp.ARP):
        return _arp(content, length)
    if isinstance(content, dpkt.ip.IP):
        return _ip(content)
    if isinstance(content, dpkt.ip6.IP6):
        return _ip6(content)
    return f"ethertype 0x{ethernet.type:04x}, length {length}"


def _arp(arp: Any, length: int) -> str:
    target, sender = ip_address(arp.tpa), ip_address(arp.spa)
    if arp.op == dpkt.arp.ARP_OP_REQUEST:
        return f"ARP, Request who-has {target} tell {sender}, length {length - 14}"
    if arp.op == dpkt.arp.ARP_OP_REPLY:
        return f"ARP, Reply {sender} is-at {arp.sha.hex(':')}, length {length - 14}"
    return f"ARP, operation {arp.op}, length {length - 14}"


def _ip(ip: Any) -> str:
    src, dst = str(ip_address(ip.src)), str(ip_address(ip.dst))
    size = max(ip.len - ip.hl * 4, 0)
    if ip.mf or ip.offset:
        return f"IP {src} > {dst}: {_protocol(ip.p)}, fragment at {ip.offset * 8}, length {size}"
    return f"IP {_transport(ip.data, ip.p, src, dst, size)}"


def _ip6(ip: Any) -> str:
    return f"IP6 {_transport(ip.data, ip.nxt, str(ip_address(ip.src)), str(ip_address(ip.dst)), ip.plen)}"


def _transport(data: Any, protocol: int, src: str, dst: str, size: int) -> str:
    if isinstance(data, dpkt.tcp.TCP):
        payload = max(size - data.off * 4, 0)
        flags = "".join(letter for bit, letter in _FLAGS if data.flags & bit) or "none"
        seq = f"{data.seq}:{(data.seq + payload) & 0xFFFFFFFF}" if payload else str(data.seq)
        ack = f", ack {data.ack}" if data.flags & dpkt.tcp.TH_ACK else ""
        return f"{src}.{data.sport} > {dst}.{data.dport}: Flags [{flags}], seq {seq}{ack}, win {data.win}, length {payload}"
    if isinstance(data, dpkt.udp.UDP):
        return f"{src}.{data.sport} > {dst}.{data.dport}: UDP, length {max(data.ulen - 8, 0)}"
    if isinstance(data, dpkt.icmp.ICMP):
        kind = _ICMP.get(data.type, f"type {data.type}")
        echo = ""
        if data.type in _ECHOES and isinstance(data.data, dpkt.icmp.ICMP.Echo):
            echo = f", id {data.data.id}, seq {data.data.seq}"
        return f"{src} > {dst}: ICMP {kind}{echo}, length {size}"
    if isinstance(data, dpkt.icmp6.ICMP6):
        return f"{src} > {dst}: ICMP6, {_ICMP6.get(data.type, f'type {data.type}')}, length {size}"
    return f"{src} > {dst}: {_protocol(protocol)}, length {size}"


def _protocol(number: int) -> str:
    return {1: "ICMP", 6: "TCP", 17: "UDP", 47: "GRE", 58: "ICMP6"}.get(number, f"protocol {number}")
