"""Counters of the stack under the names of the kernel's SNMP tables (/proc/net/snmp and /proc/net/netstat), as `nstat` prints
them.
"""

from __future__ import annotations


class Mib:
    """One plain int for each counter, never reset; `as_dict` gives all of them by name."""

    __slots__ = (
        "Icmp6InCsumErrors",
        "Icmp6InDestUnreachs",
        "Icmp6InEchoReplies",
        "Icmp6InEchos",
        "Icmp6InErrors",
        "Icmp6InMsgs",
        "Icmp6InNeighborAdvertisements",
        "Icmp6InNeighborSolicits",
        "Icmp6InParmProblems",
        "Icmp6InPktTooBigs",
        "Icmp6InRedirects",
        "Icmp6InRouterAdvertisements",
        "Icmp6InTimeExcds",
        "Icmp6OutDestUnreachs",
        "Icmp6OutEchoReplies",
        "Icmp6OutEchos",
        "Icmp6OutMLDv2Reports",
        "Icmp6OutMsgs",
        "Icmp6OutNeighborAdvertisements",
        "Icmp6OutNeighborSolicits",
        "Icmp6OutParmProblems",
        "Icmp6OutRouterSolicits",
        "Icmp6OutTimeExcds",
        "IcmpInEchos",
        "IcmpInErrors",
        "IcmpInMsgs",
        "IcmpOutDestUnreachs",
        "IcmpOutEchoReps",
        "IcmpOutMsgs",
        "IcmpOutTimeExcds",
        "Ip6FragCreates",
        "Ip6FragFails",
        "Ip6FragOKs",
        "Ip6InDelivers",
        "Ip6InReceives",
        "Ip6OutRequests",
        "Ip6ReasmFails",
        "Ip6ReasmOKs",
        "Ip6ReasmReqds",
        "Ip6ReasmTimeout",
        "IpFragCreates",
        "IpFragFails",
        "IpFragOKs",
        "IpInDelivers",
        "IpInReceives",
        "IpOutRequests",
        "IpReasmFails",
        "IpReasmOKs",
        "IpReasmReqds",
        "IpReasmTimeout",
        "TcpActiveOpens",
        "TcpAttemptFails",
        "TcpEstabResets",
        "TcpExtDelayedACKs",
        "TcpExtIPReversePathFilter",
        "TcpExtListenDrops",
        "TcpExtListenOverflows",
        "TcpExtOfoPruned",
        "TcpExtPAWSActive",
        "TcpExtPAWSEstab",
        "TcpExtPFMemallocDrop",
        "TcpExtPruneCalled",
        "TcpExtRcvPruned",
        "TcpExtSyncookiesFailed",
        "TcpExtSyncookiesRecv",
        "TcpExtSyncookiesSent",
        "TcpExtTCPAbortOnMemory",
        "TcpExtTCPAbortOnTimeout",
        "TcpExtTCPChallengeACK",
        "TcpExtTCPDSACKOldSent",
        "TcpExtTCPDSACKRecv",
        "TcpExtTCPDSACKUndo",
        "TcpExtTCPDeferAcceptDrop",
        "TcpExtTCPFastOpenActive",
        "TcpExtTCPFastOpenActiveFail",
        "TcpExtTCPFastOpenCookieReqd",
        "TcpExtTCPFastOpenListenOverflow",
        "TcpExtTCPFastOpenPassive",
        "TcpExtTCPFastOpenPassiveFail",
        "TcpExtTCPFastRetrans",
        "TcpExtTCPFullUndo",
        "TcpExtTCPHPHits",
        "TcpExtTCPKeepAlive",
        "TcpExtTCPLossProbeRecovery",
        "TcpExtTCPLossProbes",
        "TcpExtTCPLossUndo",
        "TcpExtTCPLostRetransmit",
        "TcpExtTCPMTUPFail",
        "TcpExtTCPMemoryPressures",
        "TcpExtTCPMemoryPressuresChrono",
        "TcpExtTCPOFODrop",
        "TcpExtTCPOFOQueue",
        "TcpExtTCPPartialUndo",
        "TcpExtTCPRcvCollapsed",
        "TcpExtTCPRcvQDrop",
        "TcpExtTCPRenoRecovery",
        "TcpExtTCPReqQFullDoCookies",
        "TcpExtTCPReqQFullDrop",
        "TcpExtTCPSACKReneging",
        "TcpExtTCPSACKReorder",
        "TcpExtTCPSackRecovery",
        "TcpExtTCPSpuriousRTOs",
        "TcpExtTCPTimeouts",
        "TcpExtTCPWinProbe",
        "TcpExtTW",
        "TcpInErrs",
        "TcpInSegs",
        "TcpOutRsts",
        "TcpOutSegs",
        "TcpPassiveOpens",
        "TcpRetransSegs",
        "UdpInDatagrams",
        "UdpInErrors",
        "UdpMemErrors",
        "UdpNoPorts",
        "UdpOutDatagrams",
        "UdpRcvbufErrors",
    )

    def __init__(self) -> None:
        self.Icmp6InCsumErrors = 0
        """ICMPv6 messages with a wrong checksum."""
        self.Icmp6InDestUnreachs = 0
        """"Destination unreachable" messages received over IPv6."""
        self.Icmp6InEchoReplies = 0
        """Echo replies received over IPv6."""
        self.Icmp6InEchos = 0
        """Echo requests received over IPv6."""
        self.Icmp6InErrors = 0
        """ICMPv6 messages refused: malformed, with a wrong checksum, or an error about nothing of ours."""
        self.Icmp6InMsgs = 0
        """ICMPv6 messages received, those refused included."""
        self.Icmp6InNeighborAdvertisements = 0
        """Neighbor advertisements received."""
        self.Icmp6InNeighborSolicits = 0
        """Neighbor solicitations received."""
        self.Icmp6InParmProblems = 0
        """"Parameter problem" messages received over IPv6."""
        self.Icmp6InPktTooBigs = 0
        """"Packet too big" messages received."""
        self.Icmp6InRedirects = 0
        """Redirects received over IPv6."""
        self.Icmp6InRouterAdvertisements = 0
        """Router advertisements received."""
        self.Icmp6InTimeExcds = 0
        """"Time exceeded" messages received over IPv6."""
        self.Icmp6OutDestUnreachs = 0
        """"Destination unreachable" messages sent over IPv6."""
        self.Icmp6OutEchoReplies = 0
        """Echo replies sent over IPv6."""
        self.Icmp6OutEchos = 0
        """Echo requests sent over IPv6."""
        self.Icmp6OutMLDv2Reports = 0
        """Reports of the groups that we listen to."""
        self.Icmp6OutMsgs = 0
        """ICMPv6 messages sent."""
        self.Icmp6OutNeighborAdvertisements = 0
        """Neighbor advertisements sent."""
        self.Icmp6OutNeighborSolicits = 0
        """Neighbor solicitations sent."""
        self.Icmp6OutParmProblems = 0
        """"Parameter problem" messages sent over IPv6."""
        self.Icmp6OutRouterSolicits = 0
        """Router solicitations sent."""
        self.IcmpInEchos = 0
        """Echo requests received, other than to a broadcast address."""
        self.IcmpInErrors = 0
        """ICMP messages refused: malformed, with a wrong checksum, or an error about nothing of ours."""
        self.IcmpInMsgs = 0
        """ICMP messages received, those refused included."""
        self.IcmpOutDestUnreachs = 0
        """"Destination unreachable" messages sent."""
        self.IcmpOutEchoReps = 0
        """Echo replies sent."""
        self.IcmpOutMsgs = 0
        """ICMP messages sent: errors, replies, and echo requests of our own."""
        self.IcmpOutTimeExcds = 0
        """"Time exceeded" messages sent."""
        self.Ip6FragCreates = 0
        """IPv6 fragments sent."""
        self.Ip6FragFails = 0
        """IPv6 packets that were too long for their path and must not, or could not, be sent as fragments."""
        self.Ip6FragOKs = 0
        """IPv6 packets that were sent as fragments."""
        self.Ip6InDelivers = 0
        """IPv6 packets handed to the protocol that they name."""
        self.Ip6InReceives = 0
        """IPv6 packets received, those dropped included."""
        self.Ip6ReasmReqds = 0
        """IPv6 fragments received."""
        self.Ip6ReasmOKs = 0
        """IPv6 packets put together."""
        self.Ip6ReasmFails = 0
        """IPv6 packets, or fragments, that could not be put together."""
        self.Ip6ReasmTimeout = 0
        """IPv6 packets that were not whole in time."""
        self.Icmp6OutTimeExcds = 0
        """"Time exceeded" messages sent over IPv6."""
        self.Ip6OutRequests = 0
        """IPv6 packets that a protocol asked to send, those dropped on the way included."""
        self.IpFragCreates = 0
        """Fragments sent."""
        self.IpFragFails = 0
        """Packets that were too long for their path and must not, or could not, be sent as fragments."""
        self.IpFragOKs = 0
        """Packets that were sent as fragments."""
        self.IpInDelivers = 0
        """Packets handed to the protocol that they name."""
        self.IpInReceives = 0
        """IPv4 packets received, those dropped included."""
        self.IpOutRequests = 0
        """Packets that a protocol asked to send, those dropped on the way included."""
        self.IpReasmFails = 0
        """Datagrams, or fragments of them, that could not be put together, those that timed out included."""
        self.IpReasmOKs = 0
        """Datagrams put together from fragments."""
        self.IpReasmReqds = 0
        """Fragments received."""
        self.IpReasmTimeout = 0
        """Datagrams of which fragments were missing when their time was over."""
        self.TcpActiveOpens = 0
        """Connections that we began to open."""
        self.TcpAttemptFails = 0
        """Connections reset by the peer, or given up, before they were established."""
        self.TcpEstabResets = 0
        """Connections reset by the peer in ESTABLISHED or CLOSE-WAIT."""
        self.TcpExtDelayedACKs = 0
        """Acknowledgments that the delayed-ACK timer sent."""
        self.TcpExtIPReversePathFilter = 0
        """Packets dropped because the way back to their source leads elsewhere."""
        self.TcpExtListenDrops = 0
        """SYNs, and handshakes just finished, that a listener refused."""
        self.TcpExtListenOverflows = 0
        """Those of TcpExtListenDrops that found the queue of connections to accept full."""
        self.TcpExtOfoPruned = 0
        """Times that out-of-order data was given up to make room."""
        self.TcpExtPAWSActive = 0
        """SYN-ACKs reset because they echo a timestamp that no SYN of ours had."""
        self.TcpExtPAWSEstab = 0
        """Segments dropped because their timestamp is older than one that was seen before (RFC 7323, section 5)."""
        self.TcpExtPFMemallocDrop = 0
        """Segments in the reserve for sockets that may not use it: the drop rule."""
        self.TcpExtPruneCalled = 0
        """Times that a receive queue had no room for what came, and room was looked for."""
        self.TcpExtRcvPruned = 0
        """Segments dropped because nothing brought a receive queue below its limit."""
        self.TcpExtSyncookiesFailed = 0
        """ACKs at a listener that has sent SYN cookies which were none of them."""
        self.TcpExtSyncookiesRecv = 0
        """SYN cookies that came back."""
        self.TcpExtSyncookiesSent = 0
        """SYNs answered with a cookie."""
        self.TcpExtTCPAbortOnMemory = 0
        """Connections that their users had closed, reset because the data that they held was needed."""
        self.TcpExtTCPAbortOnTimeout = 0
        """Connections given up because the peer answered neither retransmissions nor probes."""
        self.TcpExtTCPChallengeACK = 0
        """Challenge ACKs sent (RFC 5961)."""
        self.TcpExtTCPDSACKOldSent = 0
        """Segments received again, of which the peer was told (D-SACK)."""
        self.TcpExtTCPDSACKRecv = 0
        """D-SACK blocks received: the peer got something twice."""
        self.TcpExtTCPDSACKUndo = 0
        """Reductions of the window taken back because every retransmission had been a duplicate."""
        self.TcpExtTCPDeferAcceptDrop = 0
        """ACKs without data that did not finish a handshake, because the listener waits for data (TCP_DEFER_ACCEPT)."""
        self.TcpExtTCPFastOpenActive = 0
        """Data that went with our SYN and was acknowledged by the SYN-ACK (RFC 7413)."""
        self.TcpExtTCPFastOpenActiveFail = 0
        """Data that went with our SYN and was not acknowledged by the SYN-ACK."""
        self.TcpExtTCPFastOpenCookieReqd = 0
        """SYNs that asked for a Fast Open cookie."""
        self.TcpExtTCPFastOpenListenOverflow = 0
        """SYNs with a good Fast Open cookie at a listener that had as many as it may."""
        self.TcpExtTCPFastOpenPassive = 0
        """SYNs whose data was taken at once."""
        self.TcpExtTCPFastOpenPassiveFail = 0
        """SYNs with a Fast Open cookie that was not ours."""
        self.TcpExtTCPFastRetrans = 0
        """Segments sent again in fast recovery."""
        self.TcpExtTCPFullUndo = 0
        """Recoveries taken back when they were over, because timestamps or D-SACK showed that nothing had been lost."""
        self.TcpExtTCPHPHits = 0
        """Segments that header prediction matched."""
        self.TcpExtTCPKeepAlive = 0
        """Keepalive probes sent."""
        self.TcpExtTCPLossProbeRecovery = 0
        """Losses that a tail loss probe repaired."""
        self.TcpExtTCPLossProbes = 0
        """Tail loss probes sent (RFC 8985, section 7)."""
        self.TcpExtTCPLossUndo = 0
        """Timeouts taken back."""
        self.TcpExtTCPLostRetransmit = 0
        """Retransmissions found lost themselves."""
        self.TcpExtTCPMTUPFail = 0
        """Times that segments were made smaller because large ones seemed to be swallowed on the way."""
        self.TcpExtTCPMemoryPressures = 0
        """Times that TCP came under memory pressure."""
        self.TcpExtTCPMemoryPressuresChrono = 0
        """Milliseconds that TCP has been under memory pressure, the present time not included."""
        self.TcpExtTCPOFODrop = 0
        """Segments out of order dropped because there was no room or no memory."""
        self.TcpExtTCPOFOQueue = 0
        """Segments queued out of order."""
        self.TcpExtTCPPartialUndo = 0
        """Recoveries taken back half-way, because an ACK was that of an original."""
        self.TcpExtTCPRcvCollapsed = 0
        """Packets of receive queues saved by copying their data together."""
        self.TcpExtTCPRcvQDrop = 0
        """Segments in order dropped because there was no room or no memory."""
        self.TcpExtTCPRenoRecovery = 0
        """Fast recoveries on a connection without SACK."""
        self.TcpExtTCPReqQFullDoCookies = 0
        """Those of TcpExtSyncookiesSent that found the queue of half-open connections full."""
        self.TcpExtTCPReqQFullDrop = 0
        """SYNs dropped because the queue of half-open connections was full."""
        self.TcpExtTCPSACKReneging = 0
        """Peers that threw away what they had sacked."""
        self.TcpExtTCPSACKReorder = 0
        """Times that packets were seen to overtake each other."""
        self.TcpExtTCPSackRecovery = 0
        """Fast recoveries on a connection with SACK."""
        self.TcpExtTCPSpuriousRTOs = 0
        """Timeouts that F-RTO found to be spurious (RFC 5682)."""
        self.TcpExtTCPTimeouts = 0
        """Retransmission timeouts; those of a SYN are not counted here."""
        self.TcpExtTCPWinProbe = 0
        """Times that the persist timer asked whether a window was still closed."""
        self.TcpExtTW = 0
        """Connections that went into TIME-WAIT."""
        self.TcpInErrs = 0
        """Segments refused: too short, with an impossible header length, or with a wrong checksum."""
        self.TcpInSegs = 0
        """Segments received, those refused included; a super-frame counts as one."""
        self.TcpOutRsts = 0
        """Resets sent."""
        self.TcpOutSegs = 0
        """Segments sent, those sent again included; a super-frame counts as one."""
        self.TcpPassiveOpens = 0
        """Connections established by way of a listener."""
        self.TcpRetransSegs = 0
        """Segments sent again, SYNs included; a super-frame counts as one."""
        self.UdpInDatagrams = 0
        """Datagrams that a program has received."""
        self.UdpInErrors = 0
        """Datagrams refused: too short, with an impossible length, or with a wrong checksum."""
        self.UdpMemErrors = 0
        """Datagrams dropped because all UDP sockets together hold too much memory."""
        self.UdpNoPorts = 0
        """Datagrams for a port on which nobody receives."""
        self.UdpOutDatagrams = 0
        """Datagrams sent, those lost below included."""
        self.UdpRcvbufErrors = 0
        """Datagrams dropped because the receive limit of their socket was reached."""

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {name: getattr(self, name) for name in dir(self) if name[0].isupper()}
