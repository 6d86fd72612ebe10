"""ARP: we answer for our address and nothing else, announce it, defend it, and believe only what Linux would believe."""

from __future__ import annotations

import dpkt
import pytest

from tests.net.host import BenchHost, ip
from ustack.wire import arp, ethernet


def replies(frames: list[bytes]) -> list[dpkt.arp.ARP]:
    packets = [dpkt.ethernet.Ethernet(frame).data for frame in frames]
    return [packet for packet in packets if packet.op == arp.ARPOP_REPLY]


def test_a_question_for_our_address_is_answered_to_the_one_who_asked(host: BenchHost) -> None:
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, host.address)
    (frame,) = host.take_sent()
    assert frame[:14] == host.peer_mac + host.device.mac + b"\x08\x06"
    (answer,) = replies([frame])
    assert (answer.sha, answer.spa, answer.tha, answer.tpa) == (host.device.mac, host.address, host.peer_mac, host.peer)


def test_who_asks_for_us_is_remembered_because_we_will_answer_him(host: BenchHost) -> None:
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, host.address)
    entry = host.interface.neighbours.find(host.peer)
    assert entry is not None
    assert entry.lladdr == host.peer_mac
    assert entry.stale


def test_questions_for_others_and_answers_we_did_not_ask_for_make_no_entry(host: BenchHost) -> None:
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, ip("10.0.0.9"))
    host.arrive_arp(arp.ARPOP_REPLY, host.peer, host.address, dst_mac=host.device.mac)
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, host.peer)
    host.arrive_arp(arp.ARPOP_REQUEST, ip("192.0.2.1"), host.address)
    assert len(host.interface.neighbours) == 0
    assert len(replies(host.take_sent())) == 1, "the last one was for us, though from another network"
    assert host.drops == {}


def test_a_probe_for_our_address_is_answered_and_makes_no_entry(host: BenchHost) -> None:
    host.arrive_arp(arp.ARPOP_REQUEST, bytes(4), host.address)
    assert len(replies(host.take_sent())) == 1
    assert len(host.interface.neighbours) == 0


def test_our_address_is_announced_twice_when_the_interface_comes_up(host: BenchHost) -> None:
    host.interface.arp.announce()
    for _ in range(3):
        host.wait(2.0)
    packets = [dpkt.ethernet.Ethernet(frame) for frame in host.take_sent()]
    assert [(frame.dst, frame.data.spa, frame.data.tpa) for frame in packets] == [
        (ethernet.BROADCAST, host.address, host.address)
    ] * 2


def test_our_address_is_defended_once_in_ten_seconds(host: BenchHost) -> None:
    for _ in range(3):
        host.arrive_arp(arp.ARPOP_REQUEST, host.address, host.address)
    assert len(host.take_sent()) == 1
    assert host.interface.arp.conflicts == 3
    assert host.drops == {"INVALID_PROTO": 3}
    host.wait(10.0)
    host.arrive_arp(arp.ARPOP_REPLY, host.address, host.peer)
    assert len(host.take_sent()) == 1


@pytest.mark.parametrize(
    ("op", "spa", "sha"),
    [
        (3, "10.0.0.2", None),
        (1, "10.0.0.255", None),
        (1, "224.0.0.1", None),
        (1, "127.0.0.1", None),
        (1, "0.0.0.1", None),
        (2, "10.0.0.2", b"\x01\x00\x5e\x00\x00\x01"),
        (2, "10.0.0.2", b"\x02\x00\x0a\x00\x00\x01"),
    ],
    ids=["operation", "broadcast", "multicast", "loopback", "this network", "group station", "our own station"],
)
def test_a_packet_that_cannot_be_true_is_dropped(host: BenchHost, op: int, spa: str, sha: bytes | None) -> None:
    host.arrive_arp(op, ip(spa), host.address, sha=sha)
    assert host.drops == {"INVALID_PROTO": 1}
    assert host.take_sent() == []
    assert len(host.interface.neighbours) == 0


def test_a_packet_cut_short_is_dropped(host: BenchHost) -> None:
    packet = arp.build(arp.ARPOP_REQUEST, host.peer_mac, host.peer, bytes(6), host.address)
    host.arrive(ethernet.build_header(ethernet.BROADCAST, host.peer_mac, ethernet.ETH_P_ARP) + packet[:-1])
    assert host.drops == {"PKT_TOO_SMALL": 1}
