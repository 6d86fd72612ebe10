"""The socket calls, with the semantics that they have on Linux.

Each takes its arguments and returns its reply: `ret`, and what the call gives beside it. Errors are raised as OSError. A call
waits only where the kernel's would: on a socket without O_NONBLOCK, and without MSG_DONTWAIT.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from base64 import b64encode
from contextlib import contextmanager, suppress
from fcntl import F_GETFL, F_SETFL
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from tools.sockdriver import blocking
from tools.sockdriver.arguments import Arguments, BadRequest, Unsupported
from tools.sockdriver.descriptors import Descriptors, change
from ustack.socket import SIOCINQ, SIOCOUTQ
from ustack.transport.tcp.states import FIN_ACKED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tools.sockdriver.descriptors import Descriptor
    from ustack.stack import Stack

    Reply = dict[str, Any]
    Call = Callable[[Arguments], Awaitable[Reply]]

NO_EFFECT: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | socket.MSG_CMSG_CLOEXEC
"""Flags that the stack need not know: we do the waiting, there are no signals, and no descriptors are passed."""

SEND_FLAGS: Final = NO_EFFECT | socket.MSG_MORE | socket.MSG_FASTOPEN
RECV_FLAGS: Final = NO_EFFECT | socket.MSG_PEEK | socket.MSG_WAITALL | socket.MSG_TRUNC

SOCKET_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

MASK64: Final = (1 << 64) - 1
LINGER: Final = struct.Struct("ii")
LINGER_TICK: Final = 0.001
"""Seconds between two looks at whether the peer has acknowledged the FIN of a lingering close, which nobody is told of."""


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Calls:
    """A process: its sockets on `stack`, and the calls that it can make, by name in `table`."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._open = Descriptors()
        self.table: dict[str, Call] = {
            "socket": self.socket,
            "bind": self.bind,
            "listen": self.listen,
            "accept": self.accept,
            "connect": self.connect,
            **dict.fromkeys(("read", "recv", "recvfrom", "readv"), self.receive),
            "recvmsg": self.recvmsg,
            **dict.fromkeys(("write", "send", "sendto", "writev", "sendmsg"), self.send),
            "close": self.close,
            "shutdown": self.shutdown,
            "setsockopt": self.setsockopt,
            "getsockopt": self.getsockopt,
            "fcntl": self.fcntl,
            "poll": self.poll,
            "ioctl": self.ioctl,
        }

    def _get(self, args: Arguments) -> Descriptor:
        return self._open.get(args.number("fd"))

    # -- opening --

    async def socket(self, args: Arguments) -> Reply:
        """socket(2): AF_INET or AF_INET6; SOCK_STREAM or SOCK_DGRAM."""
        kind = args.number("type") | args.flags("flags")
        try:
            sock = self._stack.socket(args.number("domain"), kind & ~SOCKET_FLAGS)
        except OSError as error:
            raise Unsupported(f"{args.get('domain')} with {args.get('type')}: {error.strerror}") from None
        if args.number("proto", 0) not in (0, sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)):
            raise Unsupported(f"protocol {args.get('proto')}")
        return {"ret": self._open.add(sock, nonblocking=kind & socket.SOCK_NONBLOCK != 0)}

    async def bind(self, args: Arguments) -> Reply:
        """bind(2)"""
        self._get(args).socket.bind(_address(args))
        return {"ret": 0}

    async def listen(self, args: Arguments) -> Reply:
        """listen(2)"""
        self._get(args).socket.listen(args.number("backlog"))
        return {"ret": 0}

    async def accept(self, args: Arguments) -> Reply:
        """accept(2). O_NONBLOCK is not inherited."""
        descriptor = self._get(args)
        accepted, peer = await blocking.attempt(descriptor, descriptor.socket.accept_nowait)
        return {"ret": self._open.add(accepted), "addr": list(peer[:2])}

    async def connect(self, args: Arguments) -> Reply:
        """connect(2), with AF_UNSPEC as well."""
        descriptor = self._get(args)
        if args.number("family", socket.AF_INET) == socket.AF_UNSPEC:
            descriptor.socket.disconnect()
            descriptor.changed()
        else:
            address = _address(args)
            await blocking.attempt(descriptor, lambda: descriptor.socket.connect_nowait(address))
        return {"ret": 0}

    # -- data --

    async def receive(self, args: Arguments) -> Reply:
        """read(2), readv(2), recv(2) and recvfrom(2). MSG_TRUNC throws away what a stream has read (tcp(7))."""
        flags = args.flags("flags")
        size = args.sizes()
        if size < 0:
            raise _error(errno.EINVAL)
        if flags & ~RECV_FLAGS:
            raise Unsupported(f"flags {args.get('flags')}")
        descriptor = self._get(args)
        discarded = flags & socket.MSG_TRUNC
        if discarded and descriptor.socket.datagram is not None:
            raise Unsupported("MSG_TRUNC for datagrams")
        if args.get("null") and not discarded:
            if await blocking.receive(descriptor, size, flags | socket.MSG_PEEK):
                raise _error(errno.EFAULT)
            return {"ret": 0, "data": ""}
        data = await blocking.receive(descriptor, size, flags)
        return {"ret": len(data)} if discarded else {"ret": len(data), "data": b64encode(data).decode()}

    async def recvmsg(self, args: Arguments) -> Reply:
        """recvmsg(2). Of our options only TCP_INQ gives control messages."""
        reply = await self.receive(args)
        control = self._get(args).socket.control_messages()
        cmsgs = [{"level": level, "type": kind, "data": data.hex()} for level, kind, data in control]
        return {**reply, "msg_flags": 0, "cmsgs": cmsgs}

    async def send(self, args: Arguments) -> Reply:
        """write(2), writev(2), send(2), sendto(2) and sendmsg(2)."""
        flags = args.flags("flags")
        if flags & ~SEND_FLAGS:
            raise Unsupported(f"flags {args.get('flags')}")
        if args.get("control"):
            raise Unsupported("control messages")
        descriptor = self._get(args)
        data = args.data()
        if args.get("null") and args.sizes():
            raise _error(errno.EFAULT)
        if descriptor.socket.datagram is not None and args.get("addr") is not None:
            return {"ret": descriptor.socket.sendto_nowait(data, _address(args))}
        if flags & socket.MSG_FASTOPEN:
            if args.number("family", socket.AF_INET) == socket.AF_UNSPEC:
                raise _error(errno.EOPNOTSUPP)
            return {"ret": await self._fast_open(descriptor, data, flags, _address(args))}
        return {"ret": await blocking.send(descriptor, data, flags)}

    async def _fast_open(self, descriptor: Descriptor, data: bytes, flags: int, address: tuple[str, int]) -> int:
        """sendto(2) with MSG_FASTOPEN: connect with what fits the SYN; a call that waits then sends the rest."""
        waits = not (descriptor.nonblocking or flags & socket.MSG_DONTWAIT)
        sent = 0
        conn = descriptor.socket.stream
        if conn is not None and conn.synchronized:
            return await blocking.send(descriptor, data, flags & ~socket.MSG_FASTOPEN)
        try:
            sent = descriptor.socket.sendto_nowait(data, address, socket.MSG_FASTOPEN)
        except BlockingIOError:
            if not waits:
                raise
        if waits:
            await blocking.attempt(descriptor, lambda: descriptor.socket.connect_nowait(address))
            sent += await blocking.send(descriptor, data[sent:], flags)
        return sent

    # -- ending --

    async def close(self, args: Arguments) -> Reply:
        """close(2). With SO_LINGER it waits until the peer has acknowledged everything, O_NONBLOCK or not."""
        descriptor = self._open.remove(args.number("fd"))
        conn = descriptor.socket.stream
        deadline = monotonic() + descriptor.socket.options.linger
        descriptor.socket.close()
        descriptor.changed()
        while conn is not None and conn.state in FIN_ACKED and monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(LINGER_TICK)
        return {"ret": 0}

    async def shutdown(self, args: Arguments) -> Reply:
        """shutdown(2)"""
        descriptor = self._get(args)
        descriptor.socket.shutdown(args.number("how"))
        descriptor.changed()
        return {"ret": 0}

    # -- options and state --

    async def setsockopt(self, args: Arguments) -> Reply:
        """setsockopt(2)"""
        descriptor = self._get(args)
        value = args.get("value")
        if value is None:
            raise _error(errno.EFAULT)
        if isinstance(value, dict):
            value = _linger(Arguments(value))
        elif isinstance(value, int):
            value = (value & MASK64).to_bytes(8, "little")[: max(args.number("len", 4), 0)]
        elif isinstance(value, str):
            value = value.encode()
        else:
            raise BadRequest(f"an option cannot be set to {value!r}")
        level, option = args.number("level"), args.number("opt")
        with _option(args):
            descriptor.socket.setsockopt(level, option, value)
        descriptor.changed()
        return {"ret": 0}

    async def getsockopt(self, args: Arguments) -> Reply:
        """getsockopt(2)"""
        descriptor = self._get(args)
        level, option = args.number("level"), args.number("opt")
        if args.number("len", 4) < 0:
            raise _error(errno.EINVAL)
        with _option(args):
            value = descriptor.socket.getsockopt(level, option)
        if isinstance(value, bytes):
            return {"ret": 0, "value": list(LINGER.unpack(value))}
        return {"ret": 0, "value": value}

    async def fcntl(self, args: Arguments) -> Reply:
        """fcntl(2): F_GETFL and F_SETFL, which know O_NONBLOCK."""
        descriptor = self._get(args)
        command = args.number("cmd")
        if command == F_GETFL:
            return {"ret": os.O_RDWR | (os.O_NONBLOCK if descriptor.nonblocking else 0)}
        if command != F_SETFL:
            raise Unsupported(f"fcntl {args.get('cmd')}")
        descriptor.nonblocking = args.flags("arg") & os.O_NONBLOCK != 0
        return {"ret": 0}

    async def ioctl(self, args: Arguments) -> Reply:
        """ioctl(2): SIOCINQ, by this and by its other name FIONREAD, and SIOCOUTQ."""
        descriptor = self._get(args)
        request = args.number("cmd")
        if request not in (SIOCINQ, SIOCOUTQ):
            raise Unsupported(f"ioctl {args.get('cmd')}")
        return {"ret": 0, "value": descriptor.socket.ioctl(request)}

    async def poll(self, args: Arguments) -> Reply:
        """poll(2)"""
        asked: list[tuple[int, int]] = []
        fds = args.get("fds", [])
        if not isinstance(fds, list) or not all(isinstance(each, dict) for each in fds):
            raise BadRequest("'fds' is not a list of objects")
        for entry in map(Arguments, fds):
            asked.append((entry.number("fd"), entry.flags("events")))
        timeout = args.number("timeout", -1)
        revents = self._ready(asked)
        if timeout and not any(revents):
            with suppress(TimeoutError):
                async with asyncio.timeout(None if timeout < 0 else timeout / 1000):
                    while not any(revents):
                        await change(found for fd, _ in asked if (found := self._open.find(fd)) is not None)
                        revents = self._ready(asked)
        return {"ret": sum(events != 0 for events in revents), "revents": revents}

    def _ready(self, asked: list[tuple[int, int]]) -> list[int]:
        revents = []
        for fd, events in asked:
            found = self._open.find(fd)
            if found is not None:
                revents.append(found.socket.poll(events))
            else:
                revents.append(select.POLLNVAL if fd >= 0 else 0)
        return revents


def _address(args: Arguments) -> tuple[str, int]:
    return args.text("addr"), args.number("port")


@contextmanager
def _option(args: Arguments) -> Iterator[None]:
    """An option that our stack does not have makes the test impossible, not wrong."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        raise Unsupported(f"option {args.get('opt')} of {args.get('level')}") from None


def _linger(value: Arguments) -> bytes:
    """A struct linger."""
    try:
        return LINGER.pack(value.number("onoff", 0), value.number("linger", 0))
    except struct.error as error:
        raise BadRequest(f"linger: {error}") from None
