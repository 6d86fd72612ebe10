"""The control socket: JSON lines over a unix socket.

    -> {"call": "nstat", "args": {}}
    <- {"ok": {"counters": {...}, "drops": {...}}}
    -> {"call": "ping", "args": {"host": "10.77.0.1", "count": 2}}
    <- {"event": {"seq": 1, "time": 0.0001, ...}}
    <- {"event": {"seq": 2, "time": 0.0001, ...}}
    <- {"ok": {"sent": 2, "received": 2, ...}}
    -> {"call": "connect", "args": {"host": "10.77.0.1", "port": 1}}
    <- {"error": {"errno": 111, "message": "Connection refused"}}

`attach` and `detach` do with a disk what a section [[nbd]] of the configuration does, while the daemon runs.

With the `ok` of `capture` come descriptors, by which the client maps the packet memory (`ustack.daemon.capture`); the capture
ends when the client closes its side.

A client may make one call after the other. After the `ok` of `connect`, and after the `ok` with the peer of `listen`, the
socket is no control socket any more but the connection itself, byte for byte (`ustack.daemon.relay`); with `map` what has been
received comes as pages (`ustack.daemon.page_stream`). A client that goes away ends what it asked for. Whoever may open the
socket may do all of this: its permission bits are the access control.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
from inspect import isawaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ustack.daemon import capture, memory_calls, reports
from ustack.daemon.page_stream import PageStream
from ustack.daemon.ping import PingSeries
from ustack.daemon.relay import DatagramEnd, StreamEnd, accept_datagrams
from ustack.link.sniffer import SNAPLEN_MAX
from ustack.net import addresses
from ustack.sockaddr import family_of, pack_host, unpack_host

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ustack.socket import Socket
    from ustack.stack import Stack

LINE_MAX: Final = 64 << 10
"""Bytes of the longest request."""


class ControlServer:
    """Serves `stack` on a unix socket. `status` answers the call of that name; `actions` are calls with arguments, by name,
    which change what the daemon does."""

    def __init__(
        self,
        stack: Stack,
        status: Callable[[], dict[str, Any]],
        actions: dict[str, Callable[..., Awaitable[object]]] | None = None,
    ) -> None:
        self.stack = stack
        self.sessions: set[Session] = set()
        self.calls: dict[str, Callable[[], object]] = {
            "ss": lambda: reports.sockets(stack),
            "nstat": lambda: reports.nstat(stack),
            "slabinfo": lambda: reports.slabinfo(stack),
            "memory": lambda: reports.memory(stack),
            "status": status,
        }
        self.actions = actions or {}
        self._server: asyncio.AbstractServer | None = None
        self._path: Path | None = None

    async def listen(self, path: str, mode: int = 0o600) -> None:
        """Listen on `path` with the permission bits `mode`; its folder is made if need be.

        The socket of a dead daemon is replaced. Raises OSError: EADDRINUSE when a daemon is alive there, EEXIST when it is
        no socket.
        """
        sock = _bind(path, mode)
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: Session(self), sock=sock)
        except BaseException:
            sock.close()
            raise
        self._path = Path(path)

    async def close(self) -> None:
        """Stop listening, remove the socket, and close all sessions: connections in order, and calls with an error."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
        for session in list(self.sessions):
            session.end()


def _bind(path: str, mode: int) -> socket.socket:
    target = Path(path)
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _remove_stale(target)
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o777)  # nobody connects before the mode is right
    try:
        sock.bind(path)
        target.chmod(mode)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def _remove_stale(path: Path) -> None:
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "exists and is no socket", str(path))
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, "another daemon is listening there", str(path))


class Session(asyncio.Protocol):
    """One client, while it makes calls. Each call is answered before the next is read."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._transport: Any = None
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._series: PingSeries | None = None
        self._leaving = False
        self._waits_for_peer = False
        self._peer_transport: Any = None  # of a connection that is being handed over, or was

    # -- asyncio.Protocol --

    def connection_made(self, transport: Any) -> None:
        """A client."""
        self._transport = transport
        self._server.sessions.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._buffer += data
        if len(self._buffer) > LINE_MAX:
            self._answer(error=OSError(errno.EMSGSIZE, f"a request has at most {LINE_MAX} bytes"))
            self._transport.close()
            return
        self._next()

    def pause_writing(self) -> None:
        """The client does not read: it gets no more of what has no end."""
        if self._series is not None:
            self._series.stop()

    def eof_received(self) -> bool:
        """The client has no more calls, or is gone: what it asked is answered, but what waits for a peer waits no longer."""
        self._leaving = True
        if self._series is not None:
            self._series.stop()
        elif self._task is not None and self._waits_for_peer:
            self._task.cancel()
        return self._task is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: so is what it asked for."""
        self._server.sessions.discard(self)
        if self._task is not None:
            self._task.cancel()

    # -- calls --

    def end(self) -> None:
        """The daemon goes down."""
        if self._peer_transport is not None:
            self._peer_transport.close()
        elif self._task is not None:
            self._task.cancel()
        self._transport.close()

    def _next(self) -> None:
        if self._task is not None:
            return
        line, newline, rest = self._buffer.partition(b"\n")
        if newline:
            self._buffer = rest
            self._task = asyncio.get_running_loop().create_task(self._serve(bytes(line)))
            self._task.add_done_callback(self._on_served)

    def _on_served(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._waits_for_peer = False
        if not task.cancelled() and task.exception() is not None:
            self._transport.abort()
            task.result()
        if not self._transport.is_closing() and self._transport.get_protocol() is self:
            self._next()
            if self._leaving and self._task is None:
                self._transport.close()

    async def _serve(self, line: bytes) -> None:
        try:
            name, args = _parse(line)
            if name in self._server.calls:
                if args:
                    raise OSError(errno.EINVAL, f"{name} takes no arguments")
                self._answer(ok=self._server.calls[name]())
            elif name in _STREAMING:
                answer = _STREAMING[name](self, **args)
                if isawaitable(answer):
                    await answer
            elif name in self._server.actions:
                self._answer(ok=await self._server.actions[name](**args))
            elif name in memory_calls.CALLS:
                done = memory_calls.CALLS[name](self._server.stack, **args)
                self._answer(ok=await done if isawaitable(done) else done)
            else:
                known = ", ".join(sorted((*self._server.calls, *self._server.actions, *_STREAMING, *memory_calls.CALLS)))
                raise OSError(errno.ENOSYS, f"no call {name!r}; there are {known}")
        except OSError as error:
            self._answer(error=error)
        except (TypeError, ValueError) as error:
            # What Python says of arguments that do not fit begins with the name of a method of ours, which nobody knows.
            self._answer(error=OSError(errno.EINVAL, str(error).rpartition("() ")[2]))

    def _send(self, message: dict[str, Any]) -> None:
        if not self._transport.is_closing():
            self._transport.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _answer(self, *, ok: object = None, error: OSError | None = None) -> None:
        if error is None:
            self._send({"ok": ok})
        else:
            code = error.errno if error.errno and error.errno > 0 else errno.EINVAL  # gaierror has numbers of its own
            self._send({"error": {"errno": code, "message": error.strerror or str(error)}})

    async def _capture(self, interface: str | None = None, snaplen: int = SNAPLEN_MAX) -> None:
        """Let the client sniff until it goes away."""
        with capture.sniffer(self._server.stack, self._transport, interface, snaplen):
            self._waits_for_peer = True  # nothing more is said: the end of the client's side ends it
            await asyncio.get_running_loop().create_future()

    async def _ping(
        self,
        host: str,
        count: int | None = None,
        interval: float = 1.0,
        size: int = 56,
        timeout: float = 10.0,  # noqa: ASYNC109
        ttl: int = 0,
        pmtudisc: str = "want",
    ) -> None:
        self._series = series = PingSeries(
            self._server.stack,
            host,
            count=count,
            interval=interval,
            size=size,
            timeout=timeout,
            ttl=ttl,
            pmtudisc=pmtudisc,
            report=lambda event: self._send({"event": event}),
        )
        try:
            self._answer(ok=await series.run())
        finally:
            self._series = None

    # -- connections --

    def _wait_for_peer(self, port: object) -> None:
        if not isinstance(port, int) or not 0 < port < 65536:
            raise OSError(errno.EINVAL, f"{port!r} is no port: allowed is 1 to 65535")
        if self._leaving:
            raise OSError(errno.EPIPE, "a connection is of no use to a client that has ended its side")
        self._waits_for_peer = True

    async def _connect(self, host: str, port: int, memalloc: bool = False, udp: bool = False, map: bool = False) -> None:
        self._wait_for_peer(port)
        stack = self._server.stack
        if map:
            self._check_map(udp)
            stream = stack.socket(family_of(host))
            try:
                stream.set_memalloc(memalloc)
                await stream.connect((host, port))
                self._become_pages(stream, {"local": stream.getsockname(), "peer": stream.getpeername()})
            except BaseException:
                stream.close()
                raise
            return
        if udp:
            if memalloc:
                raise OSError(errno.EOPNOTSUPP, "memalloc is for TCP")
            peer = pack_host(host, stack.interfaces)
            datagrams = stack.udp.socket(wildcard=addresses.ANY4 if len(peer) == 4 else addresses.ANY6)
            try:
                stack.tick()
                datagrams.connect(peer, port)
            except BaseException:
                datagrams.close()
                raise
            self._become_datagrams(datagrams, {"local": _name(datagrams.local), "peer": [host, port]})
            return
        far = StreamEnd()
        transport, _ = await stack.create_connection(lambda: far, host, port, memalloc=memalloc)
        self._become_stream(
            far, {"local": transport.get_extra_info("sockname")[:2], "peer": transport.get_extra_info("peername")[:2]}
        )

    async def _listen(self, port: int, host: str | None = None, udp: bool = False, map: bool = False) -> None:
        """Take one connection; a datagram's sender counts as one."""
        self._wait_for_peer(port)
        stack = self._server.stack
        if map:
            self._check_map(udp)
            with stack.socket(family_of(host or "")) as listener:
                listener.bind((host or "", port))
                listener.listen(1)
                self._answer(ok={"local": listener.getsockname()})
                stream, peer = await listener.accept()
            try:
                self._become_pages(stream, {"peer": peer})
            except BaseException:
                stream.close()
                raise
            return
        arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_arrival(who: Any) -> None:
            if not arrived.done():
                arrived.set_result(who)

        if udp:
            local = pack_host(host, stack.interfaces) if host else None
            datagrams = stack.udp.socket(wildcard=None)
            try:
                datagrams.bind(local, port)
                accept_datagrams(datagrams, on_arrival)
                self._answer(ok={"local": _name(datagrams.local)})
                peer = await arrived
            except BaseException:
                datagrams.close()
                raise
            self._become_datagrams(datagrams, {"peer": _name(peer)})
            return
        ends: list[StreamEnd] = []

        def take_the_first() -> asyncio.BaseProtocol:
            if ends:
                return _Refused()
            ends.append(_Announced(on_arrival))
            return ends[0]

        server: Any = await stack.create_server(take_the_first, host, port, backlog=1)
        try:
            self._answer(ok={"local": server.sockets[0].getsockname()})
            transport = await arrived
        finally:
            server.close()
            if ends and ends[0].transport is not None and (not arrived.done() or arrived.cancelled()):
                ends[0].transport.abort()
        self._become_stream(ends[0], {"peer": transport.get_extra_info("peername")})

    def _check_map(self, udp: bool) -> None:
        if udp:
            raise OSError(errno.EOPNOTSUPP, "only the data of TCP can be mapped")
        if self._server.stack.flipper is None:
            raise OSError(
                errno.EOPNOTSUPP, 'nothing can be mapped: the daemon runs without [memory] zero_copy = "copy" or "scrub"'
            )

    def _become_pages(self, stream: Socket, ok: dict[str, Any]) -> None:
        if self._transport.is_closing():
            stream.close()
            return
        self._peer_transport = pages = PageStream(self._transport, stream, ok, self.connection_lost)
        self._transport.set_protocol(pages)
        if self._buffer:
            pages.data_received(bytes(self._buffer))

    def _become_stream(self, far: StreamEnd, ok: object) -> None:
        if self._transport.is_closing():
            far.transport.abort()
            return
        self._peer_transport = far.transport
        self._answer(ok=ok)
        near = _Client(self)
        near.connection_made(self._transport)
        self._transport.set_protocol(near)
        near.join(far)
        if self._buffer:
            near.data_received(bytes(self._buffer))

    def _become_datagrams(self, datagrams: Any, ok: object) -> None:
        if self._transport.is_closing():
            datagrams.close()
            return
        self._answer(ok=ok)
        end = DatagramEnd(self._server.stack, self._transport, datagrams)
        self._transport.set_protocol(end)
        self._server.sessions.discard(self)
        if self._buffer:
            end.data_received(bytes(self._buffer))


class _Client(StreamEnd):
    """The client's end of a stream; the session that it grew out of ends with it."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def connection_lost(self, exc: Exception | None) -> None:
        self._session.connection_lost(exc)
        super().connection_lost(exc)


class _Announced(StreamEnd):
    """A connection that somebody waits for."""

    __slots__ = ("_on_arrival",)

    def __init__(self, on_arrival: Callable[[Any], None]) -> None:
        super().__init__()
        self._on_arrival = on_arrival

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._on_arrival(transport)


class _Refused(asyncio.Protocol):
    """A connection that came after the one that was waited for."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


_STREAMING: Final[dict[str, Callable[..., Any]]] = {
    "capture": Session._capture,
    "ping": Session._ping,
    "connect": Session._connect,
    "listen": Session._listen,
}


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except ValueError:
        request = None
    if not isinstance(request, dict) or not isinstance(request.get("call"), str):
        raise OSError(errno.EINVAL, 'a request is a line {"call": NAME, "args": {...}}')
    args = request.get("args", {})
    if not isinstance(args, dict):
        raise OSError(errno.EINVAL, "args must be an object")
    return request["call"], args


def _name(address: tuple[bytes | None, int]) -> list[object]:
    return [unpack_host(address[0]), address[1]]
