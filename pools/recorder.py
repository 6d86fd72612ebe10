"""A pool that writes down what another is asked for: what the size-class adviser learns from, on a stack in use.

It takes the place of the pool where packets are allocated for as long as the recording lasts, so that nothing is paid for it
otherwise. What was alive when the recording began is not in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pools.base import NULL, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

RECORDS_MAX = 1_000_000
"""Allocations that are recorded at most; the rest of the time is not in the recording."""


class RecordingPool(Pool):
    """`pool`, with a record of its data: `records` has `(number, size, lane)` for each allocation, and `(number, 0, lane)` when
    it was freed.
    """

    __slots__ = ("_numbers", "pool", "records")

    name = "recorder"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool.pages)
        self.pool = pool
        self.stats = pool.stats
        self.max_size = pool.max_size
        self.head_charge = pool.head_charge
        self.records: list[tuple[int, int, int]] = []
        self._numbers: dict[int, int] = {}

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """As the pool does, and recorded."""
        addr = self.pool.alloc(size, gfp, cpu, group)
        self.pfmemalloc = self.pool.pfmemalloc
        if addr != NULL and len(self.records) < RECORDS_MAX:
            self._numbers[addr] = number = len(self.records)
            self.records.append((number, size, cpu))
        return addr

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """As the pool does, and recorded."""
        self.pool.free(addr, size, cpu, group)
        number = self._numbers.pop(addr, -1)
        if number >= 0:
            self.records.append((number, 0, cpu))

    def charge(self, addr: int, size: int) -> int:
        """As the pool does."""
        return self.pool.charge(addr, size)

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """As the pool does."""
        addr = self.pool.alloc_head(gfp, cpu, group)
        self.pfmemalloc = self.pool.pfmemalloc
        return addr

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """As the pool does."""
        self.pool.free_head(addr, cpu, group)

    def link(self, group: int, other: int) -> None:
        """As the pool does."""
        self.pool.link(group, other)

    def reap(self) -> int:
        """As the pool does."""
        return self.pool.reap()

    def compact(self, movable: Collection[int], moved: Callable[[int, int], None]) -> int:
        """As the pool does. What moves keeps its number."""

        def both(old: int, new: int) -> None:
            if old in self._numbers:
                self._numbers[new] = self._numbers.pop(old)
            moved(old, new)

        return self.pool.compact(movable, both)

    def held_pages(self) -> int:
        """As the pool does."""
        return self.pool.held_pages()

    def largest_free_run(self) -> int:
        """As the pool does."""
        return self.pool.largest_free_run()

    def check(self) -> None:
        """As the pool does."""
        self.pool.check()
