"""A ring whose one frame is an skb that we have already: what is delivered once more, without a copy.

A datagram that was put together from fragments, and a frame that the stack sent to itself, go up the same way as a frame from a
device. Who keeps such a frame gets the skb itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mypy_extensions import mypyc_attr

from ustack.link.rxring import HEADER_BUFFER, RxRing

if TYPE_CHECKING:
    from ustack.skb import Buffer, Skb, SkbMemory


@mypyc_attr(allow_interpreted_subclasses=True)
class SkbRing(RxRing):
    """Delivers skbs: `load` makes one the frame, `unload` ends it and frees the skb unless somebody kept it.

    `header` of `load` is what comes before the skb's data in the frame: it has no memory in the pool and cannot be kept.
    """

    __slots__ = ("_buffer", "_header_len", "_skb")

    def __init__(self, memory: SkbMemory) -> None:
        super().__init__(memory, 0, None)
        self._buffer = memoryview(bytearray(HEADER_BUFFER))
        self._header_len = 0
        self._skb: Skb | None = None

    def load(self, header: Buffer, skb: Skb) -> None:
        """Let `frame` be `header`, of less than `HEADER_BUFFER` bytes, and the data of `skb`, which belongs to the ring now."""
        start = len(header)
        buffer = self._buffer
        buffer[:start] = header
        length = start + skb.len
        skb.copy_to(buffer[start:])
        self._skb = skb
        self._header_len = start
        frame = self.frame
        frame.head = buffer[: min(length, HEADER_BUFFER)]
        frame.len = length
        frame.csum_ok = False
        frame.gso_size = 0
        frame.pfmemalloc = skb.pfmemalloc

    def unload(self) -> None:
        """The frame has been delivered."""
        skb = self._skb
        if skb is not None:
            self._skb = None
            skb.free()

    def ready(self) -> bool:
        """Whether a frame is loaded that nobody has kept."""
        return self._skb is not None

    def views(self, offset: int, length: int) -> list[memoryview]:
        """Views on the frame's bytes."""
        if offset + length <= len(self.frame.head):
            return [self.frame.head[offset : offset + length]]
        assert self._skb is not None, "kept before it was read"
        start = self._header_len
        if offset >= start:
            return self._skb.views(offset - start, length)
        return [self.frame.head[offset:start], *self._skb.views(0, length - (start - offset))]

    def keep(self, offset: int, length: int, gfp: int) -> Skb | None:
        """The skb itself, cut to the bytes asked for, which must lie in it. It is charged to nobody."""
        skb = self._skb
        if skb is None:
            return None
        self._skb = None
        skb.uncharge()
        skb.pull(offset - self._header_len)
        skb.trim(length)
        return skb

    def truesize(self, offset: int, length: int) -> int:
        """That of the skb, whatever part of it is asked for."""
        return 0 if self._skb is None else self._skb.truesize

    def close(self) -> None:
        """Free what is loaded."""
        self.unload()
