"""Collapsing: received data that takes much more memory than it has bytes is copied together into pages (tcp_collapse).

An skb is bloated when less than half of its truesize is payload: short segments in buffers for long ones, or an skb of which
most has been read. A run of bloated skbs is worth copying when the pages that it needs, and their heads, are less than what it
holds. The copy is made a page at a time, and what has been copied is freed before the next page is asked for, so that little
free memory is enough to begin. An ordinary socket's pages never come from the reserve: that is what `gfp` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pools.arena import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.skb import Account, Skb, SkbMemory
    from ustack.transport.tcp.receive_queue import ReceiveQueue


def collapse_in_order(queue: ReceiveQueue, gfp: int) -> int:
    """Collapse the data that waits for the reader; return how many skbs are gone.

    What has been looked at before is not looked at again, so that a peer cannot make every segment cost a walk over the queue.
    """
    skbs: list[Skb] = []
    waiting = queue.queue
    while waiting and waiting[-1].seq >= queue.settled_seq:
        skbs.append(waiting.pop())
    skbs.reverse()
    kept, gone, complete = collapse(queue.memory, queue.account, skbs, gfp)
    waiting.extend(kept)
    if complete and kept:
        queue.settled_seq = kept[-1].seq
    return gone


def collapse_out_of_order(queue: ReceiveQueue, gfp: int) -> int:
    """Collapse what lies beyond a hole (tcp_collapse_ofo_queue), unless nothing has come since the last time; return how many
    skbs are gone.
    """
    if not queue.ofo_changed:
        return 0
    kept, gone, complete = collapse(queue.memory, queue.ofo_account, queue.ofo, gfp)
    queue.ofo[:] = kept
    queue.ofo_changed = not complete
    return gone


def collapse(memory: SkbMemory, account: Account, skbs: Sequence[Skb], gfp: int) -> tuple[list[Skb], int, bool]:
    """Copy what is bloated of `skbs`, which are charged to `account` and lie in the order of their sequence numbers.

    Returns the skbs that hold their data now, how many are gone, and whether there was memory for all that was worth it.
    """
    kept: list[Skb] = []
    before = len(skbs)
    run: list[Skb] = []
    complete = True
    for skb in skbs:
        if run and (skb.seq != run[-1].end_seq or not _is_bloated(skb)):
            complete &= _copy_run(memory, account, run, gfp, kept)
            run = []
        if _is_bloated(skb):
            run.append(skb)
        else:
            kept.append(skb)
    if run:
        complete &= _copy_run(memory, account, run, gfp, kept)
    return kept, before - len(kept), complete


def _is_bloated(skb: Skb) -> bool:
    return skb.truesize > 2 * skb.len


def _cost(length: int, head: int) -> int:
    """Truesize of a copy of so many bytes: whole pages, and a buffer for the rest."""
    rest = length & PAGE_MASK
    cost = (length >> PAGE_SHIFT) * (PAGE_SIZE + head)
    return cost + (1 << (rest - 1).bit_length()) + head if rest else cost


def _copy_run(memory: SkbMemory, account: Account, run: list[Skb], gfp: int, kept: list[Skb]) -> bool:
    """Copy the contiguous skbs of `run` together, free them, and add what holds their data now to `kept`. False when memory
    ended before.
    """
    left = sum(skb.len for skb in run)
    if _cost(left, memory.pool.head_charge) >= sum(skb.truesize for skb in run):
        kept += run
        return True
    first = 0
    while left:
        size = min(left, PAGE_SIZE)
        copy = memory.alloc_paged(1, gfp) if size == PAGE_SIZE else memory.alloc(size, gfp)
        if copy is None:
            kept += run[first:]
            return False
        copy.seq = copy.end_seq = run[first].seq
        while copy.len < size:
            old = run[first]
            part = min(old.len, size - copy.len)
            for view in old.views(0, part):
                copy.append(view)
            if part == old.len:
                old.free()
                first += 1
            else:
                old.pull(part)
                old.seq += part
                old.release_front()
        copy.end_seq += size
        copy.charge_to(account)
        kept.append(copy)
        left -= size
    return True
