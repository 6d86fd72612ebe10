"""Counters of the stack under the names of the kernel's SNMP tables (/proc/net/snmp and /proc/net/netstat), as `nstat` prints them."""

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
        "TcpExtTCPSackRecovery",
        "TcpExtTCPRenoRecovery",
        "TcpExtTCPTimeouts",
        "TcpExtTCPWinProbe",
        "TcpExtTW",
        "TcpExtPFMemallocDrop",
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
        for name in self.__slots__:
            setattr(self, name, 0)

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {name: getattr(self, name) for name in sorted(self.__slots__)}
