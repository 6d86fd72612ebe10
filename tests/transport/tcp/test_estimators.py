"""Numbers: round trips, congestion windows, initial sequence numbers, and the stack's timers."""

from __future__ import annotations

from functools import partial
from sys import maxsize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ustack.timers import NEVER, Timer, Timers
from ustack.transport.tcp.arriving import unwrap
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.congestion.newreno import NewReno
from ustack.transport.tcp.isn import IsnGenerator
from ustack.transport.tcp.rtt import RttEstimator
from ustack.transport.tcp.sample import AckSample

# -- RTT (RFC 6298) --


def test_the_first_timeout_is_a_second() -> None:
    """Section 2.1."""
    assert RttEstimator(TcpConfig()).rto == 1.0


def test_the_first_sample_sets_srtt_and_half_of_it_as_variation() -> None:
    """Section 2.2."""
    rtt = RttEstimator(TcpConfig())
    rtt.on_sample(0.4)
    assert (rtt.srtt, rtt.rttvar) == (0.4, 0.2)
    assert rtt.rto == pytest.approx(0.4 + 4 * 0.2)


def test_later_samples_are_smoothed() -> None:
    """Section 2.3, with the old SRTT in the variation."""
    rtt = RttEstimator(TcpConfig())
    rtt.on_sample(0.4)
    rtt.on_sample(0.8)
    assert rtt.rttvar == pytest.approx(0.75 * 0.2 + 0.25 * 0.4)
    assert rtt.srtt == pytest.approx(0.875 * 0.4 + 0.125 * 0.8)
    assert (rtt.minimum, rtt.latest) == (0.4, 0.8)


def test_a_steady_round_trip_does_not_bring_the_timeout_onto_itself() -> None:
    rtt = RttEstimator(TcpConfig())
    for _ in range(200):
        rtt.on_sample(0.1)
    assert rtt.rto == pytest.approx(0.1 + 0.2)


def test_the_timeout_doubles_up_to_its_maximum_until_a_sample_comes() -> None:
    """Sections 5.5 and 5.7."""
    rtt = RttEstimator(TcpConfig())
    rtt.on_sample(0.1)
    first = rtt.rto
    rtt.backoff()
    assert rtt.rto == 2 * first
    rtt.backoff()
    assert rtt.rto == 4 * first
    for _ in range(50):
        rtt.backoff()
    assert rtt.rto == 120.0
    rtt.on_sample(0.1)
    assert rtt.rto <= first


@given(st.lists(st.floats(0, 1000)))
def test_the_timeout_stays_in_its_bounds(samples: list[float]) -> None:
    rtt = RttEstimator(TcpConfig())
    for sample in samples:
        rtt.on_sample(sample)
        assert 0.2 <= rtt.rto <= 120.0
        assert rtt.srtt > 0


# -- NewReno (RFC 5681) --


def delivered(size: int) -> AckSample:
    """An ACK of `size` bytes."""
    sample = AckSample()
    sample.delivered = size
    return sample


def test_slow_start_grows_by_what_is_acknowledged() -> None:
    reno = NewReno(1000, 10)
    assert (reno.cwnd, reno.ssthresh) == (10_000, maxsize)
    reno.on_ack(delivered(4000))
    assert reno.cwnd == 14_000


def test_congestion_avoidance_grows_by_a_segment_each_round_trip() -> None:
    reno = NewReno(1000, 10)
    reno.ssthresh = 10_000
    for _ in range(10):
        reno.on_ack(delivered(1000))
    assert reno.cwnd == 11_000
    for _ in range(11):
        reno.on_ack(delivered(1000))
    assert reno.cwnd == 12_000


def test_slow_start_ends_at_the_threshold_and_the_rest_counts_for_avoidance() -> None:
    reno = NewReno(1000, 10)
    reno.ssthresh = 10_500
    reno.on_ack(delivered(1000))
    assert reno.cwnd == 10_500


def test_a_loss_halves_what_was_in_flight() -> None:
    """Equation 4."""
    reno = NewReno(1000, 10)
    reno.on_congestion(8000)
    assert reno.ssthresh == 4000
    reno.on_congestion(1000)
    assert reno.ssthresh == 2000


def test_after_a_timeout_only_what_was_sent_since_counts() -> None:
    """RFC 3465, section 2.3: a cumulative ACK tells of more than the one segment that left."""
    reno = NewReno(1000, 1)
    sample = delivered(9000)
    sample.after_timeout = True
    sample.fresh = 1000
    reno.on_ack(sample)
    assert reno.cwnd == 2000


# -- initial sequence numbers (RFC 6528) --


def test_the_number_of_a_connection_counts_up_every_4_microseconds() -> None:
    isn = IsnGenerator(bytes(16))
    key = b"client server ports"
    assert (isn.isn(key, 101.0) - isn.isn(key, 100.0)) % (1 << 32) == 250_000
    assert (isn.isn(key, 20_000.0) - isn.isn(key, 10_000.0)) % (1 << 32) == 2_500_000_000


def test_numbers_of_different_connections_and_secrets_have_nothing_to_do_with_each_other() -> None:
    numbers = {IsnGenerator(bytes([secret]) * 16).isn(bytes([key]), 0.0) for secret in range(20) for key in range(20)}
    assert len(numbers) == 400
    isn = IsnGenerator(bytes(16))
    assert isn.timestamp_offset(b"key") != isn.isn(b"key", 0.0)


@given(st.integers(0, 1 << 40), st.integers(-(1 << 31), (1 << 31) - 1))
def test_numbers_are_unwrapped_next_to_what_is_known(near: int, distance: int) -> None:
    assert unwrap((near + distance) % (1 << 32), near) == near + distance


# -- timers --


def test_timers_fire_once_in_the_order_of_their_deadlines() -> None:
    timers = Timers()
    fired: list[str] = []
    for name, when in (("late", 3.0), ("early", 1.0), ("same", 3.0)):
        timers.set(Timer(partial(fired.append, name)), when)
    timers.run(0.5)
    assert fired == []
    timers.run(5.0)
    timers.run(6.0)
    assert fired == ["early", "late", "same"]
    assert timers.next_deadline() == NEVER


def test_a_timer_can_be_moved_both_ways_and_cancelled() -> None:
    timers = Timers()
    fired: list[float] = []
    timer = Timer(lambda: fired.append(timers.now))
    timers.set(timer, 10.0)
    timers.set(timer, 20.0)
    timers.run(15.0)
    assert fired == []
    timers.set(timer, 16.0)
    timers.run(17.0)
    assert fired == [17.0]
    timers.run(30.0)
    timers.set(timer, 31.0)
    timer.cancel()
    assert not timer.pending
    timers.run(40.0)
    assert fired == [17.0]


def test_a_timer_may_set_itself_again() -> None:
    timers = Timers()
    fired: list[float] = []

    def again() -> None:
        fired.append(timers.now)
        if len(fired) < 3:
            timers.set(timer, timers.now + 1)

    timer = Timer(again)
    timers.set(timer, 1.0)
    for now in range(1, 10):
        timers.run(float(now))
    assert fired == [1.0, 2.0, 3.0]


def test_the_clock_never_moves_back() -> None:
    timers = Timers(100.0)
    timers.run(50.0)
    assert timers.now == 100.0


def test_the_alarm_tells_of_a_deadline_before_all_others() -> None:
    timers = Timers()
    told: list[float] = []
    timers.alarm = told.append
    for when in (5.0, 7.0, 3.0):
        timers.set(Timer(lambda: None), when)
    assert told == [5.0, 3.0]


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(("set", "cancel", "run")), st.integers(0, 50))))
def test_timers_do_what_a_simple_list_would(history: list[tuple[int, str, int]]) -> None:
    timers = Timers()
    fired: list[int] = []
    each = [Timer(partial(fired.append, number)) for number in range(5)]
    expected: dict[int, float] = {}
    for number, what, value in history:
        if what == "set":
            timers.set(each[number], timers.now + value)
            expected[number] = timers.now + value
        elif what == "cancel":
            each[number].cancel()
            expected.pop(number, None)
        else:
            fired.clear()
            timers.run(timers.now + value)
            due = {key for key, when in expected.items() if when <= timers.now}
            assert sorted(fired) == sorted(due)
            for key in due:
                del expected[key]
        assert timers.next_deadline() <= min(expected.values(), default=NEVER)
