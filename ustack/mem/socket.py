"""What one socket holds of its protocol's memory: three accounts, and the pages taken ahead of them.

An skb may be charged once `rmem_schedule` or `wmem_schedule` has agreed. Most of the time that is one comparison with
`forward_alloc`, the bytes that the socket has taken in whole pages and not used; when they do not suffice, more pages are asked
for, by the rules of `ProtocolMemory`. What is freed refills `forward_alloc`, and whole pages of it go back at once, so that
no socket ever sits on memory that it does not use (sk_mem_uncharge, sk_mem_reclaim of Linux 6).

At every moment: pages taken * PAGE_SIZE = bytes charged + `forward_alloc`, and 0 <= `forward_alloc`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from ustack.skb import Account

if TYPE_CHECKING:
    from ustack.mem.protocol import ProtocolMemory

SOCK_MIN_SNDBUF: Final = 4608
"""Bytes below which no send limit goes."""


class SocketAccount(Account):
    """One of a socket's accounts: what is charged to it uses up the socket's forward allocation, and what is freed refills
    it.
    """

    __slots__ = ("owner",)

    def __init__(self, name: str, parent: Account | None, owner: SocketMemory) -> None:
        super().__init__(name, parent)
        self.owner = owner

    def charge(self, truesize: int) -> None:
        """Add `truesize` bytes. What was not scheduled is taken now, over any limit (sk_forced_mem_schedule)."""
        held = self.bytes = self.bytes + truesize  # as in Account.charge, which is not called: this is once per packet
        if held > self.peak:
            self.peak = held
        parent = self.parent
        if parent is not None:
            held = parent.bytes = parent.bytes + truesize
            if held > parent.peak:
                parent.peak = held
        owner = self.owner
        left = owner.forward_alloc - truesize
        if left < 0:
            pages = (PAGE_MASK - left) >> PAGE_SHIFT
            protocol = owner.protocol
            total = protocol.allocated = protocol.allocated + pages
            if total > protocol.peak:
                protocol.peak = total
            left += pages << PAGE_SHIFT
        owner.forward_alloc = left

    def uncharge(self, truesize: int) -> None:
        """Take `truesize` bytes off again, and give back the pages that are not needed any more."""
        self.bytes -= truesize
        if self.parent is not None:
            self.parent.bytes -= truesize
        owner = self.owner
        left = owner.forward_alloc + truesize
        if left >= PAGE_SIZE:
            owner.protocol.give(left >> PAGE_SHIFT)
            left &= PAGE_MASK
        owner.forward_alloc = left


class SocketMemory:
    """The memory of one socket: `receive`, `ofo` (received out of order) and `send`, each with its parent account.

    `drops` counts the packets that were dropped for want of it, or because the user had left (sk_drops).
    """

    __slots__ = ("_shares", "drops", "forward_alloc", "ofo", "protocol", "receive", "send")

    def __init__(self, protocol: ProtocolMemory, receive: Account, ofo: Account | None, send: Account | None) -> None:
        self.protocol = protocol
        self.receive = SocketAccount("receive", receive, self)
        self.ofo = SocketAccount("out of order", ofo, self)
        self.send = SocketAccount("send", send, self)
        self.forward_alloc = 0
        self.drops = 0
        self._shares = False

    @property
    def rmem_alloc(self) -> int:
        """Bytes of truesize received and not read."""
        return self.receive.bytes + self.ofo.bytes

    def ample(self, size: int) -> bool:
        """Whether a packet with `size` bytes of payload may be charged without asking: below `low` and without pressure every
        page is granted, and charging takes them.
        """
        mem = self.protocol
        most = mem.allocated + ((size + 2 * PAGE_SIZE) >> PAGE_SHIFT)
        return most <= mem.low and not (mem.over_pressure or mem.pages.under_pressure)

    def rmem_schedule(self, size: int, critical: bool) -> bool:
        """Make sure that a packet of truesize `size` may be charged to the receive side; false when it must not.

        `critical` is a packet that passes whatever the limits say: one for a memalloc socket. (Linux asks whether the skb lies
        in the reserve, sk_rmem_schedule; here also one in ordinary memory passes, since what others hold of it must never
        stop the socket that everything waits for.)
        """
        if size <= self.forward_alloc or critical:
            return True
        return self._raise(size, self.receive.bytes + self.ofo.bytes, self.protocol.rmem_min)

    def wmem_schedule(self, size: int, sndbuf: int, critical: bool) -> bool:
        """The same for the send side, whose own limit is `sndbuf`. A socket that has reached it is let through, since it must
        wait for that and not for the protocol (sk_wmem_schedule).
        """
        if size <= self.forward_alloc or critical:
            return True
        held = self.send.bytes
        return self._raise(size, held, self.protocol.wmem_min) or held + size >= sndbuf

    def _raise(self, size: int, held: int, minimum: int) -> bool:
        pages = (size - self.forward_alloc + PAGE_MASK) >> PAGE_SHIFT
        total = self.receive.bytes + self.ofo.bytes + self.send.bytes + self.forward_alloc
        if not self.protocol.take(pages, held, minimum, total):
            return False
        self.forward_alloc += pages << PAGE_SHIFT
        return True

    def reclaim(self) -> None:
        """Give back the whole pages that were scheduled and not used (sk_mem_reclaim)."""
        pages = self.forward_alloc >> PAGE_SHIFT
        if pages:
            self.forward_alloc &= PAGE_MASK
            self.protocol.give(pages)

    def accept_in_order(self, truesize: int) -> None:
        """A packet of that truesize has moved from `ofo` to `receive`: the socket holds as much as before."""
        Account.uncharge(self.ofo, truesize)
        Account.charge(self.receive, truesize)

    def join(self) -> None:
        """From now on the socket counts as one of those that share the protocol's memory."""
        if not self._shares:
            self._shares = True
            self.protocol.sockets += 1

    def leave(self) -> None:
        """It counts no longer, and what it took ahead goes back."""
        if self._shares:
            self._shares = False
            self.protocol.sockets -= 1
        self.reclaim()
