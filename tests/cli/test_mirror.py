"""Mirrors over kernel sockets: what is sent, what is cut, what is refused, and no packet of a mirror is mirrored again."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import dpkt
import pytest

from ustack.cli.mirror import PACKET_MAX, Mirror

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def collector() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
        yield sock


def test_a_frame_arrives_whole_behind_its_encapsulation(collector: socket.socket) -> None:
    port = collector.getsockname()[1]
    frame = bytes(range(200))
    for uri, header in (
        (f"tzsp://127.0.0.1:{port}", bytes.fromhex("0100000101")),
        (f"vxlan://127.0.0.1:{port}?vni=74565", bytes.fromhex("0800000001234500")),
        (f"vxlan://127.0.0.1:{port}", bytes.fromhex("0800000000000100")),
    ):
        mirror = Mirror(uri)
        mirror.send([frame[:10], memoryview(frame)[10:]], len(frame))
        assert collector.recv(65535) == header + frame
        assert (mirror.sent, mirror.cut, mirror.lost) == (1, 0, 0)
        mirror.close()


def test_what_fits_no_packet_is_cut_and_counted(collector: socket.socket) -> None:
    mirror = Mirror(f"tzsp://127.0.0.1:{collector.getsockname()[1]}")
    mirror.send([bytes(54), bytes(65495)], 65549)
    assert len(collector.recv(1 << 17)) == PACKET_MAX - 16 + 5
    mirror.send([bytes(96)], 1000)  # of which no more was captured
    assert len(collector.recv(1 << 17)) == 96 + 5
    assert (mirror.sent, mirror.cut, mirror.lost) == (2, 2, 0)
    mirror.close()


def test_what_the_kernel_refuses_is_lost_and_counted() -> None:
    mirror = Mirror("tzsp://255.255.255.255")  # broadcasts need a permission that it has not got
    mirror.send([bytes(60)], 60)
    assert (mirror.sent, mirror.lost) == (0, 1)
    mirror.close()


def test_a_packet_of_the_mirror_is_known_when_it_comes_by() -> None:
    mirror = Mirror("vxlan://127.0.0.9:4789")
    packet = dpkt.ip.IP(src=b"\x7f\0\0\1", dst=b"\x7f\0\0\x09", p=17, data=dpkt.udp.UDP(sport=9, dport=4789, ulen=8))
    frame = bytes(12) + b"\x08\x00" + bytes(packet)
    assert mirror.is_own(frame)
    packet.data.dport = 4790
    assert not mirror.is_own(bytes(12) + b"\x08\x00" + bytes(packet))
    assert not mirror.is_own(bytes(12) + b"\x08\x06" + bytes(packet))
    assert not mirror.is_own(b"")
    mirror.close()


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("http://10.0.0.1", "allowed are erspan"),
        ("tzsp://", "allowed are erspan"),
        ("tzsp://10.0.0.1/path", "allowed are erspan"),
        ("tzsp://10.0.0.1:99999", "[Pp]ort"),
        ("tzsp://10.0.0.1?session=1", "tzsp takes no session"),
        ("erspan://10.0.0.1?session=1024", "session is a number from 0 to 1023, not '1024'"),
        ("erspan://10.0.0.1:47", "erspan takes no port"),
        ("vxlan://10.0.0.1?vni=x", "vni is a number from 0 to 16777215, not 'x'"),
        ("vxlan://10.0.0.1?vni=", "vni is a number"),
    ],
)
def test_a_uri_that_is_none(uri: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Mirror(uri)
