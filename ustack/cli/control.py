"""The client's side of the control socket (see `ustack.daemon.control` for the protocol)."""

from __future__ import annotations

import errno
import json
import socket
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from ustack.daemon.paths import default_control_path

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., Any]")


def control_option(command: Command) -> Command:
    """Give `command` the option --control."""
    return click.option(
        "--control",
        metavar="PATH",
        default=default_control_path,
        show_default="the daemon's own",
        help="Control socket of the daemon.",
    )(command)


class Control:
    """A connection to the daemon's control socket at `path`. Raises OSError that says what to do when no daemon is there."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self.socket.connect(path)
        except OSError as error:
            self.socket.close()
            raise _no_daemon(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, name: str, /, **args: Any) -> None:
        """Ask for the call `name`."""
        self.socket.sendall(_request(name, args))

    def receive(self) -> dict[str, Any]:
        """The next line of the answer: a dict with the key `ok` or `event`. Raises OSError for an error, or without an answer.

        Not one byte behind the line is taken, since what follows may be a connection's.
        """
        line = bytearray()
        while not line.endswith(b"\n"):
            seen = self.socket.recv(0xFFFF, socket.MSG_PEEK)
            if not seen:
                raise OSError(errno.ECONNRESET, "the daemon has closed the control socket")
            line += self.socket.recv(seen.find(b"\n") + 1 or len(seen))
        return _answer(bytes(line))

    def call_for_descriptors(self, name: str, count: int, **args: Any) -> tuple[Any, list[int]]:
        """Ask, and return the answer and the `count` descriptors that come with it, which are the caller's."""
        self.send(name, **args)
        line, fds, _, _ = socket.recv_fds(self.socket, 0xFFFF, count)
        while not line.endswith(b"\n"):
            more = self.socket.recv(0xFFFF)
            if not more:
                raise OSError(errno.ECONNRESET, "the daemon has closed the control socket")
            line += more
        return _answer(line)["ok"], fds

    def call(self, name: str, /, **args: Any) -> Any:
        """Ask, and return the answer."""
        self.send(name, **args)
        return self.receive()["ok"]


def call(path: str, name: str, **args: Any) -> Any:
    """Make one call of the daemon at `path` and return its answer. Any error becomes click's, with a sentence."""
    try:
        with Control(path) as control:
            return control.call(name, **args)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None


async def open_tcp_through_daemon(
    path: str, host: str, port: int, protocol_factory: Callable[[], asyncio.BaseProtocol], memalloc: bool = False
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """Connect to `host` and `port` over the stack of the daemon at `path`, and give the connection to a protocol.

    The transport is that of the control socket, which has become the connection. `memalloc` lets it use the daemon's
    reserve. Raises OSError: that of the connection attempt, or what is wrong with the daemon.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            await loop.sock_connect(sock, path)
        except OSError as error:
            raise _no_daemon(path, error) from None
        await loop.sock_sendall(sock, _request("connect", {"host": host, "port": port, "memalloc": memalloc}))
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = await loop.sock_recv(sock, 1)  # one by one: what follows the line is the connection's
            if not byte:
                raise OSError(errno.ECONNRESET, "the daemon has closed the control socket")
            line += byte
        _answer(bytes(line))
        return await loop.create_unix_connection(protocol_factory, sock=sock)
    except BaseException:
        sock.close()
        raise


def _request(name: str, args: dict[str, Any]) -> bytes:
    return json.dumps({"call": name, "args": args}).encode() + b"\n"


def _answer(line: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise OSError(answer["error"]["errno"], answer["error"]["message"])
    return answer


def _no_daemon(path: str, error: OSError) -> OSError:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        hint = "no daemon listens there; start one with `ustack daemon -c FILE`, or name its socket with --control"
    elif error.errno in (errno.EACCES, errno.EPERM):
        hint = "you may not connect; the daemon's [control] mode says who may"
    else:
        hint = error.strerror or str(error)
    return OSError(error.errno, f"{path}: {hint}")
