"""The scoreboard: what is known of the segments that are out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ustack.transport.tcp.inflight import LOST, RETRANS, SACKED, Inflight, Segment

MSS = 100


def board(count: int, size: int = MSS) -> Inflight:
    """`count` segments of `size` bytes from 0 on; number n was sent at n seconds."""
    inflight = Inflight()
    for number in range(count):
        inflight.add(Segment(number * size, (number + 1) * size, float(number)))
    return inflight


def spans(inflight: Inflight, flag: int) -> list[tuple[int, int]]:
    """The joined spans with `flag`."""
    joined: list[tuple[int, int]] = []
    for segment in inflight.segments:
        if segment.flags & flag:
            if joined and joined[-1][1] == segment.seq:
                joined[-1] = joined[-1][0], segment.end
            else:
                joined.append((segment.seq, segment.end))
    return joined


def test_everything_sent_is_in_flight() -> None:
    inflight = board(5)
    assert inflight.outstanding() == inflight.in_flight() == 500
    assert Inflight().outstanding() == Inflight().in_flight() == 0


def test_an_ack_removes_what_it_covers_and_says_when_the_last_of_it_was_sent() -> None:
    inflight = board(5)
    assert inflight.on_ack(300) == 2.0
    assert inflight.outstanding() == 200


def test_an_ack_inside_a_segment_cuts_it_and_says_nothing_of_time() -> None:
    inflight = board(5)
    assert inflight.on_ack(50) == -1.0
    assert inflight.segments[0].seq == 50
    assert inflight.outstanding() == 450
    inflight.check()


def test_an_ack_of_a_segment_sent_twice_says_nothing_of_time() -> None:
    inflight = board(5)
    inflight.mark_head_lost(MSS)
    inflight.on_retransmit(0, 10.0)
    assert inflight.on_ack(500) == -1.0
    assert (inflight.lost, inflight.retrans) == (0, 0)


def test_what_is_sacked_is_no_longer_in_flight() -> None:
    inflight = board(5)
    assert inflight.on_sack(200, 400) == (200, 3.0)
    assert inflight.on_sack(200, 400) == (0, -1.0)
    assert inflight.in_flight() == 300
    assert spans(inflight, SACKED) == [(200, 400)]


def test_a_block_cuts_the_segments_at_its_edges() -> None:
    inflight = board(1, 1000)
    assert inflight.on_sack(250, 600) == (350, 0.0)
    assert spans(inflight, SACKED) == [(250, 600)]
    assert len(inflight.segments) == 3
    inflight.check()


def test_the_fin_stays_with_the_last_part() -> None:
    inflight = Inflight()
    inflight.add(Segment(0, 301, 0.0, fin=True))
    inflight.split(0, 100)
    assert [segment.fin for segment in inflight.segments] == [False, True]


@pytest.mark.parametrize(
    ("blocks", "lost"),
    [
        ([(100, 300)], []),
        ([(100, 301)], [(0, 100)]),
        ([(100, 200), (300, 400)], []),
        ([(100, 150), (200, 250), (300, 350)], [(0, 100)]),
        ([(300, 700)], [(0, 300)]),
        ([(100, 200), (400, 700)], [(0, 100), (200, 400)]),
    ],
    ids=str,
)
def test_what_enough_was_sacked_above_is_lost(blocks: list[tuple[int, int]], lost: list[tuple[int, int]]) -> None:
    """IsLost (RFC 6675, section 4): three separate blocks, or more than two segments' bytes."""
    inflight = board(10)
    for left, right in blocks:
        inflight.on_sack(left, right)
    assert inflight.mark_lost_by_sack(MSS) == bool(lost)
    assert spans(inflight, LOST) == lost
    inflight.check()


def test_what_is_lost_is_given_out_once() -> None:
    inflight = board(10)
    inflight.on_sack(300, 700)
    inflight.mark_lost_by_sack(MSS)
    for index in inflight.lost_segments():
        inflight.on_retransmit(index, 20.0)
    assert spans(inflight, RETRANS) == [(0, 300)]
    assert not list(inflight.lost_segments())
    assert inflight.in_flight() == 1000 - 400 - 300 + 300


def test_the_list_may_be_split_while_it_is_given_out() -> None:
    inflight = board(1, 1000)
    inflight.mark_all_lost(reneged=False)
    sent = []
    for index in inflight.lost_segments():
        if inflight.segments[index].end - inflight.segments[index].seq > 300:
            inflight.split(index, inflight.segments[index].seq + 300)
        sent.append(inflight.segments[index].seq)
        inflight.on_retransmit(index, 1.0)
        inflight.check()
    assert sent[0] == 0
    assert inflight.retrans <= inflight.lost == 1000


def test_a_timeout_loses_everything_that_is_not_sacked() -> None:
    inflight = board(5)
    inflight.on_sack(100, 200)
    inflight.mark_all_lost(reneged=False)
    assert spans(inflight, LOST) == [(0, 100), (200, 500)]
    assert inflight.in_flight() == 0
    inflight.mark_all_lost(reneged=True)
    assert spans(inflight, LOST) == [(0, 500)]
    inflight.check()


def test_without_sack_each_duplicate_ack_takes_a_segment_out_of_the_network() -> None:
    inflight = board(10)
    for count in range(1, 5):
        inflight.on_duplicate_ack(MSS)
        assert inflight.in_flight() == 1000 - count * MSS
    for _ in range(20):
        inflight.on_duplicate_ack(MSS)
    assert inflight.in_flight() == MSS, "the one that is missing has not left it"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sack", "ack", "lost", "timeout", "resend", "add"]), st.integers(0, 2000), st.integers(1, 700)
        )
    )
)
def test_the_counts_are_right_whatever_happens(history: list[tuple[str, int, int]]) -> None:
    inflight = Inflight()
    una = nxt = 0
    sacked: set[int] = set()
    for what, at, length in history:
        if what == "add":
            inflight.add(Segment(nxt, nxt + length, 0.0))
            nxt += length
        elif what == "sack":
            left, right = max(at, una), min(at + length, nxt)
            if left < right:
                newly, _ = inflight.on_sack(left, right)
                assert newly == len(set(range(left, right)) - sacked)
                sacked.update(range(left, right))
        elif what == "ack":
            una = max(una, min(at, nxt))
            inflight.on_ack(una)
            sacked -= set(range(una))
        elif what == "lost":
            inflight.mark_lost_by_sack(MSS)
            if length % 2:
                inflight.mark_head_lost(MSS)
        elif what == "timeout":
            inflight.mark_all_lost(reneged=False)
        else:
            for index in inflight.lost_segments():
                if length % 3 == 0:
                    break
                inflight.on_retransmit(index, 0.0)
        inflight.check()
        assert inflight.sacked == len(sacked)
        assert inflight.outstanding() == nxt - una
        assert 0 <= inflight.in_flight() <= nxt - una
