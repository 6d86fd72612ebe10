"""The scoreboard: the segments that were sent and are not acknowledged, in order, and what is known of each.

Flags and counts follow Linux (tcp_input.c, "Linux NewReno/SACK/ECN state machine"), in bytes instead of packets:

    in flight = outstanding - (sacked + lost) + retransmitted

A segment is S (selectively acknowledged), L (taken for lost), R (sent again, and that copy is still out), or several of these.
A record is as long as what was sent at once, up to 64 KiB, and is split where an acknowledgment or the congestion window cuts
it; neighbours that were sacked become one.

The records that may still arrive are also linked in the order in which they were sent last, which is what RACK looks at (RFC
8985; the tsorted queue of Linux).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ustack.transport.tcp.sample import AckSample

SACKED: Final = 1
LOST: Final = 2
RETRANS: Final = 4
EVER_RETRANS: Final = 8
"""Was sent more than once: its acknowledgment says nothing about the RTT (Karn)."""
APP_LIMITED: Final = 16
"""Was sent while the application did not fill the window."""

_BOARD: Final = SACKED | LOST | RETRANS

_seq = attrgetter("seq")
_end = attrgetter("end")


class Segment:
    """One transmission: sequence numbers `seq .. end` (a FIN counts one), last sent at `sent_at` seconds.

    `older` and `newer` are its neighbours in time. `packets` is how many transmissions a sacked record was put together from.
    The rest is what `rate` noted when it was sent.
    """

    __slots__ = (
        "delivered",
        "delivered_at",
        "end",
        "fin",
        "first_sent_at",
        "flags",
        "newer",
        "older",
        "packets",
        "sent_at",
        "seq",
    )

    def __init__(self, seq: int, end: int, sent_at: float, fin: bool = False) -> None:
        self.seq = seq
        self.end = end
        self.sent_at = sent_at
        self.flags = 0
        self.fin = fin
        self.packets = 1
        self.older: Segment | None = None
        self.newer: Segment | None = None
        self.delivered = 0
        self.delivered_at = sent_at
        self.first_sent_at = sent_at


class Inflight:
    """Segments outstanding. `sacked`, `lost` and `retrans` are bytes with that flag, `to_resend` those that are lost and not
    sent again; `reno_sacked` counts duplicate ACKs without SACK. `oldest` begins the order in time.

    `lost_total` is every byte that was ever taken for lost, and `retrans_lost` every copy, in segments.
    """

    __slots__ = (
        "_lost_below",
        "_newest",
        "_resend_from",
        "lost",
        "lost_total",
        "oldest",
        "reno_sacked",
        "retrans",
        "retrans_lost",
        "sacked",
        "sacked_packets",
        "segments",
        "to_resend",
    )

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.sacked = 0
        self.sacked_packets = 0
        self.reno_sacked = 0
        self.lost = 0
        self.retrans = 0
        self.to_resend = 0
        self.lost_total = 0
        self.retrans_lost = 0
        self.oldest: Segment | None = None
        self._newest: Segment | None = None
        self._resend_from = 0  # nothing before it waits to be sent again
        self._lost_below = 0  # everything before it that is not sacked is marked lost already (`mark_lost_by_sack`)

    def add(self, segment: Segment) -> None:
        """A segment of new data was sent."""
        self.segments.append(segment)
        self._link(segment)

    def clear(self) -> None:
        """Forget everything: the connection is over."""
        for segment in self.segments:
            segment.older = segment.newer = None
        self.segments.clear()
        self.oldest = self._newest = None
        self.sacked = self.sacked_packets = self.reno_sacked = self.lost = self.retrans = self.to_resend = 0

    def outstanding(self) -> int:
        """Bytes sent and not cumulatively acknowledged."""
        segments = self.segments
        return segments[-1].end - segments[0].seq if segments else 0

    def in_flight(self) -> int:
        """Bytes taken to be in the network now (`pipe` of RFC 6675)."""
        segments = self.segments
        if not segments:
            return 0
        return segments[-1].end - segments[0].seq - self.sacked - self.reno_sacked - self.lost + self.retrans

    def highest_sacked(self) -> int:
        """The end of the highest data that the peer holds; 0 when it holds none beyond the left edge."""
        if self.sacked:
            for segment in reversed(self.segments):
                if segment.flags & SACKED:
                    return segment.end
        return 0

    def split(self, index: int, at: int) -> None:
        """Cut segment `index` in two at sequence number `at`, which lies inside it."""
        segment = self.segments[index]
        rest = Segment(at, segment.end, segment.sent_at, fin=segment.fin)
        rest.flags = segment.flags
        rest.delivered = segment.delivered
        rest.delivered_at = segment.delivered_at
        rest.first_sent_at = segment.first_sent_at
        segment.end = at
        segment.fin = False
        self.segments.insert(index + 1, rest)
        if segment.newer is not None:
            rest.older = segment
            rest.newer = segment.newer
            segment.newer.older = rest
            segment.newer = rest
        elif self._newest is segment:
            rest.older = segment
            segment.newer = rest
            self._newest = rest

    # -- the order in time --

    def _link(self, segment: Segment) -> None:
        newest = self._newest
        segment.older = newest
        segment.newer = None
        if newest is None:
            self.oldest = segment
        else:
            newest.newer = segment
        self._newest = segment

    def _unlink(self, segment: Segment) -> None:
        older = segment.older
        newer = segment.newer
        if older is not None:
            older.newer = newer
        elif self.oldest is segment:
            self.oldest = newer
        else:
            return  # it is not linked
        if newer is not None:
            newer.older = older
        else:
            self._newest = older
        segment.older = segment.newer = None

    # -- what the peer says --

    def on_ack(self, una: int, sample: AckSample) -> None:
        """Everything before `una` is acknowledged: note in `sample` what has arrived."""
        segments = self.segments
        rtt_sent_at = -1.0
        clean = True
        done = 0
        for segment in segments:
            if segment.end > una:
                break
            flags = segment.flags
            if not flags & SACKED:
                rtt_sent_at = segment.sent_at
                self._deliver(segment, segment.end, sample)
            if flags & EVER_RETRANS:
                clean = False
            if flags & _BOARD:
                self._forget(segment, segment.end - segment.seq)
            self._unlink(segment)
            done += 1
        if done:
            sample.acked += segments[done - 1].end - segments[0].seq
            del segments[:done]
        if segments and segments[0].seq < una:
            segment = segments[0]
            flags = segment.flags
            if not flags & SACKED:
                rtt_sent_at = segment.sent_at
                self._deliver(segment, una, sample)
            if flags & EVER_RETRANS:
                clean = False
            if flags & _BOARD:
                packets = segment.packets
                segment.packets = 0
                self._forget(segment, una - segment.seq)
                segment.packets = packets
            sample.acked += una - segment.seq
            segment.seq = una
        if not self.sacked:
            self.sacked_packets = 0
        if clean and rtt_sent_at > sample.rtt_sent_at:
            sample.rtt_sent_at = rtt_sent_at

    def _forget(self, segment: Segment, length: int) -> None:
        """`length` bytes at the front of `segment` are gone, or not what they were."""
        flags = segment.flags
        if flags & SACKED:
            self.sacked -= length
            self.sacked_packets -= segment.packets
        if flags & LOST:
            self.lost -= length
            if not flags & RETRANS:
                self.to_resend -= length
        if flags & RETRANS:
            self.retrans -= length

    def _deliver(self, segment: Segment, end: int, sample: AckSample) -> None:
        """The bytes of `segment` up to `end` have arrived."""
        sent_at = segment.sent_at
        flags = segment.flags
        length = end - segment.seq
        sample.delivered += length
        if sent_at >= sample.last_sent_at:
            sample.last_sent_at = sent_at
            sample.prior_delivered = segment.delivered
            sample.prior_at = segment.delivered_at
            sample.first_sent_at = segment.first_sent_at
            sample.app_limited = flags & APP_LIMITED != 0
        if flags & EVER_RETRANS:
            sample.fresh += length
            # It was the original that arrived, too soon for the copy (RFC 8985, section 6.2, step 2).
            if sample.now - sent_at < sample.min_rtt or 0 <= sample.echo < int(sent_at * 1000):
                return
        else:
            if segment.seq >= sample.point:
                sample.fresh += length
            elif end <= sample.point:
                sample.original = True
            if segment.seq < sample.reordered:
                sample.reordered = segment.seq
        sample.rack_last = sent_at
        if sent_at >= sample.rack_sent_at:
            sample.rack_sent_at = sent_at
            sample.rack_end = end

    def on_sack(self, left: int, right: int, sample: AckSample, mss: int) -> None:
        """The peer holds `left .. right`: note in `sample` what of it is new. A part of a single segment, of at most `mss`
        bytes, is nothing (tcp_match_skb_to_sack).
        """
        segments = self.segments
        index = bisect_right(segments, left, key=_end)
        while index < len(segments):
            segment = segments[index]
            if segment.seq >= right:
                break
            if segment.flags & SACKED or (
                (segment.seq < left or segment.end > right) and segment.end - segment.seq - segment.fin <= mss
            ):
                index += 1
                continue
            if segment.seq < left:
                self.split(index, left)
                index += 1
                segment = segments[index]
            end = min(segment.end, right)
            length = end - segment.seq
            self._deliver(segment, end, sample)
            self._forget(segment, length)
            ever = segment.flags & EVER_RETRANS
            if not ever and segment.sent_at > sample.rtt_sent_at:
                sample.rtt_sent_at = segment.sent_at
            self.sacked += length
            self.sacked_packets += 1
            sample.sacked += length
            before = segments[index - 1] if index else segment
            joins = before is not segment and before.flags & (SACKED | EVER_RETRANS) == SACKED | ever
            if end < segment.end:
                if joins:
                    # What was known of the neighbour grows; no record is made (tcp_shift_skb_data).
                    before.end = segment.seq = end
                    before.packets += 1
                    continue
                self.split(index, end)
            self._unlink(segment)
            if joins:
                before.end = end
                before.fin = segment.fin
                before.packets += 1
                del segments[index]
                index -= 1
                segment = before
            else:
                segment.flags = ever | SACKED
                segment.packets = 1
            index += 1
            if index < len(segments):
                after = segments[index]
                if after.flags & (SACKED | EVER_RETRANS) == SACKED | ever:
                    segment.end = after.end
                    segment.fin = after.fin
                    segment.packets += after.packets
                    del segments[index]

    def on_duplicate_ack(self, mss: int) -> int:
        """Without SACK, a duplicate ACK says that one segment has left the network (RFC 5681, section 3.2). Returns the bytes
        that this stands for.
        """
        before = self.reno_sacked
        self.reno_sacked = max(min(before + mss, self.outstanding() - self.lost - mss), 0)
        return max(self.reno_sacked - before, 0)

    # -- what follows from it --

    def mark_lost(self, segment: Segment) -> None:
        """Take `segment`, or its copy, for lost."""
        flags = segment.flags
        length = segment.end - segment.seq
        if flags & RETRANS:
            self.retrans -= length
            self.retrans_lost += 1
            self.to_resend += length
            self.lost_total += length
            if not flags & LOST:
                self.lost += length
        elif not flags & LOST:
            self.lost += length
            self.to_resend += length
            self.lost_total += length
        segment.flags = flags & ~RETRANS | LOST
        if segment.seq < self._resend_from:
            self._resend_from = segment.seq
        self._unlink(segment)

    def mark_lost_by_sack(self, mss: int) -> bool:
        """Mark what more than two full segments, or three separate ones, were sacked above (IsLost of RFC 6675, section 4).

        Returns whether anything was newly marked.
        """
        segments = self.segments
        if not self.sacked:
            return False
        above = 0
        runs = 0
        run_below = False
        bound = 0
        index = len(segments) - 1
        while index >= 0:
            segment = segments[index]
            if segment.flags & SACKED:
                above += segment.end - segment.seq
                if not run_below:
                    runs += 1
                run_below = True
                if above > 2 * mss or runs >= 3:
                    bound = segment.seq
                    break
            else:
                run_below = False
            index -= 1
        if bound <= self._lost_below:
            return False
        start = bisect_left(segments, self._lost_below, key=_seq)
        self._lost_below = bound
        found = False
        for position in range(start, index):
            segment = segments[position]
            if not segment.flags & (SACKED | LOST):
                self.mark_lost(segment)
                found = True
        return found

    def mark_head_lost(self, mss: int) -> bool:
        """Mark the first segment, at most `mss` bytes of it, lost: as a partial ACK says (RFC 6582, section 3.2)."""
        if not self.segments:
            return False
        segment = self.segments[0]
        if segment.flags & (SACKED | LOST):
            return False
        if segment.end - segment.seq > mss + segment.fin:
            self.split(0, segment.seq + mss)
        self.mark_lost(segment)
        self.reno_sacked = max(min(self.reno_sacked, self.outstanding() - self.lost), 0)
        return True

    def mark_all_lost(self, sent_before: float) -> None:
        """The retransmission timer expired: nothing that is not sacked is in flight (RFC 6675, section 5.1), except, behind the
        first, what was sent after `sent_before` (RFC 8985, section 6.3).
        """
        self.reno_sacked = 0
        segments = self.segments
        for segment in segments:
            if segment.flags & SACKED:
                continue
            if segment.sent_at <= sent_before or segment is segments[0]:
                self.mark_lost(segment)
        if segments:
            self._lost_below = segments[-1].end

    def on_reneged(self) -> None:
        """The peer may have thrown away what it had sacked: it must say so again (RFC 2018, section 8)."""
        self.sacked = self.sacked_packets = 0
        for segment in self.segments:
            if segment.flags & SACKED:
                segment.flags &= ~SACKED
                self.mark_lost(segment)

    def forget_losses(self) -> None:
        """Nothing was lost after all: what was taken for lost is on its way."""
        for segment in self.segments:
            if segment.flags & LOST:
                if not segment.flags & RETRANS:
                    self._link_in_order(segment)
                segment.flags &= ~LOST
        self.lost = self.to_resend = 0

    def _link_in_order(self, segment: Segment) -> None:
        """Link `segment` where its time of sending belongs; the search begins at the oldest, which it most likely is."""
        after = self.oldest
        while after is not None and after.sent_at <= segment.sent_at:
            after = after.newer
        if after is None:
            self._link(segment)
            return
        segment.newer = after
        segment.older = after.older
        if after.older is None:
            self.oldest = segment
        else:
            after.older.newer = segment
        after.older = segment

    def next_lost(self) -> int:
        """Index of the first segment that is lost and not sent again yet; -1 when there is none."""
        if not self.to_resend:
            return -1
        segments = self.segments
        index = bisect_right(segments, self._resend_from, key=_end)
        while index < len(segments):
            segment = segments[index]
            if segment.flags & (LOST | RETRANS) == LOST:
                self._resend_from = segment.seq
                return index
            index += 1
        return -1

    def on_retransmit(self, index: int, now: float) -> None:
        """Segment `index` was sent again: because it is lost, or as a probe."""
        segment = self.segments[index]
        length = segment.end - segment.seq
        if segment.flags & RETRANS:
            self.retrans -= length
        elif segment.flags & LOST:
            self.to_resend -= length
        segment.flags |= RETRANS | EVER_RETRANS
        segment.sent_at = now
        self.retrans += length
        self._unlink(segment)
        self._link(segment)

    def check(self) -> None:
        """Verify the counts and the order in time against the segments; for tests."""
        previous = None
        sacked = lost = retrans = to_resend = 0
        for segment in self.segments:
            assert segment.seq < segment.end
            assert previous is None or segment.seq == previous
            previous = segment.end
            length = segment.end - segment.seq
            assert segment.flags & (SACKED | LOST) != SACKED | LOST
            assert segment.flags & (SACKED | RETRANS) != SACKED | RETRANS
            sacked += length * bool(segment.flags & SACKED)
            lost += length * bool(segment.flags & LOST)
            retrans += length * bool(segment.flags & RETRANS)
            to_resend += length * (segment.flags & (LOST | RETRANS) == LOST)
        assert (sacked, lost, retrans, to_resend) == (self.sacked, self.lost, self.retrans, self.to_resend)
        linked = set()
        at = self.oldest
        older = None
        while at is not None:
            assert at.older is older
            assert older is None or older.sent_at <= at.sent_at
            linked.add(at)
            older = at
            at = at.newer
        assert self._newest is older
        assert linked == {each for each in self.segments if not each.flags & SACKED and each.flags & (LOST | RETRANS) != LOST}
