"""Telling routers, and switches that listen in, which groups we want (MLDv2, RFC 3810, without source filters).

Every change of a group is reported twice, and queries are answered after a random delay. A query of version 1 is answered in
version 1 (section 8.2.1). Nothing is reported of ff02::1, to which everybody listens (section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net.addresses import ALL_MLDV2_ROUTERS, ALL_NODES, ALL_ROUTERS, ANY6, is_link_local
from ustack.timers import Timer
from ustack.wire import ethernet, icmpv6, ipv6, mld

if TYPE_CHECKING:
    from ustack.net.inet6 import Inet6
    from ustack.net.layer import IpPacket

ROBUSTNESS: Final = 2
"""Times that a change is reported (RFC 3810, section 9.1)."""

UNSOLICITED_REPORT_INTERVAL: Final = 1.0
"""Seconds within which it is reported again (section 9.11)."""

RECORDS_MAX: Final = 60
"""Groups in one report, so that it fits every link."""

_ROUTER_ALERT: Final = ipv6.build_options(ipv6.NEXTHDR_ICMP, [(ipv6.OPT_ROUTER_ALERT, b"\0\0")])


class Mld:
    """The listener on the interface of `inet6`, whose `groups` it reports."""

    __slots__ = ("_answer_timer", "_asked", "_change_timer", "_changes", "_inet6", "_version")

    def __init__(self, inet6: Inet6) -> None:
        self._inet6 = inet6
        self._changes: dict[bytes, tuple[int, int]] = {}  # by group: what to say, and how often still
        self._change_timer = Timer(self._report_changes)
        self._answer_timer = Timer(self._answer)
        self._asked = ANY6
        self._version = 2

    def start(self) -> None:
        """We have a link-local address to speak from: say again what was said from :: (RFC 3590)."""
        for group in self._inet6.groups:
            self.changed(group, joined=True)

    def changed(self, group: bytes, *, joined: bool) -> None:
        """We listen to `group` (packed, with its zone) from now on, or no longer."""
        if group[:16] == ALL_NODES:
            return
        kind = mld.CHANGE_TO_EXCLUDE if joined else mld.CHANGE_TO_INCLUDE
        self._changes[group[:16]] = kind, ROBUSTNESS
        timers = self._inet6.env.timers
        if not self._change_timer.pending:
            timers.set(self._change_timer, timers.now)

    def _report_changes(self) -> None:
        records = [(kind, group) for group, (kind, _) in self._changes.items()][:RECORDS_MAX]
        self._report(records)
        for kind, group in records:
            left = self._changes[group][1] - 1
            if left:
                self._changes[group] = kind, left
            else:
                del self._changes[group]
        if self._changes:
            env = self._inet6.env
            env.timers.set(self._change_timer, env.timers.now + env.random.uniform(0.0, UNSOLICITED_REPORT_INTERVAL))

    def on_query(self, packet: IpPacket) -> None:
        """A query arrived (RFC 3810, section 6.2): answer, for what it asks, within the time it gives."""
        query = mld.parse_query(packet.frame.head, packet.l4, packet.l4 + packet.l4_len)
        env = self._inet6.env
        if query is None or not is_link_local(packet.src) or packet.ttl != 1:
            env.drops.count(DropReason.INVALID_PROTO)
            return
        self._version = query.version
        # One answer is kept: when it is due already, it says all (section 6.2, rule 1 and 4).
        self._asked = query.group if not self._answer_timer.pending or self._asked == query.group else ANY6
        deadline = env.timers.now + env.random.uniform(0.0, min(query.delay, 30.0))
        if not self._answer_timer.pending or deadline < self._answer_timer.deadline:
            env.timers.set(self._answer_timer, deadline)

    def _answer(self) -> None:
        groups = [group[:16] for group in self._inet6.groups if group[:16] != ALL_NODES]
        if self._asked != ANY6:
            groups = [group for group in groups if group == self._asked]
        self._report([(mld.MODE_IS_EXCLUDE, group) for group in groups[:RECORDS_MAX]])

    def _report(self, records: list[tuple[int, bytes]]) -> None:
        if not records:
            return
        inet6 = self._inet6
        source = inet6.link_local()
        if self._version == 1:
            for kind, group in records:
                done = kind == mld.CHANGE_TO_INCLUDE
                dst = ALL_ROUTERS if done else group
                message = icmpv6.MLD_DONE if done else icmpv6.MLD_REPORT
                inet6.send(source, dst, ethernet.multicast_v6(dst), message, 0, group, _ROUTER_ALERT)
            return
        dst = ALL_MLDV2_ROUTERS
        body = mld.build_records(records)
        inet6.env.mib.Icmp6OutMLDv2Reports += 1
        inet6.send(source, dst, ethernet.multicast_v6(dst), icmpv6.MLD2_REPORT, len(records), body, _ROUTER_ALERT)

    def close(self) -> None:
        """Say nothing any more."""
        self._change_timer.cancel()
        self._answer_timer.cancel()
        self._changes.clear()
