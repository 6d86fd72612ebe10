"""The socket calls between two stacks: what poll, ioctl, flags, connect and disconnect say in each state of a connection."""

from __future__ import annotations

import errno
import select
import socket
from typing import TYPE_CHECKING

import pytest

from tests.sim.network import SERVER, Network
from ustack.link.simwire import Impairments
from ustack.socket import SIOCINQ, SIOCOUTQ
from ustack.socket_options import TCP_FASTOPEN_CONNECT
from ustack.transport.tcp.fastopen import CLIENT
from ustack.transport.tcp.fastopen import SERVER as SERVER_FLAG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.socket import Socket

pytestmark = pytest.mark.sim

ALL = select.POLLIN | select.POLLOUT | select.POLLRDHUP


@pytest.fixture
def network() -> Iterator[Network]:
    """Two stacks on a wire with ten milliseconds in each direction."""
    network = Network(1, Impairments(delay=0.01))
    yield network
    network.close()


def raises(number: int) -> pytest.RaisesExc[OSError]:
    """Expect an OSError with that errno."""
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def listen(network: Network, port: int = 80) -> Socket:
    """A listener of the server's."""
    listener = network.server.socket()
    listener.bind(("", port))
    listener.listen()
    return listener


def connected(network: Network) -> tuple[Socket, Socket]:
    """Both ends of a connection."""
    with listen(network) as listener:
        client = network.client.socket()
        with raises(errno.EINPROGRESS):
            client.connect_nowait((SERVER, 80))
        network.world.run(0.1)
        client.connect_nowait((SERVER, 80))
        return client, listener.accept_nowait()[0]


def test_poll_follows_a_connection_from_its_first_to_its_last_state(network: Network) -> None:
    listener = listen(network)
    client = network.client.socket()
    assert client.poll(ALL) == select.POLLOUT | select.POLLHUP, "as the kernel says of a new socket"
    assert listener.poll(ALL) == 0
    with raises(errno.EINPROGRESS):
        client.connect_nowait((SERVER, 80))
    assert client.poll(ALL) == 0
    network.world.run(0.1)
    assert client.poll(ALL) == select.POLLOUT
    assert listener.poll(ALL) == select.POLLIN
    server, _ = listener.accept_nowait()
    assert listener.poll(ALL) == 0
    server.send_nowait(b"x")
    network.world.run(0.1)
    assert client.poll(ALL) == select.POLLIN | select.POLLOUT
    assert client.poll(select.POLLIN) == select.POLLIN
    client.recv_nowait(1)
    server.shutdown(socket.SHUT_WR)
    network.world.run(0.1)
    assert client.poll(ALL) == select.POLLIN | select.POLLOUT | select.POLLRDHUP
    client.shutdown(socket.SHUT_WR)
    assert client.poll(ALL) == ALL | select.POLLHUP
    for sock in (client, server, listener):
        sock.close()


def test_poll_says_error_until_somebody_has_asked_for_it(network: Network) -> None:
    client, server = connected(network)
    server.abort()
    network.world.run(0.1)
    assert client.poll(0) == select.POLLERR | select.POLLHUP
    assert client.poll(ALL) == ALL | select.POLLERR | select.POLLHUP
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    assert client.poll(0) == select.POLLHUP
    client.close()
    server.close()


def test_who_polls_a_full_stream_is_told_when_there_is_room(network: Network) -> None:
    client, server = connected(network)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    while client.poll(ALL):
        client.send_nowait(bytes(1000))
    told: list[int] = []
    client.watch(told.append)
    network.world.run(0.1)
    assert client.poll(ALL) == select.POLLOUT
    assert told
    client.close()
    server.close()


def test_a_socket_without_a_connection_can_neither_read_nor_write(network: Network) -> None:
    with network.client.socket() as sock:
        with raises(errno.ENOTCONN):
            sock.recv_nowait(1)
        with raises(errno.EPIPE):
            sock.send_nowait(b"x")
        with raises(errno.ENOTCONN):
            sock.shutdown(socket.SHUT_RDWR)


def test_connect_says_once_that_it_was_made(network: Network) -> None:
    listener = listen(network)
    with listener, network.client.socket() as sock:
        with raises(errno.EINPROGRESS):
            sock.connect_nowait((SERVER, 80))
        with raises(errno.EALREADY):
            sock.connect_nowait((SERVER, 80))
        network.world.run(0.1)
        sock.connect_nowait((SERVER, 80))
        with raises(errno.EISCONN):
            sock.connect_nowait((SERVER, 80))


def test_connect_says_why_it_failed_and_may_be_tried_again(network: Network) -> None:
    with network.client.socket() as sock:
        for taken, expected in ((0, errno.ECONNREFUSED), (errno.ECONNREFUSED, errno.ECONNABORTED)):
            with raises(errno.EINPROGRESS):
                sock.connect_nowait((SERVER, 80))
            network.world.run(0.1)
            if taken:
                assert sock.take_error() == taken
            with raises(expected):
                sock.connect_nowait((SERVER, 80))
        with listen(network), raises(errno.EINPROGRESS):
            sock.connect_nowait((SERVER, 80))


def test_disconnecting_resets_and_the_same_port_may_connect_again(network: Network) -> None:
    listener = listen(network)
    client = network.client.socket()
    client.bind(("", 4000))
    for _ in range(2):
        with raises(errno.EINPROGRESS):
            client.connect_nowait((SERVER, 80))
        network.world.run(0.1)
        server, peer = listener.accept_nowait()
        assert peer[1] == 4000
        server.send_nowait(b"never read")
        network.world.run(0.1)
        client.disconnect()
        network.world.run(0.1)
        with raises(errno.ECONNRESET):
            server.recv_nowait(1)
        server.close()
    assert client.take_error() == errno.ECONNRESET, "as the kernel leaves it behind"
    with raises(errno.ENOTCONN):
        client.recv_nowait(1)
    client.close()
    listener.close()


def test_a_listener_that_is_shut_down_for_reading_listens_no_more(network: Network) -> None:
    listener = listen(network)
    listener.shutdown(socket.SHUT_WR)
    with raises(errno.EAGAIN):
        listener.accept_nowait()
    listener.shutdown(socket.SHUT_RD)
    with raises(errno.EINVAL):
        listener.accept_nowait()
    listener.listen()
    with raises(errno.EAGAIN):
        listener.accept_nowait()
    listener.close()


def test_shutting_down_ends_an_attempt_to_connect(network: Network) -> None:
    with network.client.socket() as sock:
        with raises(errno.EINPROGRESS):
            sock.connect_nowait((SERVER, 80))
        sock.shutdown(socket.SHUT_WR)
        assert sock.poll(0) == select.POLLHUP | select.POLLERR
        assert sock.take_error() == errno.ECONNRESET
        assert not network.client.tcp.connections


def test_what_is_peeked_at_stays(network: Network) -> None:
    client, server = connected(network)
    with raises(errno.EAGAIN):
        client.recv_nowait(10, socket.MSG_PEEK)
    server.send_nowait(b"abcdef")
    network.world.run(0.1)
    assert client.recv_nowait(0, socket.MSG_PEEK) == b""
    assert client.recv_nowait(4, socket.MSG_PEEK) == b"abcd"
    assert client.recv_nowait(100, socket.MSG_PEEK) == b"abcdef"
    assert client.recv_nowait(100) == b"abcdef"
    server.close()
    network.world.run(0.1)
    assert client.recv_nowait(100, socket.MSG_PEEK) == b""
    client.close()


def test_a_datagram_that_is_peeked_at_stays(network: Network) -> None:
    with (
        network.client.socket(type=socket.SOCK_DGRAM) as client,
        network.server.socket(type=socket.SOCK_DGRAM) as server,
    ):
        server.bind(("", 53))
        assert server.poll(ALL) == select.POLLOUT
        client.sendto_nowait(b"question", (SERVER, 53))
        network.world.run(0.1)
        assert server.poll(ALL) == select.POLLIN | select.POLLOUT
        assert server.recv_nowait(100, socket.MSG_PEEK) == server.recv_nowait(100) == b"question"


def test_more_to_come_holds_the_last_segment(network: Network) -> None:
    client, server = connected(network)
    client.send_nowait(b"first, ", socket.MSG_MORE)
    network.world.run(0.05)
    with raises(errno.EAGAIN):
        server.recv_nowait(100)
    client.send_nowait(b"last")
    network.world.run(0.05)
    assert server.recv_nowait(100) == b"first, last"
    client.close()
    server.close()


def test_flags_that_are_not_there_are_refused(network: Network) -> None:
    client, server = connected(network)
    with raises(errno.EOPNOTSUPP):
        client.recv_nowait(1, socket.MSG_OOB)
    with raises(errno.EOPNOTSUPP):
        client.send_nowait(b"x", socket.MSG_OOB)
    client.close()
    server.close()


def test_how_much_waits_to_be_read_and_to_be_acknowledged(network: Network) -> None:
    client, server = connected(network)
    client.send_nowait(bytes(3000))
    assert client.ioctl(SIOCOUTQ) == 3000
    client.shutdown(socket.SHUT_WR)
    assert client.ioctl(SIOCOUTQ) == 3001
    network.world.run(0.1)
    assert client.ioctl(SIOCOUTQ) == 0
    assert server.ioctl(SIOCINQ) == 3000
    server.recv_nowait(1000)
    assert server.ioctl(SIOCINQ) == 2000
    with raises(errno.ENOTTY):
        server.ioctl(0)
    with listen(network, 81) as listener, raises(errno.EINVAL):
        listener.ioctl(SIOCINQ)
    with network.client.socket() as fresh:
        assert fresh.ioctl(SIOCINQ) == fresh.ioctl(SIOCOUTQ) == 0
    client.close()
    server.close()


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_is_refused_by_every_call(network: Network, port: int) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with network.client.socket(socket.AF_INET, kind) as sock:
            for call in (sock.bind, sock.connect_nowait):
                with pytest.raises(OverflowError, match="0-65535"):
                    call((SERVER, port))
            assert sock.getsockname() == ("0.0.0.0", 0)
            with raises(errno.ENOTCONN):
                sock.getpeername()
    with network.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(OverflowError, match="0-65535"):
        sock.sendto_nowait(b"x", (SERVER, port))


def test_sizes_that_make_no_sense_are_refused_and_take_nothing(network: Network) -> None:
    client, server = connected(network)
    assert client.send_nowait(b"abcd") == 4
    receiver, sender = (stack.socket(socket.AF_INET, socket.SOCK_DGRAM) for stack in (network.server, network.client))
    receiver.bind(("", 9))
    assert sender.sendto_nowait(b"abcd", (SERVER, 9)) == 4
    network.world.run(0.1)
    for sock in (server, receiver):
        for size in (-1, 5):
            with pytest.raises(ValueError, match="no room"):
                sock.recv_into_nowait(bytearray(4), size)
        for receive in (sock.recv_nowait, sock.recvfrom_nowait):
            with pytest.raises(ValueError, match="negative"):
                receive(-1)
        assert sock.recv_into_nowait(bytearray(4), 4) == 4
        sock.close()
    client.close()
    sender.close()


def fast_open(network: Network) -> Socket:
    """Both stacks use Fast Open, a listener takes it, and the client has a cookie."""
    for stack in (network.client, network.server):
        stack.tcp.config.fastopen = CLIENT | SERVER_FLAG
    listener = listen(network)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
    with network.client.socket() as first:
        with raises(errno.EINPROGRESS):
            first.sendto_nowait(b"too early", (SERVER, 80), socket.MSG_FASTOPEN)
        network.world.run(0.1)
    with listener.accept_nowait()[0]:
        pass
    return listener


def test_data_goes_with_the_syn_and_comes_back_before_the_handshake_is_done(network: Network) -> None:
    with fast_open(network) as listener, network.client.socket() as client:
        assert client.sendto_nowait(b"question", (SERVER, 80), socket.MSG_FASTOPEN) == 8
        with raises(errno.EALREADY):
            client.sendto_nowait(b"again", (SERVER, 80), socket.MSG_FASTOPEN)
        network.world.run(0.011)
        accepted, _ = listener.accept_nowait()
        with accepted:
            assert accepted.poll(ALL) == select.POLLIN | select.POLLOUT
            assert accepted.recv_nowait(100) == b"question"
            accepted.send_nowait(b"answer")
            network.world.run(0.011)
            assert client.recv_nowait(100) == b"answer"


def test_connecting_waits_for_the_data_that_goes_with_the_syn(network: Network) -> None:
    with fast_open(network) as listener, network.client.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect_nowait((SERVER, 80))
        assert client.poll(ALL) == select.POLLOUT
        assert client.send_nowait(b"question") == 8
        network.world.run(0.011)
        accepted, _ = listener.accept_nowait()
        with accepted:
            assert accepted.recv_nowait(100) == b"question"


def test_fast_open_that_is_off_is_not_supported(network: Network) -> None:
    with network.client.socket() as client, raises(errno.EOPNOTSUPP):
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
