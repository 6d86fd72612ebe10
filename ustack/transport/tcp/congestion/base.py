"""What a congestion control is asked and told. Everything is in bytes; whoever calls keeps the scoreboard and the clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from sys import maxsize
from typing import ClassVar


class CongestionControl(ABC):
    """The window `cwnd` of one connection, in bytes. `mss` is the sender's maximum segment size and may change with the path
    MTU.
    """

    __slots__ = ("cwnd", "mss", "ssthresh")

    name: ClassVar[str]

    def __init__(self, mss: int, initial_window: int) -> None:
        self.mss = mss
        self.cwnd = initial_window * mss
        self.ssthresh = maxsize

    @abstractmethod
    def on_ack(self, acked: int) -> None:
        """`acked` bytes were newly acknowledged while the window was in use and no fast recovery is under way."""

    @abstractmethod
    def on_loss(self, in_flight: int) -> None:
        """A loss was found with `in_flight` bytes outstanding, the first in its window: fast recovery begins."""

    @abstractmethod
    def on_timeout(self, in_flight: int) -> None:
        """The retransmission timer expired with `in_flight` bytes outstanding; also after idling for an RTO."""

    def on_recovered(self) -> None:
        """Everything outstanding when the loss was found has been acknowledged."""
        self.cwnd = min(self.cwnd, max(self.ssthresh, 2 * self.mss))
