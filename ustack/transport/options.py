"""What a program sets on a socket, before and after it is connected. A listener's options are inherited by what it accepts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ustack.net.path import PMTUDISC_WANT


@dataclass(slots=True)
class SocketOptions:
    """Socket options with the kernel's meanings (socket(7), ip(7), tcp(7)). A buffer size of 0: autotuning."""

    rcvbuf: int = 0
    """Receive limit in bytes of truesize, as it is in force (twice what SO_RCVBUF was given)."""
    sndbuf: int = 0
    """Send limit in bytes of truesize, as it is in force (twice what SO_SNDBUF was given)."""
    reuseaddr: bool = False
    """Bind to a port that connections still use, or that other datagram sockets with this option have (SO_REUSEADDR)."""
    reuseport: bool = False
    """The same for datagram sockets (SO_REUSEPORT)."""
    broadcast: bool = False
    """Datagrams may go to a broadcast address (SO_BROADCAST)."""
    keepalive: bool = False
    """Probe an idle peer (SO_KEEPALIVE)."""
    keepidle: float = 0.0
    """Seconds (TCP_KEEPIDLE); 0: as configured."""
    keepintvl: float = 0.0
    """Seconds (TCP_KEEPINTVL); 0: as configured."""
    keepcnt: int = 0
    """Probes (TCP_KEEPCNT); 0: as configured."""
    linger: int = -1
    """Seconds of SO_LINGER; -1: off; 0: closing resets."""
    nodelay: bool = False
    """Send small segments at once (TCP_NODELAY)."""
    cork: bool = False
    """Hold a last segment that is not full (TCP_CORK)."""
    maxseg: int = 0
    """Upper bound of the segment size in bytes (TCP_MAXSEG); 0: none."""
    user_timeout: float = 0.0
    """Seconds that sent data may stay unacknowledged (TCP_USER_TIMEOUT, RFC 5482); 0: as configured."""
    syncnt: int = 0
    """SYN retransmissions (TCP_SYNCNT); 0: as configured."""
    congestion: str = ""
    """Congestion control (TCP_CONGESTION); empty: that of the route, or as configured."""
    max_pacing_rate: int = 0
    """Bytes per second at most (SO_MAX_PACING_RATE); 0: no limit."""
    tos: int = 0
    """Type of service, or traffic class (IP_TOS, IPV6_TCLASS)."""
    pmtudisc: int = PMTUDISC_WANT
    """What becomes of a datagram that is longer than the path MTU (IP_MTU_DISCOVER)."""
    ttl: int = 0
    """Time to live, or hop limit (IP_TTL, IPV6_UNICAST_HOPS); 0: what the path says."""
    v6only: bool = False
    """An IPv6 socket takes no IPv4 (IPV6_V6ONLY)."""
    rcvlowat: int = 1
    """Bytes that must wait before a stream counts as readable (SO_RCVLOWAT)."""
    notsent_lowat: int = 0
    """Bytes not yet sent from which on a stream takes no more (TCP_NOTSENT_LOWAT); 0: only `sndbuf` counts."""
    window_clamp: int = 0
    """Upper bound of the window in bytes that is advertised (TCP_WINDOW_CLAMP); 0: none."""
    linger2: float = 0.0
    """Seconds that a closed connection waits in FIN-WAIT-2 (TCP_LINGER2); 0: as configured; -1: not at all."""
    defer_accept: int = 0
    """Timeouts of the SYN-ACK for which a bare ACK does not finish the handshake, since data is to come (TCP_DEFER_ACCEPT)."""
    fastopen: int = 0
    """Connections that a listener may have opened by data with a SYN and not confirmed yet (TCP_FASTOPEN); 0: takes none."""
    fastopen_connect: bool = False
    """The SYN waits for the first data that is sent, where the server's cookie is known (TCP_FASTOPEN_CONNECT)."""
    inq: bool = False
    """Tell with each `recvmsg` how much is left to read (TCP_INQ)."""
    memalloc: bool = False
    """May use the reserve (SOCK_MEMALLOC of the kernel, which has no option for it)."""

    def copy(self) -> SocketOptions:
        """The same options, for a socket that inherits them."""
        return replace(self)
