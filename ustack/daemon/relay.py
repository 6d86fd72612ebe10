"""Between a client of the control socket and the stack: two transports back to back, or a transport and a UDP socket.

A stream is relayed byte by byte with flow control in both directions: while one side does not take data, the other is not
read from. A FIN is handed on and leaves the other direction open. Datagrams have no boundaries in a stream, so each is
preceded by its length (two bytes, most significant first).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from ustack.transport.events import READABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.stack import Stack
    from ustack.transport.udp import UdpSocket


class StreamEnd(asyncio.Protocol):
    """One end of a relayed stream. `join` two of them; what arrives before that waits."""

    __slots__ = ("_ended", "_other", "transport")

    def __init__(self) -> None:
        self.transport: Any = None
        self._other: StreamEnd | None = None
        self._ended = False

    def connection_made(self, transport: Any) -> None:
        """Read nothing yet: there is nobody to hand it to."""
        self.transport = transport
        transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Hand on."""
        assert self._other is not None
        self._other.transport.write(data)

    def eof_received(self) -> bool:
        """Hand on: this direction is over. When the other one is over too, both ends are closed."""
        other = self._other
        assert other is not None
        self._ended = True
        if other._ended:
            other.transport.close()
            return False
        if not other.transport.is_closing():
            other.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        """Enough: the other end stops reading."""
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """One end is gone, so the other goes too: in order when all was in order."""
        if self._other is not None:
            if exc is None:
                self._other.transport.close()
            else:
                self._other.transport.abort()

    def join(self, other: StreamEnd) -> None:
        """Relay between the two from now on."""
        self._other, other._other = other, self
        self.transport.resume_reading()
        other.transport.resume_reading()


class DatagramEnd(asyncio.Protocol):
    """A client of the control socket that has become the peer of a connected UDP socket."""

    __slots__ = ("_buffer", "_paused", "_socket", "_stack", "_transport")

    def __init__(self, stack: Stack, transport: Any, socket: UdpSocket) -> None:
        self._stack = stack
        self._transport = transport
        self._socket = socket
        self._buffer = bytearray()
        self._paused = False
        socket.wake = self._on_wake
        self._on_wake(READABLE)

    def data_received(self, data: bytes) -> None:
        """Send the datagrams that are complete. What cannot be sent is lost, as it is UDP."""
        buffer = self._buffer
        buffer += data
        self._stack.tick()
        while len(buffer) >= 2 and len(buffer) >= 2 + (length := int.from_bytes(buffer[:2])):
            datagram = bytes(buffer[2 : 2 + length])
            del buffer[: 2 + length]
            with contextlib.suppress(OSError):
                self._socket.sendto_nowait(datagram)

    def pause_writing(self) -> None:
        """The client does not read: datagrams wait in the socket, and over its receive limit are dropped."""
        self._paused = True

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        self._on_wake(READABLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._socket.close()

    def _on_wake(self, mask: int) -> None:
        while mask & READABLE and not self._paused:
            try:
                datagram, _ = self._socket.recvfrom_nowait(0xFFFF)
            except BlockingIOError:
                return
            except OSError:  # what ICMP said about an earlier datagram: nobody is there
                self._transport.abort()
                return
            self._transport.write(len(datagram).to_bytes(2) + datagram)


def accept_datagrams(socket: UdpSocket, on_first: Callable[[tuple[bytes, int]], object]) -> None:
    """Call `on_first` with the sender of the first datagram, and connect `socket` to it. The datagram stays queued."""

    def on_wake(mask: int) -> None:
        if not mask & READABLE:
            return
        try:
            _, peer = socket.recvfrom_nowait(0, peek=True)
            socket.connect(*peer)
        except OSError:
            return
        on_first(peer)

    socket.wake = on_wake
