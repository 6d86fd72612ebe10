"""Finding connections, the first and the next ones: ways in turn, back-off, and when to give up.

A session says when it has lost all its connections and when something was answered; this part makes connections until there are
as many as wanted, and says when the server counts as dead. What is done with a connection, and with the requests that wait for
one, is the session's affair (`session.py`).
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from ustack.nbd.connection import Connection, Connector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ustack.nbd.connection import Owner
    from ustack.nbd.handshake import Wishes
    from ustack.nbd.session_options import SessionCounters
    from ustack.nbd.tls import TlsSettings

BACKOFF_FIRST: Final = 0.05
"""Seconds between the first attempt to connect again, which is made at once, and the second; doubled after each."""
BACKOFF_MAX: Final = 5.0
"""Seconds between attempts at most: a link that comes back is noticed so soon."""
MAX_FRUITLESS: Final = 8
"""Connections in a row that the server ends without one answer, after which it is not worth another (unless `dead_after` is
None). With the back-off they take about five seconds."""


class Way(NamedTuple):
    """A way to the export: how to connect, and the TLS to demand there."""

    connector: Connector
    tls: TlsSettings | None


class Client(Protocol):
    """Who needs connections."""

    @property
    def connections(self) -> int:
        """Connections that are up."""

    @property
    def requests_in_flight(self) -> int:
        """Requests that wait for an answer, or for a connection."""

    async def take(self, connection: Connection) -> None:
        """Use this connection. OSError: it is of no use, try another."""

    def give_up(self, error: OSError) -> None:
        """There will be no connection any more."""


class Reconnection:
    """Makes connections by `ways` for `client`, whose owner hears of what happens on them."""

    def __init__(
        self,
        client: Client,
        owner: Owner,
        counters: SessionCounters,
        ways: Sequence[Way],
        export: str,
        wishes: Wishes,
        *,
        connect_timeout: float | None,
        request_timeout: float | None,
        dead_after: float | None,
    ) -> None:
        """See `SessionOptions` for the times, in seconds."""
        self._client = client
        self._owner = owner
        self._counters = counters
        self._ways = list(ways)
        self._way = 0
        self._export = export
        self._wishes = wishes
        self._connect_timeout = connect_timeout
        self._request_timeout = request_timeout
        self._dead_after = dead_after
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._backoff = 0.0
        self._fruitless = 0
        self._deadline: asyncio.TimerHandle | None = None
        self.wanted = 1
        """How many connections there should be."""
        self.reason: OSError | None = None
        """The last thing that went wrong."""
        self.recovering = False
        """Nothing was answered since the last connection was lost."""

    async def first(self) -> Connection:
        """A connection by the first way that works; raises what the last one raised."""
        while True:
            try:
                return await self.connect()
            except OSError:
                if self._way == len(self._ways) - 1:
                    raise
                self._way += 1

    async def connect(self) -> Connection:
        """A connection by the way that worked last. Raises what `Connection.open` does."""
        way = self._ways[self._way]
        connection = await Connection.open(
            way.connector,
            self._export,
            owner=self._owner,
            connect_timeout=self._connect_timeout,
            request_timeout=self._request_timeout,
            tls=way.tls,
            wishes=self._wishes,
        )
        self._counters.connected += 1
        return connection

    # -- outages -----------------------------------------------------------------------------------------------------------

    def outage(self, error: OSError, waiting: bool) -> OSError | None:
        """No connection is left, and this is why; `waiting`: requests need one. Returns the error to give up with, if it is
        time to."""
        self._counters.outages += 1
        if self.recovering:
            self._fruitless += 1
            if self._fruitless >= MAX_FRUITLESS and self._dead_after is not None and waiting:
                text = f"{error.strerror}; {self._fruitless} connections in a row ended without an answer"
                return OSError(error.errno, text)
        self.recovering = True
        if waiting:
            self.start_deadline()
        return None

    def start_deadline(self) -> None:
        """Somebody waits: from now on it counts."""
        if self._deadline is None and self._dead_after is not None:
            self._deadline = asyncio.get_running_loop().call_later(self._dead_after, self._dead)

    def _dead(self) -> None:
        self._deadline = None
        if not self.recovering or not self._client.requests_in_flight:
            return
        reason = self.reason
        last = f"; the last thing we heard: {reason.strerror or reason}" if reason is not None else ""
        text = f"the server is dead: no answer for {self._dead_after:g} s{last}"
        self._client.give_up(OSError(errno.ETIMEDOUT, text))

    def recovered(self) -> None:
        """The first answer after an outage."""
        self.recovering = False
        self._fruitless = 0
        self._backoff = 0.0
        self.reason = None
        self._stop_deadline()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def start(self) -> None:
        """Connections are missing: look for them."""
        if self._task is None and not self._stopped:
            self._task = asyncio.get_running_loop().create_task(self._connect_all())

    def stop(self) -> None:
        """Look for no more connections."""
        self._stopped = True
        self._stop_deadline()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def _connect_all(self) -> None:
        """Make connections until there are as many as wanted."""
        try:
            while self._client.connections < self.wanted and not self._stopped:
                if self._backoff:
                    await asyncio.sleep(self._backoff)
                self._backoff = min(self._backoff * 2, BACKOFF_MAX) or BACKOFF_FIRST
                try:
                    await self._client.take(await self.connect())
                except OSError as error:
                    self._counters.failed_attempts += 1
                    self.reason = error
                    self._way = (self._way + 1) % len(self._ways)
        finally:
            self._task = None
