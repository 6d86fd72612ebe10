"""SYN cookies (RFC 4987, section 3.6): a full queue of half-open connections keeps nobody out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.states import State
from ustack.transport.tcp.syncookies import MSS_VALUES, PERIOD, SynCookies, options_of, timestamp_with_state
from ustack.wire.tcp import ACK, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


def full(peer: Peer) -> None:
    """Somebody's SYN, whose SYN-ACK never arrives, fills the queue."""
    peer.listens()
    peer.own_port = 39999
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects(SYN | ACK)
    peer.returns()
    peer.own_port = 40000


@pytest.fixture
def crowded(make_peer: Callable[..., Peer]) -> Peer:
    """A peer whose stack has room for one half-open connection, and has it."""
    peer = make_peer(config=TcpConfig(max_syn_backlog=1, synack_retries=0))
    full(peer)
    return peer


def test_a_syn_is_answered_without_state_when_the_queue_is_full(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1460)
    crowded.expects(SYN | ACK, seq=0, ack=1)
    assert len(crowded.stack.tcp.connections) == 1
    assert crowded.stack.mib.TcpExtSyncookiesSent == 1
    assert crowded.stack.mib.TcpExtTCPReqQFullDoCookies == 1


def test_the_ack_of_a_cookie_makes_the_connection(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1460)
    answer = crowded.expects(SYN | ACK, seq=0, ack=1)
    assert answer.options.wscale == -1
    assert not answer.options.sack_permitted
    crowded.sends(ACK)
    user = crowded.user()
    assert user.is_in(State.ESTABLISHED)
    assert crowded.stack.mib.TcpExtSyncookiesRecv == 1
    user.sends(3000)
    crowded.expects_data(1, 3001)


def test_the_first_data_may_come_instead_of_the_ack(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1460)
    crowded.expects(SYN | ACK)
    crowded.sends(ACK, length=100)
    crowded.expects(ACK, ack=101)
    crowded.user().reads(100)


def test_timestamps_carry_the_window_scale_and_sack(crowded: Peer) -> None:
    crowded.ts = (1000, 0)
    crowded.sends(SYN, seq=0, mss=1400, wscale=9, sack_permitted=True)
    answer = crowded.expects(SYN | ACK)
    assert answer.options.wscale >= 0
    assert answer.options.sack_permitted
    crowded.ts = (1001, answer.options.ts_val)
    crowded.sends(ACK, window=100)
    conn = crowded.user().conn
    assert conn.snd_wscale == 9
    assert conn.snd_wnd == 100 << 9
    assert conn.sack_ok
    assert conn.peer_mss == 1300


def test_the_largest_mss_that_a_cookie_can_say_and_that_fits_is_used(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1459)
    crowded.expects(SYN | ACK)
    crowded.sends(ACK)
    assert crowded.user().conn.mss == 1440


def test_a_cookie_that_we_did_not_make_is_reset(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1460)
    crowded.expects(SYN | ACK)
    crowded.sends(ACK, ack=2)
    crowded.expects(RST, seq=2)
    assert crowded.stack.mib.TcpExtSyncookiesFailed == 1
    assert crowded.listener is not None
    assert not crowded.listener.queue


def test_a_cookie_is_good_for_no_other_port(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1460)
    crowded.expects(SYN | ACK)
    crowded.own_port += 1
    crowded.sends(ACK)
    crowded.expects(RST)


def test_an_old_cookie_is_reset(crowded: Peer) -> None:
    crowded.sends(SYN, seq=0, mss=1460)
    crowded.expects(SYN | ACK)
    crowded.waits(3 * PERIOD)
    crowded.ignores()
    crowded.sends(ACK)
    crowded.expects(RST)


def test_a_full_accept_queue_forgets_the_cookie_until_there_is_room(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(syncookies=2))
    peer.listens(backlog=1)
    for port in (40001, 40002, 40003):
        peer.returns()
        peer.own_port = port
        peer.sends(SYN, seq=0, mss=1460)
        if port == 40003:
            peer.expects_nothing()  # two wait already
        else:
            peer.expects(SYN | ACK)
            peer.sends(ACK)
    assert peer.listener is not None
    assert len(peer.listener.queue) == 2
    assert peer.stack.mib.TcpExtListenOverflows == 1


def test_without_cookies_the_syn_is_dropped_and_counted(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(max_syn_backlog=1, syncookies=0, synack_retries=0))
    full(peer)
    peer.sends(SYN, seq=0, mss=1460)
    peer.expects_nothing()
    assert peer.stack.mib.TcpExtTCPReqQFullDrop == 1


def test_no_ack_is_taken_for_a_cookie_while_none_was_sent(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    peer.listens()
    peer.sends(ACK, ack=77)
    peer.expects(RST, seq=77)
    assert peer.stack.mib.TcpExtSyncookiesFailed == 0


@given(mss=st.integers(48, 65535), now=st.floats(0, 1e6), age=st.floats(0, PERIOD), irs=st.integers(0, 2**32 - 1))
def test_a_cookie_says_its_mss_for_a_period_at_least(mss: int, now: float, age: float, irs: int) -> None:
    cookies = SynCookies(b"sixteen bytes 16")
    cookie = cookies.make(b"name", irs, mss, now)
    said = cookies.check(b"name", irs, cookie, now + age)
    assert said == max(value for value in MSS_VALUES if value <= mss)
    assert not cookies.check(b"name", (irs + 1) % 2**32, cookie, now + age)


@given(clock=st.integers(64, 2**31), wscale=st.integers(-1, 14), sack=st.booleans())
def test_a_timestamp_with_state_is_no_later_than_the_clock(clock: int, wscale: int, sack: bool) -> None:
    value = timestamp_with_state(clock, wscale, sack)
    assert clock - 64 < value <= clock
    options = options_of(1460, value, 5)
    assert (options.wscale, options.sack_permitted) == (wscale, sack)
