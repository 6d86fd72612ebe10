"""Attempts that wait: what blocking sockets do on Linux, made of calls that never wait."""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, TypeVar

from tools.sockdriver.descriptors import change

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.sockdriver.descriptors import Descriptor

T = TypeVar("T")


async def attempt(descriptor: Descriptor, call: Callable[[], T]) -> T:
    """Make `call` until it does not raise BlockingIOError; once, with O_NONBLOCK."""
    while True:
        try:
            return call()
        except BlockingIOError:
            if descriptor.nonblocking:
                raise
        await change([descriptor])


async def receive(descriptor: Descriptor, size: int, flags: int) -> bytes:
    """Up to `size` bytes, and not fewer with MSG_WAITALL unless the stream or O_NONBLOCK forbids. An error that comes in the
    middle is left for the next call.
    """
    sock = descriptor.socket
    peek = flags & socket.MSG_PEEK
    waits = not (descriptor.nonblocking or flags & socket.MSG_DONTWAIT)
    wanted = size if flags & socket.MSG_WAITALL else min(sock.options.rcvlowat, size)
    if not waits:
        wanted = 1
    data = b""
    while not (data and sock.poll(0)):
        try:
            chunk = sock.recv_nowait(size if peek else size - len(data), peek)
        except BlockingIOError:
            if not waits:
                raise
        else:
            data = chunk if peek else data + chunk
            if not chunk or len(data) >= wanted or sock.poll(select.POLLRDHUP):
                break
        await change([descriptor])
    return data


async def send(descriptor: Descriptor, data: bytes, flags: int) -> int:
    """All of `data`; with O_NONBLOCK what there is room for. An error that comes in the middle is left for the next call."""
    sock = descriptor.socket
    waits = not (descriptor.nonblocking or flags & socket.MSG_DONTWAIT)
    view = memoryview(data)
    sent = 0
    while not (sent and sock.poll(0)):
        try:
            sent += sock.send_nowait(view[sent:], flags & socket.MSG_MORE)
        except BlockingIOError:
            if not waits:
                raise
        except BrokenPipeError:
            if not sent:
                raise
            break
        if sent == len(view) or not waits:
            break
        await change([descriptor])
    return sent
