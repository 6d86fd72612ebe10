"""What must be true of a connection at every moment, whatever arrives and whatever its user does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from ustack.transport.tcp.connection import Connection
from ustack.transport.tcp.states import State

if TYPE_CHECKING:
    from ustack.stack import Stack


class Watch:
    """Looks at every connection of a stack, and remembers what must never move back."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._edges: dict[Connection, tuple[int, int, int]] = {}

    def check(self) -> None:
        """Raises `AssertionError` for a connection that is in a state that cannot be."""
        tcp = self.stack.tcp
        charged = tcp.receive_account.bytes + tcp.ofo_account.bytes + tcp.send_account.bytes
        assert (tcp.mem.allocated << PAGE_SHIFT) - charged >= 0, "more is charged than pages were taken"
        connections = [conn for conn in tcp.connections.values() if isinstance(conn, Connection)]
        for conn in connections:
            check_connection(conn)
            if conn.synchronized:
                una, nxt, adv = self._edges.get(conn, (conn.snd_una, conn.rcv_nxt, conn.rcv_adv))
                assert conn.snd_una >= una, "SND.UNA went back"
                assert conn.rcv_nxt >= nxt, "RCV.NXT went back"
                assert conn.rcv_adv >= adv, "the window shrank"
                self._edges[conn] = conn.snd_una, conn.rcv_nxt, conn.rcv_adv
        half_open = {conn for listener in tcp.listeners.values() for conn in listener.half_open}
        assert all(conn.state is State.SYN_RECV for conn in half_open)
        assert half_open == {conn for conn in connections if conn.listener is not None}


def check_connection(conn: Connection) -> None:
    """The invariants of one connection that is not closed."""
    assert conn.state not in (State.CLOSE, State.LISTEN, State.TIME_WAIT)
    # sending
    assert conn.iss <= conn.snd_una <= conn.snd_nxt
    segments = conn.inflight.segments
    conn.inflight.check()
    if segments:
        assert segments[0].seq == max(conn.snd_una, conn.iss + 1)
        assert segments[-1].end == conn.snd_nxt
    elif conn.synchronized:
        assert conn.snd_una == conn.snd_nxt
    assert conn.inflight.in_flight() >= 0
    assert conn.cc.cwnd > 0
    send_queue = conn.send_queue
    assert send_queue.start <= send_queue.end
    if conn.synchronized:
        assert conn.snd_nxt <= send_queue.end + 1
    assert send_queue.account.bytes == sum(skb.truesize for skb in send_queue._skbs)
    if segments:
        assert conn.retransmit_timer.pending, "data is out, and nothing watches it"
    # receiving
    if conn.state is State.SYN_SENT:
        return
    assert conn.irs < conn.rcv_nxt <= conn.rcv_adv
    assert conn.rcv_wup <= conn.rcv_nxt
    assert conn.fin_seq < 0 or conn.fin_seq >= conn.rcv_nxt - 1
    queue = conn.receive_queue
    charges = conn.charges
    assert 0 <= charges.forward_alloc < 2 * PAGE_SIZE + conn.adv_mss
    assert (charges.rmem_alloc + charges.send.bytes + charges.forward_alloc) % PAGE_SIZE == 0
    assert queue.account.bytes == sum(skb.truesize for skb in queue.queue)
    assert queue.ofo_account.bytes == sum(skb.truesize for skb in queue.ofo)
    at = conn.rcv_nxt
    for skb in queue.ofo:
        assert skb.seq >= at, "out-of-order data overlaps"
        assert skb.end_seq - skb.seq == skb.len > 0
        at = skb.end_seq
    got_fin = 0 <= conn.fin_seq < conn.rcv_nxt
    if queue.queue:
        assert queue.queue[0].seq == queue.copied_seq
        assert queue.queue[-1].end_seq == conn.rcv_nxt - got_fin
        for skb in queue.queue:
            assert skb.end_seq - skb.seq == skb.len > 0
