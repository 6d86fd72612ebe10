"""HyStart++: leave slow start when the round trip grows, before packets are lost; come back if that was an error (RFC 9406)."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ustack.transport.tcp.sample import AckSample

MIN_RTT_THRESH: Final = 0.004
MAX_RTT_THRESH: Final = 0.016
MIN_RTT_DIVISOR: Final = 8
"""Bounds in seconds of how much the round trip must grow, and the part of it that it is otherwise (section 4.3)."""

N_RTT_SAMPLE: Final = 8
"""Samples in a round before it says anything."""

CSS_GROWTH_DIVISOR: Final = 4
"""How much slower conservative slow start grows."""

CSS_ROUNDS: Final = 5
"""Rounds of conservative slow start before congestion avoidance."""


class HyStart:
    """Slow start's look at the round trips of each round. `divisor`: growth is to be divided by it now."""

    __slots__ = ("_baseline", "_css_rounds", "_last_min", "_round_end", "_round_min", "_samples", "divisor")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Slow start begins."""
        self.divisor = 1
        self._round_end = -1
        self._round_min = inf
        self._last_min = inf
        self._samples = 0
        self._baseline = inf
        self._css_rounds = 0

    def on_ack(self, sample: AckSample) -> bool:
        """Take an ACK's round trip. Returns True when slow start is over (section 4.2)."""
        if sample.una > self._round_end:
            done = self._round_end >= 0 and self.divisor > 1
            self._last_min = self._round_min
            self._round_min = inf
            self._samples = 0
            self._round_end = sample.nxt
            if done:
                self._css_rounds += 1
                if self._css_rounds >= CSS_ROUNDS:
                    return True
        if sample.rtt >= 0:
            self._round_min = min(self._round_min, sample.rtt)
            self._samples += 1
        if self._samples < N_RTT_SAMPLE:
            return False
        if self.divisor == 1:
            if self._last_min < inf:
                threshold = max(MIN_RTT_THRESH, min(self._last_min / MIN_RTT_DIVISOR, MAX_RTT_THRESH))
                if self._round_min >= self._last_min + threshold:
                    self._baseline = self._round_min
                    self.divisor = CSS_GROWTH_DIVISOR
                    self._css_rounds = 0
        elif self._round_min < self._baseline:
            self._baseline = inf
            self.divisor = 1
        return False
