"""Requests that outlive their connections: one or more connections to a server, made again when they are lost.

A caller waits for its reply and nothing else. When connections are lost, the requests that they had not answered are kept, and
sent again, oldest first, on the next connection there is. What that keeps:

* Writes that overlap are never in flight together (`write_order.py`), so a write that is sent again cannot undo a newer one.
* A flush covers every write that was answered before it was called, also when it is sent again: NBD_FLAG_CAN_MULTI_CONN,
  without which there is only one connection, says that one connection's flush covers the others' writes.
* After an outage the export must be the same: size, flags, block sizes; otherwise everybody fails with ESTALE. Data that was
  answered but not flushed is sampled (`unflushed.py`); when the server has lost it, the next flush fails with EIO, once, as
  after fsync(2), and `on_event` hears of it.
* Nothing is copied or piles up: the data of a write stays in its caller's memory, and no more requests than fit wait here.

What no client can keep: requests that a server has read but not done when the link is cut may be done later, after newer ones
that came over the next connection. Servers drop them when they notice that the connection is gone.

`dead_after` bounds the wait: the server counts as dead when requests wait and nothing was answered for so many seconds, or when
it ends `MAX_FRUITLESS` connections in a row without answering a single request. A server that breaks the protocol is not asked
again.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack
from zlib import crc32

from ustack.nbd.admission import Admission
from ustack.nbd.call import CHANGES, Call
from ustack.nbd.connection import CLOSE_TIMEOUT, CONNECT_TIMEOUT, REQUEST_TIMEOUT, Connection, Connector
from ustack.nbd.constants import (
    COMMAND_NAMES,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_ESHUTDOWN,
    WIRE_TO_ERRNO,
)
from ustack.nbd.errors import NbdProtocolError, describe_errno
from ustack.nbd.unflushed import UnflushedWrites
from ustack.nbd.write_order import WriteOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.nbd.export_info import ExportInfo
    from ustack.nbd.tls import TlsSettings
    from ustack.nbd.unflushed import Sample

QUEUE_DEPTH: Final = 64
"""Requests in flight on one connection (libnbd's advice)."""
MAX_BYTES_IN_FLIGHT: Final = 64 << 20
"""Bytes of payload in flight: two requests of the largest size that every server takes."""
REQUEST_SIZE: Final = 64 << 10
"""Bytes of a request that the reserve is made for, unless told otherwise."""
DEAD_AFTER: Final = 30.0
"""Seconds without an answer, while requests wait, after which they fail: enough for a server to be restarted."""
BACKOFF_FIRST: Final = 0.05
"""Seconds between the first attempt to connect again, which is made at once, and the second; doubled after each."""
BACKOFF_MAX: Final = 5.0
"""Seconds between attempts at most: a link that comes back is noticed so soon."""
MAX_FRUITLESS: Final = 8
"""Connections in a row that the server ends without one answer, after which it is not worth another (unless `dead_after` is
None). With the back-off they take about five seconds."""
VERIFY_TIMEOUT: Final = 30.0
"""Seconds that reading the samples back may take."""


class SessionOptions(TypedDict, total=False):
    """Keyword arguments that `connect` and `NbdClient.open` hand on to the `Session`.

    `queue_depth`: requests in flight per connection; `max_bytes_in_flight`: bytes of their payload, together. `connections`:
    how many to use where the server says that they see one cache (NBD_FLAG_CAN_MULTI_CONN); one otherwise. `connect_timeout`:
    seconds for each attempt to connect and negotiate. `request_timeout`: seconds without any sign of life while a request
    waits, after which a connection counts as lost; None: never. `dead_after`: see above, seconds; 0: a lost connection is the
    end at once; None: wait for ever. `check_cache`: read samples of unflushed writes back after an outage. `copy_writes`: copy
    the data of each write when it is called, so that a caller who is cancelled may use its memory at once. `tls`:
    what to demand on each of the ways; empty for none. `on_event`: called with the name of an event and its reason.
    """

    queue_depth: int
    max_bytes_in_flight: int
    request_size: int
    connections: int
    connect_timeout: float | None
    request_timeout: float | None
    dead_after: float | None
    check_cache: bool
    copy_writes: bool
    on_event: Callable[[str, OSError | None], object]
    tls: Sequence[TlsSettings | None]


@dataclass(slots=True)
class SessionCounters:
    """What has happened to a session so far. All are counts."""

    connected: int = 0
    """Connections made and negotiated."""
    lost: int = 0
    """Connections lost."""
    outages: int = 0
    """Times without any connection."""
    failed_attempts: int = 0
    """Attempts to connect again that failed."""
    replayed: int = 0
    """Requests sent again."""
    slow: int = 0
    """Requests that took longer than the request timeout while the server was alive."""
    unflushed_at_outage: int = 0
    """Writes that were answered but not flushed when an outage began: the server may have lost them."""
    samples_checked: int = 0
    """Of these and older ones, samples read back."""
    samples_lost: int = 0
    """Samples that were not there any more."""

    def report(self) -> dict[str, int]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Session:
    """An export as a place to send requests to. `open` makes it; `call` does one request."""

    def __init__(
        self,
        connectors: Sequence[Connector],
        export: str = "",
        *,
        queue_depth: int = QUEUE_DEPTH,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
        request_size: int = REQUEST_SIZE,
        connections: int = 1,
        connect_timeout: float | None = CONNECT_TIMEOUT,
        request_timeout: float | None = REQUEST_TIMEOUT,
        dead_after: float | None = DEAD_AFTER,
        check_cache: bool = True,
        copy_writes: bool = False,
        on_event: Callable[[str, OSError | None], object] | None = None,
        tls: Sequence[TlsSettings | None] = (),
    ) -> None:
        """`connectors` are the ways to the export, tried in turn: one, or several for fail-over between servers that have the
        same storage. See `SessionOptions` for the rest. Raises ValueError for options that make no sense."""
        if queue_depth < 1 or connections < 1 or not connectors:
            raise ValueError("an NBD client needs a queue depth and a number of connections of at least 1, and a server")
        self.counters = SessionCounters()
        self._loop = asyncio.get_running_loop()
        self._connectors = list(connectors)
        self._way = 0
        self._tls = list(tls) or [None] * len(self._connectors)
        self._export = export
        self._queue_depth = queue_depth
        self._max_bytes = max_bytes_in_flight
        self._request_size = request_size
        self._reserve: Any = None
        self._wanted = connections
        self._connect_timeout = connect_timeout
        self._request_timeout = request_timeout
        self._dead_after = dead_after
        self._check_cache = check_cache
        self._copy_writes = copy_writes
        self._on_event = on_event
        self._admission = Admission(queue_depth, max_bytes_in_flight)
        self._order = WriteOrder()
        self._number = 0
        self._up: list[Connection] = []
        # Requests that wait for a connection, oldest first, and how many of them were sent before.
        self._unsent: deque[Call] = deque()
        self._failure: OSError | None = None
        self._leaving = False
        self._idle: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._reconnecting: asyncio.Task[None] | None = None
        self._backoff = 0.0
        self._fruitless = 0
        self._reason: OSError | None = None
        self._recovering = False
        """Nothing was answered since the last connection was lost."""
        self._deadline: asyncio.TimerHandle | None = None
        self._cache_lost: OSError | None = None
        self.info: ExportInfo
        self.structured_replies = False
        self.tls = False
        self.unflushed: UnflushedWrites

    @classmethod
    async def open(cls, connectors: Sequence[Connector], export: str = "", **options: Unpack[SessionOptions]) -> Self:
        """Connect and negotiate. Nothing is tried twice here, except that each connector has a turn; raises the OSError of the
        last, see `Connection.open`, and ValueError."""
        session = cls(connectors, export, **options)
        connection = await session._first()
        session.info = connection.info
        session.structured_replies = connection.structured_replies
        session.tls = connection.tls
        session.unflushed = UnflushedWrites(session.info.minimum_block)
        if not session.info.can_multi_conn:
            session._wanted = 1
        session._admission = session._room_for(session._wanted)
        session._join(connection)
        try:
            while len(session._up) < session._wanted:
                session._join(await session._connect())
        except BaseException:
            await session.close(0)
            raise
        return session

    @property
    def connections(self) -> int:
        """Connections that are up."""
        return len(self._up)

    @property
    def requests_in_flight(self) -> int:
        """Requests let in and not yet answered, including those whose callers have given up."""
        return self._admission.count

    @property
    def slow_requests(self) -> int:
        """See `SessionCounters.slow`."""
        return self.counters.slow + sum(connection.slow_requests for connection in self._up)

    # -- requests ----------------------------------------------------------------------------------------------------------

    async def call(
        self, command: int, flags: int, offset: int, length: int, view: memoryview | None, payload: memoryview | None
    ) -> None:
        """Do one request: wait for a place, send it, wait for the reply. `view` is where a read goes, `payload` the data of a
        write. A request of no bytes is done already, since the protocol has none. Raises OSError."""
        if length == 0 and command != NBD_CMD_FLUSH:
            return
        size = length if view is not None or payload is not None else 0
        self._check_open()
        admission = self._admission
        if not admission.try_enter(size):
            await admission.enter(size)
            try:
                self._check_open()
            except OSError:
                admission.leave(size)
                raise
        if payload is not None and self._copy_writes:
            payload = memoryview(bytes(payload))
        future = self._loop.create_future()
        call = Call(command, flags, offset, length, view, payload, future, size)
        if command in CHANGES:
            earlier = self._order.add(call)
            if earlier is not None:
                await self._follow(call, earlier)
        elif command == NBD_CMD_FLUSH:
            call.mark = self.unflushed.mark()
        self._number = call.number = self._number + 1
        up = self._up
        if len(up) == 1 and not self._unsent and not up[0].paused:
            up[0].send(call)
        else:
            self._unsent.append(call)
            self._send_unsent()
        try:
            await future
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        if call.error:
            raise self._error_of(call)
        if command == NBD_CMD_FLUSH and self._cache_lost is not None:
            error, self._cache_lost = self._cache_lost, None
            raise error

    def _check_open(self) -> None:
        if self._failure is not None or self._leaving:
            raise self._error()

    async def _follow(self, call: Call, earlier: list[Call]) -> None:
        """Wait until what `call` overlaps is settled."""
        try:
            for other in earlier:
                if not other.settled:
                    turn = self._loop.create_future()
                    other.followers = [*(other.followers or ()), turn]
                    await turn
        except asyncio.CancelledError:
            self._settle(call)
            self._admission.admit()
            raise
        if self._failure is not None:
            self._settle(call)
            raise self._error()

    def _send_unsent(self) -> None:
        """Send what waits, as far as connections take it."""
        unsent = self._unsent
        while unsent:
            best: Connection | None = None
            for connection in self._up:
                if not connection.paused and (best is None or connection.in_flight < best.in_flight):
                    best = connection
            if best is None:
                if not self._up and self._deadline is None and self._failure is None:
                    self._start_deadline()
                return
            call = unsent.popleft()
            if call.future.cancelled():
                self._settle(call)
            else:
                self.counters.replayed += call.cookie != 0
                best.send(call)

    def _abandon(self, call: Call) -> None:
        """The caller has gone. A request that was sent stays in flight, without its memory; it is not sent again."""
        call.view = None
        call.payload = None
        for connection in self._up:
            connection.abandon(call)
        if not self._up:
            # Nobody can answer it any more.
            if call in self._unsent:
                self._unsent.remove(call)
                self._settle(call)
                self._admitted()

    def _settle(self, call: Call) -> None:
        """The call is over, one way or another; its place is free after the next `_admitted`."""
        if call.settled:
            return
        if call.size >= 0:
            self._admission.leave(call.size)
            if call.command in CHANGES:
                self._order.remove(call)
        call.settle()

    def _admitted(self) -> None:
        """Places have become free: let others in."""
        admission = self._admission
        admission.admit()
        if not admission.count and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    @staticmethod
    def _error_of(call: Call) -> OSError:
        code = WIRE_TO_ERRNO.get(call.error, errno.EINVAL)
        said = f': "{call.message}"' if call.message else ""
        what = COMMAND_NAMES[call.command]
        where = "" if call.command == NBD_CMD_FLUSH else f" of {call.length} bytes at {call.offset}"
        return OSError(code, f"{what}{where} failed on the server with {describe_errno(code)}{said}")

    def _room_for(self, connections: int) -> Admission:
        depth = self._queue_depth * connections
        admission = Admission(depth, self._max_bytes)
        reserve = self._reserve
        if reserve is not None:
            admission.limit_bytes(depth * self._request_size)
            admission.may_begin = reserve.may_begin
        return admission

    # -- what connections say ------------------------------------------------------------------------------------------------

    def connected(self, sock: Any) -> None:
        """Mark a socket of our own stack memalloc, so that even the negotiation may use the reserve, and make that large
        enough."""
        if hasattr(sock, "reserve_for"):
            sock.set_memalloc(True)
            sock.reserve_for(self._queue_depth, self._request_size)
            self._reserve = sock.reserve

    def answered(self, connection: Connection, calls: list[Call]) -> None:
        """Wake the callers of the requests that are complete."""
        progress = False
        for call in calls:
            if call.error:
                if call.error == NBD_ESHUTDOWN and self._dead_after != 0 and call.size >= 0 and not self._leaving:
                    call.error, call.message = 0, ""
                    self._unsent.appendleft(call)
                    continue
            elif call.command in CHANGES:
                self.unflushed.answered(call)
            elif call.command == NBD_CMD_FLUSH:
                self.unflushed.flushed(call.mark)
            progress = True
            self._settle(call)
            if not call.future.done():
                call.future.set_result(None)
        if self._recovering and progress:
            self._recovered()
        if connection.retiring:
            self._retire(connection)
        self._admitted()

    def lost(self, connection: Connection, calls: list[Call], error: OSError) -> None:
        """A connection is lost: keep what it had not answered, and look for another."""
        self.counters.slow += connection.slow_requests
        connection.slow_requests = 0
        was_up = connection in self._up
        if was_up:
            self._up.remove(connection)
            self.counters.lost += 1
        for call in calls:
            if call.size < 0:
                call.settle()
                if not call.future.done():
                    call.future.set_exception(error)
            elif call.future.cancelled():
                self._settle(call)
            else:
                self._unsent.append(call)
        if calls:
            self._unsent = deque(sorted(self._unsent, key=_number_of))
        if self._failure is not None:
            self._drop_unsent(self._failure)
        elif self._dead_after == 0 or self._leaving or isinstance(error, NbdProtocolError):
            self._give_up(error)
        elif was_up:
            self._look_for_another(error)
        self._admitted()

    def held(self, connection: Connection) -> None:
        """A transport has enough to send: when all have, nobody is let in."""
        if all(each.paused for each in self._up):
            self._admission.paused = True

    def resumed(self, connection: Connection) -> None:
        """A transport takes data again."""
        self._admission.paused = False
        self._send_unsent()
        self._admission.admit()

    # -- losing and finding connections ----------------------------------------------------------------------------------------

    def _retire(self, connection: Connection) -> None:
        """The server is shutting down: what comes now waits for another connection."""
        if connection in self._up and self._dead_after != 0 and not self._leaving:
            self._up.remove(connection)
            self.counters.lost += 1
            self._look_for_another(OSError(errno.ESHUTDOWN, f"{connection.peer}: the server is shutting down"))
        elif self._dead_after == 0:
            self._leaving = True

    def _look_for_another(self, error: OSError) -> None:
        self._reason = error
        if not self._up:
            self.counters.outages += 1
            self.counters.unflushed_at_outage += self.unflushed.count
            if self._recovering:
                self._fruitless += 1
                if self._fruitless >= MAX_FRUITLESS and self._dead_after is not None and self._unsent:
                    text = f"{error.strerror}; {self._fruitless} connections in a row ended without an answer"
                    self._give_up(OSError(error.errno, text))
                    return
            self._recovering = True
            self._admission.paused = False
            if self._unsent:
                self._start_deadline()
            self._tell("lost", error)
        else:
            self._send_unsent()
        if self._reconnecting is None:
            self._reconnecting = self._loop.create_task(self._reconnect())

    def _start_deadline(self) -> None:
        if self._deadline is None and self._dead_after is not None:
            self._deadline = self._loop.call_later(self._dead_after, self._dead)

    def _dead(self) -> None:
        self._deadline = None
        if not self._recovering or not self._admission.count:
            return
        reason = self._reason
        last = f"; the last thing we heard: {reason.strerror or reason}" if reason is not None else ""
        self._give_up(OSError(errno.ETIMEDOUT, f"the server is dead: no answer for {self._dead_after:g} s{last}"))

    def _recovered(self) -> None:
        """The first answer after an outage."""
        self._recovering = False
        self._fruitless = 0
        self._backoff = 0.0
        self._reason = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def _first(self) -> Connection:
        """A connection by the first way that works."""
        while True:
            try:
                return await self._connect()
            except OSError:
                if self._way == len(self._connectors) - 1:
                    raise
                self._way += 1

    async def _connect(self) -> Connection:
        connection = await Connection.open(
            self._connectors[self._way],
            self._export,
            owner=self,
            connect_timeout=self._connect_timeout,
            request_timeout=self._request_timeout,
            tls=self._tls[self._way],
        )
        self.counters.connected += 1
        return connection

    def _join(self, connection: Connection) -> None:
        """A connection is ready for use."""
        self._up.append(connection)
        self._admission.paused = False
        self._send_unsent()
        self._admission.admit()

    async def _reconnect(self) -> None:
        """Make connections until there are as many as wanted."""
        try:
            while len(self._up) < self._wanted and self._failure is None and not self._leaving:
                if self._backoff:
                    await asyncio.sleep(self._backoff)
                self._backoff = min(self._backoff * 2, BACKOFF_MAX) or BACKOFF_FIRST
                try:
                    connection = await self._connect()
                    changed = _differences(self.info, connection.info)
                    if changed:
                        connection.fail(errno.ECONNABORTED, "the export is not the same any more")
                        self._give_up(OSError(errno.ESTALE, f"{connection.peer}: the export has changed: {changed}"))
                        return
                    if not self._up and self._check_cache:
                        await self._verify(connection)
                except OSError as error:
                    self.counters.failed_attempts += 1
                    self._reason = error
                    self._way = (self._way + 1) % len(self._connectors)
                    continue
                outage = not self._up
                self._join(connection)
                if outage:
                    self._tell("attached", None)
        finally:
            self._reconnecting = None

    async def _verify(self, connection: Connection) -> None:
        """Read samples of what the server had answered. Raises OSError when the connection is lost meanwhile."""
        changing = [call for call in self._unsent if call.command in CHANGES]
        samples = self.unflushed.samples(changing)
        if not samples:
            return
        lost: list[Sample] = []
        async with asyncio.timeout(VERIFY_TIMEOUT):
            reads = [self._read_sample(connection, sample) for sample in samples]
            for sample, same in zip(samples, await asyncio.gather(*reads), strict=True):
                self.counters.samples_checked += 1
                if not same:
                    lost.append(sample)
        if lost:
            self.counters.samples_lost += len(lost)
            flushed = sum(self.unflushed.is_flushed(sample) for sample in lost)
            kinds = f"{len(lost)} of {len(samples)} writes that we looked at, {flushed} of them flushed"
            text = f"{connection.peer}: the server has lost data that it had answered: {kinds}; one of them at {lost[0].offset}"
            self._cache_lost = OSError(errno.EIO, text)
            self.unflushed.forget()
            self._tell("data lost", self._cache_lost)

    async def _read_sample(self, connection: Connection, sample: Sample) -> bool:
        data = memoryview(bytearray(sample.length))
        future = self._loop.create_future()
        call = Call(NBD_CMD_READ, 0, sample.offset, sample.length, data, None, future, -1)
        if connection.closed.done():
            raise connection.error()
        connection.send(call)
        try:
            await future
        except asyncio.CancelledError:
            connection.abandon(call)
            raise
        return not call.error and crc32(data) == sample.crc

    def _tell(self, event: str, reason: OSError | None) -> None:
        if self._on_event is not None:
            self._on_event(event, reason)

    # -- the end -------------------------------------------------------------------------------------------------------------

    def _give_up(self, error: OSError) -> None:
        """Everybody who waits hears why, and so does everybody who comes later."""
        if self._failure is not None:
            return
        self._failure = error
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        for connection in list(self._up):
            connection.fail(error.errno or errno.EIO, str(error.strerror))
        self._drop_unsent(error)
        if self._reconnecting is not None and self._reconnecting is not asyncio.current_task(self._loop):
            self._reconnecting.cancel()
        # Those who wait in line go on and find out why.
        self._admission.closed = True
        self._admitted()
        if not self._ended.done():
            self._ended.set_result(None)
        if not self._leaving:
            self._tell("given up", error)

    def _drop_unsent(self, error: OSError) -> None:
        unsent, self._unsent = self._unsent, deque()
        for call in unsent:
            self._settle(call)
            if not call.future.done():
                call.future.set_exception(_again(error))

    def _error(self) -> OSError:
        """A fresh exception for the reason why nothing can be sent."""
        if self._failure is None:
            return OSError(errno.EPIPE, f"{self._export or 'NBD export'}: the connection is being closed")
        return _again(self._failure)

    async def close(self, grace: float = CLOSE_TIMEOUT) -> None:
        """Wait up to `grace` seconds for requests in flight, say NBD_CMD_DISC, and close. Later calls fail with EPIPE."""
        self._leaving = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        try:
            async with asyncio.timeout(grace):
                if self._up and self._admission.count and self._failure is None:
                    self._idle = self._idle or self._loop.create_future()
                    self._admission.closed = True  # those who wait in line are turned away
                    self._admission.admit()
                    await asyncio.shield(self._idle)
        except TimeoutError:
            self._give_up(OSError(errno.ETIMEDOUT, f"closed with requests still unanswered after {grace} s"))
        up = list(self._up)
        await asyncio.gather(*(connection.close(grace) for connection in up))
        self._give_up(OSError(errno.EPIPE, "closed"))

    async def wait_lost(self) -> OSError:
        """Wait until nothing can be sent any more, and return the reason: what every call raises from then on."""
        await asyncio.shield(self._ended)
        return self._error()


def _number_of(call: Call) -> int:
    return call.number


def _again(error: OSError) -> OSError:
    """A fresh exception that says the same."""
    if isinstance(error, NbdProtocolError):
        return NbdProtocolError(str(error.strerror))
    return OSError(error.errno, error.strerror)


def _differences(before: ExportInfo, after: ExportInfo) -> str:
    """How an export is not what it was, in words; empty when it is."""
    found = []
    for name in ("size", "flags", "minimum_block", "preferred_block", "maximum_payload"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            found.append(f"{name} was {old:#x} and is {new:#x}" if name == "flags" else f"{name} was {old} and is {new}")
    return ", ".join(found)
