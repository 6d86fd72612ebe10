"""Counters of the stack under the names of the kernel's SNMP tables (/proc/net/snmp and /proc/net/netstat), as `nstat` prints
them.
"""

from __future__ import annotations


class Mib:
    """One plain int for each counter; `as_dict` gives all of them by name."""

    __slots__ = (
        "IcmpInEchos",
        "IcmpInErrors",
        "IcmpInMsgs",
        "IcmpOutDestUnreachs",
        "IcmpOutEchoReps",
        "IcmpOutMsgs",
        "IpInDelivers",
        "IpInReceives",
        "IpOutRequests",
        "TcpActiveOpens",
        "TcpAttemptFails",
        "TcpEstabResets",
        "TcpExtDelayedACKs",
        "TcpExtListenDrops",
        "TcpExtListenOverflows",
        "TcpExtPFMemallocDrop",
        "TcpExtTCPAbortOnMemory",
        "TcpExtTCPAbortOnTimeout",
        "TcpExtTCPAutoCorking",
        "TcpExtTCPChallengeACK",
        "TcpExtTCPFastRetrans",
        "TcpExtTCPHPHits",
        "TcpExtTCPKeepAlive",
        "TcpExtTCPMemoryPressures",
        "TcpExtTCPOFOQueue",
        "TcpExtTCPRcvPruned",
        "TcpExtTCPRenoRecovery",
        "TcpExtTCPSackRecovery",
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
        "UdpNoPorts",
        "UdpOutDatagrams",
        "UdpRcvbufErrors",
    )

    def __init__(self) -> None:
        self.IcmpInEchos = 0
        self.IcmpInErrors = 0
        self.IcmpInMsgs = 0
        self.IcmpOutDestUnreachs = 0
        self.IcmpOutEchoReps = 0
        self.IcmpOutMsgs = 0
        self.IpInDelivers = 0
        self.IpInReceives = 0
        self.IpOutRequests = 0
        self.TcpActiveOpens = 0
        self.TcpAttemptFails = 0
        self.TcpEstabResets = 0
        self.TcpExtDelayedACKs = 0
        self.TcpExtListenDrops = 0
        self.TcpExtListenOverflows = 0
        self.TcpExtPFMemallocDrop = 0
        self.TcpExtTCPAbortOnMemory = 0
        self.TcpExtTCPAbortOnTimeout = 0
        self.TcpExtTCPAutoCorking = 0
        self.TcpExtTCPChallengeACK = 0
        self.TcpExtTCPFastRetrans = 0
        self.TcpExtTCPHPHits = 0
        self.TcpExtTCPKeepAlive = 0
        self.TcpExtTCPMemoryPressures = 0
        self.TcpExtTCPOFOQueue = 0
        self.TcpExtTCPRcvPruned = 0
        self.TcpExtTCPRenoRecovery = 0
        self.TcpExtTCPSackRecovery = 0
        self.TcpExtTCPTimeouts = 0
        self.TcpExtTCPWinProbe = 0
        self.TcpExtTW = 0
        self.TcpInErrs = 0
        self.TcpInSegs = 0
        self.TcpOutRsts = 0
        self.TcpOutSegs = 0
        self.TcpPassiveOpens = 0
        self.TcpRetransSegs = 0
        self.UdpInDatagrams = 0
        self.UdpInErrors = 0
        self.UdpNoPorts = 0
        self.UdpOutDatagrams = 0
        self.UdpRcvbufErrors = 0

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}
