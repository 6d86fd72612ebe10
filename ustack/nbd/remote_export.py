"""An export whose disk is elsewhere: what clients ask of it goes on to another server, through our client.

That is how the kernel's nbd, QEMU and whatever else speaks NBD over a unix socket come to a disk over our own stack, and to
what our client does about lost connections: while the other server is away, commands wait, and nobody is told. Many commands
are under way at a time and are answered as the answers come. What the other server offers is offered, its block sizes are ours.
The order of writes and flushes is kept, since all our clients share one session: a flush covers what was answered to any of
them.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

from ustack.nbd.constants import (
    ERRNO_TO_WIRE,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_ROTATIONAL,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from ustack.nbd.export import MAX_STATUS_EXTENTS, Export
from ustack.nbd.export_info import ExportInfo

if TYPE_CHECKING:
    from ustack.nbd.client import NbdClient
    from ustack.nbd.export import Answers
    from ustack.nbd.server_transmission import Command

MAX_STATUS: Final = 1 << 30
"""Bytes that one block status is asked about over there; who wants to know more asks again from there on."""

_PASSED_ON: Final = (
    NBD_FLAG_READ_ONLY
    | NBD_FLAG_ROTATIONAL
    | NBD_FLAG_SEND_CACHE
    | NBD_FLAG_SEND_FAST_ZERO
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
)
_OUR_OWN: Final = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF | NBD_FLAG_CAN_MULTI_CONN
"""A read is answered in one piece, and all clients share one session, whatever the other server does."""
_WRITES: Final = NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO


class RemoteExport(Export):
    """`disk` under the name `name`: by default the one that it has over there. The disk remains the caller's, who closes it."""

    __slots__ = ("_disk",)

    def __init__(self, disk: NbdClient, name: str | None = None, *, read_only: bool = False) -> None:
        super().__init__(_info_of(disk, disk.name if name is None else name, read_only), tuple(sorted(disk.meta_contexts)))
        self._disk: NbdClient | None = disk

    def lose(self) -> None:
        """There is no disk for now: commands are answered with ESHUTDOWN."""
        self._disk = None

    def go_on_with(self, disk: NbdClient) -> bool:
        """Use this disk from now on, if it is what clients were told; tells whether it is."""
        if _info_of(disk, self.info.name, self.info.read_only) != self.info or not disk.meta_contexts.issuperset(self.contexts):
            return False
        self._disk = disk
        return True

    def destination(self, offset: int, length: int) -> memoryview:
        """A buffer of its own for each write, which is sent from there."""
        return memoryview(bytearray(length))

    def submit(self, command: Command, answers: Answers) -> asyncio.Task[None]:
        """Send it on."""
        return asyncio.get_running_loop().create_task(self._forward(command, answers))

    def abandon(self, task: asyncio.Task[None]) -> None:
        """Nobody waits any more. A write that was not answered may or may not happen."""
        task.cancel()

    def close(self) -> None:
        """Nothing: the disk is the caller's."""

    async def _forward(self, command: Command, answers: Answers) -> None:
        disk = self._disk
        try:
            if disk is None:
                raise OSError(errno.ESHUTDOWN, "the disk is lost")
            if command.command == NBD_CMD_READ:
                data = bytearray(command.length)
                await disk.pread_into(data, command.offset)
                answers.read(command, ((command.length, data),))
                return
            if command.command == NBD_CMD_BLOCK_STATUS:
                answers.status(
                    command, [(each, await _status(disk, command, self.contexts[each])) for each in command.contexts]
                )
                return
            await _change(disk, command)
        except OSError as error:
            answers.failed(command, _seen_from_here(error))
        else:
            answers.done(command)


async def _status(disk: NbdClient, command: Command, context: str) -> list[tuple[int, int]]:
    """What the disk's server says of a context: all of it if that is little enough, and something in any case."""
    offset = command.offset
    one = bool(command.flags & NBD_CMD_FLAG_REQ_ONE)
    length = command.length if one else min(command.length, MAX_STATUS)
    try:
        extents = await disk.block_status(length, offset, context, one=one)
    except OSError as error:
        if one or error.errno != errno.EOVERFLOW:
            raise
        extents = await disk.block_status(length, offset, context, one=True)
    return [(extent.length, extent.flags) for extent in extents[:MAX_STATUS_EXTENTS]]


async def _change(disk: NbdClient, command: Command) -> None:
    """Everything but reading."""
    kind, flags, offset, length = command.command, command.flags, command.offset, command.length
    fua = bool(flags & NBD_CMD_FLAG_FUA)
    if kind == NBD_CMD_WRITE:
        assert command.payload is not None
        await disk.pwrite(command.payload, offset, fua=fua)
    elif kind == NBD_CMD_FLUSH:
        await disk.flush()
    elif kind == NBD_CMD_TRIM:
        await disk.trim(length, offset, fua=fua)
    elif kind == NBD_CMD_WRITE_ZEROES:
        await disk.zero(
            length, offset, fua=fua, no_hole=bool(flags & NBD_CMD_FLAG_NO_HOLE), fast=bool(flags & NBD_CMD_FLAG_FAST_ZERO)
        )
    elif kind == NBD_CMD_CACHE:
        await disk.cache(length, offset)


def _info_of(disk: NbdClient, name: str, read_only: bool) -> ExportInfo:
    """What clients are told of a disk."""
    flags = _OUR_OWN | (disk.info.flags & _PASSED_ON)
    if read_only:
        flags = (flags & ~_WRITES) | NBD_FLAG_READ_ONLY
    return ExportInfo(
        name,
        disk.size,
        flags,
        disk.description,
        minimum_block=disk.minimum_block,
        preferred_block=disk.preferred_block,
        maximum_payload=disk.maximum_payload,
    )


def _seen_from_here(error: OSError) -> OSError:
    """What a client is told. An error of the other server is its own; any other means that our client has given it up, and this
    export with it: ESHUTDOWN, after which a client may look for it anew."""
    if error.errno in ERRNO_TO_WIRE:
        return error
    return OSError(errno.ESHUTDOWN, f"the disk is lost: {error.strerror or error}")
