"""Neighbours: packets wait for an answer, stations come and go, and a table never outgrows its limits."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import dpkt
import pytest

from tests.net.host import BenchHost, ip
from ustack.drops import DropReason
from ustack.net.neighbour import (
    NUD_DELAY,
    NUD_FAILED,
    NUD_INCOMPLETE,
    NUD_PROBE,
    NUD_REACHABLE,
    NUD_STALE,
    STATE_NAMES,
    Neighbour,
    NeighbourParameters,
)
from ustack.wire import arp, ethernet, icmp

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.link.simwire import WireFrame

PROTO = 253  # for experiments (RFC 3692)


def send(host: BenchHost, payload: bytes = b"payload", dst: str = "10.0.0.2") -> bool:
    return host.ipv4.path(ip(dst)).send(PROTO, 0, (payload,), len(payload))


def neighbour(host: BenchHost, address: str = "10.0.0.2") -> Neighbour:
    entry = host.interface.neighbours.find(ip(address))
    assert entry is not None
    return entry


def state(host: BenchHost, address: str = "10.0.0.2") -> str:
    return STATE_NAMES[neighbour(host, address).state]


def arp_questions(frames: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Who was asked for what: (Ethernet destination, target address)."""
    parsed = [dpkt.ethernet.Ethernet(frame) for frame in frames]
    return [(frame.dst, frame.data.tpa) for frame in parsed if frame.type == dpkt.ethernet.ETH_TYPE_ARP and frame.data.op == 1]


def test_a_packet_waits_until_its_neighbour_answers(host: BenchHost) -> None:
    assert send(host, b"first")
    assert send(host, b"second")
    assert arp_questions(host.take_sent()) == [(ethernet.BROADCAST, host.peer)]
    assert host.interface.neighbours.account.bytes > 0
    host.answer_arp()
    frames = [dpkt.ethernet.Ethernet(frame) for frame in host.take_sent()]
    assert [(frame.dst, frame.data.data) for frame in frames] == [(host.peer_mac, b"first"), (host.peer_mac, b"second")]
    assert state(host) == "REACHABLE"
    assert host.interface.neighbours.account.bytes == 0
    assert host.drops == {}


def test_a_super_frame_waits_on_pages_with_its_offload_request(host: BenchHost) -> None:
    wire_frames: list[WireFrame] = []
    host.device.wire = wire_frames.append
    path = host.ipv4.path(host.peer)
    path.head[path.l4 : path.l4 + 20] = bytes(12) + b"\x50" + bytes(7)
    payload = [bytes([n]) * 1448 for n in range(40)]
    assert path.send(6, 20, payload, 40 * 1448, csum_at=16, gso_size=1448)
    host.answer_arp()
    frame = wire_frames[-1]
    assert (frame.gso_size, frame.csum_start, frame.csum_offset) == (1448, 34, 16)
    assert bytes(frame.data[54:]) == b"".join(payload)


def test_a_neighbour_that_never_answers_is_asked_three_times_and_given_up(host: BenchHost) -> None:
    failed: list[tuple[int, int, int, bytes, bytes, bytes]] = []

    def on_error(*error: Any) -> bool:
        failed.append(error)
        return True

    host.ipv4.icmp.error_handlers[PROTO] = on_error
    send(host, b"eight bytes of it")
    for _ in range(5):
        host.wait(1.0)
    assert arp_questions(host.take_sent()) == [(ethernet.BROADCAST, host.peer)] * 3
    assert state(host) == "FAILED"
    assert host.drops == {"NEIGH_FAILED": 1}
    assert failed == [(icmp.ICMP_DEST_UNREACH, icmp.ICMP_HOST_UNREACH, 0, host.address, host.peer, b"eight bytes of it")]
    assert neighbour(host).lladdr is None


def test_the_sender_of_a_lost_packet_may_send_again_at_once(host: BenchHost) -> None:
    """The callback sends through the neighbour that is just failing: that starts a new resolution."""
    host.ipv4.icmp.error_handlers[PROTO] = lambda *_: send(host, b"again...")
    send(host)
    for _ in range(3):
        host.wait(1.0)
    assert state(host) == "INCOMPLETE"
    host.answer_arp()
    assert host.take_sent()[-1].endswith(b"again...")


def test_the_queue_of_a_neighbour_drops_its_oldest(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(parameters=NeighbourParameters(unres_qlen_bytes=8000))
    for n in range(10):
        assert send(host, bytes([n]) * 1000)
    assert host.interface.neighbours.account.bytes <= 8000
    host.take_sent()
    host.answer_arp()
    kept = [frame[-1] for frame in host.take_sent()]
    assert kept == list(range(10 - len(kept), 10))
    assert host.drops == {"NEIGH_QUEUEFULL": 10 - len(kept)}


def test_a_packet_that_finds_no_memory_to_wait_in_is_counted(host: BenchHost) -> None:
    pages = host.env.memory.pages
    host.env.memory.pool.reap()
    owner = pages.owner_id("test")
    taken: list[int] = []
    while pfns := pages.alloc_bulk(1, 0, owner):
        taken += pfns
    assert not send(host, bytes(1400))
    assert host.drops == {"NOMEM": 1}
    pages.free_bulk(taken)


def test_an_answer_wears_off_and_use_without_confirmation_leads_to_probes(host: BenchHost) -> None:
    send(host)
    host.answer_arp()
    host.wait(45.1)  # more than 1.5 times the base time
    assert state(host) == "STALE"
    host.take_sent()
    send(host)
    assert state(host) == "DELAY"
    assert len(host.take_sent()) == 1, "a stale address is used meanwhile"
    host.wait(5.0)
    assert state(host) == "PROBE"
    assert arp_questions(host.take_sent()) == [(host.peer_mac, host.peer)], "only the known station is asked"
    host.answer_arp()
    assert state(host) == "REACHABLE"


def test_a_neighbour_that_fell_silent_fails_after_three_probes(host: BenchHost) -> None:
    send(host)
    host.answer_arp()
    host.wait(45.1)
    send(host)
    for _ in range(9):
        host.wait(1.0)
    assert state(host) == "FAILED"
    host.take_sent()
    send(host)
    assert arp_questions(host.take_sent()) == [(ethernet.BROADCAST, host.peer)], "and is looked for anew when it is needed"


@pytest.mark.parametrize("seconds", [45.1, 50.0])
def test_forward_progress_of_an_upper_layer_is_as_good_as_an_answer(host: BenchHost, seconds: float) -> None:
    send(host)
    host.answer_arp()
    host.wait(seconds)
    send(host)
    assert neighbour(host).state == NUD_DELAY
    host.ipv4.path(host.peer).neighbour.confirm()
    assert neighbour(host).state == NUD_REACHABLE
    host.wait(5.1)
    assert neighbour(host).state == NUD_REACHABLE


def test_a_neighbour_that_is_confirmed_all_the_time_stays_reachable(host: BenchHost) -> None:
    send(host)
    host.answer_arp()
    for _ in range(100):
        host.wait(3.0)
        neighbour(host).confirm()
        assert neighbour(host).state == NUD_REACHABLE
    assert arp_questions(host.take_sent()) == [(ethernet.BROADCAST, host.peer)]


def test_a_gratuitous_arp_moves_an_address_to_another_station(host: BenchHost) -> None:
    send(host)
    host.answer_arp()
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, host.peer, sha=b"\x02\x77\x77\x77\x77\x77")
    assert state(host) == "STALE"
    host.take_sent()
    send(host)
    assert host.take_sent()[0][:6] == b"\x02\x77\x77\x77\x77\x77"


def test_of_two_answers_to_one_question_the_first_wins(host: BenchHost) -> None:
    send(host)
    host.answer_arp()
    host.arrive_arp(arp.ARPOP_REPLY, host.peer, host.address, sha=b"\x02\x66\x66\x66\x66\x66", dst_mac=host.device.mac)
    assert neighbour(host).lladdr == host.peer_mac
    host.wait(1.1)
    host.arrive_arp(arp.ARPOP_REPLY, host.peer, host.address, sha=b"\x02\x66\x66\x66\x66\x66", dst_mac=host.device.mac)
    assert neighbour(host).lladdr == b"\x02\x66\x66\x66\x66\x66"


def test_what_somebody_says_unasked_does_not_prove_that_he_hears_us(host: BenchHost) -> None:
    send(host)
    host.answer_arp()
    host.wait(45.1)
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, host.address)
    assert neighbour(host).state == NUD_STALE


def test_a_packet_that_waited_for_somebody_who_only_asked_us_makes_us_probe(host: BenchHost) -> None:
    send(host)
    assert neighbour(host).state == NUD_INCOMPLETE
    host.arrive_arp(arp.ARPOP_REQUEST, host.peer, host.address)
    assert neighbour(host).state == NUD_DELAY
    host.wait(5.0)
    assert neighbour(host).state == NUD_PROBE


def test_a_full_table_gives_up_what_was_unused_longest(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(parameters=NeighbourParameters(gc_thresh1=2, gc_thresh2=4, gc_thresh3=8))
    for n in range(10, 18):
        host.arrive_arp(arp.ARPOP_REQUEST, ip(f"10.0.0.{n}"), host.address)
        host.wait(0.1)
    old = host.ipv4.path(ip("10.0.0.10"))
    host.arrive_arp(arp.ARPOP_REQUEST, ip("10.0.0.18"), host.address)
    assert {entry.address[3] for entry in host.interface.neighbours} == {14, 15, 16, 17, 18}
    assert old.obsolete, "paths through a forgotten neighbour are looked up again"
    assert host.ipv4.path(ip("10.0.0.10")) is not old


def test_a_table_full_of_neighbours_in_use_says_so(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(parameters=NeighbourParameters(gc_thresh1=2, gc_thresh2=4, gc_thresh3=8))
    for n in range(10, 18):
        send(host, dst=f"10.0.0.{n}")
    with pytest.raises(OSError, match="neighbour table is full") as full:
        host.ipv4.path(ip("10.0.0.18"))
    assert full.value.errno == errno.ENOBUFS
    assert host.env.drops[DropReason.NEIGH_TABLEFULL] == 1
    for _ in range(3):
        host.wait(1.0)
    assert neighbour(host, "10.0.0.10").state == NUD_FAILED
    host.ipv4.path(ip("10.0.0.18"))


def test_entries_that_nobody_used_for_a_minute_go_when_others_come(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(parameters=NeighbourParameters(gc_thresh1=2))
    for n in (10, 11, 12):
        host.arrive_arp(arp.ARPOP_REQUEST, ip(f"10.0.0.{n}"), host.address)
    host.wait(61.0)
    host.arrive_arp(arp.ARPOP_REQUEST, ip("10.0.0.13"), host.address)
    assert [entry.address[3] for entry in host.interface.neighbours] == [13]


def test_closing_frees_what_waits(host: BenchHost) -> None:
    send(host, bytes(1400))
    host.close()
    assert host.interface.neighbours.account.bytes == 0
    assert host.env.memory.live == 0
