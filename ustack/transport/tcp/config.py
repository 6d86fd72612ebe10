"""The limits and times that people argue about, each with its unit, its default and where the default comes from."""

from __future__ import annotations

from dataclasses import dataclass

from ustack.mem.protocol import pages_of


@dataclass(slots=True)
class TcpConfig:
    """One stack's TCP settings. Names are those of Linux sysctls (net.ipv4.tcp_*) where there is one."""

    rmem_min: int = 4096
    """Bytes of truesize that a socket may receive even when all connections together are over `mem_high` (tcp_rmem[0])."""
    rmem_default: int = 131072
    """Initial receive limit in bytes of truesize (tcp_rmem[1])."""
    rmem_max: int = 6 << 20
    """Receive limit in bytes up to which autotuning goes (tcp_rmem[2]); a quarter of `mem_low` if that is less."""
    wmem_min: int = 4096
    """Bytes of truesize that a socket may queue to send even when all connections together are over `mem_high`
    (tcp_wmem[0]).
    """
    wmem_default: int = 65536
    """Initial send limit in bytes of truesize; Linux starts with 16384 and grows at once to what the initial window needs."""
    wmem_max: int = 4 << 20
    """Send limit in bytes up to which autotuning goes (tcp_wmem[2]); a quarter of `mem_low` if that is less."""
    mem_low: int = 0
    """Bytes of truesize that all connections together hold when pressure ends (tcp_mem[0], which counts pages); 0: half of
    `mem_high`.
    """
    mem_pressure: int = 0
    """Bytes of truesize above which all connections together are under pressure (tcp_mem[1]); 0: two thirds of `mem_high`."""
    mem_high: int = 0
    """Bytes of truesize that all connections together may hold (tcp_mem[2]); 0: three quarters of the arena, without what its
    watermarks keep free.
    """
    syn_retries: int = 6
    """Retransmissions of a SYN before connecting fails with ETIMEDOUT: about 127 s (tcp_syn_retries)."""
    synack_retries: int = 5
    """Retransmissions of a SYN-ACK before a half-open connection is forgotten: about 63 s (tcp_synack_retries)."""
    retries2: int = 15
    """Consecutive timeouts before an established connection fails with ETIMEDOUT (tcp_retries2; R2 of RFC 9293, section 3.8.3).
    """
    orphan_retries: int = 8
    """Consecutive timeouts before a connection that its user has closed is given up (tcp_orphan_retries)."""
    fin_timeout: float = 60.0
    """Seconds that a closed connection waits in FIN-WAIT-2 for the peer's FIN (tcp_fin_timeout)."""
    time_wait: float = 60.0
    """Seconds of TIME-WAIT: 2 MSL with an MSL of 30 s, as Linux; RFC 9293 suggests an MSL of 2 minutes."""
    max_tw_buckets: int = 16384
    """Connections in TIME-WAIT; the oldest goes when there are more (tcp_max_tw_buckets)."""
    keepalive_time: float = 7200.0
    """Idle seconds before the first keepalive probe (tcp_keepalive_time; RFC 9293, section 3.8.4)."""
    keepalive_intvl: float = 75.0
    """Seconds between keepalive probes (tcp_keepalive_intvl)."""
    keepalive_probes: int = 9
    """Unanswered probes before the connection fails with ETIMEDOUT (tcp_keepalive_probes)."""
    max_syn_backlog: int = 1024
    """Half-open connections of one listener (tcp_max_syn_backlog)."""
    fastopen: int = 0
    """Data with the SYN, as the sum of flags (tcp_fastopen; RFC 7413): 1 as a client, 2 as a server, 4 as a client even without
    a cookie, 512 as a server even without a cookie, 1024 for every listener.
    """
    syncookies: int = 1
    """What a listener does when `max_syn_backlog` connections are half open (tcp_syncookies): 0 drops SYNs, 1 answers them with
    cookies and keeps nothing, 2 does so always.
    """
    delack: float = 0.04
    """Seconds that an acknowledgment may wait for data to ride on (TCP_DELACK_MIN; RFC 9293 allows 0.5)."""
    initial_rto: float = 1.0
    """Retransmission timeout in seconds before the round trip has been measured (RFC 6298, section 2.1)."""
    rto_min: float = 0.2
    """Seconds by which the retransmission timeout exceeds the smoothed round trip at least, as in Linux (TCP_RTO_MIN); RFC 6298
    wants a timeout of no less than 1.
    """
    rto_max: float = 120.0
    """Retransmission timeout in seconds at most, and time between window probes (TCP_RTO_MAX; RFC 6298 allows any maximum of at
    least 60).
    """
    congestion: str = "cubic"
    """Congestion control of sockets and routes that name none (tcp_congestion_control): `reno` or `newreno`, `cubic`, `bbr`."""
    ecn: int = 2
    """Explicit congestion notification (tcp_ecn; RFC 3168): 0 never, 1 ask for it, 2 when the peer asks."""
    rack: bool = True
    """Find losses by time (tcp_recovery; RFC 8985), else by counting what was sacked (RFC 6675)."""
    early_retrans: bool = True
    """Send tail loss probes (tcp_early_retrans; RFC 8985, section 7)."""
    frto: bool = True
    """After a timeout find out whether it was spurious (tcp_frto; RFC 5682)."""
    dsack: bool = True
    """Report what arrived twice (tcp_dsack; RFC 2883)."""
    reordering: int = 3
    """Segments by which packets overtake each other, as long as nothing is known of the path (tcp_reordering); so many
    duplicate ACKs mean a loss.
    """
    slow_start_after_idle: bool = True
    """Start again from the initial window after a pause of a retransmission timeout (tcp_slow_start_after_idle; RFC 5681,
    section 4.1).
    """
    mtu_probing: int = 1
    """Whether full segments that go unanswered are taken for too large for the path, and cut smaller (tcp_mtu_probing; RFC
    4821, section 7.7): 0 never, else after three timeouts.
    """
    initial_window: int = 10
    """Segments of the initial congestion window (RFC 6928)."""
    challenge_ack_limit: int = 1000
    """Challenge ACKs per second for the whole stack (tcp_challenge_ack_limit; RFC 5961, section 7)."""
    timestamps: bool = True
    """Offer and accept RFC 7323 timestamps (tcp_timestamps)."""
    sack: bool = True
    """Offer and accept selective acknowledgments (tcp_sack; RFC 2018)."""
    window_scaling: bool = True
    """Offer and accept window scaling (tcp_window_scaling; RFC 7323)."""
    offload: bool = True
    """Send super-frames of up to 64 KiB where the device cuts them."""

    def mem_pages(self) -> tuple[int, int, int]:
        """`mem_low`, `mem_pressure` and `mem_high` in pages."""
        return pages_of(self.mem_low), pages_of(self.mem_pressure), pages_of(self.mem_high)
