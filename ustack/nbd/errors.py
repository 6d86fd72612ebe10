"""What can go wrong between two NBD peers, as OSErrors.

Errors of single requests are plain OSErrors with the errno that the server named. These are for the rest: a peer that breaks
the protocol, a server that refuses an option, and a read of which a part is good.
"""

from __future__ import annotations

import errno
import os

from ustack.nbd.constants import MAX_STRING, OPTION_NAMES, REFUSALS


class NbdProtocolError(OSError):
    """The peer broke a mandatory rule of the protocol; the connection cannot be used any more. `errno` is EPROTO."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EPROTO, message)


class NbdNotFixedError(NbdProtocolError):
    """The server does not speak fixed newstyle, so it can be used but not asked."""


class NbdOptionError(OSError):
    """The server answered an option with an error reply (NBD_REP_ERR_*).

    `option` and `reply` are the numbers on the wire, `text` is the server's own explanation, possibly empty. `errno` says the
    same in the system's terms: ENOENT for an unknown export, EACCES for policy, ENOTSUP for what the server does not do, and so
    on.
    """

    def __init__(self, option: int, reply: int, text: str) -> None:
        name, code, meaning = REFUSALS.get(reply, (f"option error {reply:#x}", errno.EINVAL, "unknown kind of refusal"))
        said = f': "{text}"' if text else ""
        super().__init__(code, f"{OPTION_NAMES.get(option, f'option {option}')} refused with {name} ({meaning}){said}")
        self.option = option
        self.reply = reply
        self.text = text


class NbdReadError(OSError):
    """A read failed on the server, which told where (NBD_REPLY_TYPE_ERROR_OFFSET): the first `valid_bytes` bytes of that
    request are good all the same."""

    def __init__(self, code: int, message: str, valid_bytes: int) -> None:
        super().__init__(code, message)
        self.valid_bytes = valid_bytes


def decode_name(data: bytes | bytearray | memoryview, what: str) -> str:
    """Decode an export name: at most 4096 bytes of UTF-8 without NUL ("Conventions"), else NbdProtocolError naming `what`."""
    if len(data) > MAX_STRING:
        raise NbdProtocolError(f"{what} of {len(data)} bytes; a string has at most {MAX_STRING}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        raise NbdProtocolError(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise NbdProtocolError(f"{what} contains NUL")
    return text


def decode_message(data: bytes | bytearray | memoryview) -> str:
    """Decode a text for humans. It may end up on a terminal, so whatever is not printable becomes U+FFFD instead of an
    error."""
    text = str(data[:MAX_STRING], "utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def describe_errno(code: int) -> str:
    """`EIO (Input/output error)` for 5: how errors are written in our messages."""
    return f"{errno.errorcode.get(code, str(code))} ({os.strerror(code)})"
