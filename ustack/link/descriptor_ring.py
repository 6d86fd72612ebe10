"""The ring of descriptors between the stack and a process that sniffs: shared memory, one writer, one reader.

A descriptor says where the bytes of a frame lie in the arena, which the reader has mapped as well; so no frame is copied into
the ring, only up to `INLINE_MAX` bytes of header that lie nowhere in the arena. Four things are shared, as descriptors handed
over a unix socket:

* the arena, read-only;
* the slots, read-only: the writer writes a slot, and never touches it again before the reader has released it. Behind them is
  the number of frames that were missed;
* the release index, which the reader writes: how many descriptors it is done with since the beginning. What lies in frames that
  are not released stays where it is;
* a pipe, into which the writer puts one byte for each descriptor. The reader sleeps on it, learns from it how many there are,
  and the kernel orders the memory for both. It is no eventfd, because who holds one of those can make its writer wait (by
  taking O_NONBLOCK off the description that both share); the two ends of a pipe are apart.

The writer trusts nothing that it reads: a release index that goes backwards or beyond what was written is counted in `nonsense`
and ignored. The memory of the slots is sealed against new writable mappings (F_SEAL_FUTURE_WRITE), and so is the arena.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import Arena, sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOTS: Final = 1024
"""Slots of a ring. A pipe holds 65,536 bytes, so its writer never finds it full unless the reader has filled it."""

SLOT_SIZE: Final = 512
"""Bytes of a slot."""

INLINE_MAX: Final = 128
"""Bytes of a frame that may lie in the slot itself, before all others."""

INCOMING: Final = 0
OUTGOING: Final = 1
"""Directions, as seen from the stack."""

NOT_DROPPED: Final = 0xFFFF
"""In place of a drop reason."""

_HEAD: Final = Struct("=QQIHHHHH")  # number, stamp, length, interface, direction, reason, inline, fragments
_FRAG: Final = Struct("=QI")
_INLINE_AT: Final = 40
_FRAGS_AT: Final = _INLINE_AT + INLINE_MAX
FRAGS_MAX: Final = (SLOT_SIZE - _FRAGS_AT) // _FRAG.size
"""Runs of arena bytes in one descriptor; what lies behind them is not captured."""


class Descriptor(NamedTuple):
    """A frame: its bytes are `inline`, and then the runs `(address, length)` of the arena. `length` is that of the whole frame,
    of which `captured` bytes are described. `stamp` is in nanoseconds; `reason` the index of a drop reason or `NOT_DROPPED`.
    `number` counts all descriptors of the ring from 0.
    """

    number: int
    stamp: int
    length: int
    interface: int
    direction: int
    reason: int
    inline: bytes
    frags: Sequence[tuple[int, int]]

    @property
    def captured(self) -> int:
        """Bytes that are described."""
        return len(self.inline) + sum(length for _, length in self.frags)


class RingWriter:
    """The stack's end. `written` counts descriptors, `nonsense` release indexes that cannot be. Raises OSError when the memory
    cannot be had.
    """

    __slots__ = ("_missed", "_release", "_release_map", "_slots", "_wake_fd", "fds", "nonsense", "released", "slots", "written")

    def __init__(self, slots: int = SLOTS) -> None:
        self.slots = slots
        self.written = 0
        self.released = 0
        self.nonsense = 0
        fds: list[int] = []
        try:
            fd, self._slots = sealed_memfd("ustack-sniffer", slots * SLOT_SIZE + mmap.PAGESIZE)
            fds.append(fd)
            fds.append(os.memfd_create("ustack-sniffer-release", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(fds[1], mmap.PAGESIZE)
            fcntl.fcntl(fds[1], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._release_map = mmap.mmap(fds[1], mmap.PAGESIZE)
            wait_fd, self._wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        self._missed = memoryview(self._slots)[slots * SLOT_SIZE :].cast("Q")
        self._release = memoryview(self._release_map).cast("Q")
        self.fds = (*fds, wait_fd)

    def room(self) -> bool:
        """Whether there is a free slot."""
        return self.written - self.released < self.slots

    @property
    def missed(self) -> int:
        """Frames that the reader was not shown."""
        return self._missed[0]

    def miss(self) -> None:
        """There is a frame that the reader is not shown, for want of room or of memory."""
        self._missed[0] += 1

    def write(
        self,
        stamp: int,
        length: int,
        interface: int,
        direction: int,
        reason: int,
        inline: bytes,
        frags: Sequence[tuple[int, int]],
    ) -> None:
        """Describe a frame and wake the reader. There must be room; at most `INLINE_MAX` bytes and `FRAGS_MAX` runs."""
        at = self.written % self.slots * SLOT_SIZE
        slots = self._slots
        _HEAD.pack_into(slots, at, self.written, stamp, length, interface, direction, reason, len(inline), len(frags))
        slots[at + _INLINE_AT : at + _INLINE_AT + len(inline)] = inline
        at += _FRAGS_AT
        for addr, size in frags:
            _FRAG.pack_into(slots, at, addr, size)
            at += _FRAG.size
        self.written += 1
        try:
            os.write(self._wake_fd, b"\0")
        except OSError:  # full, or nobody has the other end any more
            self.nonsense += 1

    def reclaim(self) -> int:
        """How many more descriptors the reader is done with; what it says is believed only when it can be."""
        said = self._release[0]
        if said == self.released:
            return 0
        if not self.released < said <= self.written:
            self.nonsense += 1
            return 0
        done = said - self.released
        self.released = said
        return done

    def close(self) -> None:
        """Let go of the shared memory; the reader finds the pipe at its end."""
        self._release.release()
        self._release_map.close()
        self._missed.release()
        self._slots.close()
        for fd in (*self.fds, self._wake_fd):
            os.close(fd)


class RingReader:
    """The reader's end, on descriptors of the arena (`size` bytes), of the slots, of the release index and of the pipe, which
    it owns from now on. Raises OSError when they cannot be mapped.
    """

    __slots__ = ("_arena", "_missed", "_release", "_release_map", "_slot_count", "_slots", "mem", "number", "wait_fd")

    def __init__(self, fds: Sequence[int], size: int, slots: int) -> None:
        arena_fd, slots_fd, release_fd, self.wait_fd = fds
        self._slot_count = slots
        self.number = 0
        try:
            self._arena = mmap.mmap(arena_fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            self._slots = mmap.mmap(slots_fd, slots * SLOT_SIZE + mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
            self._missed = memoryview(self._slots)[slots * SLOT_SIZE :].cast("Q")
            self._release_map = mmap.mmap(release_fd, mmap.PAGESIZE)
        finally:
            for fd in (arena_fd, slots_fd, release_fd):
                os.close(fd)
        self.mem = memoryview(self._arena)
        self._release = memoryview(self._release_map).cast("Q")

    @property
    def missed(self) -> int:
        """Frames for which there was no room until now."""
        return self._missed[0]

    def read(self) -> list[Descriptor]:
        """The descriptors that have come since the last call; what they describe stays as it is until `release`. Raises
        EOFError when the writer has gone, BlockingIOError when there are none (wait until `wait_fd` is readable).
        """
        count = len(os.read(self.wait_fd, self._slot_count))
        if not count:
            raise EOFError
        found = [self._slot(number) for number in range(self.number, self.number + count)]
        self.number += count
        return found

    def _slot(self, number: int) -> Descriptor:
        at = number % self._slot_count * SLOT_SIZE
        slots = self._slots
        own, stamp, length, interface, direction, reason, inline, frags = _HEAD.unpack_from(slots, at)
        runs = [_FRAG.unpack_from(slots, at + _FRAGS_AT + n * _FRAG.size) for n in range(frags)]
        start = at + _INLINE_AT
        return Descriptor(own, stamp, length, interface, direction, reason, slots[start : start + inline], runs)

    def pieces(self, descriptor: Descriptor) -> list[bytes | memoryview]:
        """The captured bytes of a frame, where they lie. They may change once it is released."""
        mem = self.mem
        return [descriptor.inline, *(mem[addr : addr + size] for addr, size in descriptor.frags)]

    def release(self, number: int) -> None:
        """Done with every descriptor before `number`."""
        self._release[0] = number

    def close(self) -> None:
        """Unmap everything; what somebody still has pieces of, as soon as he lets go of them."""
        self.mem.release()
        with contextlib.suppress(BufferError):
            self._arena.close()
        self._missed.release()
        self._slots.close()
        self._release.release()
        self._release_map.close()
        os.close(self.wait_fd)


def shared_fds(arena: Arena, writer: RingWriter) -> list[int]:
    """What `RingReader` takes, in its order: to be handed to another process. The writer stays their owner."""
    return [arena.fd, *writer.fds]
