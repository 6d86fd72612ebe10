"""The states of a connection (RFC 9293, section 3.3.2) and what may follow what (figure 5, and RFC 9293 section 3.10 for the
resets).

LISTEN belongs to the listener and TIME-WAIT to `timewait`; both are here because other tools show them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class State(IntEnum):
    """Numbered as in Linux include/net/tcp_states.h, which `ss` and TCP_INFO use."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


# A member of an enum costs ten times as much to name as a global does, and these are named for every segment.
ESTABLISHED: Final = State.ESTABLISHED
SYN_SENT: Final = State.SYN_SENT
SYN_RECV: Final = State.SYN_RECV
CLOSE: Final = State.CLOSE
TIME_WAIT: Final = State.TIME_WAIT

FOLLOWERS: Final[dict[State, frozenset[State]]] = {
    State.CLOSE: frozenset({State.SYN_SENT, State.SYN_RECV, State.LISTEN}),
    State.LISTEN: frozenset({State.CLOSE}),
    State.SYN_SENT: frozenset({State.ESTABLISHED, State.SYN_RECV, State.CLOSE}),
    State.SYN_RECV: frozenset({State.ESTABLISHED, State.CLOSE}),
    State.ESTABLISHED: frozenset({State.FIN_WAIT1, State.CLOSE_WAIT, State.CLOSE}),
    State.FIN_WAIT1: frozenset({State.FIN_WAIT2, State.CLOSING, State.TIME_WAIT, State.CLOSE}),
    State.FIN_WAIT2: frozenset({State.TIME_WAIT, State.CLOSE}),
    State.CLOSING: frozenset({State.TIME_WAIT, State.CLOSE}),
    State.CLOSE_WAIT: frozenset({State.LAST_ACK, State.CLOSE}),
    State.LAST_ACK: frozenset({State.CLOSE}),
    State.TIME_WAIT: frozenset({State.CLOSE}),
}
"""Which states may follow a state. `Connection.enter` holds to it."""

CAN_SEND: Final = frozenset({State.ESTABLISHED, State.CLOSE_WAIT})
"""States in which the user may add data to the send queue."""

CAN_RECEIVE: Final = frozenset({State.ESTABLISHED, State.FIN_WAIT1, State.FIN_WAIT2})
"""States in which the peer may still send data."""

SENDS_FIN: Final = {State.ESTABLISHED: State.FIN_WAIT1, State.CLOSE_WAIT: State.LAST_ACK}
"""The state that follows when our side is closed."""

RECEIVES_FIN: Final = {
    State.ESTABLISHED: State.CLOSE_WAIT,
    State.FIN_WAIT1: State.CLOSING,
    State.FIN_WAIT2: State.TIME_WAIT,
}
"""The state that follows when the peer's FIN is reached in sequence."""

FIN_ACKED: Final = {State.FIN_WAIT1: State.FIN_WAIT2, State.CLOSING: State.TIME_WAIT, State.LAST_ACK: State.CLOSE}
"""The state that follows when the peer has acknowledged our FIN."""
