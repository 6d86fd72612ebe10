"""What a receiver does that has no room: shrink the window, collapse, give up out-of-order data, and only then drop.

In the order of Linux (net/ipv4/tcp_input.c: tcp_try_rmem_schedule, tcp_prune_queue, tcp_prune_ofo_queue, tcp_clamp_window). It
is decided before anything is allocated for the segment. Left out is `pred_flags`: header prediction has no state here, and a
predicted segment comes by here like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.transport.tcp.collapse import collapse_in_order, collapse_out_of_order
from ustack.transport.tcp.output import PRESSURE_SEGMENTS, WINDOW_UNCLAMPED

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

OVERCOMMIT_SEGMENTS: Final = 2
"""Full segments that the window is limited to while the receive queue is over its limit (tcp_clamp_window)."""

PRUNE_SHIFT: Final = 3
"""Out-of-order data is given up an eighth of the receive limit at a time."""


def make_room(conn: Connection, seq: int, truesize: int) -> DropReason | None:
    """See to it that a segment that begins at `seq` may be charged with `truesize` bytes (tcp_try_rmem_schedule). Returns why
    it must be dropped, or None.
    """
    charges = conn.charges
    critical = conn.options.memalloc
    if charges.receive.bytes + charges.ofo.bytes > conn.rcvbuf or not charges.rmem_schedule(truesize, critical):
        if not prune_queue(conn, seq):
            return DropReason.SOCKET_RCVBUFF
        while not charges.rmem_schedule(truesize, critical):
            if not prune_ofo_queue(conn, seq):
                return DropReason.PROTO_MEM
    return None


def prune_queue(conn: Connection, seq: int) -> bool:
    """Bring the receive queues below their limit, for a segment that begins at `seq` (tcp_prune_queue); whether they are."""
    queue = conn.receive_queue
    mib = conn.tcp.env.mib
    mib.TcpExtPruneCalled += 1
    if queue.truesize >= conn.rcvbuf:
        _clamp_window(conn)
    elif conn.under_pressure():
        conn.rcv_ssthresh = min(conn.rcv_ssthresh, PRESSURE_SEGMENTS * conn.adv_mss)
    if queue.truesize <= conn.rcvbuf:
        return True
    mib.TcpExtTCPRcvCollapsed += collapse_out_of_order(queue, conn.gfp) + collapse_in_order(queue, conn.gfp)
    if queue.truesize <= conn.rcvbuf:
        return True
    prune_ofo_queue(conn, seq)
    if queue.truesize <= conn.rcvbuf:
        return True
    mib.TcpExtRcvPruned += 1
    return False


def prune_ofo_queue(conn: Connection, seq: int) -> bool:
    """Give up out-of-order data from the highest sequence number on, but none from before `seq`: until the queues are within
    their limit, or all of it under pressure (tcp_prune_ofo_queue). Returns whether there was any.
    """
    queue = conn.receive_queue
    env = conn.tcp.env
    pruned = 0
    while count := queue.prune_out_of_order(seq, conn.rcvbuf >> PRUNE_SHIFT):
        pruned += count
        if queue.truesize <= conn.rcvbuf and not conn.under_pressure():
            break
    if not pruned:
        return False
    env.mib.TcpExtOfoPruned += 1
    env.drops.counts[DropReason.TCP_OFO_QUEUE_PRUNE] += pruned
    conn.charges.drops += pruned
    return True


def _clamp_window(conn: Connection) -> None:
    """The queues are over their limit: let it follow as long as there is plenty of memory, else make the window small
    (tcp_clamp_window).
    """
    conn.quick_acks = 0
    held = conn.receive_queue.truesize
    mem = conn.tcp.mem
    most = min(conn.tcp.config.rmem_max, mem.most_for_one())
    if conn.rcvbuf < most and not conn.options.rcvbuf and mem.allocated < mem.low and not conn.under_pressure():
        conn.rcvbuf = min(held, most)
    if held > conn.rcvbuf:
        conn.rcv_ssthresh = min(conn.rcv_ssthresh, OVERCOMMIT_SEGMENTS * conn.adv_mss)


def grow_window(conn: Connection, size: int) -> None:
    """`size` bytes came in order while the window was clamped: let it open again unless memory is still short
    (tcp_grow_window).
    """
    if conn.under_pressure() or conn.receive_queue.truesize > conn.rcvbuf:
        return
    conn.rcv_ssthresh += 2 * max(conn.adv_mss, size)
    if conn.rcv_ssthresh >= conn.rcvbuf * conn.win_ratio >> 8:
        conn.rcv_ssthresh = WINDOW_UNCLAMPED
