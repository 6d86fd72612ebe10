"""The table of states: it has every transition that is made."""

from __future__ import annotations

from ustack.transport.tcp.states import FIN_ACKED, FOLLOWERS, RECEIVES_FIN, SENDS_FIN, State


def test_every_transition_that_is_made_is_one_that_may_be_made() -> None:
    for table in (SENDS_FIN, RECEIVES_FIN, FIN_ACKED):
        for state, follower in table.items():
            assert follower in FOLLOWERS[state]
    assert set(FOLLOWERS) == set(State)
    for state in set(State) - {State.CLOSE}:
        assert State.CLOSE in FOLLOWERS[state]
