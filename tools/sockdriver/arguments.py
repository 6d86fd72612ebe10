"""The arguments of a call, as they come in a line of JSON: names of constants, lists of flags, base64."""

from __future__ import annotations

import binascii
import fcntl
import os
import select
import socket
import termios
from base64 import b64decode
from typing import Any, Final

from ustack.socket_options import TCP_FASTOPEN_CONNECT, TCP_INQ

_MODULES: Final = (socket, select, os, fcntl)

_MORE_NAMES: Final = {
    "SIOCINQ": termios.FIONREAD,
    "FIONREAD": termios.FIONREAD,
    "SIOCOUTQ": termios.TIOCOUTQ,
    "TCP_FASTOPEN_CONNECT": TCP_FASTOPEN_CONNECT,
    "TCP_INQ": TCP_INQ,
    "TCP_CM_INQ": TCP_INQ,
}
"""Constants that Python's modules know by other names."""


class Unsupported(Exception):
    """Our stack does not have this at all: the test cannot be run. The text says what it is."""


class BadRequest(Exception):
    """The line is not what the protocol says. The text says why."""


def constant(name: object) -> int:
    """The number behind the name of a constant of Linux's headers; numbers are themselves. Raises Unsupported for a name that
    we have never heard of.
    """
    if isinstance(name, int):
        return int(name)
    if not isinstance(name, str):
        raise BadRequest(f"{name!r} is not the name of a constant")
    if name in _MORE_NAMES:
        return _MORE_NAMES[name]
    if name.isupper() or "_" in name:
        for module in _MODULES:
            value = getattr(module, name, None)
            if isinstance(value, int):
                return int(value)
    raise Unsupported(f"unknown constant {name}")


class Arguments:
    """What a line has under "args". A key that is null is one that is not there."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it came."""
        return self._values.get(key, default)

    def number(self, key: str, default: int | None = None) -> int:
        """A number or the name of a constant. Raises BadRequest when there is none and no `default`."""
        value = self._values.get(key, default)
        if value is None:
            raise BadRequest(f"no argument {key!r}")
        return constant(value)

    def flags(self, key: str) -> int:
        """A set of flags, given as a list of names, or as one name or number; 0 when there is none."""
        value = self._values.get(key, 0)
        flags = 0
        for name in value if isinstance(value, list) else [value]:
            flags |= constant(name)
        return flags

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises BadRequest when there is none and no `default`."""
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise BadRequest(f"no string {key!r}")
        return value

    def sizes(self) -> int:
        """The bytes of all buffers together: `len`, or the sum of `lens`."""
        lens = self._values.get("lens")
        if lens is None:
            return self.number("len")
        if not isinstance(lens, list):
            raise BadRequest("'lens' is not a list")
        return sum(constant(each) for each in lens)

    def data(self) -> bytes:
        """The bytes to send: `data`, or as many zeros as the lengths say."""
        encoded = self._values.get("data")
        if encoded is None:
            return bytes(max(self.sizes(), 0))
        try:
            return b64decode(encoded, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise BadRequest(f"'data': {error}") from None
