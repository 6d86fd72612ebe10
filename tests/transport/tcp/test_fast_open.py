"""TCP Fast Open (RFC 7413), both sides."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.transport.tcp.peer import PEER_ADDRESS
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.fastopen import CLIENT, KNOWN_MAX, SERVER, SERVER_COOKIE_NOT_REQD, SERVER_WO_SOCKOPT, FastOpen
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, PSH, RST, SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.tcp.peer import Peer


@pytest.fixture
def server(make_peer: Callable[..., Peer]) -> Peer:
    """A peer whose stack listens with TCP_FASTOPEN."""
    peer = make_peer(config=TcpConfig(fastopen=SERVER))
    peer.listens(fastopen=2)
    return peer


def cookie(peer: Peer) -> bytes:
    """The cookie that the stack gives to the peer."""
    return peer.stack.tcp.fastopen.cookie_for(PEER_ADDRESS)


def opens_early(peer: Peer, length: int = 100) -> None:
    """The peer sends data with its SYN, and a good cookie."""
    peer.sends(SYN, seq=0, mss=1460, length=length, fastopen=cookie(peer))


# -- the server's side --


def test_rfc7413_4_1_1_a_syn_that_asks_gets_the_cookie(server: Peer) -> None:
    server.sends(SYN, seq=0, mss=1460, fastopen=b"")
    answer = server.expects(SYN | ACK, ack=1)
    assert answer.options.fastopen == cookie(server)
    assert server.stack.mib.TcpExtTCPFastOpenCookieReqd == 1


def test_rfc7413_4_2_2_data_with_a_good_cookie_is_taken_at_once(server: Peer) -> None:
    opens_early(server)
    answer = server.expects(SYN | ACK, ack=101)
    assert answer.options.fastopen is None
    user = server.user()
    assert user.is_in(State.SYN_RECV)
    user.reads(100)
    assert server.stack.mib.TcpExtTCPFastOpenPassive == 1


def test_rfc7413_4_2_2_the_answer_does_not_wait_for_the_handshake(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK, ack=101)
    user = server.user()
    user.sends(3000)
    server.expects_data(1, 3001)
    server.sends(ACK)
    assert user.is_in(State.ESTABLISHED)
    assert user.acknowledged == 3001


def test_an_answer_that_is_lost_is_sent_again_after_the_handshake(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK, ack=101)
    user = server.user()
    user.sends(500)
    server.expects(ACK | PSH, seq=1, length=500)
    server.sends(ACK, ack=1)
    assert user.is_in(State.ESTABLISHED)
    assert user.conn.retransmit_timer.pending
    server.waits(1.5)
    assert any(seen.seq == 1 and seen.length == 500 for seen in server.ignores())


def test_rfc7413_4_2_2_a_bad_cookie_leads_to_an_ordinary_handshake(server: Peer) -> None:
    server.sends(SYN, seq=0, mss=1460, length=100, fastopen=b"12345678")
    answer = server.expects(SYN | ACK, ack=1)
    assert answer.options.fastopen == cookie(server)
    assert server.stack.mib.TcpExtTCPFastOpenPassiveFail == 1
    assert server.listener is not None
    assert not server.listener.queue


def test_rfc7413_5_1_so_many_at_a_time_and_no_more(server: Peer) -> None:
    for port in (40001, 40002, 40003):
        server.returns()
        server.own_port = port
        opens_early(server)
        server.expects(SYN | ACK, ack=1 if port == 40003 else 101)
    assert server.stack.mib.TcpExtTCPFastOpenListenOverflow == 1


def test_a_syn_that_comes_again_without_its_data_gets_the_same_answer(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK, ack=101)
    server.sends(SYN, seq=0, mss=1460)
    server.expects(SYN | ACK, ack=101)


def test_a_reset_before_the_handshake_is_done_is_for_who_has_accepted(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK)
    user = server.user()
    server.sends(RST, seq=101)
    user.fails_with(errno.ECONNRESET)


def test_a_connection_accepted_early_outlives_its_listener(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK)
    user = server.user()
    assert server.listener is not None
    server.listener.close()
    server.sends(ACK)
    assert user.is_in(State.ESTABLISHED)


def test_one_that_nobody_accepted_goes_with_its_listener(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK)
    assert server.listener is not None
    server.listener.close()
    server.expects(RST | ACK)
    assert not server.stack.tcp.connections


def test_closing_before_the_handshake_is_done_sends_the_fin_with_its_end(server: Peer) -> None:
    opens_early(server)
    server.expects(SYN | ACK)
    user = server.user()
    user.reads(100)
    user.closes()
    server.sends(ACK)
    server.expects(FIN | ACK, seq=1)


def test_fast_open_is_off_by_default(peer: Peer) -> None:
    peer.listens(fastopen=5)
    peer.sends(SYN, seq=0, mss=1460, length=100, fastopen=cookie(peer))
    answer = peer.expects(SYN | ACK, ack=1)
    assert answer.options.fastopen is None


def test_every_listener_and_no_cookie_when_configured(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(fastopen=SERVER | SERVER_COOKIE_NOT_REQD | SERVER_WO_SOCKOPT))
    peer.listens()
    peer.sends(SYN, seq=0, mss=1460, length=100)
    peer.expects(SYN | ACK, ack=101)
    peer.user().reads(100)


# -- the client's side --


@pytest.fixture
def client(make_peer: Callable[..., Peer]) -> Peer:
    """A peer whose stack opens connections with data where it may, and has the peer's cookie."""
    peer = make_peer(config=TcpConfig(fastopen=CLIENT))
    peer.stack.tcp.fastopen.remember(PEER_ADDRESS, b"biscuits", 1460)
    return peer


def test_rfc7413_4_1_1_the_first_syn_asks_for_a_cookie(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer(config=TcpConfig(fastopen=CLIENT))
    user = peer.is_called(early=100)
    assert user.sent == 0
    assert peer.expects(SYN, seq=0, length=0).options.fastopen == b""
    peer.sends(SYN | ACK, seq=0, ack=1, mss=1200, fastopen=b"biscuits")
    peer.expects(ACK)
    assert peer.stack.tcp.fastopen.recall(PEER_ADDRESS) == (b"biscuits", 1200)


def test_rfc7413_4_2_1_data_goes_with_the_syn(client: Peer) -> None:
    user = client.is_called(early=100)
    assert user.sent == 100
    assert client.expects(SYN, seq=0, length=100).options.fastopen == b"biscuits"
    client.sends(SYN | ACK, seq=0, ack=101, mss=1460)
    client.expects(ACK, seq=101)
    assert user.is_in(State.ESTABLISHED)
    assert client.stack.mib.TcpExtTCPFastOpenActive == 1
    user.sends(50)
    client.expects(ACK, seq=101, length=50)


def test_rfc7413_4_2_1_no_more_than_a_segment_goes(client: Peer) -> None:
    user = client.is_called(early=5000)
    assert user.sent == 1460 - 40
    client.expects(SYN, length=1420)


def test_rfc7413_4_2_2_data_that_was_not_taken_is_sent_again(client: Peer) -> None:
    user = client.is_called(early=100)
    client.expects(SYN, length=100)
    client.sends(SYN | ACK, seq=0, ack=1, mss=1460)
    client.expects(ACK, seq=1, length=100)
    assert user.is_in(State.ESTABLISHED)
    assert client.stack.mib.TcpExtTCPFastOpenActiveFail == 1


def test_rfc7413_4_2_2_data_that_was_taken_in_part_is_sent_from_there(client: Peer) -> None:
    client.is_called(early=100)
    client.expects(SYN, length=100)
    client.sends(SYN | ACK, seq=0, ack=61, mss=1460)
    client.expects(ACK, seq=61, length=40)


def test_rfc7413_4_1_3_the_syn_is_sent_again_without_data_and_cookie(client: Peer) -> None:
    client.is_called(early=100)
    client.expects(SYN, length=100)
    again = client.expects(SYN, length=0, after=1.0)
    assert again.options.fastopen is None
    client.sends(SYN | ACK, seq=0, ack=1, mss=1460)
    client.expects(ACK, seq=1, length=100)


def test_a_syn_ack_that_acknowledges_what_was_not_sent_is_reset(client: Peer) -> None:
    client.is_called(early=100)
    client.expects(SYN, length=100)
    client.sends(SYN | ACK, seq=0, ack=102, mss=1460)
    client.expects(RST, seq=102)


def test_cookies_are_remembered_for_so_many_servers() -> None:
    fastopen = FastOpen(b"secret")
    for number in range(KNOWN_MAX + 1):
        fastopen.remember(number.to_bytes(4), b"cookie", 1460)
    assert fastopen.recall((0).to_bytes(4)) is None
    assert fastopen.recall((1).to_bytes(4)) == (b"cookie", 1460)


def test_a_cookie_is_good_for_its_client_only() -> None:
    fastopen = FastOpen(b"secret")
    assert fastopen.knows(b"one", fastopen.cookie_for(b"one"))
    assert not fastopen.knows(b"two", fastopen.cookie_for(b"one"))
