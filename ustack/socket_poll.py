"""What poll(2) says of a socket: the kernel's tcp_poll, inet_csk_listen_poll and datagram_poll over our endpoints."""

from __future__ import annotations

from select import POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, POLLRDNORM, POLLWRNORM
from typing import TYPE_CHECKING, Final

from ustack.transport.events import SHUT_WR
from ustack.transport.tcp.states import CLOSE, SYN_RECV, SYN_SENT

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.listener import Listener
    from ustack.transport.udp import UdpSocket

IN: Final = POLLIN | POLLRDNORM
OUT: Final = POLLOUT | POLLWRNORM


def readiness(stream: Connection | None, listener: Listener | None, datagram: UdpSocket | None, error: int) -> int:
    """The events of a socket with that endpoint, or of a stream socket without one, whose pending errno is `error`."""
    if stream is not None:
        return _of_stream(stream)
    if listener is not None:
        return IN if listener.readable else 0
    if datagram is not None:
        return (IN if datagram.readable else 0) | OUT | (POLLERR if datagram.error else 0)
    return OUT | POLLHUP | (POLLERR if error else 0)


def _of_stream(conn: Connection) -> int:
    events = POLLERR if conn.error else 0
    ended = conn.shutdown_mask & SHUT_WR != 0
    if conn.at_end:
        events |= IN | POLLRDHUP
        if ended:
            events |= POLLHUP
    if conn.state is CLOSE:
        events |= POLLHUP
    if conn.state is SYN_SENT or (conn.state is SYN_RECV and not conn.fastopen):
        return events
    if conn.readable:
        events |= IN
    if ended or conn.writable:
        events |= OUT
    else:
        conn.write_blocked = True
    return events
