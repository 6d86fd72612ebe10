"""NBD server on asyncio: memory, files, and disks that are elsewhere, for any number of clients.

The whole server's side of the protocol: every option and command but RESIZE, structured replies, extended headers, block
status, TLS. There is no access control but the certificates of clients, and the permissions of a unix socket: without them,
listen where only friends are. What a client may make the server hold is in `server_connection.py`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ustack.nbd.server_connection import STALL_TIMEOUT, ServerConnection
from ustack.nbd.server_handshake import Offer, TlsPolicy

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

    from ustack.nbd.export import Export

MAX_CLIENTS: Final = 256
"""Clients at a time. Who comes then is turned away."""
LISTEN_FDS_START: Final = 3
"""The first of the descriptors that a parent hands down: sd_listen_fds(3)."""


class NbdServer:
    """Serves exports on any number of addresses. Use `listen_*`, then leave it to the event loop, then `close`."""

    def __init__(
        self,
        exports: Iterable[Export],
        *,
        tls: TlsPolicy = TlsPolicy.OFF,
        tls_context: ssl.SSLContext | None = None,
        stall_timeout: float | None = STALL_TIMEOUT,
    ) -> None:
        """Exports with distinct names. A client that names none gets the first one.

        `tls` says whether clients may or must use TLS, with `tls_context` (see `tls.server_context`). A client that stops amid
        a message, or takes no replies, for `stall_timeout` seconds is dropped; None: never. Raises ValueError.
        """
        self.exports: dict[str, Export] = {}
        for export in exports:
            if export.info.name in self.exports:
                raise ValueError(f"two exports are named {export.info.name!r}")
            self.exports[export.info.name] = export
        if not self.exports:
            raise ValueError("an NBD server needs at least one export")
        if tls is not TlsPolicy.OFF and tls_context is None:
            raise ValueError("TLS needs certificates")
        self.offers = {name: Offer(export.info, export.contexts) for name, export in self.exports.items()}
        """What there is, by the names that clients may use."""
        self.offers.setdefault("", next(iter(self.offers.values())))
        self.tls_policy = tls
        self.tls_context = tls_context
        self.stall_timeout = stall_timeout
        self._servers: list[asyncio.AbstractServer] = []
        self._unix_paths: list[str] = []
        self._connections: set[ServerConnection] = set()

    @property
    def clients(self) -> int:
        """Clients that are connected."""
        return len(self._connections)

    async def listen_tcp(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen on a TCP address; returns the port, which the kernel chooses for 0. Raises OSError."""
        server = await asyncio.get_running_loop().create_server(self.protocol, host, port)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_unix(self, path: str, mode: int = 0o600) -> None:
        """Listen on a unix socket with the permission bits `mode`: by default only this user may connect. A dead server's
        socket is replaced; a living one's is EADDRINUSE."""
        await self.listen_socket(bind_unix(path, mode))
        self._unix_paths.append(path)

    async def listen_socket(self, sock: socket.socket) -> None:
        """Listen on a stream socket that is bound already: one inside of another network namespace, or one that was handed
        down. It belongs to the server from now on."""
        try:
            self._servers.append(await asyncio.get_running_loop().create_server(self.protocol, sock=sock))
        except BaseException:
            sock.close()
            raise

    def protocol(self) -> asyncio.BufferedProtocol:
        """The protocol for one client: what to give to any other loop.create_server, for example that of a stack."""
        return ServerConnection(self)

    async def attach(self, sock: socket.socket, name: str) -> ServerConnection:
        """Serve the export `name` on a connected socket, without negotiation and with simple replies: the other end belongs to
        the kernel's nbd. The socket belongs to the server from now on."""
        connection = ServerConnection(self, self.exports[name])
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        return connection

    def admit(self, connection: ServerConnection) -> bool:
        """Take a client in, unless there are enough."""
        if len(self._connections) >= MAX_CLIENTS:
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: ServerConnection) -> None:
        """A client is gone."""
        self._connections.discard(connection)

    async def close(self) -> None:
        """Stop listening, drop the clients, close the exports. A second call does nothing."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.drop()
        for connection in connections:
            await connection.closed
        for server in servers:
            await server.wait_closed()
        self._remove_sockets()
        exports, self.exports = self.exports, {}
        for export in exports.values():
            export.close()

    def _remove_sockets(self) -> None:
        while self._unix_paths:
            Path(self._unix_paths.pop()).unlink(missing_ok=True)


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets that whoever started this process has handed down: sd_listen_fds(3), socket activation.

    Empty when there are none or they are meant for another process. Our own children do not inherit them. Raises OSError for
    what is no listening stream socket.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found: list[socket.socket] = []
    for fd in range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        found.append(sock)
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, f"descriptor {fd}, which was handed down, is no listening stream socket")
    return found


def bind_unix(path: str, mode: int = 0o600) -> socket.socket:
    """A stream socket bound to `path` with these permission bits. A dead server's socket is replaced; OSError EADDRINUSE for a
    living one's, and for what is no socket."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o777)  # nobody connects before the mode is right
    try:
        sock.bind(path)
        Path(path).chmod(mode)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.umask(mask)
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            raise OSError(errno.EADDRINUSE, "exists and is no socket", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server listens there", path)
