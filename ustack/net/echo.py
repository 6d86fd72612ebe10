"""Echo clients, what ping is made of, over either version of ICMP (RFC 792; RFC 4443, section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ustack.net.path import PMTUDISC_WANT

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.skb import Buffer


class EchoLayer(Protocol):
    """What an echo client needs of its ICMP."""

    def send_echo(self, ident: int, dst: bytes, seq: int, payload: Buffer, ttl: int, pmtudisc: int) -> bool:
        """Send an echo request; see `Echo.send`."""

    def close_echo(self, ident: int) -> None:
        """End the echo client with the identifier `ident`."""


class Echo:
    """An echo client; see `Icmp.open_echo` and `Icmpv6.open_echo`. `ident` is the identifier of its requests."""

    __slots__ = ("_icmp", "ident", "on_error", "on_reply")

    def __init__(
        self,
        layer: EchoLayer,
        ident: int,
        on_reply: Callable[[bytes, int, bytes, int], None],
        on_error: Callable[[int, int, bytes, int, bytes], None],
    ) -> None:
        self._icmp = layer
        self.ident = ident
        self.on_reply = on_reply
        self.on_error = on_error

    def send(self, dst: bytes, seq: int, payload: Buffer = b"", ttl: int = 0, pmtudisc: int = PMTUDISC_WANT) -> bool:
        """Ask `dst` (packed) with the sequence number `seq` (16 bits); False when the request was dropped here. `ttl` 0: the
        path's own; `pmtudisc` as IP_MTU_DISCOVER has it.

        Raises the OSErrors of `IpLayer.path`, and EMSGSIZE for what does not fit the path and must not be cut.
        """
        return self._icmp.send_echo(self.ident, dst, seq, payload, ttl, pmtudisc)

    def close(self) -> None:
        """Call nobody any more, and free the identifier."""
        self._icmp.close_echo(self.ident)
