"""The arena: pages that are there, views of them, and the rights it needs."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from pathlib import Path

import pytest

from pools.arena import PAGE_SIZE, Arena


def resident_kib() -> int:
    with Path("/proc/self/smaps_rollup").open(encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def test_all_pages_are_resident_before_the_first_use() -> None:
    before = resident_kib()
    with Arena(4096):
        assert resident_kib() - before > 4096 * 4 * 0.9


def test_what_is_written_through_one_view_is_read_through_the_others() -> None:
    with Arena(4) as arena:
        arena.page(2)[:3] = b"abc"
        assert bytes(arena.mem[2 * PAGE_SIZE : 2 * PAGE_SIZE + 3]) == b"abc"
        with arena.view(2 * PAGE_SIZE + 1, 2) as view:
            assert bytes(view) == b"bc"
        assert (arena.pages, arena.size, arena.fd) == (4, 4 * PAGE_SIZE, -1)


def test_the_view_of_a_page_is_made_once() -> None:
    with Arena(4) as arena:
        assert arena.page(3) is arena.page(3)
        assert len(arena.page(3)) == PAGE_SIZE


def test_another_mapping_of_the_memfd_sees_the_same_bytes() -> None:
    with Arena(2, memfd=True) as arena, mmap.mmap(arena.fd, arena.size, prot=mmap.PROT_READ) as other:
        arena.page(1)[0] = 77
        assert other[PAGE_SIZE] == 77


def test_who_has_the_memfd_cannot_pull_pages_from_under_us() -> None:
    with Arena(2, memfd=True) as arena, pytest.raises(PermissionError), open(arena.fd, "r+b", closefd=False) as file:
        file.truncate(PAGE_SIZE)


@pytest.mark.root
def test_locked_pages_are_counted_as_locked() -> None:
    def locked_kib() -> int:
        with Path("/proc/self/status").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmLck:"))

    before = locked_kib()
    with Arena(16, lock=True):
        assert locked_kib() - before == 64
    assert locked_kib() == before


def test_a_refused_lock_is_an_oserror_with_the_errno_of_mlock() -> None:
    def lock_without_the_right() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            Arena(1, lock=True)
        except OSError as refused:
            return refused.errno or 0
        return 0

    child = os.fork()  # rights that were given up do not come back
    if not child:
        os._exit(lock_without_the_right())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in {errno.EPERM, errno.ENOMEM}


def test_closing_while_a_view_is_held_is_refused_and_closing_twice_is_not() -> None:
    arena = Arena(1)
    view = arena.view(0, 10)
    with pytest.raises(BufferError):
        arena.close()
    view.release()
    arena.close()
    arena.close()


def test_an_arena_of_no_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        Arena(0)
