"""Compaction: queued packets are moved together, and the pages that become empty go back to the page allocator.

The kernel cannot do this, because anybody may keep a pointer into a packet. Here a packet's addresses are known to its skb
and to nobody else, which makes the skb a handle. What a clone shares stays where it is; pages that hang on an skb as fragments
need not move, since they are whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pools.base import NULL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.skb import Skb, SkbMemory


def compact(memory: SkbMemory, skbs: Iterable[Skb]) -> int:
    """Let the pool move the heads and linear parts of `skbs`, into which nobody holds a view; return the pages given back."""
    owners: dict[int, Skb] = {}
    for skb in skbs:
        owners[skb.head] = skb
        if skb.addr != NULL and skb.dataref is None:
            owners[skb.addr] = skb

    def moved(old: int, new: int) -> None:
        skb = owners.pop(old)
        if skb.head == old:
            skb.head = new
        else:
            skb.data += new - old
            skb.tail += new - old
            skb.addr = new
        owners[new] = skb

    return memory.pool.compact(frozenset(owners), moved)
