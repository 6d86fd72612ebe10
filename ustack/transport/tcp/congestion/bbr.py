"""BBR: a model of the path, from the highest delivery rate and the shortest round trip seen lately, sets window and pacing
rate; losses alone do not (Cardwell et al., "BBR: Congestion-Based Congestion Control", 2016; Linux tcp_bbr.c, version 1).

Left out is the detection of token-bucket policers (lt_bw), which later versions gave up.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, ClassVar, Final

from ustack.transport.tcp.congestion.base import CongestionControl
from ustack.transport.tcp.phase import LOSS, OPEN, RECOVERY, Phase

if TYPE_CHECKING:
    from ustack.transport.tcp.sample import AckSample

HIGH_GAIN: Final = 2.885
"""2/ln 2: the smallest gain that doubles the rate in each round."""

DRAIN_GAIN: Final = 1 / HIGH_GAIN

CWND_GAIN: Final = 2.0
"""Bandwidth-delay products that may be in flight, since ACKs are delayed and put together."""

# The type is spelled out because mypyc takes a fixed tuple of floats for one that was never set.
CYCLE: Final[tuple[float, ...]] = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Pacing gains of the phases of PROBE_BW, one round trip each: probe, drain what that has queued, cruise."""

PACING_MARGIN: Final = 0.99
"""Part of the estimated bandwidth that is used, so that no queue builds up."""

BW_ROUNDS: Final = 10
"""Round trips for which a bandwidth sample is remembered."""

MIN_RTT_WINDOW: Final = 10.0
"""Seconds for which the shortest round trip is remembered."""

PROBE_RTT_TIME: Final = 0.2
"""Seconds, at least, with hardly anything in flight, to see the shortest round trip."""

CWND_MIN: Final = 4
"""Segments in flight at least."""

FULL_BW_GROWTH: Final = 1.25
FULL_BW_ROUNDS: Final = 3
"""The pipe is full when bandwidth has grown by less than this factor for so many rounds."""

EXTRA_ACKED_ROUNDS: Final = 5
EXTRA_ACKED_MAX: Final = 0.1
"""Round trips (once or twice) for which aggregation of ACKs is remembered, and the seconds of bandwidth it is at most."""

QUANTUM: Final = 0.001
QUANTUM_MAX: Final = 65536
"""Seconds, and bytes at most, of one transmission."""

STARTUP: Final = 0
DRAIN: Final = 1
PROBE_BW: Final = 2
PROBE_RTT: Final = 3

NEVER: Final = -1.0


class Bbr(CongestionControl):
    """Bandwidth in bytes per second. A round is a round trip, counted by what has been delivered when it began."""

    __slots__ = (
        "_bw_samples",
        "_conserve",
        "_cycle",
        "_cycle_at",
        "_epoch_acked",
        "_epoch_at",
        "_extra",
        "_extra_rounds",
        "_full_bw",
        "_full_bw_rounds",
        "_idle_restart",
        "_initial",
        "_next_round",
        "_phase",
        "_probe_rtt_done",
        "_probe_rtt_round_done",
        "_round_start",
        "_rounds",
        "bw",
        "cwnd_gain",
        "full",
        "min_rtt",
        "min_rtt_at",
        "mode",
        "pacing_gain",
    )

    name: ClassVar[str] = "bbr"

    def __init__(self, mss: int, initial_window: int) -> None:
        super().__init__(mss, initial_window)
        self.model_based = True
        self.paced = True
        self.mode = STARTUP
        self.pacing_gain = HIGH_GAIN
        self.cwnd_gain = HIGH_GAIN
        self.bw = 0.0
        self.full = False
        self.min_rtt = inf
        self.min_rtt_at = NEVER
        self._initial = initial_window
        self._bw_samples: list[tuple[int, float]] = []  # (round, bandwidth), the highest first, later ones lower
        self._rounds = 0
        self._next_round = 0
        self._round_start = False
        self._full_bw = 0.0
        self._full_bw_rounds = 0
        self._cycle = 0
        self._cycle_at = 0.0
        self._conserve = False
        self._phase: Phase = OPEN
        self._idle_restart = False
        self._probe_rtt_done = NEVER
        self._probe_rtt_round_done = False
        self._extra = [0, 0]
        self._extra_rounds = 0
        self._epoch_at = 0.0
        self._epoch_acked = 0

    # -- events --

    def on_ack(self, sample: AckSample) -> None:
        """Bring the model up to date, then window and rate."""
        self._update_bandwidth(sample)
        self._update_aggregation(sample)
        if self.mode == PROBE_BW and self._phase_is_over(sample):
            self._advance_cycle(sample.now)
        self._check_full(sample)
        self._check_drained(sample)
        self._update_min_rtt(sample)
        self._set_gains()
        self._set_rate(sample)
        self._set_window(sample)

    def on_congestion(self, flight_size: int) -> None:
        """Only remember the window: it comes back when the recovery is over (bbr_ssthresh)."""
        self._save_window()

    def on_timeout(self) -> None:
        """Look at the bandwidth afresh."""
        self._phase = LOSS
        self._full_bw = 0.0
        self._round_start = True

    def on_undo(self) -> None:
        """The pipe was perhaps not full after all; the window is restored when the recovery ends."""
        self._full_bw = 0.0
        self._full_bw_rounds = 0

    def on_idle(self, window: int, threshold: int) -> None:
        """The model is still the best guess: pacing makes a restart harmless."""

    def on_restart(self, now: float, idle: float, *, app_limited: bool) -> None:
        """After idling for want of data, go on at the estimated rate, and do not blame the path for the pause."""
        if not app_limited:
            return
        self._idle_restart = True
        self._epoch_at = now
        self._epoch_acked = 0
        if self.mode == PROBE_BW and self.bw:
            self.pacing_rate = self.bw * PACING_MARGIN
        elif self.mode == PROBE_RTT:
            self._check_probe_rtt_done(now)

    # -- the model --

    def _update_bandwidth(self, sample: AckSample) -> None:
        self._round_start = False
        if sample.interval <= 0:
            return
        if sample.prior_delivered >= self._next_round:
            self._next_round = sample.total
            self._rounds += 1
            self._round_start = True
            self._conserve = False
        bw = sample.rate_delivered / sample.interval
        if sample.app_limited and bw < self.bw:
            return
        samples = self._bw_samples
        while samples and samples[-1][1] <= bw:
            samples.pop()
        samples.append((self._rounds, bw))
        while samples[0][0] < self._rounds - BW_ROUNDS:
            samples.pop(0)
        self.bw = samples[0][1]

    def _update_aggregation(self, sample: AckSample) -> None:
        """How much more than the bandwidth allows is acknowledged at once (bbr_update_ack_aggregation)."""
        if not sample.delivered or sample.interval <= 0:
            return
        if self._round_start:
            self._extra_rounds += 1
            if self._extra_rounds >= EXTRA_ACKED_ROUNDS:
                self._extra_rounds = 0
                self._extra = [0, self._extra[0]]
        expected = int(self.bw * (sample.now - self._epoch_at))
        if self._epoch_acked <= expected:
            self._epoch_acked = 0
            self._epoch_at = sample.now
            expected = 0
        self._epoch_acked += sample.delivered
        extra = min(self._epoch_acked - expected, self.cwnd)
        if extra > self._extra[0]:
            self._extra[0] = extra

    def _phase_is_over(self, sample: AckSample) -> bool:
        long_enough = sample.now - self._cycle_at > self.min_rtt
        gain = self.pacing_gain
        if gain == 1.0:
            return long_enough
        if gain > 1.0:
            return long_enough and (sample.lost > 0 or sample.prior_in_flight >= self._inflight(gain))
        return long_enough or sample.prior_in_flight <= self._inflight(1.0)

    def _advance_cycle(self, now: float) -> None:
        self._cycle = (self._cycle + 1) % len(CYCLE)
        self._cycle_at = now

    def _check_full(self, sample: AckSample) -> None:
        """Whether STARTUP has found the bandwidth: it grows no more."""
        if self.full or not self._round_start or sample.app_limited:
            return
        if self.bw >= self._full_bw * FULL_BW_GROWTH:
            self._full_bw = self.bw
            self._full_bw_rounds = 0
            return
        self._full_bw_rounds += 1
        self.full = self._full_bw_rounds >= FULL_BW_ROUNDS

    def _check_drained(self, sample: AckSample) -> None:
        if self.mode == STARTUP and self.full:
            self.mode = DRAIN
            self.ssthresh = self._inflight(1.0)
        if self.mode == DRAIN and sample.in_flight <= self._inflight(1.0):
            self._probe_bandwidth(sample.now)

    def _probe_bandwidth(self, now: float) -> None:
        """Enter PROBE_BW in any phase but the one that drains, so that flows do not probe together."""
        self.mode = PROBE_BW
        self._cycle = len(CYCLE) - 1 - int(now * 1e6) % (len(CYCLE) - 1)
        self._advance_cycle(now)

    def _update_min_rtt(self, sample: AckSample) -> None:
        now = sample.now
        expired = self.min_rtt_at >= 0 and now > self.min_rtt_at + MIN_RTT_WINDOW
        if sample.rtt >= 0 and (sample.rtt < self.min_rtt or expired):
            self.min_rtt = sample.rtt
            self.min_rtt_at = now
        if expired and not self._idle_restart and self.mode != PROBE_RTT:
            self.mode = PROBE_RTT
            self._save_window()
            self._probe_rtt_done = NEVER
        if self.mode == PROBE_RTT:
            sample.starved = True  # what is sent now says nothing about the bandwidth
            if self._probe_rtt_done < 0:
                if sample.in_flight <= CWND_MIN * self.mss:
                    self._probe_rtt_done = now + PROBE_RTT_TIME
                    self._probe_rtt_round_done = False
                    self._next_round = sample.total
            else:
                if self._round_start:
                    self._probe_rtt_round_done = True
                if self._probe_rtt_round_done:
                    self._check_probe_rtt_done(now)
        if sample.delivered:
            self._idle_restart = False

    def _check_probe_rtt_done(self, now: float) -> None:
        if 0 <= self._probe_rtt_done < now:
            self.min_rtt_at = now
            self.cwnd = max(self.cwnd, self.prior_cwnd)
            if self.full:
                self._probe_bandwidth(now)
            else:
                self.mode = STARTUP

    # -- what follows from it --

    def _set_gains(self) -> None:
        mode = self.mode
        if mode == PROBE_BW:
            self.pacing_gain = CYCLE[self._cycle]
            self.cwnd_gain = CWND_GAIN
        elif mode == STARTUP:
            self.pacing_gain = self.cwnd_gain = HIGH_GAIN
        elif mode == DRAIN:
            self.pacing_gain = DRAIN_GAIN
            self.cwnd_gain = HIGH_GAIN
        else:
            self.pacing_gain = self.cwnd_gain = 1.0

    def _set_rate(self, sample: AckSample) -> None:
        if not self.bw:
            if sample.srtt:
                self.pacing_rate = HIGH_GAIN * self.cwnd / max(sample.srtt, 1e-6) * PACING_MARGIN
            return
        rate = self.bw * self.pacing_gain * PACING_MARGIN
        if self.full or rate > self.pacing_rate:
            self.pacing_rate = rate

    def _bdp(self, gain: float) -> int:
        if self.min_rtt == inf:
            return self._initial * self.mss
        return int(self.bw * self.min_rtt * gain) + 1

    def _inflight(self, gain: float) -> int:
        """Bytes that `gain` bandwidth-delay products are, with room for transmissions that are being put together at both
        ends.
        """
        window = self._bdp(gain) + 3 * max(min(int(self.pacing_rate * QUANTUM), QUANTUM_MAX), 2 * self.mss)
        if self.mode == PROBE_BW and not self._cycle:
            window += 2 * self.mss
        return window

    def _set_window(self, sample: AckSample) -> None:
        acked = sample.delivered
        mss = self.mss
        if acked and not self._recovers(sample):
            target = self._inflight(self.cwnd_gain)
            if self.full:
                target += min(max(self._extra), int(self.bw * EXTRA_ACKED_MAX))
                self.cwnd = min(self.cwnd + acked, target)
            elif self.cwnd < target or sample.total < self._initial * mss:
                self.cwnd += acked
            self.cwnd = max(self.cwnd, CWND_MIN * mss)
        if self.mode == PROBE_RTT:
            self.cwnd = min(self.cwnd, CWND_MIN * mss)

    def _recovers(self, sample: AckSample) -> bool:
        """In the first round of a recovery what is sent is what has arrived; afterwards the window is what it was. Returns
        whether that has set the window (bbr_set_cwnd_to_recover_or_restore).
        """
        phase = sample.phase
        before = self._phase
        if sample.lost:
            self.cwnd = max(self.cwnd - sample.lost, self.mss)
        if phase is RECOVERY and before is not RECOVERY:
            self._conserve = True
            self._next_round = sample.total
            self.cwnd = sample.in_flight + sample.delivered
        elif before >= RECOVERY and phase < RECOVERY:
            self.cwnd = max(self.cwnd, self.prior_cwnd)
            self._conserve = False
        self._phase = phase
        if self._conserve:
            self.cwnd = max(self.cwnd, sample.in_flight + sample.delivered)
        return self._conserve

    def _save_window(self) -> None:
        if self._phase < RECOVERY and self.mode != PROBE_RTT:
            self.prior_cwnd = self.cwnd
        else:
            self.prior_cwnd = max(self.prior_cwnd, self.cwnd)
