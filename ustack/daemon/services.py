"""Echo, discard and character generator (RFC 862, 863, 864) over a stack: what benchmarks and tests talk to.

They are as fast as the stack allows, because they are also what the stack is measured with: one buffer for all connections,
no task a connection, no stream. Memory is bounded: who does not read what it is sent is not read from.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

from ustack.net.addresses import ANY4
from ustack.transport.events import READABLE

if TYPE_CHECKING:
    from ustack.stack import Stack

ECHO_PORT: Final = 7
DISCARD_PORT: Final = 9
CHARGEN_PORT: Final = 19

BUFFER: Final = 256 << 10
"""Bytes read at a time."""

CHARGEN_BATCH: Final = 1 << 20
"""Bytes of characters that are handed to the transport at a time; most wait there, so that it need not ask often."""

_scratch: Final = bytearray(BUFFER)
_LINE: Final = bytes(range(0x20, 0x7F))
_CHARACTERS: Final = b"".join(
    (_LINE + _LINE)[first : first + 72] + b"\r\n" for first in range(len(_LINE))
)  # the pattern that RFC 864 recommends


class _Server(asyncio.BufferedProtocol):
    """What the three have in common: a transport, and one buffer that all share, since it is empty when a call returns."""

    __slots__ = ("_transports", "transport")

    def __init__(self, transports: set[Any]) -> None:
        self._transports = transports

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transports.discard(self.transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        return _scratch


class _Echo(_Server):
    """Sends back what comes, and its FIN after the peer's."""

    __slots__ = ()

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(memoryview(_scratch)[:nbytes])

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class _Discard(_Server):
    """Reads and forgets."""

    __slots__ = ()

    def buffer_updated(self, nbytes: int) -> None:
        pass


class _Chargen(_Server):
    """Sends until the peer has had enough; what it says is forgotten."""

    __slots__ = ("_paused", "_stopped")

    characters: Final = _CHARACTERS * (CHARGEN_BATCH // len(_CHARACTERS))

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._paused = False
        self._generate()

    def _generate(self) -> None:
        while not (self._paused or self.transport.is_closing()):
            self.transport.write(self.characters)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._generate()

    def buffer_updated(self, nbytes: int) -> None:
        pass


class _UdpEcho:
    """Sends every datagram back from the wake-up that it caused: no task, and no turn of the event loop in between."""

    __slots__ = ("_socket",)

    def __init__(self, stack: Stack, port: int) -> None:
        """Raises OSError EADDRINUSE."""
        everybody = None if stack.ip6.interfaces else ANY4
        self._socket = stack.udp.socket(wildcard=everybody)
        self._socket.bind(everybody, port)
        self._socket.wake = self._on_wake

    def _on_wake(self, mask: int) -> None:
        if not mask & READABLE:
            return
        socket = self._socket
        view = memoryview(_scratch)
        while True:
            try:
                length, peer = socket.recvfrom_into_nowait(view)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error about an earlier answer
                continue
            with contextlib.suppress(OSError):  # it is UDP: an answer that cannot be sent is lost
                socket.sendto_nowait(view[:length], peer)

    def close(self) -> None:
        """Free the port."""
        self._socket.close()


class Services:
    """The small servers of one stack. `set` says which there are to be."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._servers: dict[str, asyncio.AbstractServer] = {}
        self._udp: _UdpEcho | None = None
        self._transports: set[Any] = set()

    async def set(self, *, echo: bool, discard: bool, chargen: bool) -> None:
        """Start and stop servers so that these run. Raises OSError when a port is taken."""
        for name, on, protocol, port in (
            ("echo", echo, _Echo, ECHO_PORT),
            ("discard", discard, _Discard, DISCARD_PORT),
            ("chargen", chargen, _Chargen, CHARGEN_PORT),
        ):
            if on and name not in self._servers:
                self._servers[name] = await self._stack.create_server(_factory(protocol, self._transports), None, port)
            elif not on and name in self._servers:
                self._servers.pop(name).close()
        if echo and self._udp is None:
            self._udp = _UdpEcho(self._stack, ECHO_PORT)
        elif not echo and self._udp is not None:
            self._udp.close()
            self._udp = None

    async def close(self) -> None:
        """Stop all, and close their connections in order."""
        await self.set(echo=False, discard=False, chargen=False)
        for transport in list(self._transports):
            transport.close()


def _factory(protocol: type[_Server], transports: set[Any]) -> Any:
    return lambda: protocol(transports)
