"""Several servers with the same contents as one disk: writes go to all, reads come from one, and who has lagged is known.

Each member is an `NbdClient` with its own connections, which wait and send again as usual (`session.py`). A member whose client
gives up, that fails a write, or that takes `max_lag` seconds longer over one than the fastest has lagged: from then on nothing
is read from it and nothing written to it, and what it misses is noted, in regions of 1 MiB: what it failed, what it had not
flushed, and what is written from then on. In the background it is connected to again, what it misses is copied from the others,
and it is a member again.

What no mirror of clients can keep: when this process dies amid a write, the members may differ there, and nobody has noted
where. Write again what was not flushed, or name all members but one `stale` to have them copied.
"""

from __future__ import annotations

import asyncio
import errno
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Self, Unpack

from ustack.nbd.connector import open_disk

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
    from types import TracebackType

    from ustack.nbd.block_status import Extent
    from ustack.nbd.client import NbdClient
    from ustack.nbd.connection import Buffer, CreateConnection
    from ustack.nbd.session_options import SessionOptions
    from ustack.nbd.uri import NbdUri

REGION_SHIFT: Final = 20
"""Missed writes are noted by 1 MiB: a byte of notes for each."""
COPY_SIZE: Final = 1 << 18
"""Bytes that are copied at a time to a member that has lagged."""
MAX_LAG: Final = 10.0
"""Seconds that a member may take longer over a request than the fastest."""
RESYNC_EVERY: Final = 5.0
"""Seconds between attempts to bring a member that has lagged up to date."""


class MemberReport(NamedTuple):
    """A member: its name, whether it is in sync, how many bytes it misses at most, and why it lagged last."""

    name: str
    in_sync: bool
    missed: int
    reason: OSError | None


class _Member:
    """`disk` is None while there is no connection. `missed`, `unflushed` and `flushing` have a byte for each region.
    While it is `catching_up` it is written to, so that what is copied once stays right, but not read from."""

    __slots__ = ("catching_up", "disk", "flushing", "in_sync", "missed", "name", "open", "reason", "unflushed")

    def __init__(self, name: str, opening: Callable[[], Awaitable[NbdClient]]) -> None:
        self.name = name
        self.open = opening
        self.disk: NbdClient | None = None
        self.in_sync = False
        self.catching_up = False
        self.missed = bytearray()
        self.unflushed = bytearray()
        self.flushing = bytearray()
        self.reason: OSError | None = None


class NbdMirror:
    """A disk that is kept on several servers. `open` makes it; the methods are those of `NbdClient`.

    Sizes are those that all members have, abilities those that all have, and block sizes fit all.
    """

    def __init__(self, members: list[_Member], max_lag: float, on_event: Callable[[str, str, OSError | None], object] | None):
        self._members = members
        self._max_lag = max_lag
        self._on_event = on_event
        self._changing: dict[int, tuple[int, int]] = {}
        self._changes = 0
        self._flushes = 0
        self._copying = (0, 0)
        self._moved: asyncio.Future[None] | None = None
        self._resyncing: asyncio.Task[None] | None = None
        self._resync_every: float | None = None
        self._resync_lock = asyncio.Lock()
        disks = [member.disk for member in members if member.disk is not None]
        infos = [disk.info for disk in disks]
        self.size = infos[0].size
        self.minimum_block = max(info.minimum_block for info in infos)
        self.preferred_block = max(info.preferred_block for info in infos)
        self.maximum_payload = min(info.maximum_payload for info in infos)
        self.read_only = any(info.read_only for info in infos)
        self.can_flush = all(info.can_flush for info in infos)
        self.can_fua = all(info.can_fua for info in infos)
        self.can_trim = all(info.can_trim for info in infos)
        self.can_zero = all(info.can_zero for info in infos)
        self.can_block_status = all(disk.can_block_status for disk in disks)

    @classmethod
    async def open(
        cls,
        members: Sequence[tuple[str, Callable[[], Awaitable[NbdClient]]]],
        *,
        max_lag: float = MAX_LAG,
        resync_every: float | None = RESYNC_EVERY,
        stale: Collection[int] = (),
        on_event: Callable[[str, str, OSError | None], object] | None = None,
    ) -> Self:
        """Open `members`, each a name and what opens it. One that cannot be opened, and those whose numbers are in `stale`,
        miss everything, and are brought up to date every `resync_every` seconds (None: only by `resync`). `on_event` is called
        with what happened, to whom, and why: "lagged", "in sync". Raises the last OSError when there is none in sync;
        EINVAL when their sizes differ; ValueError without members."""
        if not members:
            raise ValueError("a mirror needs members")
        made = [_Member(name, opening) for name, opening in members]
        results = await asyncio.gather(*(member.open() for member in made), return_exceptions=True)
        failed: BaseException | None = None
        for number, (member, result) in enumerate(zip(made, results, strict=True)):
            if isinstance(result, BaseException):
                failed = result
                member.reason = result if isinstance(result, OSError) else None
            else:
                member.disk = result
                member.in_sync = number not in stale
        disks = [member.disk for member in made if member.disk is not None]
        sizes = sorted({disk.size for disk in disks})
        if not any(member.in_sync for member in made) or len(sizes) != 1:
            await asyncio.gather(*(disk.close() for disk in disks))
            if failed is not None:
                raise failed
            raise OSError(errno.EINVAL, f"the members of the mirror have {sizes} bytes, or all of them are stale")
        mirror = cls(made, max_lag, on_event)
        regions = (mirror.size >> REGION_SHIFT) + 1
        for member in made:
            member.missed = bytearray(regions) if member.in_sync else bytearray(b"\1") * regions
            member.unflushed, member.flushing = bytearray(regions), bytearray(regions)
        mirror._resync_every = resync_every
        mirror._resync_later()
        return mirror

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def members(self) -> list[MemberReport]:
        """How the members are."""
        return [
            MemberReport(member.name, member.in_sync, member.missed.count(1) << REGION_SHIFT, member.reason)
            for member in self._members
        ]

    # -- reads -------------------------------------------------------------------------------------------------------------

    async def pread(self, length: int, offset: int) -> bytearray:
        """Read `length` bytes at `offset`."""
        data = bytearray(length)
        await self.pread_into(data, offset)
        return data

    async def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`, from the member with the least to do; from the next when that fails or is too slow."""
        await self._from_one(lambda disk: disk.pread_into(buffer, offset))

    async def block_status(self, length: int, offset: int) -> list[Extent]:
        """Which parts are holes and which read as zeroes, on one of the members."""
        extents: list[Extent] = []

        async def ask(disk: NbdClient) -> None:
            extents[:] = await disk.block_status(length, offset)

        await self._from_one(ask)
        return extents

    async def _from_one(self, ask: Callable[[NbdClient], Awaitable[None]]) -> None:
        tried: list[_Member] = []
        while True:
            member, others = self._idlest(tried)
            if member is None or member.disk is None:
                raise OSError(errno.EIO, "no member of the mirror is left")
            tried.append(member)
            disk = member.disk
            try:
                async with asyncio.timeout(self._max_lag if others else None):
                    await ask(disk)
                return
            except OSError as error:
                if disk.lost is not None and self._others(member):
                    self._lagged(member, error)
                if not others:
                    raise

    def _idlest(self, tried: list[_Member]) -> tuple[_Member | None, bool]:
        """Whom to ask, and whether there are others: those with a connection first, then by what they have to do."""
        best: _Member | None = None
        count, least = 0, (True, 0)
        for member in self._members:
            disk = member.disk
            if member.in_sync and disk is not None and member not in tried:
                count += 1
                load = (not disk.connections, disk.requests_in_flight)
                if best is None or load < least:
                    best, least = member, load
        return best, count > 1

    def _others(self, member: _Member) -> bool:
        return any(other.in_sync for other in self._members if other is not member)

    # -- writes ------------------------------------------------------------------------------------------------------------

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write `data` at `offset` on all members. A cancelled write happens all the same, and is over when this raises."""
        length = memoryview(data).nbytes
        await self._change(offset, length, lambda disk: disk.pwrite(data, offset, fua=fua))

    async def zero(self, length: int, offset: int, *, fua: bool = False, no_hole: bool = False) -> None:
        """Write zeroes to `length` bytes at `offset` on all members."""
        await self._change(offset, length, lambda disk: disk.zero(length, offset, fua=fua, no_hole=no_hole))

    async def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Tell all members that `length` bytes at `offset` are not needed."""
        await self._change(offset, length, lambda disk: disk.trim(length, offset, fua=fua))

    async def flush(self) -> None:
        """Bring every write that has been answered to stable storage, on all members."""
        await self._settled(self._flush())

    async def _flush(self) -> None:
        for member in self._members:
            member.flushing = bytearray(map(max, member.flushing, member.unflushed))
            member.unflushed = bytearray(len(member.unflushed))
        self._flushes += 1
        try:
            await self._on_all(lambda disk: disk.flush(), 0, 0)
        finally:
            self._flushes -= 1
        if not self._flushes:
            for member in self._members:
                if member.in_sync:
                    member.flushing = bytearray(len(member.flushing))

    async def _change(self, offset: int, length: int, do: Callable[[NbdClient], Awaitable[None]]) -> None:
        if not length:
            return
        await self._settled(self._ordered_change(offset, offset + length, do))

    @staticmethod
    async def _settled(work: Awaitable[None]) -> None:
        """Wait for `work` to end, also when we are cancelled: half a write would leave the members different."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                with suppress(asyncio.CancelledError, OSError):
                    await asyncio.shield(task)
            if not task.cancelled():
                task.exception()
            raise

    async def _ordered_change(self, start: int, stop: int, do: Callable[[NbdClient], Awaitable[None]]) -> None:
        while start < self._copying[1] and self._copying[0] < stop:
            await self._next_move()
        self._changes = number = self._changes + 1
        self._changing[number] = (start, stop)
        try:
            for member in self._members:
                if not (member.in_sync or member.catching_up):
                    _mark(member.missed, start, stop)
            await self._on_all(do, start, stop)
        finally:
            del self._changing[number]
            self._move()

    async def _on_all(self, do: Callable[[NbdClient], Awaitable[None]], start: int, stop: int) -> None:
        """Do it on all members in sync. Those that fail or take too long while another has done it have lagged."""
        chosen = [member for member in self._members if member.in_sync or member.catching_up]
        tasks: dict[asyncio.Future[None], _Member] = {
            asyncio.ensure_future(do(member.disk)): member for member in chosen if member.disk is not None
        }
        pending = set(tasks)
        done: set[asyncio.Future[None]] = set()
        while pending and not any(tasks[task].in_sync and not task.exception() for task in done):
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            done |= finished
        if pending:
            finished, pending = await asyncio.wait(pending, timeout=self._max_lag)
            done |= finished
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        errors = {tasks[task]: _failure(task) for task in tasks}
        failed = [error for member, error in errors.items() if member.in_sync]
        if None not in failed:
            for member in chosen:
                if member.catching_up:
                    _mark(member.missed, start, stop)
            raise failed[0] if failed and failed[0] else OSError(errno.EIO, "no member of the mirror is left")
        for member, error in errors.items():
            if error is not None:
                if start == stop:
                    member.missed[:] = b"\1" * len(member.missed)  # a flush failed: nobody knows what is lost
                _mark(member.missed, start, stop)
                self._lagged(member, error)
            elif start < stop:
                _mark(member.unflushed, start, stop)

    def _lagged(self, member: _Member, error: OSError) -> None:
        """Nothing is read from `member` any more. What it had not flushed may be lost with it."""
        if not member.in_sync:
            return
        member.in_sync = False
        member.reason = error
        member.missed = bytearray(map(max, member.missed, member.unflushed, member.flushing))
        for start, stop in self._changing.values():
            _mark(member.missed, start, stop)
        self._tell("lagged", member, error)
        self._resync_later()

    def _tell(self, event: str, member: _Member, reason: OSError | None) -> None:
        if self._on_event is not None:
            self._on_event(event, member.name, reason)

    # -- bringing a member up to date --------------------------------------------------------------------------------------

    def _resync_later(self) -> None:
        lagging = not all(member.in_sync for member in self._members)
        if lagging and self._resync_every is not None and self._resyncing is None:
            self._resyncing = asyncio.ensure_future(self._resync_all(self._resync_every))

    async def _resync_all(self, every: float) -> None:
        try:
            while not all(member.in_sync for member in self._members):
                await asyncio.sleep(every)
                for number, member in enumerate(self._members):
                    if not member.in_sync:
                        with suppress(OSError):
                            await self.resync(number)
        finally:
            self._resyncing = None

    async def resync(self, number: int) -> None:
        """Connect to member `number` again, copy to it what it misses, and use it again. Raises OSError when that fails;
        what it misses stays noted."""
        member = self._members[number]
        async with self._resync_lock:
            if member.in_sync:
                return
            try:
                await self._bring_up_to_date(member)
            except OSError as error:
                member.reason = error
                raise

    async def _bring_up_to_date(self, member: _Member) -> None:
        if member.disk is not None:
            await member.disk.close(0)
            member.disk = None
        disk = await member.open()
        member.disk = disk
        member.catching_up = True
        try:
            if disk.size != self.size:
                raise OSError(errno.ESTALE, f"{member.name} has {disk.size} bytes, the mirror {self.size}")
            member.unflushed, member.flushing = bytearray(len(member.missed)), bytearray(len(member.missed))
            region = member.missed.find(1)
            while region >= 0:
                await self._copy_region(disk, member, region)
                region = member.missed.find(1)
                if region < 0 and self.can_flush:
                    await disk.flush()
                    region = member.missed.find(1)
        except BaseException:
            member.disk = None
            await disk.close(0)
            raise
        finally:
            member.catching_up = False
        # Nothing was awaited since the notes were found empty.
        member.in_sync = True
        member.reason = None
        self._tell("in sync", member, None)

    async def _copy_region(self, disk: NbdClient, member: _Member, region: int) -> None:
        start = region << REGION_SHIFT
        stop = min(start + (1 << REGION_SHIFT), self.size)
        self._copying = (start, stop)
        member.missed[region] = 0
        try:
            # Who writes there is done before we read, and who comes later writes to this member as well.
            while any(a < stop and start < b for a, b in self._changing.values()):
                await self._next_move()
            step = max(COPY_SIZE, self.minimum_block)
            for offset in range(start, stop, step):
                await disk.pwrite(await self.pread(min(step, stop - offset), offset), offset)
        except BaseException:
            member.missed[region] = 1
            raise
        finally:
            self._copying = (0, 0)
            self._move()

    async def _next_move(self) -> None:
        if self._moved is None:
            self._moved = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._moved)

    def _move(self) -> None:
        if self._moved is not None:
            self._moved.set_result(None)
            self._moved = None

    async def close(self) -> None:
        """Take leave of all members."""
        if self._resyncing is not None:
            self._resyncing.cancel()
            await asyncio.gather(self._resyncing, return_exceptions=True)
        await asyncio.gather(*(member.disk.close() for member in self._members if member.disk is not None))


@asynccontextmanager
async def connect_mirror(
    uris: Sequence[str | NbdUri],
    *,
    create_connection: CreateConnection | None = None,
    context: ssl.SSLContext | None = None,
    max_lag: float = MAX_LAG,
    resync_every: float | None = RESYNC_EVERY,
    stale: Collection[int] = (),
    on_member_event: Callable[[str, str, OSError | None], object] | None = None,
    **options: Unpack[SessionOptions],
) -> AsyncIterator[NbdMirror]:
    """The exports at `uris`, which have the same contents, as one disk, for `async with`. See `NbdMirror.open`; `options` are
    those of `connect`, for each member."""

    def opener(uri: str | NbdUri) -> tuple[str, Callable[[], Awaitable[NbdClient]]]:
        return str(uri), lambda: open_disk([uri], create_connection=create_connection, context=context, **options)

    mirror = await NbdMirror.open(
        [opener(uri) for uri in uris], max_lag=max_lag, resync_every=resync_every, stale=stale, on_event=on_member_event
    )
    async with mirror:
        yield mirror


def _mark(regions: bytearray, start: int, stop: int) -> None:
    if start < stop:
        first, last = start >> REGION_SHIFT, (stop - 1) >> REGION_SHIFT
        regions[first : last + 1] = b"\1" * (last + 1 - first)


def _failure(task: asyncio.Future[None]) -> OSError | None:
    if task.cancelled():
        return OSError(errno.ETIMEDOUT, "took longer than the others")
    error = task.exception()
    if error is None or isinstance(error, OSError):
        return error
    raise error
