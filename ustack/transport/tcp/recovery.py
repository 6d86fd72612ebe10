"""Finding losses and getting over them: the state machine of Linux (tcp_fastretrans_alert, tcp_process_loss, tcp_enter_loss).

With SACK, RACK finds what is lost (RFC 8985), or, where it is turned off, RFC 6675's counting; without SACK it is NewReno (RFC
6582), limited transmit included (RFC 3042). The window shrinks by `prr`, comes back by `undo`, and after a timeout F-RTO asks
first whether it was one (RFC 5682). `output` sends again what is lost before it sends anything new.
"""

from __future__ import annotations

from math import inf
from sys import maxsize
from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.inflight import SACKED
from ustack.transport.tcp.phase import CWR, DISORDER, LOSS, OPEN, RECOVERY
from ustack.transport.tcp.prr import RateReduction
from ustack.transport.tcp.rack import Rack
from ustack.transport.tcp.tlp import NO_PROBE, TailLossProbe
from ustack.transport.tcp.undo import Undo
from ustack.transport.tcp.usage import WindowUsage

if TYPE_CHECKING:
    from ustack.transport.tcp.config import TcpConfig
    from ustack.transport.tcp.connection import Connection
    from ustack.transport.tcp.sample import AckSample

RENEGING_WAIT: Final = 0.01
"""Seconds, at least, that a peer whose left edge is data it has sacked gets to move it (tcp_check_sack_reneging)."""


class Recovery:
    """The phase and its end (`point`: SND.NXT when it began). `usage`: whether the window is what limits us. `frto`: nobody
    knows yet whether the timeout was one; `send_new`: to find out, new data goes before what is lost.
    """

    __slots__ = (
        "frto",
        "phase",
        "point",
        "probe",
        "rack",
        "reduction",
        "send_new",
        "undo",
        "usage",
    )

    def __init__(self, config: TcpConfig) -> None:
        self.phase = OPEN
        self.point = 0
        self.frto = False
        self.send_new = False
        self.rack = Rack(config.reordering)
        self.probe = TailLossProbe(off=not config.early_retrans)
        self.reduction = RateReduction()
        self.undo = Undo()
        self.usage = WindowUsage()

    # -- acknowledgments --

    def on_ack(self, conn: Connection, sample: AckSample, *, advanced: bool, duplicate: bool) -> bool:
        """An acceptable ACK was applied to the scoreboard. `advanced`: SND.UNA moved; `duplicate`: it is a pure duplicate.

        Returns whether the timer was set for what was found.
        """
        inflight = conn.inflight
        if self.phase is OPEN and not (
            inflight.sacked or inflight.lost or inflight.reno_sacked or duplicate or sample.ece or sample.duplicate
        ):
            return False
        lost_total = inflight.lost_total
        retrans_lost = inflight.retrans_lost
        timer_set = self._alert(conn, sample, advanced, duplicate)
        sample.lost = inflight.lost_total - lost_total
        if inflight.retrans_lost != retrans_lost:
            conn.tcp.env.mib.TcpExtTCPLostRetransmit += inflight.retrans_lost - retrans_lost
        return timer_set

    def _alert(self, conn: Connection, sample: AckSample, advanced: bool, duplicate: bool) -> bool:
        inflight = conn.inflight
        undo = self.undo
        if sample.ece:
            undo.prior_ssthresh = 0
        if advanced and inflight.segments and inflight.segments[0].flags & SACKED:
            return self._wait_for_reneger(conn)
        if self.phase is OPEN:
            undo.stamp = -1.0
        elif conn.snd_una >= self.point:
            if self.phase is CWR:
                if conn.snd_una != self.point:
                    self._end_reduction(conn)
                    self.phase = OPEN
            elif self.phase is RECOVERY:
                if not conn.sack_ok:
                    inflight.reno_sacked = 0
                if self._try_undo_recovery(conn, sample):
                    return False
                self._end_reduction(conn)
        timer_set = False
        if self.phase is RECOVERY:
            if advanced:
                if self._try_undo_partial(conn, sample):
                    return False
                if not conn.sack_ok:
                    self._partial_reno(conn, sample)
            elif duplicate and not conn.sack_ok:
                sample.delivered += inflight.on_duplicate_ack(conn.mss)
            if self._try_undo_dsack(conn):
                self._try_to_open(conn, sample)
                return False
            return self._identify_loss(conn, sample, advanced)
        if self.phase is LOSS:
            if self._process_loss(conn, sample, advanced, duplicate):
                return False
            timer_set = self._identify_loss(conn, sample, advanced)
            if not sample.lost_retransmission:
                return timer_set
        elif not conn.sack_ok:
            if advanced:
                inflight.reno_sacked = 0
            elif duplicate:
                sample.delivered += inflight.on_duplicate_ack(conn.mss)
        if self.phase <= DISORDER:
            self._try_undo_dsack(conn)
        timer_set |= self._identify_loss(conn, sample, advanced)
        if not inflight.lost:
            self._try_to_open(conn, sample)
            return timer_set
        self.enter_recovery(conn, ece=sample.ece)
        return timer_set

    def _identify_loss(self, conn: Connection, sample: AckSample, advanced: bool) -> bool:
        """Mark what is lost (tcp_identify_packet_loss). Returns whether the timer was set for what may be late."""
        inflight = conn.inflight
        if not inflight.segments:
            return False
        mss = conn.mss
        if not conn.sack_ok:
            enough = inflight.reno_sacked >= self.rack.reordering * mss
            if (self.phase is RECOVERY and advanced) or (self.phase < RECOVERY and enough):
                inflight.mark_head_lost(mss)
            return False
        if not conn.tcp.config.rack:
            inflight.mark_lost_by_sack(mss)
            return False
        before = inflight.retrans_lost
        timer_set = self.rack.look(conn)
        if inflight.retrans_lost != before:
            sample.lost_retransmission = True
        return timer_set

    def _partial_reno(self, conn: Connection, sample: AckSample) -> None:
        """Without SACK an ACK says which duplicates it explains (tcp_remove_reno_sacks)."""
        inflight = conn.inflight
        inflight.reno_sacked -= min(inflight.reno_sacked, max(sample.acked - conn.mss, 0))

    def _wait_for_reneger(self, conn: Connection) -> bool:
        """The left edge is data that the peer had sacked: it would have moved the edge if it had it. Time out soon (RFC 2018,
        section 8).
        """
        timers = conn.tcp.env.timers
        conn.waits_for = 0
        timers.set(conn.retransmit_timer, timers.now + min(max(conn.rtt.srtt / 2, RENEGING_WAIT), conn.rtt.rto))
        return True

    # -- phases --

    def _try_to_open(self, conn: Connection, sample: AckSample) -> None:
        """Nothing is lost for certain (tcp_try_to_open)."""
        if not conn.inflight.retrans:
            self.undo.stamp = -1.0
        if sample.ece and conn.ecn.ok:
            self.enter_cwr(conn)
        if self.phase is not CWR:
            self._keep_open(conn)

    def _keep_open(self, conn: Connection) -> None:
        inflight = conn.inflight
        phase = DISORDER if inflight.sacked or inflight.lost or inflight.reno_sacked or inflight.retrans else OPEN
        if phase is not self.phase:
            self.phase = phase
            self.point = conn.snd_nxt

    def _begin_reduction(self, conn: Connection) -> None:
        """tcp_init_cwnd_reduction."""
        cc = conn.cc
        self.point = conn.snd_nxt
        self.probe.point = NO_PROBE
        self.reduction.begin(cc.cwnd)
        cc.on_congestion(min(conn.inflight.outstanding(), cc.cwnd))
        conn.ecn.on_reduction()

    def _end_reduction(self, conn: Connection) -> None:
        """The window is to be where the congestion control wants it (tcp_end_cwnd_reduction)."""
        cc = conn.cc
        if not cc.model_based and cc.ssthresh < maxsize and (self.phase is CWR or self.undo.marker >= 0):
            cc.cwnd = cc.ssthresh

    def enter_recovery(self, conn: Connection, *, ece: bool) -> None:
        """Something is lost while ACKs come: fast recovery begins (RFC 6675, section 5, step 4; tcp_enter_recovery)."""
        mib = conn.tcp.env.mib
        if conn.sack_ok:
            mib.TcpExtTCPSackRecovery += 1
        else:
            mib.TcpExtTCPRenoRecovery += 1
        undo = self.undo
        undo.prior_ssthresh = 0
        undo.begin(conn)
        if not (self.phase is CWR or self.phase is RECOVERY):
            if not ece:
                undo.remember_threshold(conn)
            self._begin_reduction(conn)
        self.phase = RECOVERY

    def enter_cwr(self, conn: Connection) -> None:
        """The network asks for less, without a loss: once in a window (RFC 3168, section 6.1.2)."""
        self.undo.prior_ssthresh = 0
        if self.phase < CWR:
            self.undo.marker = -1
            self._begin_reduction(conn)
            self.phase = CWR

    def on_repaired_loss(self, conn: Connection) -> None:
        """The loss probe was needed, and has done its work: one reduction, and on (RFC 8985, section 7.4)."""
        self._begin_reduction(conn)
        self.phase = CWR
        self._end_reduction(conn)
        self._keep_open(conn)

    def on_timeout(self, conn: Connection) -> None:
        """The retransmission timer expired: take what is not sacked for lost, and start slowly (RFC 6298, 5.4; RFC 5681, 3.1;
        tcp_enter_loss).
        """
        inflight = conn.inflight
        cc = conn.cc
        undo = self.undo
        mib = conn.tcp.env.mib
        phase = self.phase
        new_episode = phase < RECOVERY
        again = conn.retries > 1
        if phase <= DISORDER or conn.snd_una >= self.point or (phase is LOSS and not again):
            undo.remember_threshold(conn)
            cc.on_congestion(min(inflight.outstanding(), max(cc.cwnd, conn.mss)))
            undo.begin(conn)
        cc.on_timeout()
        if phase <= DISORDER and inflight.sacked_packets >= self.rack.reordering:
            self.rack.reordering = min(self.rack.reordering, conn.tcp.config.reordering)
        if inflight.segments and inflight.segments[0].flags & SACKED:
            # The peer reneged: it would have moved the edge otherwise.
            mib.TcpExtTCPSACKReneging += 1
            inflight.on_reneged()
        before = inf
        if conn.sack_ok and conn.tcp.config.rack and self.rack.sent_at >= 0:
            before = conn.tcp.env.timers.now - self.rack.rtt
        inflight.mark_all_lost(before)
        cc.cwnd = inflight.in_flight() + conn.mss
        self.phase = LOSS
        self.point = conn.snd_nxt
        self.probe.point = NO_PROBE
        self.send_new = False
        self.frto = conn.tcp.config.frto and (new_episode or again)
        conn.ecn.on_reduction()

    def on_narrower_path(self, conn: Connection) -> None:
        """What is out was too large for the path: send it again in smaller pieces; the network is not congested
        (tcp_simple_retransmit).
        """
        inflight = conn.inflight
        inflight.mark_all_lost(inf)
        if inflight.segments and self.phase is not LOSS:
            self.phase = LOSS
            self.point = conn.snd_nxt
            self.frto = False
            self.undo.prior_ssthresh = 0
            self.undo.marker = -1

    def on_reordering_timeout(self, conn: Connection) -> None:
        """What was late has had its time (RFC 8985, section 6.2, step 5; tcp_rack_reo_timeout)."""
        inflight = conn.inflight
        before = inflight.in_flight()
        lost_total = inflight.lost_total
        self.rack.detect_loss(conn)
        if inflight.in_flight() != before:
            if self.phase is not RECOVERY:
                self.enter_recovery(conn, ece=False)
                if not conn.cc.model_based:
                    lost = inflight.lost_total - lost_total
                    self.reduction.on_ack(conn.cc, inflight.in_flight(), 1, lost, advanced=False, must_send=False)

    def _process_loss(self, conn: Connection, sample: AckSample, advanced: bool, duplicate: bool) -> bool:
        """An ACK after a timeout (F-RTO with SACK, RFC 5682, section 3; tcp_process_loss). Returns whether it was all."""
        undo = self.undo
        recovered = conn.snd_una >= self.point
        if advanced and undo.may_undo(sample):
            self._undo_loss(conn, spurious=False)
            return True
        if self.frto:
            # Step 3.b: data that was sent once only, before the timeout, has arrived.
            if sample.original:
                self._undo_loss(conn, spurious=True)
                return True
            if conn.snd_nxt > self.point:
                if sample.sacked or duplicate:
                    self.frto = False  # step 3.a: the loss was real
            elif advanced and not recovered:
                self.point = conn.snd_nxt
                if conn.snd_nxt < min(conn.send_queue.end, conn.snd_una + conn.snd_wnd):
                    self.send_new = True  # step 2.b
                    return True
                self.frto = False
        if recovered:
            self._try_undo_recovery(conn, sample)
            return True
        if not conn.sack_ok:
            if conn.snd_nxt > self.point and duplicate:
                conn.inflight.on_duplicate_ack(conn.mss)
            elif advanced:
                conn.inflight.reno_sacked = 0
        return False

    # -- undoing --

    def _undo_loss(self, conn: Connection, *, spurious: bool) -> None:
        """Nothing was lost: the timeout was too short (tcp_try_undo_loss)."""
        mib = conn.tcp.env.mib
        self.undo.revert(conn, forget_losses=True)
        mib.TcpExtTCPLossUndo += 1
        if spurious:
            mib.TcpExtTCPSpuriousRTOs += 1
        conn.retries = 0
        if spurious or conn.sack_ok:
            self.phase = OPEN

    def _try_undo_recovery(self, conn: Connection, sample: AckSample) -> bool:
        """Everything from before the recovery is acknowledged. Returns True when it must go on all the same
        (tcp_try_undo_recovery).
        """
        mib = conn.tcp.env.mib
        undo = self.undo
        if undo.may_undo(sample):
            if self.phase is LOSS:
                mib.TcpExtTCPLossUndo += 1
            else:
                mib.TcpExtTCPFullUndo += 1
            undo.revert(conn, forget_losses=False)
        elif self.rack.persist:
            self.rack.persist -= 1
        if conn.snd_una == self.point and not conn.sack_ok:
            # Hold on until something beyond is acknowledged: duplicates of what was sent again are no new loss (RFC 6582,
            # section 4).
            if not conn.inflight.retrans:
                undo.stamp = -1.0
            return True
        self.phase = OPEN
        return False

    def _try_undo_partial(self, conn: Connection, sample: AckSample) -> bool:
        """A partial ACK may be that of an original, which was late and not lost (tcp_try_undo_partial)."""
        undo = self.undo
        if undo.marker < 0 or not undo.original_acknowledged(sample):
            return False
        self.rack.on_reordering(conn, sample.una_before, conn.inflight.highest_sacked())
        if conn.inflight.retrans:
            return True  # more proof may come
        undo.stamp = -1.0
        undo.revert(conn, forget_losses=True)
        conn.tcp.env.mib.TcpExtTCPPartialUndo += 1
        self._keep_open(conn)
        return True

    def _try_undo_dsack(self, conn: Connection) -> bool:
        """Everything that was sent again has been reported as a duplicate (RFC 3708; tcp_try_undo_dsack)."""
        undo = self.undo
        if undo.marker < 0 or undo.retrans:
            return False
        self.rack.persist = min(self.rack.persist + 1, 16)
        undo.revert(conn, forget_losses=False)
        conn.tcp.env.mib.TcpExtTCPDSACKUndo += 1
        return True
