"""Explicit congestion notification: a router marks instead of dropping, the receiver says so, the sender slows down (RFC 3168;
what RFC 8311 relaxes is left as it was).

Data that is sent for the first time is marked ECT(0); retransmissions, pure ACKs and everything of the handshake are not.
"""

from __future__ import annotations

from typing import Final

from ustack.wire.tcp import CWR, ECE

ECT_0: Final = 2
CE: Final = 3
"""The ECN field of an IP header (RFC 3168, section 5)."""

ECN_MASK: Final = 3

ASKS_FOR_ECN: Final = ECE | CWR
"""Flags of a SYN that asks for ECN (section 6.1.1)."""

OFF: Final = 0
ALWAYS: Final = 1
ON_REQUEST: Final = 2
"""`TcpConfig.ecn`, as tcp_ecn: not at all; ask for it; only when the peer asks for it."""


class Ecn:
    """One connection's part. `ok`: both sides can do it. `echo`: a mark has been seen, and every ACK says so until the peer
    answers with CWR; `reduced`: we have slowed down, and the next new data is to say so.
    """

    __slots__ = ("echo", "ok", "reduced")

    def __init__(self) -> None:
        self.ok = False
        self.echo = False
        self.reduced = False

    def on_reduction(self) -> None:
        """The window was reduced, for whatever reason (section 6.1.2)."""
        if self.ok:
            self.reduced = True

    def withdraw(self) -> None:
        """The reduction was taken back."""
        self.reduced = False

    def on_data(self, marked: bool, flags: int) -> bool:
        """A data segment with the TCP `flags` arrived; `marked`: a router has met congestion. Returns whether to acknowledge it
        at once.
        """
        hurry = False
        if flags & CWR:
            self.echo = False
            hurry = True  # the peer's window may be small now
        if marked and not self.echo:
            self.echo = True
            hurry = True
        return hurry

    def ack_flags(self) -> int:
        """Flags that every segment carries."""
        return ECE if self.echo else 0
