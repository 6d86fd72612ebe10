"""Requests that outlive their connections: one or more connections to a server, made again when they are lost.

A caller waits for its reply and nothing else. When connections are lost, the requests that they had not answered are kept, and
sent again, oldest first, on the next connection there is. What that keeps:

* Writes that overlap are never in flight together (`write_order.py`), so a write that is sent again cannot undo a newer one.
* A flush covers every write that was answered before it was called, also when it is sent again: NBD_FLAG_CAN_MULTI_CONN,
  without which there is only one connection, says that one connection's flush covers the others' writes.
* After an outage the export must be the same: size, what it can do, block sizes; otherwise everybody fails with ESTALE. Data
  that was answered but not flushed is sampled (`unflushed.py`); when the server has lost it, the next flush fails with EIO,
  once, as after fsync(2), and `on_event` hears of it.
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
from typing import TYPE_CHECKING, Any, Self, Unpack

from ustack.mem.reserve import Demand
from ustack.nbd.admission import Admission
from ustack.nbd.cache_check import lost_samples
from ustack.nbd.call import CHANGES, Call
from ustack.nbd.connection import CLOSE_TIMEOUT, CONNECT_TIMEOUT, REQUEST_TIMEOUT, Connection, Connector
from ustack.nbd.constants import (
    BASE_ALLOCATION,
    COMMAND_NAMES,
    NBD_CMD_FLUSH,
    NBD_ESHUTDOWN,
    NBD_FLAG_ROTATIONAL,
    WIRE_TO_ERRNO,
)
from ustack.nbd.errors import NbdProtocolError, NbdReadError, describe_errno
from ustack.nbd.handshake import Wishes
from ustack.nbd.reconnection import Reconnection, Way
from ustack.nbd.session_options import (
    DEAD_AFTER,
    MAX_BYTES_IN_FLIGHT,
    QUEUE_DEPTH,
    REQUEST_SIZE,
    SessionCounters,
    SessionOptions,
)
from ustack.nbd.strict import STRICT
from ustack.nbd.unflushed import UnflushedWrites
from ustack.nbd.write_order import WriteOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ustack.nbd.export_info import ExportInfo
    from ustack.nbd.tls import TlsSettings


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
        structured_replies: bool = True,
        extended_headers: bool = True,
        meta_contexts: Sequence[str] = (BASE_ALLOCATION,),
        strict: int = STRICT,
    ) -> None:
        """`connectors` are the ways to the export, tried in turn: one, or several for fail-over between servers that have the
        same storage. See `SessionOptions` for the rest. Raises ValueError for options that make no sense."""
        if queue_depth < 1 or connections < 1 or not connectors:
            raise ValueError("an NBD client needs a queue depth and a number of connections of at least 1, and a server")
        self.counters = SessionCounters()
        self._loop = asyncio.get_running_loop()
        self._export = export
        self._queue_depth = queue_depth
        self._max_bytes = max_bytes_in_flight
        self._request_size = request_size
        self._reserve: Any = None
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
        self._cache_lost: OSError | None = None
        settings = list(tls) or [None] * len(connectors)
        self._reconnection = Reconnection(
            self,
            self,
            self.counters,
            [Way(*pair) for pair in zip(connectors, settings, strict=True)],
            export,
            Wishes(structured_replies, extended_headers, tuple(meta_contexts)),
            connect_timeout=connect_timeout,
            request_timeout=request_timeout,
            dead_after=dead_after,
        )
        self._reconnection.wanted = connections
        self.strict = strict
        """The rules that requests keep: bits of `strict.py`."""
        self.info: ExportInfo
        self.structured_replies = False
        self.extended_headers = False
        self.contexts: frozenset[str] = frozenset()
        """Metadata contexts that a block status can be asked for."""
        self.tls = False
        self.unflushed: UnflushedWrites

    @classmethod
    async def open(cls, connectors: Sequence[Connector], export: str = "", **options: Unpack[SessionOptions]) -> Self:
        """Connect and negotiate. Nothing is tried twice here, except that each connector has a turn; raises the OSError of the
        last, see `Connection.open`, and ValueError."""
        session = cls(connectors, export, **options)
        try:
            await session._begin()
        except BaseException:
            await session.close(0)
            raise
        return session

    async def _begin(self) -> None:
        reconnection = self._reconnection
        connection = await reconnection.first()
        self.info = connection.info
        self.structured_replies = connection.structured_replies
        self.extended_headers = connection.extended_headers
        self.contexts = connection.contexts
        self.tls = connection.tls
        self.unflushed = UnflushedWrites(self.info.minimum_block)
        if not self.info.can_multi_conn:
            reconnection.wanted = 1
        self._admission = self._room_for(reconnection.wanted)
        self._join(connection)
        while self.connections < reconnection.wanted:
            self._join(await reconnection.connect())

    @property
    def connections(self) -> int:
        """Connections that are up."""
        return len(self._up)

    @property
    def requests_in_flight(self) -> int:
        """Requests let in and not yet answered, including those whose callers have given up."""
        return self._admission.count

    @property
    def failure(self) -> OSError | None:
        """Why nothing can be sent any more."""
        return self._failure

    @property
    def slow_requests(self) -> int:
        """See `SessionCounters.slow`."""
        return self.counters.slow + sum(connection.slow_requests for connection in self._up)

    # -- requests ----------------------------------------------------------------------------------------------------------

    async def call(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        view: memoryview | None,
        payload: memoryview | None,
        context: str | None = None,
    ) -> Call:
        """Do one request: wait for a place, send it, wait for the reply. `view` is where a read goes, `payload` the data of a
        write, `context` what a block status is about. Returns the answered call. Raises OSError."""
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
        call.context = context
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
        return call

    def begin(self, call: Call) -> bool:
        """Start a read or a write that can be sent now: nobody waits for a place, nothing that it overlaps is under way, and
        there is one connection. Its `future` is told when it is done, within the turn of the loop that brings the reply. False
        when it cannot be, and then nothing has happened: `call` waits."""
        up = self._up
        if self._failure is not None or self._leaving or self._unsent or len(up) != 1 or up[0].paused or self._copy_writes:
            return False
        if not self._admission.try_enter(call.size):
            return False
        if call.command in CHANGES and self._order.add(call) is not None:
            self._order.remove(call)
            self._admission.leave(call.size)
            return False
        self._number = call.number = self._number + 1
        up[0].send(call)
        return True

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
                if not self._up and self._failure is None:
                    self._reconnection.start_deadline()
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
        text = f"{what}{where} failed on the server with {describe_errno(code)}{said}"
        valid = call.valid_bytes()
        return NbdReadError(code, text, valid) if valid else OSError(code, text)

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
        enough. It stays ours until the end: between two connections the memory would fill, and the next could not begin.
        """
        if hasattr(sock, "reserve_for"):
            sock.set_memalloc(True)
            sock.reserve_for(Demand(self._queue_depth, self._request_size, self._reconnection.wanted), self)
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
        if progress and self._reconnection.recovering:
            self._reconnection.recovered()
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
            self.give_up(error)
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
        reconnection = self._reconnection
        reconnection.reason = error
        if not self._up:
            self.counters.unflushed_at_outage += self.unflushed.count
            final = reconnection.outage(error, bool(self._unsent))
            if final is not None:
                self.give_up(final)
                return
            self._admission.paused = False
            self._tell("lost", error)
        else:
            self._send_unsent()
        reconnection.start()

    def _join(self, connection: Connection) -> None:
        """A connection is ready for use."""
        self._up.append(connection)
        self._admission.paused = False
        self._send_unsent()
        self._admission.admit()

    async def take(self, connection: Connection) -> None:
        """A connection is there again: is it still the same export, with what was answered? Then use it. Raises OSError when
        it is lost meanwhile."""
        changed = self._differences(connection)
        if changed:
            connection.fail(errno.ECONNABORTED, "the export is not the same any more")
            self.give_up(OSError(errno.ESTALE, f"{connection.peer}: the export has changed: {changed}"))
            return
        outage = not self._up
        if outage and self._check_cache:
            await self._check_answered(connection)
        self._join(connection)
        if outage:
            self._tell("attached", None)

    def _differences(self, connection: Connection) -> str:
        """How an export is not what it was, in words; empty when it is. What it can do beyond does not matter."""
        before, now = self.info, connection.info
        found = []
        if now.size != before.size:
            found.append(f"size was {before.size} and is {now.size}")
        if before.flags & ~now.flags & ~NBD_FLAG_ROTATIONAL or now.read_only != before.read_only:
            found.append(f"flags was {before.flags:#x} and is {now.flags:#x}")
        if now.minimum_block > before.minimum_block:
            found.append(f"minimum_block was {before.minimum_block} and is {now.minimum_block}")
        if now.maximum_payload < before.maximum_payload:
            found.append(f"maximum_payload was {before.maximum_payload} and is {now.maximum_payload}")
        if self.extended_headers and not connection.extended_headers:
            found.append("it has no extended headers any more")
        found += [f"metadata context {name!r} is missing" for name in sorted(self.contexts - connection.contexts)]
        return ", ".join(found)

    async def _check_answered(self, connection: Connection) -> None:
        samples = self.unflushed.samples([call for call in self._unsent if call.command in CHANGES])
        if not samples:
            return
        lost = await lost_samples(connection, samples)
        self.counters.samples_checked += len(samples)
        if lost:
            self.counters.samples_lost += len(lost)
            flushed = sum(self.unflushed.is_flushed(sample) for sample in lost)
            kinds = f"{len(lost)} of {len(samples)} writes that we looked at, {flushed} of them flushed"
            text = f"{connection.peer}: the server has lost data that it had answered: {kinds}; one of them at {lost[0].offset}"
            self._cache_lost = OSError(errno.EIO, text)
            self.unflushed.forget()
            self._tell("data lost", self._cache_lost)

    def _tell(self, event: str, reason: OSError | None) -> None:
        if self._on_event is not None:
            self._on_event(event, reason)

    # -- the end -------------------------------------------------------------------------------------------------------------

    def give_up(self, error: OSError) -> None:
        """Everybody who waits hears why, and so does everybody who comes later."""
        if self._failure is not None:
            return
        self._failure = error
        self._reconnection.stop()
        for connection in list(self._up):
            connection.fail(error.errno or errno.EIO, str(error.strerror))
        self._drop_unsent(error)
        # Those who wait in line go on and find out why.
        self._admission.closed = True
        self._admitted()
        if self._reserve is not None:
            self._reserve.release(self)
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
        self._reconnection.stop()
        try:
            async with asyncio.timeout(grace):
                if self._up and self._admission.count and self._failure is None:
                    self._idle = self._idle or self._loop.create_future()
                    self._admission.closed = True  # those who wait in line are turned away
                    self._admission.admit()
                    await asyncio.shield(self._idle)
        except TimeoutError:
            self.give_up(OSError(errno.ETIMEDOUT, f"closed with requests still unanswered after {grace} s"))
        up = list(self._up)
        await asyncio.gather(*(connection.close(grace) for connection in up))
        self.give_up(OSError(errno.EPIPE, "closed"))

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
