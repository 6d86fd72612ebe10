"""What a sender is doing about losses (tcp_ca_state in Linux)."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Phase(IntEnum):
    """Numbered as in Linux include/uapi/linux/tcp.h, which TCP_INFO uses."""

    OPEN = 0
    """Nothing is amiss."""
    DISORDER = 1
    """Something arrived out of order, or twice: perhaps a loss, perhaps not."""
    CWR = 2
    """The window is being reduced without a retransmission: because of ECN, or of a loss that the probe repaired."""
    RECOVERY = 3
    """Fast recovery: a loss was found while ACKs still come."""
    LOSS = 4
    """The retransmission timer expired: what is not sacked is sent again, in slow start."""


# A member of an enum costs ten times as much to name as a global does.
OPEN: Final = Phase.OPEN
DISORDER: Final = Phase.DISORDER
CWR: Final = Phase.CWR
RECOVERY: Final = Phase.RECOVERY
LOSS: Final = Phase.LOSS
