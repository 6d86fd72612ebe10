"""The Internet checksum (RFC 1071): ones-complement sums over buffers and over pieces of buffers.

A sum is an ordinary int of any size, because 2**16 = 1 (mod 0xffff): sums are added with `+`, and a sum that starts at an odd
byte is multiplied by 256. Ones-complement arithmetic has two zeros: only a sum of nothing but zero bytes is 0, other multiples
of 0xffff are 0xffff. `fold` keeps that apart, and with it everything here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.skb import Buffer


def fold(total: int) -> int:
    """`total` as the 16-bit ones-complement sum that it stands for: 0 only when `total` is 0."""
    return (total - 1) % 0xFFFF + 1 if total else 0


def finish(total: int) -> int:
    """The value of a checksum field over data that sums up to `total`; 0 when the data includes a correct checksum."""
    return 0xFFFF - fold(total)


def ones_sum(buffer: Buffer) -> int:
    """The 16-bit ones-complement sum of `buffer` in network byte order; an odd length is padded with a zero byte."""
    total = int.from_bytes(buffer, "big")
    if len(buffer) & 1:
        total <<= 8
    return (total - 1) % 0xFFFF + 1 if total else 0


def ones_sum_views(views: Iterable[Buffer]) -> int:
    """The 16-bit ones-complement sum of `views` laid end to end; any of them may have an odd length."""
    total = 0
    odd = False
    for view in views:
        part = ones_sum(view)
        total += part << 8 if odd else part
        if len(view) & 1:
            odd = not odd
    return fold(total)


def pseudo_v4(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The sum of the IPv4 pseudo-header (RFC 9293, section 3.1): 4-byte addresses, `length` in bytes of header and payload."""
    return fold(int.from_bytes(source, "big") + int.from_bytes(destination, "big") + protocol + length)


def pseudo_v6(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The sum of the IPv6 pseudo-header (RFC 8200, section 8.1): 16-byte addresses, `length` in bytes of header and payload."""
    return fold(int.from_bytes(source, "big") + int.from_bytes(destination, "big") + protocol + length)
