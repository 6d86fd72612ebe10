"""Congestion controls by themselves: CUBIC (RFC 9438), HyStart++ (RFC 9406), BBR over a wire whose rate and delay are known."""

from __future__ import annotations

import pytest

from tests.sim.network import Network, Talker
from ustack.link.simwire import Impairments
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.congestion.bbr import PROBE_BW, Bbr
from ustack.transport.tcp.congestion.cubic import ALPHA, BETA, C, Cubic
from ustack.transport.tcp.congestion.hystart import CSS_GROWTH_DIVISOR, CSS_ROUNDS, N_RTT_SAMPLE, HyStart
from ustack.transport.tcp.sample import AckSample

MSS = 1000
RTT = 0.1


def drive(cc: Cubic, seconds: float, start: float = 0.0, rtt: float = RTT) -> None:
    """Acknowledge a full window in each round trip, a segment at a time, for so long from `start` on."""
    sample = AckSample()
    now = start
    while now < start + seconds:
        now += rtt / (cc.cwnd // MSS)
        sample.begin(now, rtt, 0, 0, cc.cwnd)
        sample.srtt = rtt
        sample.delivered = sample.acked = MSS
        cc.on_ack(sample)


def after_a_loss(segments: int) -> Cubic:
    """CUBIC whose window was `segments` when something was lost."""
    cc = Cubic(MSS, 10)
    cc.cwnd = segments * MSS
    cc.on_congestion(cc.cwnd)
    cc.cwnd = cc.ssthresh
    return cc


def test_rfc9438_4_6_a_loss_leaves_seven_tenths() -> None:
    assert after_a_loss(100).cwnd == 70 * MSS


@pytest.mark.parametrize("segments", [200, 1000])
def test_rfc9438_4_2_the_window_is_back_after_k_and_flat_around_it(segments: int) -> None:
    """Section 4.2, equations 1 and 2. So large that Reno's window, which is the least, is smaller all the while."""
    cc = after_a_loss(segments)
    k = (segments * (1 - BETA) / C) ** (1 / 3)
    drive(cc, k / 2)
    half = cc.cwnd / MSS
    assert half == pytest.approx(segments - C * (k / 2) ** 3, rel=0.03)
    drive(cc, k / 2, start=k / 2)
    assert cc.cwnd / MSS == pytest.approx(segments, rel=0.02)


def test_rfc9438_4_4_beyond_it_the_window_grows_faster_and_faster() -> None:
    cc = after_a_loss(200)
    k = (200 * (1 - BETA) / C) ** (1 / 3)
    drive(cc, k + 2)
    after_two = cc.cwnd
    drive(cc, 2, start=k + 2)
    assert cc.cwnd - after_two > 3 * (after_two - 200 * MSS) > 0


def test_rfc9438_4_3_a_small_window_grows_as_renos_would() -> None:
    """ALPHA segments in each round trip until the window is what it was, then one."""
    cc = after_a_loss(10)
    drive(cc, 1.0)
    assert cc.cwnd / MSS == pytest.approx(7 + ALPHA * 1.0 / RTT, abs=2)


def test_rfc9438_4_7_a_loss_below_the_last_maximum_lowers_the_next() -> None:
    cc = after_a_loss(100)
    cc.on_congestion(cc.cwnd)
    assert cc._w_max == pytest.approx(70 * (1 + BETA) / 2)


def test_rfc9438_4_9_a_loss_that_was_none_is_forgotten() -> None:
    cc = after_a_loss(100)
    cc.on_undo()
    assert cc.cwnd == 100 * MSS
    assert cc._w_max == 0


class Rounds:
    """Slow start as HyStart++ sees it: rounds of round trips."""

    def __init__(self) -> None:
        self.hystart = HyStart()
        self.nxt = 0

    def round(self, rtt: float) -> bool:
        """A round of so many samples as it takes; whether slow start is over."""
        sample = AckSample()
        una = self.nxt
        self.nxt += 10_000
        over = False
        for count in range(N_RTT_SAMPLE + 1):
            sample.una = una + count + 1
            sample.nxt = self.nxt
            sample.rtt = rtt
            over |= self.hystart.on_ack(sample)
        return over


def test_rfc9406_4_2_a_growing_round_trip_slows_slow_start_down_and_then_ends_it() -> None:
    rounds = Rounds()
    assert not rounds.round(0.1)
    assert not rounds.round(0.1)
    assert rounds.hystart.divisor == 1
    rounds.round(0.12)
    assert rounds.hystart.divisor == CSS_GROWTH_DIVISOR
    assert [rounds.round(0.12) for _ in range(CSS_ROUNDS)].index(True) >= CSS_ROUNDS - 2


def test_rfc9406_4_2_a_round_trip_that_is_short_again_resumes_it() -> None:
    rounds = Rounds()
    rounds.round(0.1)
    rounds.round(0.12)
    assert rounds.hystart.divisor == CSS_GROWTH_DIVISOR
    rounds.round(0.1)
    assert rounds.hystart.divisor == 1


def test_rfc9406_4_3_a_little_more_is_not_enough() -> None:
    rounds = Rounds()
    rounds.round(0.1)
    rounds.round(0.104)
    assert rounds.hystart.divisor == 1


@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_bbr_finds_the_rate_and_the_delay_of_the_path_and_losses_do_not_keep_it_from_using_them(loss: float) -> None:
    network = Network(
        1,
        Impairments(delay=0.02, rate=10_000_000, queue=100_000, loss=loss),
        tcp=TcpConfig(congestion="bbr"),
        features=0,
    )
    talkers: list[Talker] = []
    network.listen(on_accept=lambda conn: talkers.append(Talker(conn, b"")))
    client = Talker(network.connect(), bytes(5_000_000))
    network.world.run_until(lambda: bool(talkers) and len(talkers[0].incoming) >= 2_000_000, 20)

    cc = client.conn.cc
    assert isinstance(cc, Bbr)
    assert cc.mode == PROBE_BW
    assert cc.bw == pytest.approx(1_250_000 * 1460 / 1526, rel=0.1)
    assert 0.04 <= cc.min_rtt < 0.05
    assert len(talkers[0].incoming) / network.world.now > 0.75 * 1_250_000
    network.close()
