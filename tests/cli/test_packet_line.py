"""One line for each frame, in tcpdump's words; and no frame, however damaged, that stops a capture."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import dpkt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.needs import require_tool
from ustack.cli.packet_line import describe, line

if TYPE_CHECKING:
    from pathlib import Path

A, B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
A6, B6 = bytes(15) + b"\1", bytes(15) + b"\2"


def ethernet(kind: int, payload: bytes) -> bytes:
    """A frame from station 1 to station 2."""
    return b"\2\0\0\0\0\2\2\0\0\0\0\1" + kind.to_bytes(2) + payload


def ip(protocol: int, payload: bytes, **fields: int) -> bytes:
    """A packet from A to B."""
    return ethernet(0x800, bytes(dpkt.ip.IP(src=A, dst=B, p=protocol, len=20 + len(payload), data=payload, **fields)))


def ip6(protocol: int, payload: bytes) -> bytes:
    """A packet from A6 to B6."""
    return ethernet(0x86DD, bytes(dpkt.ip6.IP6(src=A6, dst=B6, nxt=protocol, hlim=64, plen=len(payload), data=payload)))


TCP = bytes(dpkt.tcp.TCP(sport=1234, dport=80, seq=7, ack=9, flags=0x18, win=512, data=b"abc"))
UDP = bytes(dpkt.udp.UDP(sport=53, dport=5353, ulen=12, data=b"data"))
ECHO = bytes(dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=5, seq=6, data=bytes(56))))
ARP = bytes(dpkt.arp.ARP(op=1, sha=b"\2\0\0\0\0\1", spa=A, tha=bytes(6), tpa=B))

FRAMES = {
    ip(6, TCP): "IP 10.0.0.1.1234 > 10.0.0.2.80: Flags [P.], seq 7:10, ack 9, win 512, length 3",
    ip6(6, TCP): "IP6 ::1.1234 > ::2.80: Flags [P.], seq 7:10, ack 9, win 512, length 3",
    ip(17, UDP): "IP 10.0.0.1.53 > 10.0.0.2.5353: UDP, length 4",
    ip(1, ECHO): "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 5, seq 6, length 64",
    ip(17, UDP, mf=1): "IP 10.0.0.1 > 10.0.0.2: UDP, fragment at 0, length 12",
    ip(2, bytes(8)): "IP 10.0.0.1 > 10.0.0.2: protocol 2, length 8",
    ethernet(0x806, ARP): "ARP, Request who-has 10.0.0.2 tell 10.0.0.1, length 28",
    ethernet(0x1234, bytes(46)): "ethertype 0x1234, length 60",
    b"short": "[malformed], length 5",
}


@pytest.mark.parametrize("frame", FRAMES, ids=range(len(FRAMES)))
def test_a_frame_in_a_line(frame: bytes) -> None:
    assert describe(frame, len(frame)) == FRAMES[frame]


def test_time_place_direction_and_comment() -> None:
    shown = line(1_700_000_000_000_000_042, "ut0", True, ip(17, UDP), 46, "dropped: TX_DEVICE")
    assert shown.split(" ", 1)[0].endswith(".000000042")
    assert shown.endswith(" ut0 Out IP 10.0.0.1.53 > 10.0.0.2.5353: UDP, length 4 [dropped: TX_DEVICE]")


def test_tcpdump_says_the_same_of_a_tcp_segment(tmp_path: Path) -> None:
    file = tmp_path / "one.pcap"
    with file.open("wb") as out:
        dpkt.pcap.Writer(out).writepkt(ip(6, TCP), 1.0)
    said = subprocess.run([require_tool("tcpdump"), "-n", "-S", "-r", str(file)], capture_output=True, check=True, timeout=30)
    assert said.stdout.decode().split(" ", 1)[1].startswith(FRAMES[ip(6, TCP)].rsplit(",", 1)[0])


@settings(deadline=None, max_examples=600)
@given(
    st.sampled_from([*FRAMES, ip6(58, bytes((128, 0)) + bytes(6)), ip6(0, bytes(16)), ip6(44, bytes(8)), ip(2, bytes(8))]),
    st.lists(st.tuples(st.integers(12, 80), st.integers(0, 255)), max_size=8),
    st.integers(0, 100),
    st.binary(max_size=64),
)
@example(ethernet(0x8847, b""), [], 14, b"")
@example(ethernet(0x8864, b""), [], 14, b"\x11\x00")
def test_no_damage_is_too_much(frame: bytes, changes: list[tuple[int, int]], length: int, more: bytes) -> None:
    damaged = bytearray(frame[:length] + more)
    for at, value in changes:
        if at < len(damaged):
            damaged[at] = value
    assert describe(bytes(damaged), len(damaged)).isprintable()
