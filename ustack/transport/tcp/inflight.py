"""The scoreboard: the segments that were sent and are not acknowledged, in order, and what is known of each.

Flags and counts follow Linux (tcp_input.c, "Linux NewReno/SACK/ECN state machine"), in bytes instead of packets:

    in flight = outstanding - (sacked + lost) + retransmitted

A segment is S (selectively acknowledged), L (taken for lost), R (sent again, and that copy is still out), or several of these.
A record is as long as what was sent at once, up to 64 KiB, and is split where an acknowledgment or the congestion window cuts
it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

SACKED: Final = 1
LOST: Final = 2
RETRANS: Final = 4
EVER_RETRANS: Final = 8
"""Was sent more than once: its acknowledgment says nothing about the RTT (Karn)."""

_seq = attrgetter("seq")
_end = attrgetter("end")


class Segment:
    """One transmission: sequence numbers `seq .. end` (a FIN counts one), last sent at `sent_at` seconds."""

    __slots__ = ("end", "fin", "flags", "sent_at", "seq")

    def __init__(self, seq: int, end: int, sent_at: float, fin: bool = False) -> None:
        self.seq = seq
        self.end = end
        self.sent_at = sent_at
        self.flags = 0
        self.fin = fin


class Inflight:
    """Segments outstanding. `sacked`, `lost` and `retrans` are bytes with that flag; `sacked` also counts duplicate ACKs
    without SACK.
    """

    __slots__ = ("_lost_below", "lost", "reno_sacked", "retrans", "sacked", "segments")

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.sacked = 0
        self.reno_sacked = 0
        self.lost = 0
        self.retrans = 0
        self._lost_below = 0  # everything before it that is not sacked is marked lost already

    def add(self, segment: Segment) -> None:
        """A segment of new data was sent."""
        self.segments.append(segment)

    def outstanding(self) -> int:
        """Bytes sent and not cumulatively acknowledged."""
        segments = self.segments
        return segments[-1].end - segments[0].seq if segments else 0

    def in_flight(self) -> int:
        """Bytes taken to be in the network now (`pipe` of RFC 6675)."""
        return self.outstanding() - self.sacked - self.reno_sacked - self.lost + self.retrans

    def split(self, index: int, at: int) -> None:
        """Cut segment `index` in two at sequence number `at`, which lies inside it."""
        segment = self.segments[index]
        rest = Segment(at, segment.end, segment.sent_at, fin=segment.fin)
        rest.flags = segment.flags
        segment.end = at
        segment.fin = False
        self.segments.insert(index + 1, rest)

    # -- what the peer says --

    def on_ack(self, una: int) -> float:
        """Everything before `una` is acknowledged. Returns when the last segment covered was sent, or -1 when that says nothing
        because one of them was sent twice (Karn).
        """
        sent_at = -1.0
        clean = True
        segments = self.segments
        done = 0
        for segment in segments:
            if segment.end > una:
                break
            flags = segment.flags
            if not flags:
                sent_at = segment.sent_at
            else:
                if flags & EVER_RETRANS:
                    clean = False
                elif not flags & SACKED:
                    sent_at = segment.sent_at
                self._forget(flags, segment.end - segment.seq)
            done += 1
        if done:
            del segments[:done]
        if segments and segments[0].seq < una:
            segment = segments[0]
            if segment.flags:
                self._forget(segment.flags, una - segment.seq)
            segment.seq = una
        return sent_at if clean else -1.0

    def _forget(self, flags: int, length: int) -> None:
        if flags & SACKED:
            self.sacked -= length
        if flags & LOST:
            self.lost -= length
        if flags & RETRANS:
            self.retrans -= length

    def on_sack(self, left: int, right: int) -> tuple[int, float]:
        """The peer holds `left .. right`. Returns the bytes that are newly so, and when the last of them sent only once was
        sent, or -1.
        """
        segments = self.segments
        index = bisect_right(segments, left, key=_end)
        newly = 0
        sent_at = -1.0
        while index < len(segments):
            segment = segments[index]
            if segment.seq >= right:
                break
            if not segment.flags & SACKED:
                if segment.seq < left:
                    self.split(index, left)
                    index += 1
                    segment = segments[index]
                if segment.end > right:
                    self.split(index, right)
                length = segment.end - segment.seq
                self._forget(segment.flags, length)
                if not segment.flags & EVER_RETRANS:
                    sent_at = max(sent_at, segment.sent_at)
                segment.flags = segment.flags & EVER_RETRANS | SACKED
                self.sacked += length
                newly += length
            index += 1
        return newly, sent_at

    def on_duplicate_ack(self, mss: int) -> None:
        """Without SACK, a duplicate ACK says that one segment has left the network (RFC 5681, section 3.2)."""
        outstanding = self.outstanding()
        self.reno_sacked = max(min(self.reno_sacked + mss, outstanding - self.lost - mss), 0)

    # -- what follows from it --

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
                segment.flags |= LOST
                self.lost += segment.end - segment.seq
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
        length = segment.end - segment.seq
        segment.flags |= LOST
        self.lost += length
        self.reno_sacked = max(min(self.reno_sacked, self.outstanding() - self.lost), 0)
        return True

    def mark_all_lost(self, *, reneged: bool) -> None:
        """The retransmission timer expired: nothing that is not sacked is in flight (RFC 6675, section 5.1).

        With `reneged` what was sacked counts as lost, too: the peer may have thrown it away (RFC 2018, section 8).
        """
        self.lost = self.retrans = self.reno_sacked = 0
        if reneged:
            self.sacked = 0
        for segment in self.segments:
            if reneged:
                segment.flags &= ~SACKED
            if segment.flags & SACKED:
                continue
            segment.flags = segment.flags & ~RETRANS | LOST
            self.lost += segment.end - segment.seq
        if self.segments:
            self._lost_below = self.segments[-1].end

    def lost_segments(self) -> Iterator[int]:
        """Indexes of the segments that are lost and not sent again yet, in order. The list may be split while iterating."""
        segments = self.segments
        index = 0
        left = self.lost - self.retrans
        while left > 0 and index < len(segments):
            segment = segments[index]
            if segment.flags & (LOST | RETRANS) == LOST:
                yield index
                left -= segment.end - segment.seq
            index += 1

    def on_retransmit(self, index: int, now: float) -> None:
        """Segment `index`, lost, was sent again."""
        segment = self.segments[index]
        segment.flags |= RETRANS | EVER_RETRANS
        segment.sent_at = now
        self.retrans += segment.end - segment.seq

    def check(self) -> None:
        """Verify the counts against the segments; for tests."""
        previous = None
        sacked = lost = retrans = 0
        for segment in self.segments:
            assert segment.seq < segment.end
            assert previous is None or segment.seq == previous
            previous = segment.end
            length = segment.end - segment.seq
            assert segment.flags & (SACKED | LOST) != SACKED | LOST
            assert not segment.flags & RETRANS or segment.flags & LOST
            sacked += length * bool(segment.flags & SACKED)
            lost += length * bool(segment.flags & LOST)
            retrans += length * bool(segment.flags & RETRANS)
        assert (sacked, lost, retrans) == (self.sacked, self.lost, self.retrans)
