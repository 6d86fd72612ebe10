"""Received data is given away by pages, and no byte of anybody else ever goes with it: in every pool, by either policy."""

from __future__ import annotations

import mmap
import os
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import pytest

from pools.arena import PAGE_SIZE, Arena
from pools.base import by_name
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from tests import leaks
from ustack.mem.page_flip import GivenPages, PageFlipper
from ustack.skb import SkbMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.mem.page_flip import Policy
    from ustack.skb import Skb

POOLS = ("kmalloc", "nta", "srog", "page_per_object", "page_frag")
POLICIES: tuple[Policy, ...] = ("copy", "scrub")
MINE, OTHERS = 0xA5, 0x5A
HEADER = b"\xee" * 54
"""What comes before the data in a linear buffer: it is nobody's data, and must not be seen either."""


class Mapping:
    """A process that has mapped pages, and never lets go."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def map(self, given: GivenPages) -> bytes:
        """Map all pages read-only, and read the data."""
        maps = [mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) for fd in given.fds]
        self.maps += maps
        return b"".join(maps[page][offset : offset + length] for page, offset, length in given.pieces)

    def sees(self) -> set[int]:
        """Every byte value that can be read now."""
        seen: set[int] = set()
        for one in self.maps:
            page = one[:]
            seen.update(page.translate(None, bytes((0, MINE))))
            seen.update(byte for byte in (0, MINE) if byte in page)
        return seen

    def close(self) -> None:
        for one in self.maps:
            one.close()


@pytest.fixture
def reader() -> Iterator[Mapping]:
    mapping = Mapping()
    yield mapping
    mapping.close()


def make_memory(name: str, pages: int = 1024) -> SkbMemory:
    """Packet memory of one pool on a flippable arena."""
    memory = SkbMemory(leaks.watch_pool(by_name(name)(PageAllocator(Arena(pages, flippable=True), min_pages=0))))
    leaks.watch(partial(_end, memory))
    return memory


def _end(memory: SkbMemory) -> list[str]:
    memory.arena.keep_pages()
    return [f"{memory.live} skbs"] if memory.live else []


def packet(memory: SkbMemory, mark: int, size: int, paged: int = 0) -> Skb:
    """A packet of `size` bytes of `mark` behind a header, and `paged` bytes of it in page fragments."""
    skb = memory.alloc(len(HEADER) + size, ATOMIC)
    assert skb is not None
    skb.put(HEADER)
    skb.put(bytes((mark,)) * size)
    if paged:
        pfns = memory.pages.alloc_bulk(-(-paged // PAGE_SIZE), ATOMIC, memory.frag_owner)
        skb.attach_pages(pfns, paged)
        for addr, length in skb.frags:
            memory.mem[addr : addr + length] = bytes((mark,)) * length
    skb.pull(len(HEADER))
    return skb


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", POOLS)
def test_no_byte_of_another_socket_is_ever_seen(name: str, policy: Policy, reader: Mapping) -> None:
    """Packets of two sockets at random, in pages that are used again and again; one socket's go to a process that keeps all."""
    random = Random(f"{name} {policy}")
    memory = make_memory(name)
    flipper = PageFlipper(memory, policy)
    others: list[Skb] = []
    mine: list[Skb] = []
    given = 0
    for _ in range(250):
        size = random.choice((1, 60, 400, 900, 1448, 1448, 3000))
        paged = random.choice((0, 0, 0, 1, 5000)) if size > 60 else 0
        whose = others if random.random() < 0.5 else mine
        whose.append(packet(memory, OTHERS if whose is others else MINE, size, paged))
        if random.random() < 0.3 and others:
            others.pop(random.randrange(len(others))).free()
        if random.random() < 0.2 and mine:
            size = sum(skb.len for skb in mine)
            taken = flipper.give(mine)
            for skb in mine:
                skb.free()
            mine.clear()
            assert reader.map(taken) == bytes((MINE,)) * size
            given += size
            for fd in taken.fds:
                os.close(fd)
            assert all(skb.tobytes() == bytes((OTHERS,)) * skb.len for skb in others), "what stays is as it was"
            assert reader.sees() <= {0, MINE}
    memory.pool.check()
    for skb in (*others, *mine):
        skb.free()
    for _ in range(100):  # whatever is written from now on, on the same addresses, nobody sees
        others.append(packet(memory, OTHERS, 1448, 4096))
    assert reader.sees() <= {0, MINE}
    for skb in others[-100:]:
        skb.free()
    assert flipper.in_place + flipper.copied == given
    assert flipper.copied == 0 if policy == "scrub" else flipper.moved == 0
    memory.pool.check()


@pytest.mark.parametrize("name", POOLS)
def test_with_one_socket_nothing_is_copied(name: str, reader: Mapping) -> None:
    memory = make_memory(name)
    flipper = PageFlipper(memory, "copy")
    mine = [packet(memory, MINE, 1448) for _ in range(40)]
    taken = flipper.give(mine)
    assert reader.map(taken) == bytes((MINE,)) * 1448 * 40
    assert (flipper.copied, flipper.moved, flipper.copied_share) == (0, 0, 0.0)
    for skb in mine:
        skb.free()
    taken.close()


def test_two_sockets_in_turn_cost_all_or_half_by_the_policy(reader: Mapping) -> None:
    """Claim 3, on the stack's own code: two packets on a page, two sockets that alternate."""
    for policy in POLICIES:
        memory = make_memory("kmalloc")
        flipper = PageFlipper(memory, policy)
        skbs = [packet(memory, (MINE, OTHERS)[n % 2], 1448) for n in range(64)]
        taken = flipper.give(skbs[::2])
        assert reader.map(taken) == bytes((MINE,)) * 1448 * 32
        if policy == "copy":
            assert flipper.copied == 1448 * 32
        else:
            assert flipper.in_place == 1448 * 32
            assert flipper.moved >= 1448 * 32
        for skb in skbs:
            skb.free()
        taken.close()


def test_what_a_clone_shares_is_copied(reader: Mapping) -> None:
    memory = make_memory("kmalloc")
    flipper = PageFlipper(memory, "scrub")
    skb = packet(memory, MINE, 1000, 6000)
    twin = memory.clone(skb, ATOMIC)
    assert twin is not None
    taken = flipper.give([skb])
    assert reader.map(taken) == bytes((MINE,)) * 7000
    assert (flipper.in_place, flipper.copied) == (0, 7000)
    skb.free()
    assert twin.tobytes() == bytes((MINE,)) * 7000
    twin.free()
    taken.close()


def test_pages_that_are_closed_give_their_memory_back_though_they_are_mapped(reader: Mapping) -> None:
    memory = make_memory("kmalloc")
    skb = packet(memory, MINE, 1000)
    taken = PageFlipper(memory, "copy").give([skb])
    skb.free()
    reader.map(taken)
    held = os.dup(taken.fds[0])
    assert os.fstat(held).st_blocks
    taken.close()
    assert not os.fstat(held).st_blocks
    assert reader.sees() == {0}
    os.close(held)


def test_without_descriptors_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory("kmalloc")
    flipper = PageFlipper(memory, "scrub")
    skbs = [packet(memory, mark, 1448) for mark in (MINE, OTHERS, MINE)]

    def refuse() -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("ustack.mem.page_flip.page_memfd", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        flipper.give([skbs[0], skbs[2]])
    assert skbs[0].tobytes() == bytes((MINE,)) * 1448
    assert flipper.pages == 0
    for skb in skbs:
        skb.free()


def test_only_a_flippable_arena_gives_pages() -> None:
    with pytest.raises(ValueError, match="cannot be given away"):
        PageFlipper(SkbMemory(by_name("kmalloc")(PageAllocator(Arena(16)))), "copy")
    with pytest.raises(ValueError, match="one memfd, or one for each page"):
        Arena(16, memfd=True, flippable=True)
