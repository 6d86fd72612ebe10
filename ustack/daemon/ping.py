"""A series of echo requests (RFC 792; RFC 4443, section 4), as `ping` sends them: one every interval, replies matched by their
sequence number.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from ustack.net.path import PMTUDISC_DO, PMTUDISC_DONT, PMTUDISC_PROBE, PMTUDISC_WANT
from ustack.sockaddr import pack_host, unpack_host
from ustack.wire import icmp, icmpv6

if TYPE_CHECKING:
    from collections.abc import Callable

    from ustack.net.echo import Echo
    from ustack.stack import Stack

PAYLOAD_MAX: Final = 65507
"""Bytes of the largest payload of an echo request."""

INTERVAL_MIN: Final = 0.002
"""Seconds between two requests at least, as ping allows its users."""

PMTUDISC: Final = {"dont": PMTUDISC_DONT, "want": PMTUDISC_WANT, "do": PMTUDISC_DO, "probe": PMTUDISC_PROBE}
"""What may become of requests that are longer than the path MTU, by the names of ping -M."""

_MASK: Final = 0xFFFF

_UNREACHABLE: Final = {
    0: "Destination Net Unreachable",
    1: "Destination Host Unreachable",
    2: "Destination Protocol Unreachable",
    3: "Destination Port Unreachable",
    4: "Frag needed and DF set",
}

_UNREACHABLE6: Final = {
    0: "Destination unreachable: No route",
    1: "Destination unreachable: Administratively prohibited",
    2: "Destination unreachable: Beyond scope of source address",
    3: "Destination unreachable: Address unreachable",
    4: "Destination unreachable: Port unreachable",
    5: "Destination unreachable: Source address failed ingress/egress policy",
    6: "Destination unreachable: Reject route to destination",
}
"""As ping says it of IPv6."""


class PingSeries:
    """Sends `count` requests with `size` bytes of payload to `host`, one every `interval` seconds (None: until stopped).

    `report` is called with each thing that happens, as a dict for JSON: a reply (`seq`, `bytes`, `ttl`, `time` in seconds,
    `duplicate`) or an error (`seq`, `error`, and
    `from` when another host reported it). After the last request it waits up to `timeout` seconds for its reply.
    """

    def __init__(
        self,
        stack: Stack,
        host: str,
        *,
        count: int | None,
        interval: float,
        size: int,
        timeout: float,
        ttl: int = 0,
        pmtudisc: str = "want",
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """Raises gaierror when `host` is not an address, OSError EINVAL or ENODEV for a link-local one on no link of ours,
        ValueError for a size, a count or a time that cannot be.
        """
        if not 0 <= size <= PAYLOAD_MAX:
            raise ValueError(f"a payload has 0 to {PAYLOAD_MAX} bytes, not {size}")
        if (count is not None and count < 1) or interval < INTERVAL_MIN or timeout < 0:
            raise ValueError(f"count must be at least 1, interval at least {INTERVAL_MIN:g} s, timeout at least 0 s")
        if not 0 <= ttl <= 255:
            raise ValueError(f"a time to live is at most 255, not {ttl}")
        if pmtudisc not in PMTUDISC:
            raise ValueError(f"pmtudisc is one of {', '.join(PMTUDISC)}, not {pmtudisc!r}")
        packed = pack_host(host, stack.interfaces)
        self._stack = stack
        self._dst = packed
        self._count = count
        self._interval = interval
        self._timeout = timeout
        self._ttl = ttl
        self._pmtudisc = PMTUDISC[pmtudisc]
        self._payload = os.urandom(size)
        self._report = report
        self._waiting: dict[int, tuple[int, float]] = {}  # by sequence number on the wire: which request, and when it was sent
        self._answered: set[int] = set()
        self._done = asyncio.Event()
        self._all_sent = False
        self.sent = self.received = self.duplicates = self.errors = 0

    async def run(self) -> dict[str, Any]:
        """Send the series and return what became of it: counts, and `time` in seconds. Raises the OSErrors of
        `IpLayer.path`.
        """
        echo: Echo
        if len(self._dst) == 4:
            echo = self._stack.ip.icmp.open_echo(self._on_reply, self._on_error)
        else:
            echo = self._stack.ip6.icmp.open_echo(self._on_reply, self._on_error6)
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            while (self._count is None or self.sent < self._count) and not self._done.is_set():
                if self.sent:
                    await self._wait(started + self.sent * self._interval - loop.time())
                    if self._done.is_set():
                        break
                self._send(echo)
            self._all_sent = True
            if self._waiting:
                await self._wait(self._timeout)
        finally:
            echo.close()
        return {
            "sent": self.sent,
            "received": self.received,
            "duplicates": self.duplicates,
            "errors": self.errors,
            "time": loop.time() - started,
        }

    def stop(self) -> None:
        """Let `run` return at once, with what there is."""
        self._done.set()

    async def _wait(self, seconds: float) -> None:
        """Until all is done, but not longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._done.wait()

    def _send(self, echo: Echo) -> None:
        self.sent += 1
        on_wire = self.sent & _MASK
        self._waiting[on_wire] = (self.sent, perf_counter())
        self._answered.discard(on_wire)
        self._stack.tick()
        try:
            if not echo.send(self._dst, on_wire, self._payload, self._ttl, self._pmtudisc):
                self._forget(on_wire, "not sent: the device is full")
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            self._forget(on_wire, str(error.strerror).lower())

    def _on_reply(self, src: bytes, seq: int, payload: bytes, ttl: int) -> None:
        now = perf_counter()
        known = self._waiting.pop(seq, None)
        duplicate = known is None
        if known is None:
            if seq not in self._answered:
                return
            self.duplicates += 1
            number, sent = seq, now
        else:
            number, sent = known
            self.received += 1
            self._answered.add(seq)
        event = {
            "from": unpack_host(src),
            "seq": number,
            "bytes": len(payload) + icmp.HEADER_LEN,
            "ttl": ttl,
            "time": None if duplicate else now - sent,
            "duplicate": duplicate,
        }
        if payload != self._payload:
            event["error"] = "wrong data in the reply"
        self._report(event)
        self._check_done()

    def _on_error(self, kind: int, code: int, dst: bytes, seq: int, reporter: bytes) -> None:
        what = _UNREACHABLE.get(code, f"Destination Unreachable, code {code}")
        if kind == icmp.ICMP_TIME_EXCEEDED:
            what = "Frag reassembly time exceeded" if code == icmp.ICMP_EXC_FRAGTIME else "Time to live exceeded"
        elif kind == icmp.ICMP_PARAMETERPROB:
            what = "Parameter problem"
        self._forget(seq, what, reporter)

    def _on_error6(self, kind: int, code: int, dst: bytes, seq: int, reporter: bytes) -> None:
        what = _UNREACHABLE6.get(code, f"Destination unreachable: Unknown code {code}")
        if kind == icmpv6.ICMPV6_PKT_TOOBIG:
            what = "Packet too big"
        elif kind == icmpv6.ICMPV6_TIME_EXCEED:
            what = f"Time exceeded: {'Defragmentation failure' if code else 'Hop limit'}"
        elif kind == icmpv6.ICMPV6_PARAMPROB:
            what = "Parameter problem"
        self._forget(seq, what, reporter)

    def _forget(self, seq: int, why: str, reporter: bytes | None = None) -> None:
        known = self._waiting.pop(seq, None)
        if known is None:
            return
        self.errors += 1
        event = {"to": unpack_host(self._dst), "seq": known[0], "error": why}
        if reporter is not None:
            event["from"] = unpack_host(reporter)
        self._report(event)
        self._check_done()

    def _check_done(self) -> None:
        if self._all_sent and not self._waiting:
            self._done.set()
