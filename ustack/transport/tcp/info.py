"""TCP_INFO: the inner state of a connection, under the names and in the units of Linux (struct tcp_info: microseconds, segments
where it says so, bytes per second).
"""

from __future__ import annotations

from sys import maxsize
from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.inflight import RETRANS
from ustack.transport.tcp.pacing import pacing_rate

if TYPE_CHECKING:
    from ustack.transport.tcp.connection import Connection

TCPI_OPT_TIMESTAMPS: Final = 1
TCPI_OPT_SACK: Final = 2
TCPI_OPT_WSCALE: Final = 4
TCPI_OPT_ECN: Final = 8
TCPI_OPT_SYN_DATA: Final = 32
"""Bits of `tcpi_options`."""

INFINITE_SSTHRESH: Final = 0x7FFFFFFF


def tcp_info(conn: Connection) -> dict[str, int | bool | str]:
    """Every field of struct tcp_info that we can tell, and `congestion`, the name of the congestion control."""
    now = conn.tcp.env.timers.now
    rtt = conn.rtt
    cc = conn.cc
    inflight = conn.inflight
    recovery = conn.recovery
    mss = conn.mss

    def segments(size: int) -> int:
        return -(-size // mss)

    def micro(seconds: float) -> int:
        return int(seconds * 1e6)

    sent = max(conn.snd_nxt - conn.iss - 1, 0)
    options = TCPI_OPT_TIMESTAMPS * conn.ts_ok | TCPI_OPT_SACK * conn.sack_ok | TCPI_OPT_ECN * conn.ecn.ok
    if conn.snd_wscale >= 0 and conn.synchronized:
        options |= TCPI_OPT_WSCALE
    if conn.fastopen:
        options |= TCPI_OPT_SYN_DATA
    return {
        "congestion": cc.name,
        "tcpi_state": int(conn.state),
        "tcpi_ca_state": int(recovery.phase),
        "tcpi_retransmits": conn.retries,
        "tcpi_probes": conn.probes,
        "tcpi_backoff": rtt.backoff_shift,
        "tcpi_options": options,
        "tcpi_wscales": max(conn.snd_wscale, 0) | conn.rcv_wscale << 4,
        "tcpi_snd_wscale": max(conn.snd_wscale, 0),
        "tcpi_rcv_wscale": conn.rcv_wscale,
        "tcpi_delivery_rate_app_limited": conn.rate.rate_app_limited,
        "tcpi_rto": micro(rtt.rto),
        "tcpi_ato": micro(conn.ato),
        "tcpi_snd_mss": mss,
        "tcpi_rcv_mss": conn.rcv_mss,
        "tcpi_unacked": segments(inflight.outstanding()),
        "tcpi_sacked": segments(inflight.sacked + inflight.reno_sacked),
        "tcpi_lost": segments(inflight.lost),
        "tcpi_retrans": sum(segments(each.end - each.seq) for each in inflight.segments if each.flags & RETRANS),
        "tcpi_last_data_sent": int((now - conn.last_sent) * 1000),
        "tcpi_last_data_recv": int((now - conn.last_data) * 1000),
        "tcpi_last_ack_recv": int((now - conn.last_received) * 1000),
        "tcpi_pmtu": conn.path.mtu,
        "tcpi_rcv_ssthresh": min(conn.rcv_ssthresh, conn.rcvbuf),
        "tcpi_rtt": micro(rtt.srtt),
        "tcpi_rttvar": micro(rtt.rttvar),
        "tcpi_snd_ssthresh": INFINITE_SSTHRESH if cc.ssthresh == maxsize else cc.ssthresh // mss,
        "tcpi_snd_cwnd": cc.cwnd // mss,
        "tcpi_advmss": conn.adv_mss,
        "tcpi_reordering": recovery.rack.reordering,
        "tcpi_rcv_rtt": micro(conn.rcv_rtt),
        "tcpi_rcv_space": conn.rcvq_space,
        "tcpi_total_retrans": conn.total_retrans,
        "tcpi_pacing_rate": int(pacing_rate(conn)),
        "tcpi_max_pacing_rate": conn.options.max_pacing_rate or (1 << 64) - 1,
        "tcpi_bytes_acked": max(conn.snd_una - conn.iss - 1, 0),
        "tcpi_bytes_received": max(conn.rcv_nxt - conn.irs - 1, 0) if conn.synchronized else 0,
        "tcpi_notsent_bytes": max(conn.send_queue.end - conn.snd_nxt, 0),
        "tcpi_min_rtt": micro(rtt.minimum),
        "tcpi_delivery_rate": int(conn.rate.rate),
        "tcpi_delivered": segments(conn.rate.delivered) + (conn.snd_una > conn.iss),
        "tcpi_bytes_sent": sent + conn.bytes_retrans,
        "tcpi_bytes_retrans": conn.bytes_retrans,
        "tcpi_dsack_dups": segments(conn.dsack_bytes),
        "tcpi_reord_seen": recovery.rack.reordering_seen,
        "tcpi_snd_wnd": conn.snd_wnd,
        "tcpi_rcv_wnd": max(conn.rcv_adv - conn.rcv_nxt, 0),
    }
