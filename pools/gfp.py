"""What an allocation may do: the few bits of the kernel's GFP flags that mean something to a stack that never sleeps.

Plain ints, because they are tested on every packet. The names and the meaning are those of Linux `include/linux/gfp_types.h`;
what depends on reclaim, zones and I/O has no counterpart here and is left out.
"""

from typing import Final

ATOMIC: Final = 0
"""An ordinary allocation: it fails rather than wait, and it stops at the `min` watermark."""

MEMALLOC: Final = 1
"""May use the reserve, the pages under the `min` watermark: for memalloc sockets, and for frames not yet classified."""

NOMEMALLOC: Final = 2
"""Must not use the reserve, even when `MEMALLOC` is set as well (it wins over it, as `__GFP_NOMEMALLOC` does)."""


def may_use_reserve(gfp: int) -> bool:
    """Whether an allocation with the flags `gfp` may go below the `min` watermark."""
    return gfp & (MEMALLOC | NOMEMALLOC) == MEMALLOC
