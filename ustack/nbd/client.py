"""NBD client for asyncio, over any transport: the kernel's sockets or our own stack.

    async with nbd.connect("nbd://10.77.0.1/disk", create_connection=stack.create_connection) as disk:
        data = await disk.pread(4096, 0)

Calls may be made from many tasks at once; up to `queue_depth` requests are in flight and the rest wait in line. Calls larger
than the server takes are split. What happens when connections are lost is in `session.py`; which rules are kept before anything
is sent, and how to leave one out, in `strict.py`.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from ustack.nbd.block_status import Extent, append_extents
from ustack.nbd.call import CHANGES, Call
from ustack.nbd.connection import CLOSE_TIMEOUT, Buffer, Connector
from ustack.nbd.constants import (
    BASE_ALLOCATION,
    COMMAND_NAMES,
    MAX_DESCRIPTORS,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from ustack.nbd.session import Session
from ustack.nbd.strict import (
    STRICT_ALIGN,
    STRICT_BOUNDS,
    STRICT_COMMANDS,
    STRICT_FLAGS,
    STRICT_PAYLOAD,
    STRICT_ZERO_SIZE,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from ustack.nbd.export_info import ExportInfo
    from ustack.nbd.session_options import SessionOptions

MAX_RANGE: Final = 128 << 20
"""Bytes of one trim or write-zeroes request. They carry no payload, but a server may need long to do them."""
MAX_RANGE_EXTENDED: Final = 1 << 30
"""The same with extended headers, which are for servers that do it at once."""
MAX_STATUS_RANGE: Final = 1 << 31
"""Bytes of one block status request without extended headers."""
MAX_LENGTH: Final = (1 << 32) - 1
"""The longest request that fits a header, and with extended headers:"""
MAX_LENGTH_EXTENDED: Final = (1 << 63) - 1


class NbdClient:
    """An export as a disk. Made by `connect` or `NbdClient.open`.

    Offsets and lengths are bytes and must be multiples of `minimum_block`. Calls that break the export's limits are refused
    before anything is sent: EINVAL for misalignment and for what lies beyond the end (ENOSPC for writes), EPERM for writing to
    a read-only export, EOPNOTSUPP for what the server does not offer.
    """

    __slots__ = ("_call", "_session", "_strict", "info")

    def __init__(self, session: Session) -> None:
        """`session` is open and belongs to the client from now on."""
        self._session = session
        self._call = session.call
        self._strict = session.strict
        self.info: ExportInfo = session.info

    @classmethod
    async def open(
        cls, connector: Connector | Sequence[Connector], export: str = "", **options: Unpack[SessionOptions]
    ) -> Self:
        """Connect with `connector` and negotiate; several are ways to the same export, tried in turn, now and whenever the
        connection is lost. See `Session.open` for options and errors."""
        connectors = [connector] if callable(connector) else connector
        return cls(await Session.open(connectors, export, **options))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- what the export is ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes on the export."""
        return self.info.size

    @property
    def name(self) -> str:
        """The export's name: the server's own form of it if it told."""
        return self.info.name if self.info.canonical_name is None else self.info.canonical_name

    @property
    def description(self) -> str | None:
        """The server's description of the export, if it has one."""
        return self.info.description

    @property
    def minimum_block(self) -> int:
        """Offsets and lengths are multiples of this many bytes."""
        return self.info.minimum_block

    @property
    def preferred_block(self) -> int:
        """Bytes from which on requests are efficient."""
        return self.info.preferred_block

    @property
    def maximum_payload(self) -> int:
        """Bytes in one read or write on the wire. Larger calls are split."""
        return self.info.maximum_payload

    @property
    def read_only(self) -> bool:
        """Writes are refused."""
        return self.info.read_only

    @property
    def can_flush(self) -> bool:
        """`flush` is supported."""
        return self.info.can_flush

    @property
    def can_fua(self) -> bool:
        """`fua=True` is supported."""
        return self.info.can_fua

    @property
    def can_trim(self) -> bool:
        """`trim` is supported."""
        return self.info.can_trim

    @property
    def can_zero(self) -> bool:
        """`zero` is supported."""
        return self.info.can_zero

    @property
    def can_fast_zero(self) -> bool:
        """`zero(..., fast=True)` is supported."""
        return self.info.can_fast_zero

    @property
    def can_cache(self) -> bool:
        """`cache` is supported."""
        return self.info.can_cache

    @property
    def can_df(self) -> bool:
        """`df=True` is supported."""
        return self.info.can_df

    @property
    def can_multi_conn(self) -> bool:
        """Several connections to the export see one cache."""
        return self.info.can_multi_conn

    @property
    def is_rotational(self) -> bool:
        """The medium turns."""
        return self.info.is_rotational

    @property
    def structured_replies(self) -> bool:
        """Structured replies were negotiated."""
        return self._session.structured_replies

    @property
    def extended_headers(self) -> bool:
        """Extended headers were negotiated."""
        return self._session.extended_headers

    @property
    def meta_contexts(self) -> frozenset[str]:
        """Metadata contexts that `block_status` can be asked for."""
        return self._session.contexts

    @property
    def can_block_status(self) -> bool:
        """`block_status` works for base:allocation."""
        return BASE_ALLOCATION in self._session.contexts

    @property
    def tls(self) -> bool:
        """Everything goes through TLS."""
        return self._session.tls

    @property
    def requests_in_flight(self) -> int:
        """Requests sent and not yet answered, including those whose callers have given up."""
        return self._session.requests_in_flight

    @property
    def connections(self) -> int:
        """Connections that are up now; 0 while the server is away."""
        return self._session.connections

    @property
    def unflushed(self) -> tuple[int, int]:
        """Writes that the server has answered and that no flush has covered yet: how many, and their bytes."""
        return self._session.unflushed.count, self._session.unflushed.nbytes

    @property
    def lost(self) -> OSError | None:
        """Why nothing can be sent any more; None as long as it can."""
        return self._session.failure

    def counters(self) -> dict[str, int]:
        """What has happened to the connections: see `SessionCounters`."""
        report = self._session.counters.report()
        report["slow"] = self._session.slow_requests
        return report

    # -- commands ----------------------------------------------------------------------------------------------------------

    async def pread(self, length: int, offset: int, *, df: bool = False) -> bytearray:
        """Read `length` bytes at `offset`. `df` asks the server not to fragment its reply."""
        data = bytearray(length)
        await self.pread_into(data, offset, df=df)
        return data

    async def pread_into(self, buffer: bytearray | memoryview, offset: int, *, df: bool = False) -> None:
        """Fill `buffer` from `offset`. When this raises, or is cancelled, the contents of `buffer` are undefined, but nothing
        writes into it afterwards."""
        view = memoryview(buffer)
        if view.format != "B":
            view = view.cast("B")
        info = self.info
        self._check(NBD_CMD_READ, offset, len(view), True, not df or info.can_df)
        flags = NBD_CMD_FLAG_DF if df else 0
        if not view and self._strict & STRICT_ZERO_SIZE:
            return
        if self._fits(len(view)):
            await self._call(NBD_CMD_READ, flags, offset, len(view), view, None)
        else:
            parts = self._parts(len(view), info.maximum_payload)
            await self._together(self._call(NBD_CMD_READ, flags, offset + at, n, view[at : at + n], None) for at, n in parts)

    def begin(self, call: Call) -> bool:
        """Start a read or write of one request at once, without a task: see `Session.begin`. False when it has to wait, or is
        one that `pread_into` and `pwrite` would cut or refuse: use them."""
        info = self.info
        end = call.offset + call.length
        if not 0 < call.length <= info.maximum_payload or end > info.size or (call.offset | end) & (info.minimum_block - 1):
            return False
        if call.payload is not None and info.read_only:
            return False
        return self._session.begin(call)

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is on stable storage when this returns. `data` must not change meanwhile. A
        cancelled write may or may not happen."""
        view = memoryview(data)
        if view.format != "B":
            view = view.cast("B")
        info = self.info
        self._check(NBD_CMD_WRITE, offset, len(view), True, not fua or info.can_fua)
        flags = NBD_CMD_FLAG_FUA if fua else 0
        if not view and self._strict & STRICT_ZERO_SIZE:
            return
        if self._fits(len(view)):
            await self._call(NBD_CMD_WRITE, flags, offset, len(view), None, view)
        else:
            parts = self._parts(len(view), info.maximum_payload)
            await self._together(self._call(NBD_CMD_WRITE, flags, offset + at, n, None, view[at : at + n]) for at, n in parts)

    async def flush(self) -> None:
        """Bring every write that has been answered to stable storage."""
        if not self.info.can_flush and self._strict & STRICT_COMMANDS:
            raise OSError(errno.EOPNOTSUPP, "the server does not offer NBD_CMD_FLUSH")
        await self._call(NBD_CMD_FLUSH, 0, 0, 0, None, None)

    async def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Tell the server that `length` bytes at `offset` are not needed. Their contents are undefined afterwards."""
        self._check(NBD_CMD_TRIM, offset, length, self.info.can_trim, not fua or self.info.can_fua)
        await self._range(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA if fua else 0, offset, length, self._range_limit)

    async def zero(self, length: int, offset: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False) -> None:
        """Write zeroes to `length` bytes at `offset`. With `no_hole` the server keeps the space allocated. With `fast` it does
        so only if that is faster than writing them, else this fails with ENOTSUP, having changed nothing or a part."""
        info = self.info
        offered = (not fua or info.can_fua) and (not fast or info.can_fast_zero)
        self._check(NBD_CMD_WRITE_ZEROES, offset, length, info.can_zero, offered)
        flags = (NBD_CMD_FLAG_FUA if fua else 0) | (NBD_CMD_FLAG_NO_HOLE if no_hole else 0)
        flags |= NBD_CMD_FLAG_FAST_ZERO if fast else 0
        await self._range(NBD_CMD_WRITE_ZEROES, flags, offset, length, self._range_limit)

    async def cache(self, length: int, offset: int) -> None:
        """Ask the server to bring `length` bytes at `offset` into its cache."""
        self._check(NBD_CMD_CACHE, offset, length, self.info.can_cache, True)
        await self._range(NBD_CMD_CACHE, 0, offset, length, self.info.maximum_payload)

    async def block_status(
        self, length: int, offset: int, context: str = BASE_ALLOCATION, *, one: bool = False
    ) -> list[Extent]:
        """What the server says of `length` bytes at `offset` in a metadata context: extents without gaps that cover them all,
        neighbours with the same flags joined.

        With `one` there is one extent, as long as the server chose to look. Raises EOPNOTSUPP for a context that was not
        negotiated, EOVERFLOW for more than a million extents: ask for less at a time.
        """
        session = self._session
        if context not in session.contexts:
            raise OSError(errno.EOPNOTSUPP, f"the server was not asked for the metadata context {context!r}, or has none")
        self._check(NBD_CMD_BLOCK_STATUS, offset, length, True, True)
        flags = NBD_CMD_FLAG_REQ_ONE if one else 0
        if len(session.contexts) > 1 and session.extended_headers and self.info.can_block_status_payload:
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN
        limit = MAX_LENGTH_EXTENDED if session.extended_headers else MAX_STATUS_RANGE
        extents: list[Extent] = []
        stop = offset + length
        while offset < stop:
            asked = min(stop - offset, limit)
            call = await self._call(NBD_CMD_BLOCK_STATUS, flags, offset, asked, None, None, context)
            assert call.status is not None
            offset = append_extents(extents, call.status[context], offset, offset + asked)
            if one:
                break
            if len(extents) > MAX_DESCRIPTORS:
                raise OSError(errno.EOVERFLOW, f"more than {MAX_DESCRIPTORS} extents up to offset {offset}")
        return extents

    async def close(self, grace: float = CLOSE_TIMEOUT) -> None:
        """Wait up to `grace` seconds for requests in flight, then take leave. Later calls fail with EPIPE."""
        await self._session.close(grace)

    async def wait_lost(self) -> OSError:
        """Wait until nothing can be sent any more, and return the reason: what every call raises from then on."""
        return await self._session.wait_lost()

    # -- how calls become requests -----------------------------------------------------------------------------------------

    def _check(self, command: int, offset: int, length: int, offered: bool, with_flags: bool) -> None:
        """Refuse what breaks a rule; see `strict.py`."""
        info, strict = self.info, self._strict
        if not offered and strict & STRICT_COMMANDS:
            raise OSError(errno.EOPNOTSUPP, f"the server does not offer {COMMAND_NAMES[command]}")
        if not with_flags and strict & STRICT_FLAGS:
            raise OSError(errno.EOPNOTSUPP, f"the server does not offer {COMMAND_NAMES[command]} with these flags")
        if info.read_only and command in CHANGES and strict & STRICT_COMMANDS:
            raise OSError(errno.EPERM, f"{COMMAND_NAMES[command]}: the export is read-only")
        if offset < 0 or length < 0 or (offset + length > info.size and strict & STRICT_BOUNDS):
            writes = command in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
            code = errno.ENOSPC if writes and offset >= 0 and length >= 0 else errno.EINVAL
            raise OSError(code, f"{COMMAND_NAMES[command]} of {length} bytes at {offset}: the export has {info.size} bytes")
        if (offset | length) & (info.minimum_block - 1) and strict & STRICT_ALIGN:
            raise OSError(
                errno.EINVAL, f"{COMMAND_NAMES[command]} of {length} bytes at {offset}: blocks have {info.minimum_block} bytes"
            )
        if offset + length > MAX_LENGTH_EXTENDED:
            raise OSError(errno.EOVERFLOW, f"{COMMAND_NAMES[command]} of {length} bytes at {offset} fits no request")

    def _fits(self, length: int) -> bool:
        """A payload of `length` bytes goes into one request."""
        return length <= self.info.maximum_payload or (not self._strict & STRICT_PAYLOAD and length <= MAX_LENGTH)

    @property
    def _range_limit(self) -> int:
        return MAX_RANGE_EXTENDED if self._session.extended_headers else MAX_RANGE

    async def _range(self, command: int, flags: int, offset: int, length: int, limit: int) -> None:
        if not length and self._strict & STRICT_ZERO_SIZE:
            return
        if length <= limit:
            await self._call(command, flags, offset, length, None, None)
        else:
            parts = self._parts(length, limit - limit % self.info.minimum_block)
            await self._together(self._call(command, flags, offset + at, n, None, None) for at, n in parts)

    @staticmethod
    def _parts(length: int, limit: int) -> Iterator[tuple[int, int]]:
        return ((at, min(limit, length - at)) for at in range(0, length, limit))

    @staticmethod
    async def _together(calls: Iterator[Any]) -> None:
        """Run the parts of a split call. All of them end before this returns, also on error, so that no part outlives the
        call."""
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
