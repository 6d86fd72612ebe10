"""`ustack nc`: a connection of the daemon's stack on standard input and output."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from ustack.cli.control import Control, control_option

if TYPE_CHECKING:
    from collections.abc import Callable

STDIN: Final = 0
STDOUT: Final = 1
CHUNK: Final = 64 << 10
"""Bytes moved at a time."""
DATAGRAM_MAX: Final = 16 << 10
"""Bytes read from standard input for one datagram."""


@click.command()
@click.argument("where", metavar="[ADDRESS] PORT", nargs=-1, required=True)
@click.option("-l", "listen", is_flag=True, help="Listen on PORT (of ADDRESS) and take one connection.")
@click.option("-u", "udp", is_flag=True, help="UDP: each read of standard input is a datagram.")
@click.option(
    "-w", "timeout", type=click.FloatRange(min=0, min_open=True), help="Give up after this many seconds without anything."
)
@click.option("--map", "mapped", is_flag=True, help="Write out what is received from the daemon's own pages, mapped; only TCP.")
@control_option
def nc(where: tuple[str, ...], listen: bool, udp: bool, timeout: float | None, mapped: bool, control: str) -> None:
    """Connect standard input and output to a TCP or UDP peer over the daemon's stack.

    The end of standard input is sent as a FIN and leaves the other direction open. It is over when both directions are,
    or at a terminal when the peer has ended. Exit code: 0, or 1 for an error.
    """
    host, port = _parse(where, listen)
    if mapped and (udp or timeout):
        raise click.UsageError("--map goes with neither -u nor -w")
    try:
        if mapped:
            _map(control, "listen" if listen else "connect", port=port, **({} if host is None else {"host": host}))
            return
        with Control(control) as daemon:
            daemon.socket.settimeout(timeout)
            if listen:
                daemon.call("listen", port=port, udp=udp, **({} if host is None else {"host": host}))
                daemon.socket.settimeout(None)
                daemon.receive()
            else:
                daemon.call("connect", host=host, port=port, udp=udp)
            daemon.socket.settimeout(None)
            _Relay(daemon.socket, udp=udp, timeout=timeout).run()
    except OSError as error:
        if isinstance(error, TimeoutError) and error.errno is None:  # ours, not the connection's
            raise click.ClickException(f"nothing happened for {timeout:g} s") from None
        raise click.ClickException(f"{host or ''}{':' if host else ''}{port}: {error.strerror or error}") from None


def _parse(where: tuple[str, ...], listen: bool) -> tuple[str | None, int]:
    if len(where) > 2 or (len(where) == 1 and not listen):
        raise click.UsageError("give ADDRESS PORT, or with -l at least PORT")
    try:
        port = int(where[-1])
    except ValueError:
        port = -1
    if not 0 < port < 65536:
        raise click.UsageError(f"{where[-1]!r} is no port: allowed is 1 to 65535")
    return (where[0] if len(where) == 2 else None), port


def _map(control: str, name: str, **args: Any) -> None:
    """Move bytes between standard input and output and a connection whose received data is mapped."""
    import threading

    from ustack.daemon.page_stream import PageReader

    with PageReader(control, name, **args) as reader:

        def send() -> None:
            with contextlib.suppress(OSError):
                while data := os.read(STDIN, CHUNK):
                    reader.socket.sendall(data)
                reader.socket.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        while pieces := reader.read():
            for piece in pieces:
                _write(piece)
                piece.release()
            reader.release()
        if not os.isatty(STDIN):
            sender.join()


class _Relay:
    """Moves bytes between the control socket, which has become the connection, and standard input and output."""

    def __init__(self, sock: socket.socket, *, udp: bool, timeout: float | None) -> None:
        self._sock = sock
        self._udp = udp
        self._timeout = timeout
        self._poll = select.poll()
        self._sources: dict[int, Callable[[], bool]] = {STDIN: self._send, sock.fileno(): self._receive}
        self._datagrams = bytearray()

    def run(self) -> None:
        """Until both directions have ended. Raises TimeoutError (for a stream) after the timeout without anything; OSError."""
        for fd in self._sources:
            self._poll.register(fd, select.POLLIN)
        while self._sources:
            ready = self._poll.poll(None if self._timeout is None else self._timeout * 1000)
            if not ready:
                if self._udp:  # a conversation in datagrams has no other end
                    return
                raise TimeoutError
            for fd, _ in ready:
                if not self._sources[fd]():
                    self._poll.unregister(fd)
                    del self._sources[fd]
                    if fd != STDIN and os.isatty(STDIN):
                        return

    def _send(self) -> bool:
        data = os.read(STDIN, DATAGRAM_MAX if self._udp else CHUNK)
        if not data:
            if not self._udp:
                self._sock.shutdown(socket.SHUT_WR)
            return False
        self._sock.sendall(len(data).to_bytes(2) + data if self._udp else data)
        return True

    def _receive(self) -> bool:
        data = self._sock.recv(CHUNK)
        if self._udp:
            self._datagrams += data
            _write(_take_datagrams(self._datagrams))
        else:
            _write(data)
        return bool(data)


def _take_datagrams(buffer: bytearray) -> bytes:
    """The payload of all complete datagrams in `buffer`, which loses them."""
    found = []
    while len(buffer) >= 2 and len(buffer) >= 2 + (length := int.from_bytes(buffer[:2])):
        found.append(bytes(buffer[2 : 2 + length]))
        del buffer[: 2 + length]
    return b"".join(found)


def _write(data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(STDOUT, view) :]
    sys.stdout.flush()
