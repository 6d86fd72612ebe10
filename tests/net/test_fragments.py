"""Reassembly over IPv4: what becomes whole, what never does, and that nobody can make it cost more than it may."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.net.host import BenchHost, ip
from tests.net.test_ipv4 import listen
from ustack.link.rxring import LinearRing
from ustack.net.fragments import FragmentParameters, Fragments
from ustack.wire import ethernet, icmp, ipv4, udp
from ustack.wire.checksum import finish, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROTO = 253


class Piece(NamedTuple):
    start: int
    data: bytes
    more: bool


def cut(payload: bytes, *lengths: int) -> list[Piece]:
    """`payload` in pieces of those lengths, the last as long as it takes."""
    pieces = []
    start = 0
    for length in lengths:
        pieces.append(Piece(start, payload[start : start + length], True))
        start += length
    return [*pieces, Piece(start, payload[start:], False)]


def arrive(
    host: BenchHost, piece: Piece, ident: int = 7, proto: int = PROTO, src: str = "", tos: int = 0, ttl: int = 9
) -> None:
    """Deliver a fragment of the datagram `ident`."""
    host.arrive_ip(
        proto,
        piece.data,
        ident=ident,
        frag=piece.start >> 3 | (ipv4.IP_MF if piece.more else 0),
        tos=tos,
        ttl=ttl,
        src=ip(src) if src else host.peer,
    )


def waiting(host: BenchHost) -> int:
    return host.ipv4.fragments.account.bytes


def test_fragments_in_any_order_become_the_datagram(host: BenchHost) -> None:
    delivered = listen(host)
    payload = Random(1).randbytes(5000)
    pieces = cut(payload, 1480, 1480, 1480)
    for piece in (pieces[2], pieces[0], pieces[3]):
        arrive(host, piece, ttl=piece.start % 250 + 1)
    assert delivered == []
    assert waiting(host) > 3 * 1480 - 1000
    arrive(host, pieces[1], ttl=200)
    assert delivered == [(host.peer, host.address, 1, 0, False, payload)]  # the header is that of the first fragment
    mib = host.env.mib
    assert (mib.IpReasmReqds, mib.IpReasmOKs, mib.IpReasmFails, mib.IpInDelivers) == (4, 1, 0, 1)
    assert host.drops == {}
    assert waiting(host) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_in_any_order_with_duplicates_gives_the_datagram_back(data: st.DataObject) -> None:
    payload = data.draw(st.binary(min_size=9, max_size=400))
    cuts = sorted(data.draw(st.sets(st.integers(1, (len(payload) - 1) // 8).map(lambda n: n * 8), min_size=1, max_size=12)))
    edges = [0, *cuts, len(payload)]
    pieces = [Piece(start, payload[start:end], end < len(payload)) for start, end in pairwise(edges)]
    again = data.draw(st.lists(st.sampled_from(pieces[:-1]), max_size=4))
    order = data.draw(st.permutations([*pieces, *again]))
    missing = set(pieces)
    host = BenchHost()
    try:
        delivered = listen(host)
        for piece in order:
            arrive(host, piece)
            missing.discard(piece)
            if not missing:
                break
        assert [each.payload for each in delivered] == [payload]
        assert waiting(host) == 0
    finally:
        host.close()


class Model:
    """Reassembly as slow and simple as can be: a set of bytes that have come."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.start_over()

    def start_over(self) -> None:
        self.bytes: dict[int, int] = {}
        self.pieces: set[tuple[int, bytes]] = set()
        self.length = 0
        self.ended = False

    def add(self, piece: Piece) -> bytes | None:
        start, end = piece.start, piece.start + len(piece.data)
        if piece.more:
            inconsistent = self.ended and end > self.length
        else:
            inconsistent = end < self.length or (self.ended and end != self.length)
        if inconsistent:
            self.start_over()
            return None
        if any(at in self.bytes for at in range(start, end)):
            known = (start, piece.data) in self.pieces if self.exact else all(at in self.bytes for at in range(start, end))
            if not known:
                self.start_over()
            return None
        self.bytes.update(zip(range(start, end), piece.data, strict=True))
        self.pieces.add((start, piece.data))
        self.length = max(self.length, end)
        self.ended = self.ended or not piece.more
        if self.ended and len(self.bytes) == self.length:
            whole = bytes(self.bytes[at] for at in range(self.length))
            self.start_over()
            return whole
        return None


PIECES = st.lists(
    st.builds(
        lambda start, units, tail, more, fill: Piece(
            start * 8, bytes([fill]) * (units * 8 if more else units * 8 - tail), more
        ),
        st.integers(0, 7),
        st.integers(1, 4),
        st.integers(0, 7),
        st.sampled_from([True, True, True, False]),
        st.integers(0, 1),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(pieces=PIECES, exact=st.booleans())
def test_overlaps_and_contradictions_end_as_in_the_model(pieces: list[Piece], exact: bool) -> None:
    host = BenchHost()
    try:
        delivered = listen(host)
        model = Model(exact)
        host.ipv4.fragments.parameters.exact = exact
        expected = []
        for piece in pieces:
            whole = model.add(piece) if piece.start or piece.more else piece.data
            if whole is not None:
                expected.append(whole)
            arrive(host, piece)
        assert [each.payload for each in delivered] == expected
    finally:
        host.close()


def test_a_piece_with_other_bytes_is_no_exact_duplicate(host: BenchHost) -> None:
    host.ipv4.fragments.parameters.exact = True
    arrive(host, Piece(0, b"a" * 16, True))
    arrive(host, Piece(0, b"a" * 16, True))
    assert host.drops == {"DUP_FRAG": 1}
    arrive(host, Piece(0, b"b" * 16, True))
    assert host.drops == {"DUP_FRAG": 1, "FRAG_OVERLAP": 2}
    assert waiting(host) == 0


def test_what_is_not_whole_in_time_is_given_up_and_the_sender_is_told(host: BenchHost) -> None:
    arrive(host, Piece(0, b"first..." * 100, True), ident=1)
    arrive(host, Piece(8, b"not the first...", True), ident=2)
    host.wait(29.9)
    assert waiting(host) > 0
    host.wait(0.2)
    assert waiting(host) == 0
    host.answer_arp()
    sent = [frame for frame in host.take_sent() if frame[12:14] == b"\x08\x00"]
    assert len(sent) == 1  # only where the first fragment has come (RFC 792)
    header = icmp.parse_header(sent[0], 34, len(sent[0]))
    assert header is not None
    assert (header.type, header.code) == (icmp.ICMP_TIME_EXCEEDED, icmp.ICMP_EXC_FRAGTIME)
    assert finish(ones_sum(sent[0][34:])) == 0
    quoted = ipv4.parse_header(sent[0], 42, len(sent[0]))
    assert quoted is not None
    assert (quoted.ident, quoted.frag, quoted.src) == (1, ipv4.IP_MF, host.peer)
    assert len(sent[0]) == 14 + 576
    mib = host.env.mib
    assert (mib.IpReasmTimeout, mib.IpReasmFails, mib.IcmpOutTimeExcds) == (2, 2, 1)
    assert host.drops == {"FRAG_REASM_TIMEOUT": 2}


def test_datagrams_time_out_each_in_its_turn(host: BenchHost) -> None:
    for ident in range(3):
        arrive(host, Piece(8, b"12345678", True), ident=ident)
        host.wait(10)
    assert [len(host.ipv4.fragments), host.env.mib.IpReasmTimeout] == [2, 1]
    host.wait(10)
    assert [len(host.ipv4.fragments), host.env.mib.IpReasmTimeout] == [1, 2]
    host.wait(10)
    assert [len(host.ipv4.fragments), host.env.mib.IpReasmTimeout] == [0, 3]


def test_a_ping_of_death_is_harmless(host: BenchHost) -> None:
    delivered = listen(host)
    arrive(host, Piece(65528, bytes(100), False))
    assert host.drops == {"PKT_TOO_BIG": 1}
    arrive(host, Piece(65512, bytes(3), False))  # with a header of 20 bytes this is the longest packet
    assert len(host.ipv4.fragments) == 1
    assert delivered == []


@pytest.mark.parametrize("piece", [Piece(8, bytes(24), True), Piece(0, bytes(16), True)])
def test_fragments_that_hide_a_tcp_header_are_dropped(host: BenchHost, piece: Piece) -> None:
    arrive(host, piece, proto=ipv4.IPPROTO_TCP)
    assert host.drops == {"FRAG_TINY": 1}
    assert len(host.ipv4.fragments) == 0


def test_an_empty_fragment_is_none(host: BenchHost) -> None:
    arrive(host, Piece(8, b"", True))
    arrive(host, Piece(8, b"1234567", True))  # what does not fill eight bytes does not count
    assert host.drops == {"FRAG_INVALID": 2}
    assert len(host.ipv4.fragments) == 0


@pytest.mark.parametrize(
    ("marks", "whole"),
    [((0, 0), 0), ((2, 2), 2), ((1, 3), 3), ((3, 2), 3), ((3, 3), 3), ((1, 2), 1), ((0, 3), None), ((2, 0), None)],
)
def test_the_congestion_marks_of_fragments_are_combined(host: BenchHost, marks: tuple[int, int], whole: int | None) -> None:
    delivered = listen(host)
    for mark, piece in zip(marks, cut(bytes(20), 16), strict=True):
        arrive(host, piece, tos=0x28 | mark)
    assert [each.tos for each in delivered] == ([] if whole is None else [0x28 | whole])
    assert host.drops == ({"FRAG_INVALID": 2} if whole is None else {})


def test_a_datagram_of_which_nothing_came_for_long_does_not_get_mixed_with_its_successor(host: BenchHost) -> None:
    delivered = listen(host)
    old, new = cut(b"old" * 8, 16), cut(b"new" * 8, 16)
    arrive(host, old[0], ident=1)
    for ident in range(100, 165):
        arrive(host, cut(bytes(16), 8)[1], ident=ident)
    arrive(host, new[1], ident=1)
    assert host.drops == {"FRAG_TOO_FAR": 1}
    arrive(host, new[0], ident=1)
    assert [each.payload for each in delivered] == [b"new" * 8]


def test_one_source_never_holds_more_than_its_share(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(pages=4096)
    honest = cut(Random(2).randbytes(3000), 1480)
    arrive(host, honest[0], ident=1, src="10.0.0.3")
    delivered = listen(host)
    fragments = host.ipv4.fragments
    worst = 0
    for ident in range(3000):
        arrive(host, Piece(8 * (ident % 50), bytes(1400), True), ident=ident)
        worst = max(worst, waiting(host))
    assert worst <= fragments.source_thresh + 2 * 4096 * 2
    assert fragments.source_thresh <= fragments.parameters.high_thresh // 2
    arrive(host, honest[1], ident=1, src="10.0.0.3")
    assert len(delivered) == 1  # untouched by the flood from elsewhere
    assert set(host.drops) == {"FRAG_EVICTED"}


def test_all_sources_together_never_hold_more_than_the_limit(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench("10.0.0.1/8", pages=4096)
    fragments = host.ipv4.fragments
    delivered = listen(host)
    worst = 0
    for n in range(6000):
        arrive(host, Piece(8, b"12345678", True), ident=n & 0xFFFF, src=f"10.1.{n >> 8}.{n & 255}")
        worst = max(worst, waiting(host))
        if n % 1000 == 999:  # what is whole at once gets through all the time
            for piece in cut(bytes(3000), 1480):
                arrive(host, piece, ident=n)
    assert worst <= fragments.parameters.high_thresh + 4096
    assert len(delivered) == 6


def test_a_flood_of_tiny_fragments_of_one_datagram_costs_little_each(make_bench: Callable[..., BenchHost]) -> None:
    host = make_bench(pages=4096)
    delivered = listen(host)
    payload = Random(3).randbytes(8 * 250)
    pieces = cut(payload, *[8] * 249)
    Random(4).shuffle(pieces)
    for piece in pieces:
        arrive(host, piece)
    assert [each.payload for each in delivered] == [payload]
    for start in range(0, 65000, 16):  # with gaps, so that no run ever grows
        arrive(host, Piece(start, bytes(8), True), ident=8)
    fragments = host.ipv4.fragments
    assert waiting(host) <= fragments.source_thresh + 4096
    assert host.drops["FRAG_EVICTED"] > 1000


@pytest.fixture(params=[LinearRing, None], ids=["linear", "paged"])
def udp_host(request: pytest.FixtureRequest) -> Iterator[BenchHost]:
    host = BenchHost(pages=2048, features=0, **({"ring": request.param} if request.param else {}))
    yield host
    host.close()


def udp_pieces(host: BenchHost, payload: bytes, size: int = 1480) -> list[Piece]:
    header = udp.build_header(2000, 1000, len(payload))
    checksum = finish(pseudo_v4(host.peer, host.address, 17, 8 + len(payload)) + ones_sum(header + payload))
    packet = udp.build_header(2000, 1000, len(payload), checksum) + payload
    return cut(packet, *[size] * ((len(packet) - 1) // size))


def test_the_largest_udp_datagram_is_received_in_its_pieces(udp_host: BenchHost) -> None:
    host = udp_host
    socket = host.udp.socket()
    socket.bind(bytes(4), 1000)
    payload = Random(5).randbytes(65507)
    pieces = udp_pieces(host, payload)
    for piece in reversed(pieces):
        arrive(host, piece, proto=17)
    live = host.env.memory.live
    assert live == len(pieces)  # nothing was copied
    assert socket.account.bytes > 65507
    assert socket.recvfrom_nowait(70000, peek=True) == (payload, (host.peer, 2000))
    target = bytearray(100)
    assert socket.recvfrom_into_nowait(memoryview(target))[0] == 65507
    assert target == payload[:100]
    assert (host.env.memory.live, socket.account.bytes) == (0, 0)
    damaged = [Piece(each.start, each.data[:-1] + b"?", each.more) for each in pieces]
    for piece in damaged:
        arrive(host, piece, proto=17)
    assert host.drops == {"UDP_CSUM": 1}
    socket.close()


def test_a_broadcast_in_pieces_reaches_several_sockets(host: BenchHost) -> None:
    from ustack.transport.options import SocketOptions

    sockets = [host.udp.socket(SocketOptions(reuseaddr=True)) for _ in range(2)]
    for socket in sockets:
        socket.bind(bytes(4), 1000)
    packet = udp.build_header(2000, 1000, 3000) + bytes(3000)
    for piece in cut(packet, 1480, 1480):
        host.arrive_ip(
            17,
            piece.data,
            ident=5,
            frag=piece.start >> 3 | (ipv4.IP_MF if piece.more else 0),
            dst=b"\xff\xff\xff\xff",
            dst_mac=ethernet.BROADCAST,
        )
    for socket in sockets:
        assert socket.recvfrom_nowait(4000)[0] == bytes(3000)
        socket.close()


def test_what_waits_goes_with_its_interface(host: BenchHost) -> None:
    arrive(host, Piece(0, bytes(800), True))
    host.ipv4.remove_interface(host.interface)
    assert waiting(host) == 0
    assert host.drops == {"DEV_READY": 1}


def test_the_limit_follows_the_size_of_the_memory(make_bench: Callable[..., BenchHost]) -> None:
    env = make_bench(pages=256).env
    assert Fragments(env, FragmentParameters(), lambda *_: None).parameters.high_thresh == 256 * 4096 // 8
