"""The contract of a pool, and the registry by which others add pools of their own.

A pool lays packets on the pages of an arena. It is asked for two kinds of memory: *data* of any size (headers and payload of a
packet) and *heads* of one fixed size (what `struct sk_buff` is to the kernel). The three allocators of the 2006 dispute want to
know different things about a request, so the contract carries what any of them needs and each ignores the rest:

* `size` is given on free as well as on allocation: NTA keeps no header and must be told.
* `cpu` is a lane number that stands for the CPU that allocates or frees: SLAB has per-CPU arrays, NTA per-CPU regions.
* `group` is the address of an earlier object of the same packet: SROG packs the objects of one packet on the same pages.

A pool never raises for want of memory: it returns `NULL`. After every successful allocation `pfmemalloc` tells whether that
allocation had to use the reserve (memory under the page allocator's `min` watermark, `gfp.MEMALLOC`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, ClassVar, Final

from mypy_extensions import mypyc_attr

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pools.buddy import PageAllocator

NULL: Final = -1
"""What an allocation returns when there is no memory; also "no group"."""

SKB_HEAD_SIZE: Final = 232
"""Bytes of one packet head: `sizeof(struct sk_buff)` on a 64-bit kernel of the years that we compare with."""

ENTRY_POINT_GROUP: Final = "ustack.pools"


class PoolStats:
    """Running totals of a pool. `requested` and `charged` are bytes now live; the peaks are their highest values so far."""

    __slots__ = ("allocs", "charged", "charged_peak", "failures", "frees", "requested", "requested_peak")

    def __init__(self) -> None:
        self.allocs = 0
        self.frees = 0
        self.failures = 0
        self.requested = 0
        self.requested_peak = 0
        self.charged = 0
        self.charged_peak = 0


@mypyc_attr(allow_interpreted_subclasses=True)
class Pool(ABC):
    """Packet memory on the pages of one `PageAllocator`.

    `name` is the name under which configuration selects the pool. `max_size` is the largest data request in bytes that can ever
    succeed. `head_charge` is the number of bytes that one head really takes. `pfmemalloc` belongs to the last successful
    allocation. `stats` counts data and heads together.
    """

    __slots__ = ("head_charge", "max_size", "pages", "pfmemalloc", "stats")

    name: ClassVar[str]

    def __init__(self, pages: PageAllocator) -> None:
        self.pages = pages
        self.stats = PoolStats()
        self.pfmemalloc = False
        self.max_size = 0
        self.head_charge = 0

    @abstractmethod
    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate `size` bytes of data and return their address, or `NULL`. `group`: an object of the packet it belongs to."""

    @abstractmethod
    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """Give back data; `size` is what was asked for. Raises `DoubleFree` for memory that is not allocated."""

    @abstractmethod
    def charge(self, addr: int, size: int) -> int:
        """Bytes that the live allocation at `addr`, asked for as `size`, really takes: with rounding and headers (truesize)."""

    @abstractmethod
    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate one packet head (`SKB_HEAD_SIZE` bytes) and return its address, or `NULL`."""

    @abstractmethod
    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Give back a packet head."""

    def alloc_fclone(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate two heads in one piece, for a packet that is going to be cloned, and return the address of the first, or
        `NULL`; the second lies `SKB_HEAD_SIZE` bytes further on (skbuff_fclone_cache). A pool that does not have such pieces
        has no memory for them either.
        """
        return NULL

    def free_fclone(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Give two heads back that were allocated in one piece, when neither is used any more. Raises `DoubleFree`."""
        raise DoubleFree(f"no pair of heads at {addr:#x} is allocated")

    def link(self, group: int, other: int) -> None:  # noqa: B027 (a pool without groups has nothing to do)
        """Join the groups of two live objects, so that either is a valid `group` for the objects of both (srog_link)."""

    @abstractmethod
    def reap(self) -> int:
        """Give back every page that no live object needs; return how many pages went back."""

    def compact(self, movable: Collection[int], moved: Callable[[int, int], None]) -> int:
        """Move live objects together and give back the pages that become empty; return how many pages went back.

        `movable` are the addresses, of data and of heads, that may move now, because nobody looks at them: no device and no
        view. After an object has been copied `moved` is called with its old and its new address. A pool that cannot move
        anything gives back what `reap` does.
        """
        return self.reap()

    def alone_on(self, pfn: int, own: Collection[int]) -> bool:
        """Whether no live data lies on the page `pfn`, not even in part, but that at the addresses `own`.

        Heads do not count: what they would hold is not in the arena. False also says that the pool cannot tell.
        """
        return False

    @abstractmethod
    def held_pages(self) -> int:
        """Pages that the pool holds now, cached free objects included."""

    @abstractmethod
    def largest_free_run(self) -> int:
        """Bytes of the largest piece that lies free in the pages that the pool holds already, whoever may use it."""

    @abstractmethod
    def check(self) -> None:
        """Verify every invariant of the pool's bookkeeping; raise `AssertionError` on the first that fails. Slow: for tests."""


class DoubleFree(Exception):
    """Memory was freed that is not allocated: a bug in the caller. The pool is unchanged."""


_BUILTIN: Final = {
    "kmalloc": "pools.kmalloc:KmallocPool",
    "nta": "pools.nta:NtaPool",
    "page_frag": "pools.page_frag:PageFragPool",
    "page_per_object": "pools.page_per_object:PagePerObjectPool",
    "srog": "pools.srog:SrogPool",
}
"""The pools of this package, as entry points: each is imported when it is asked for, because a stack uses one."""


def _entry_points() -> list[EntryPoint]:
    """All pools that there are, ours first."""
    ours = [EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in _BUILTIN.items()]
    return [*ours, *entry_points(group=ENTRY_POINT_GROUP)]


def names() -> list[str]:
    """The names of all pools that can be selected, sorted."""
    return sorted({point.name for point in _entry_points()})


def by_name(name: str) -> type[Pool]:
    """The pool class with that name; the names of the built-in pools cannot be taken by others.

    Raises `KeyError` with the names there are if there is none, `TypeError` if the entry point is not a pool.
    """
    for point in _entry_points():
        if point.name == name:
            pool = point.load()
            if not (isinstance(pool, type) and issubclass(pool, Pool)):
                raise TypeError(f"entry point {point.value!r} for pool {name!r} is not a subclass of pools.base.Pool")
            return pool
    raise KeyError(f"no pool {name!r}; there are: {', '.join(names())}")
