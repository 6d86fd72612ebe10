"""Page fragments: what Linux does for packet data today (mm/page_frag_cache.c; netdev_alloc_frag, napi_alloc_frag).

Each lane has a current block of 32 KiB, or of one page when there is no such block. Fragments are cut from it, from the top
down, in whole cache lines, and every fragment holds a reference to the block. When the current block has no room, it is
left to its fragments, and goes back to the page allocator with the last of them; if there are none any more, it is used
again from the top. There are no free lists and there is no merging: one long-lived fragment keeps 32 KiB. Heads come from
the slab cache `skbuff_head_cache`.

One thing is not as in Linux. There, a block from the reserve becomes the current one for everybody, and who must not use it
finds out when the packet is dropped. Here such blocks are apart: only as large as the request, used by who may, and given
back with the last fragment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.gfp import ATOMIC, MEMALLOC, may_use_reserve
from pools.kmalloc import LANES
from pools.slab import KmemCache, SlabMap

if TYPE_CHECKING:
    from collections.abc import Collection

    from pools.buddy import PageAllocator

BLOCK_ORDER: Final = 3
"""PAGE_FRAG_CACHE_MAX_ORDER: blocks of 32 KiB."""

LINE_SHIFT: Final = 6
LINE: Final = 1 << LINE_SHIFT
"""Fragments are whole cache lines (SKB_DATA_ALIGN)."""


class Block:
    """Pages in one piece. `top` is the offset of the lowest fragment cut so far, `fragments` how many are alive.

    `current`: a lane cuts from it, and keeps it when there are none. Nobody keeps a block of the reserve.
    """

    __slots__ = ("base", "current", "fragments", "order", "pfmemalloc", "top")

    def __init__(self, base: int, order: int, *, pfmemalloc: bool) -> None:
        self.base = base
        self.order = order
        self.pfmemalloc = pfmemalloc
        self.top = PAGE_SIZE << order
        self.fragments = 0
        self.current = False


class PageFragPool(Pool):
    """Fragments of the current block of each of `lanes` lanes, and heads from a slab cache."""

    __slots__ = ("_block_of", "_current", "_heads", "_held", "_live", "_owner", "_reserve")

    name = "page_frag"

    def __init__(self, pages: PageAllocator, *, lanes: int = LANES) -> None:
        super().__init__(pages)
        self._owner = pages.owner_id("page_frag")
        self._heads = KmemCache(
            pages, SlabMap(pages), "skbuff_head_cache", SKB_HEAD_SIZE, lanes=lanes, shrink=self._drop_unused
        )
        self._block_of: list[Block | None] = [None] * pages.pages
        self._live = bytearray(pages.arena.size >> LINE_SHIFT)  # 1: a fragment begins on this line
        self._current: list[Block | None] = [None] * lanes
        self._reserve: Block | None = None
        self._held = 0
        self.max_size = PAGE_SIZE << min(BLOCK_ORDER, pages.pages.bit_length() - 1)
        self.head_charge = self._heads.size

    def alloc(self, size: int, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Cut a fragment from the current block of the lane `cpu`. `NULL` also for a size under 1 or over `max_size`."""
        stats = self.stats
        if not 0 < size <= self.max_size:
            stats.failures += 1
            return NULL
        need = size + LINE - 1 & -LINE
        block = self._current[cpu]
        if block is None or block.top < need:
            block = self._refill(need, gfp, cpu)
            if block is None:
                stats.failures += 1
                return NULL
        block.top = top = block.top - need
        block.fragments += 1
        addr = block.base + top
        self._live[addr >> LINE_SHIFT] = 1
        self.pfmemalloc = block.pfmemalloc
        stats.allocs += 1
        stats.requested = requested = stats.requested + size
        if requested > stats.requested_peak:
            stats.requested_peak = requested
        stats.charged = charged = stats.charged + need
        if charged > stats.charged_peak:
            stats.charged_peak = charged
        return addr

    def free(self, addr: int, size: int, cpu: int = 0, group: int = NULL) -> None:
        """Drop the reference of a fragment to its block."""
        if addr & (LINE - 1) or not self._live[addr >> LINE_SHIFT]:
            raise DoubleFree(f"no data at {addr:#x} is allocated")
        self._live[addr >> LINE_SHIFT] = 0
        block = self._block_of[addr >> PAGE_SHIFT]
        assert block is not None
        block.fragments -= 1
        if not block.fragments and not block.current:
            self._give_back(block)
        stats = self.stats
        stats.frees += 1
        stats.requested -= size
        stats.charged -= size + LINE - 1 & -LINE

    def charge(self, addr: int, size: int) -> int:
        """The size in whole cache lines. It may keep much more from others; Linux does not charge that either."""
        return size + LINE - 1 & -LINE

    def alloc_head(self, gfp: int, cpu: int = 0, group: int = NULL) -> int:
        """Allocate an object of `skbuff_head_cache`."""
        heads = self._heads
        stats = self.stats
        addr = heads.alloc(gfp, cpu)
        if addr < 0:
            stats.failures += 1
            return NULL
        self.pfmemalloc = heads.pfmemalloc
        stats.allocs += 1
        stats.requested += SKB_HEAD_SIZE
        stats.requested_peak = max(stats.requested_peak, stats.requested)
        stats.charged += heads.size
        stats.charged_peak = max(stats.charged_peak, stats.charged)
        return addr

    def free_head(self, addr: int, cpu: int = 0, group: int = NULL) -> None:
        """Give a head back to the lane `cpu`."""
        self._heads.free(addr, cpu)
        stats = self.stats
        stats.frees += 1
        stats.requested -= SKB_HEAD_SIZE
        stats.charged -= self._heads.size

    def reap(self) -> int:
        """Leave the current blocks to their fragments, give back those that have none, and reap the heads."""
        before = self.pages.free_pages
        self._drop_unused()
        for cpu, block in enumerate(self._current):
            if block is not None:
                block.current = False
                self._current[cpu] = None
        self._heads.reap()
        return self.pages.free_pages - before

    def alone_on(self, pfn: int, own: Collection[int]) -> bool:
        """See `Pool.alone_on`. Where a fragment ends is not known here: the one before is taken to reach onto the page."""
        block = self._block_of[pfn]
        if block is None:
            return False
        first = pfn << PAGE_SHIFT >> LINE_SHIFT
        end = (pfn + 1) << PAGE_SHIFT >> LINE_SHIFT
        line = self._live.rfind(1, block.base >> LINE_SHIFT, first + 1)
        if line < 0:
            line = self._live.find(1, first, end)
        while line >= 0:
            if line << LINE_SHIFT not in own:
                return False
            line = self._live.find(1, line + 1, end)
        return True

    def held_pages(self) -> int:
        """Pages of all blocks and of the heads."""
        return self._held + self._heads.held_pages()

    def largest_free_run(self) -> int:
        """What is left of the emptiest current block: all of it, if it has no fragments and can be used from the top again."""
        blocks = [block for block in (*self._current, self._reserve) if block is not None]
        rest = max((block.top if block.fragments else PAGE_SIZE << block.order for block in blocks), default=0)
        return max(rest, self._heads.size if self._heads.has_free() else 0)

    def _refill(self, need: int, gfp: int, cpu: int) -> Block | None:
        """A block with room for `need` bytes: that of the lane from the top again, a new one, or one of the reserve."""
        block = self._current[cpu]
        if block is not None:
            if not block.fragments and PAGE_SIZE << block.order >= need:
                block.top = PAGE_SIZE << block.order
                return block
            self._current[cpu] = None
            block.current = False
            if not block.fragments:
                self._give_back(block)
        block = self._new_block(need, ATOMIC)
        if block is None and self._drop_unused() + self._heads.reap():
            block = self._new_block(need, ATOMIC)
        if block is not None:
            self._current[cpu] = block
            block.current = True
            return block
        if not may_use_reserve(gfp):
            return None
        block = self._reserve
        if block is None or block.top < need:
            self._reserve = block = self._new_block(need, MEMALLOC)
        return block

    def _new_block(self, need: int, gfp: int) -> Block | None:
        pages = self.pages
        fits = (need - 1 >> PAGE_SHIFT).bit_length()
        order = fits if gfp == MEMALLOC else BLOCK_ORDER
        pfn = pages.alloc(order, gfp, self._owner)
        if pfn < 0 and not fits:
            order = 0
            pfn = pages.alloc(order, gfp, self._owner)
        if pfn < 0:
            return None
        block = Block(pfn << PAGE_SHIFT, order, pfmemalloc=pages.pfmemalloc)
        self._block_of[pfn : pfn + (1 << order)] = [block] * (1 << order)
        self._held += 1 << order
        return block

    def _give_back(self, block: Block) -> None:
        if block is self._reserve:
            self._reserve = None
        pfn = block.base >> PAGE_SHIFT
        self._block_of[pfn : pfn + (1 << block.order)] = [None] * (1 << block.order)
        self._held -= 1 << block.order
        self.pages.free(pfn, block.order)

    def _drop_unused(self) -> int:
        """Give back the current blocks without fragments; returns the pages."""
        before = self.pages.free_pages
        for cpu, block in enumerate(self._current):
            if block is not None and not block.fragments:
                self._current[cpu] = None
                self._give_back(block)
        return self.pages.free_pages - before

    def check(self) -> None:
        """Verify the references, and that every block without any is the current one of a lane."""
        self._heads.check()
        fragments: dict[Block, int] = {}
        line = self._live.find(1)
        while line >= 0:
            block = self._block_of[line >> (PAGE_SHIFT - LINE_SHIFT)]
            assert block is not None, f"live fragment {line << LINE_SHIFT:#x} on a page that was given back"
            fragments[block] = fragments.get(block, 0) + 1
            line = self._live.find(1, line + 1)
        blocks = {block for block in self._block_of if block is not None}
        assert self._held == sum(1 << block.order for block in blocks)
        for block in blocks:
            assert block.fragments == fragments.get(block, 0), f"block {block.base:#x}: {block.fragments} references"
            assert block.current == (block in self._current)
            assert block.fragments or block.current, f"block {block.base:#x} serves nobody"
