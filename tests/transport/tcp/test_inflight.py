"""The scoreboard: what is known of the segments that are out."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ustack.transport.tcp.inflight import LOST, RETRANS, SACKED, Inflight, Segment
from ustack.transport.tcp.sample import AckSample

MSS = 100


def board(count: int, size: int = MSS) -> Inflight:
    """`count` segments of `size` bytes from 0 on; number n was sent at n seconds."""
    inflight = Inflight()
    for number in range(count):
        inflight.add(Segment(number * size, (number + 1) * size, float(number)))
    return inflight


def acked(inflight: Inflight, una: int) -> AckSample:
    """Acknowledge everything before `una`."""
    sample = AckSample()
    inflight.on_ack(una, sample)
    return sample


def sacked(inflight: Inflight, left: int, right: int) -> AckSample:
    """Acknowledge `left .. right` selectively."""
    sample = AckSample()
    inflight.on_sack(left, right, sample, 0)
    return sample


def resend_all(inflight: Inflight, now: float) -> None:
    """Send again what is lost."""
    while (index := inflight.next_lost()) >= 0:
        inflight.on_retransmit(index, now)


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
    sample = acked(inflight, 300)
    assert (sample.rtt_sent_at, sample.acked, sample.delivered) == (2.0, 300, 300)
    assert inflight.outstanding() == 200


def test_an_ack_inside_a_segment_cuts_it() -> None:
    inflight = board(5)
    sample = acked(inflight, 50)
    assert (sample.rtt_sent_at, sample.delivered) == (0.0, 50)
    assert inflight.segments[0].seq == 50
    assert inflight.outstanding() == 450
    inflight.check()


def test_an_ack_of_a_segment_sent_twice_says_nothing_of_time() -> None:
    inflight = board(5)
    inflight.mark_head_lost(MSS)
    inflight.on_retransmit(0, 10.0)
    assert acked(inflight, 500).rtt_sent_at == -1.0
    assert (inflight.lost, inflight.retrans) == (0, 0)


def test_what_is_sacked_is_no_longer_in_flight() -> None:
    inflight = board(5)
    sample = sacked(inflight, 200, 400)
    assert (sample.sacked, sample.rtt_sent_at, sample.rack_sent_at, sample.rack_end) == (200, 3.0, 3.0, 400)
    assert sacked(inflight, 200, 400).sacked == 0
    assert inflight.in_flight() == 300
    assert spans(inflight, SACKED) == [(200, 400)]


def test_a_block_cuts_the_segments_at_its_edges() -> None:
    inflight = board(1, 1000)
    assert sacked(inflight, 250, 600).delivered == 350
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
        sacked(inflight, left, right)
    assert inflight.mark_lost_by_sack(MSS) == bool(lost)
    assert spans(inflight, LOST) == lost
    inflight.check()


def test_what_is_lost_is_given_out_once() -> None:
    inflight = board(10)
    sacked(inflight, 300, 700)
    inflight.mark_lost_by_sack(MSS)
    resend_all(inflight, 20.0)
    assert spans(inflight, RETRANS) == [(0, 300)]
    assert inflight.next_lost() == -1
    assert inflight.in_flight() == 1000 - 400 - 300 + 300


def test_what_is_lost_may_be_cut_while_it_is_given_out() -> None:
    inflight = board(1, 1000)
    inflight.mark_all_lost(inf)
    sent = []
    while (index := inflight.next_lost()) >= 0:
        if inflight.segments[index].end - inflight.segments[index].seq > 300:
            inflight.split(index, inflight.segments[index].seq + 300)
        sent.append(inflight.segments[index].seq)
        inflight.on_retransmit(index, 1.0)
        inflight.check()
    assert sent == [0, 300, 600, 900]
    assert inflight.retrans == inflight.lost == 1000


def test_a_timeout_loses_everything_that_is_not_sacked() -> None:
    inflight = board(5)
    sacked(inflight, 100, 200)
    inflight.mark_all_lost(inf)
    assert spans(inflight, LOST) == [(0, 100), (200, 500)]
    assert inflight.in_flight() == 0
    inflight.on_reneged()
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


def test_a_timeout_spares_what_was_sent_just_now_but_for_the_first() -> None:
    """RFC 8985, section 6.3."""
    inflight = board(5)
    inflight.mark_all_lost(2.0)
    assert spans(inflight, LOST) == [(0, 300)]
    inflight = board(5)
    inflight.mark_all_lost(-1.0)
    assert spans(inflight, LOST) == [(0, 100)]
    inflight.check()


def test_what_was_not_lost_after_all_is_in_flight_again() -> None:
    inflight = board(5)
    sacked(inflight, 300, 400)
    inflight.mark_all_lost(inf)
    inflight.on_retransmit(inflight.next_lost(), 9.0)
    inflight.forget_losses()
    inflight.check()
    assert (inflight.lost, inflight.in_flight()) == (0, 500)


class Model:
    """The scoreboard byte by byte: what RFC 2018 and the flags of Linux say, with nothing clever."""

    def __init__(self) -> None:
        self.sacked: set[int] = set()
        self.lost: set[int] = set()
        self.retrans: set[int] = set()
        self.una = self.nxt = 0

    def in_flight(self) -> int:
        return self.nxt - self.una - len(self.sacked) - len(self.lost) + len(self.retrans)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sack", "ack", "lost", "late", "timeout", "resend", "probe", "undo", "renege", "add"]),
            st.integers(0, 2000),
            st.integers(1, 700),
        )
    )
)
def test_the_counts_are_right_whatever_happens(history: list[tuple[str, int, int]]) -> None:
    inflight = Inflight()
    model = Model()
    now = 0.0
    for what, at, length in history:
        now += 1.0
        everything = set(range(model.una, model.nxt))
        if what == "add":
            inflight.add(Segment(model.nxt, model.nxt + length, now))
            model.nxt += length
        elif what == "sack":
            left, right = max(at, model.una), min(at + length, model.nxt)
            if left < right:
                block = set(range(left, right))
                assert sacked(inflight, left, right).delivered == len(block - model.sacked)
                model.sacked |= block
                model.lost -= block
                model.retrans -= block
        elif what == "ack":
            una = max(model.una, min(at, model.nxt))
            fresh = len(set(range(model.una, una)) - model.sacked)
            sample = acked(inflight, una)
            assert (sample.acked, sample.delivered) == (una - model.una, fresh)
            model.una = una
            for each in (model.sacked, model.lost, model.retrans):
                each -= set(range(una))
        elif what in ("lost", "late"):
            if what == "late" and inflight.oldest is not None:
                inflight.mark_lost(inflight.oldest)
            elif what == "lost":
                inflight.mark_lost_by_sack(MSS)
            marked = bytes_with(inflight, LOST)
            assert marked >= model.lost
            assert not marked & model.sacked
            model.lost = marked
            model.retrans = model.retrans & bytes_with(inflight, RETRANS)
        elif what == "timeout":
            inflight.mark_all_lost(inf)
            model.lost = everything - model.sacked
            model.retrans.clear()
        elif what == "resend":
            resend_all(inflight, now)
            model.retrans |= model.lost
        elif what == "probe":
            if inflight.segments and not inflight.segments[-1].flags & SACKED:
                inflight.on_retransmit(len(inflight.segments) - 1, now)
                model.retrans |= set(range(inflight.segments[-1].seq, inflight.segments[-1].end))
        elif what == "undo":
            inflight.forget_losses()
            model.lost.clear()
        elif model.sacked:
            inflight.on_reneged()
            model.lost |= model.sacked
            model.sacked.clear()
        inflight.check()
        assert bytes_with(inflight, SACKED) == model.sacked
        assert bytes_with(inflight, LOST) == model.lost
        assert bytes_with(inflight, RETRANS) == model.retrans
        assert inflight.in_flight() == model.in_flight()
        assert inflight.outstanding() == model.nxt - model.una


def bytes_with(inflight: Inflight, flag: int) -> set[int]:
    """Every byte that has `flag`."""
    return {byte for segment in inflight.segments if segment.flags & flag for byte in range(segment.seq, segment.end)}
