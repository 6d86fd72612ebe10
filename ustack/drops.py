"""Why a packet was dropped: one enum for the whole stack, and the counters behind `ustack nstat`.

The names are those of the kernel's `enum skb_drop_reason` (include/net/dropreason-core.h) wherever it has one for the case;
the few of our own come last. A drop is counted once, at the place that decides it, and is never logged.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final


class DropReason(IntEnum):
    """Why a packet, in or out, went no further. The value is an index into `Drops.counts`, and means nothing else."""

    PKT_TOO_SMALL = 0
    """Shorter than the headers that it must have."""
    PKT_TOO_BIG = auto()
    """Longer than the path MTU, or than the receiving device takes."""
    OTHERHOST = auto()
    """The Ethernet destination is another station."""
    UNHANDLED_PROTO = auto()
    """An ethertype that the stack does not speak."""
    INVALID_PROTO = auto()
    """An ARP packet that is malformed or claims an address of ours, or an ICMP message of a kind that is not acted on."""
    IP_INHDR = auto()
    """The IP header contradicts itself: version, header length, total length, options."""
    IP_CSUM = auto()
    """Wrong IPv4 header checksum."""
    IP_INADDRERRORS = auto()
    """A source or destination address that must not appear there."""
    IP_NOPROTO = auto()
    """An IP protocol that nobody handles."""
    IP_OUTNOROUTES = auto()
    """No route to the destination."""
    FRAG_REASM_TIMEOUT = auto()
    """Fragments of a datagram that was not whole in time."""
    FRAG_TOO_FAR = auto()
    """Fragments of a datagram of which nothing came while its source sent many others."""
    DUP_FRAG = auto()
    """A fragment that brings nothing new."""
    FRAG_OVERLAP = auto()
    """Fragments of a datagram in which some overlap (RFC 5722)."""
    FRAG_INVALID = auto()
    """Fragments that contradict each other about the end or the congestion marks, are empty, or make too long a datagram."""
    FRAG_TINY = auto()
    """A fragment that hides a part of the TCP header (RFC 1858, RFC 3128)."""
    FRAG_EVICTED = auto()
    """Fragments given up because all together, or those of their source, took too much memory."""
    DEV_READY = auto()
    """The interface is down, or went down."""
    IPV6_BAD_EXTHDR = auto()
    """An IPv6 extension header that is malformed, unknown, misplaced, or one too many."""
    IPV6_NDISC_HOP_LIMIT = auto()
    """A message of Neighbor Discovery that came from beyond the link: its hop limit is not 255."""
    IPV6_NDISC_BAD_OPTIONS = auto()
    """A message of Neighbor Discovery that is malformed, or says what it must not."""
    IPV6_NDISC_NS_OTHERHOST = auto()
    """A neighbor solicitation for somebody else, or an advertisement that nobody asked for."""
    NEIGH_FAILED = auto()
    """The next hop did not answer address resolution."""
    NEIGH_QUEUEFULL = auto()
    """Too much already waits for this next hop to be resolved."""
    NEIGH_TABLEFULL = auto()
    """The neighbour table is full of entries in use."""
    ICMP_CSUM = auto()
    """Wrong ICMP checksum."""
    ICMP_MALFORMED = auto()
    """An ICMP message that is too short or quotes nothing of ours."""
    ICMP_RATELIMIT = auto()
    """An ICMP message that the rate limit kept us from sending."""
    UDP_CSUM = auto()
    """Wrong UDP checksum."""
    UDP_LENGTH = auto()
    """The UDP length disagrees with the IP length."""
    TCP_CSUM = auto()
    """Wrong TCP checksum."""
    TCP_HDR = auto()
    """The TCP data offset points outside the segment."""
    TCP_FLAGS = auto()
    """A combination of flags that the state does not allow."""
    NO_SOCKET = auto()
    """No socket, listener or echo client that it is for."""
    PFMEMALLOC = auto()
    """The packet lies in the reserve and its socket may not use it: the drop rule."""
    PROTO_MEM = auto()
    """The socket may not be charged: its protocol is over its limit."""
    NOMEM = auto()
    """No memory to keep the packet in."""
    SOCKET_RCVBUFF = auto()
    """The socket's receive limit is reached."""
    SOCKET_SHUTDOWN = auto()
    """Data for a socket whose reader has gone."""
    LISTEN_OVERFLOW = auto()
    """The backlog of connections not yet accepted, or of half-open ones, is full."""
    SYN_OVERFLOW = auto()
    """Too many half-open connections."""
    TCP_ZEROWINDOW = auto()
    """Data while we advertised a window of zero."""
    IP_RPFILTER = auto()
    """The way back to the source does not lead through the interface that the packet came by (RFC 3704)."""
    TCP_OLD_DATA = auto()
    """Data, or a SYN, that was received before."""
    TCP_OVERWINDOW = auto()
    """Data to the right of the window that we advertised."""
    TCP_RFC7323_PAWS = auto()
    """An old timestamp (RFC 7323, section 5)."""
    TCP_INVALID_SYN = auto()
    """A SYN on a synchronized connection (RFC 5961, section 4)."""
    TCP_INVALID_ACK = auto()
    """An acknowledgment number that is too old or of data not yet sent (RFC 5961, section 5)."""
    TCP_RESET = auto()
    """A reset that did not match exactly (RFC 5961, section 3), or that came to a listener."""
    TCP_OFO_QUEUE_PRUNE = auto()
    """Out-of-order data given up to make room."""
    TCP_CLOSE = auto()
    """Data after the peer's FIN, or for a connection that has ended."""
    TIME_WAIT = auto()
    """A segment for a connection in TIME-WAIT that did not restart it."""
    MEM_PRESSURE = auto()
    """A SYN for an ordinary listener while memory is under pressure."""
    RING_EMPTY = auto()
    """The device had no receive buffer posted."""
    TX_DEVICE = auto()
    """The device refused the frame: link down or no room."""
    WIRE_LOSS = auto()
    """An impairment of a simulated wire."""
    WIRE_QUEUE = auto()
    """The queue of a simulated wire is full."""


DROP_REASONS: Final = len(DropReason)


DROPS_OF_OTHERS: Final = frozenset(
    {
        DropReason.TX_DEVICE,
        DropReason.ICMP_RATELIMIT,
        DropReason.FRAG_EVICTED,
        DropReason.FRAG_TOO_FAR,
        DropReason.TCP_OFO_QUEUE_PRUNE,
        DropReason.NEIGH_QUEUEFULL,
        DropReason.NEIGH_FAILED,
        DropReason.IP_OUTNOROUTES,
        DropReason.WIRE_LOSS,
        DropReason.WIRE_QUEUE,
    }
)
"""What may be counted while a frame is delivered and is not said of that frame, but of an answer or of one that waited."""


class Drops:
    """Dropped packets by reason: `counts[reason]`."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * DROP_REASONS

    def count(self, reason: DropReason) -> None:
        """Count one packet dropped for `reason`."""
        self.counts[reason] += 1

    def __getitem__(self, reason: DropReason) -> int:
        return self.counts[reason]

    def total(self) -> int:
        """All drops together."""
        return sum(self.counts)

    def by_name(self) -> dict[str, int]:
        """The reasons that occurred, by name, in the order of the enum."""
        return {reason.name: self.counts[reason] for reason in DropReason if self.counts[reason]}
