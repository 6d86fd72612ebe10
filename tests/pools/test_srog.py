"""SROG: conformance in both roles, how it packs a packet, and each fault of the posted code, shown and shown to be gone."""

from __future__ import annotations

from itertools import permutations

import pytest

from pools.arena import PAGE_SIZE, Arena
from pools.base import NULL, SKB_HEAD_SIZE, DoubleFree, Pool
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC, MEMALLOC
from pools.srog import LAYOUT, PAYLOADS, POSTED_64, Oops, Role, SrogPool
from pools.testing import PoolConformance, machine
from tests import leaks


class TestConformance(PoolConformance):
    def make_pool(self, pages: PageAllocator) -> Pool:
        return SrogPool(pages)


class TestConformanceAsFallback(PoolConformance):
    lanes = 4

    def make_pool(self, pages: PageAllocator) -> Pool:
        return SrogPool(pages, role="fallback")


TestMachine = machine(SrogPool).TestCase
TestMachineAsFallback = machine(lambda pages: SrogPool(pages, role="fallback")).TestCase


def new_pool(role: Role = "main", *, pages: int = 64, min_pages: int = 0, payloads: int = PAYLOADS) -> SrogPool:
    allocator = PageAllocator(Arena(pages), min_pages=min_pages)
    return leaks.watch_pool(SrogPool(allocator, role=role, payloads=payloads))


def posted_pool(*, pages: int = 64) -> SrogPool:
    """The pool with all its faults. What it does not give back is not to be wondered at."""
    return SrogPool(PageAllocator(Arena(pages), min_pages=0), faithful=True)


# Layout


@pytest.mark.parametrize(("size", "pages"), [(60, 1), (1514 + 320, 1), (4040, 1), (4041, 2), (9018 + 320, 4)])
def test_a_packet_opens_a_block_of_the_smallest_power_of_two_of_pages(size: int, pages: int) -> None:
    pool = new_pool()
    addr = pool.alloc(size, ATOMIC)
    assert pool.held_pages() == pages
    pool.free(addr, size)
    assert pool.held_pages() == 0


def test_head_and_clones_find_room_beside_the_data() -> None:
    pool = new_pool()
    data = pool.alloc(1514 + 320, ATOMIC)
    heads = [pool.alloc_head(ATOMIC, 0, data) for _ in range(9)]
    assert pool.held_pages() == 1
    heads.append(pool.alloc_head(ATOMIC, 0, heads[-1]))  # any live object names the group
    assert pool.group_pages(data) == 2
    for head in heads:
        pool.free_head(head, 0, data)
    pool.free(data, 1514 + 320)


def test_an_object_beyond_the_first_page_of_a_block_names_the_group_too() -> None:
    pool = new_pool()
    data = pool.alloc(9018 + 320, ATOMIC)
    head = pool.alloc_head(ATOMIC, 0, data)
    assert head // PAGE_SIZE == data // PAGE_SIZE + 2
    clone = pool.alloc_head(ATOMIC, 0, head)
    assert pool.group_pages(clone) == 4
    pool.free(data, 9018 + 320, 0, clone)
    pool.free_head(head, 0, clone)
    pool.free_head(clone)


def test_who_opens_a_block_pays_for_it_and_leaves_one_head_its_place() -> None:
    pool = new_pool()
    data = pool.alloc(100, ATOMIC)
    head = pool.alloc_head(ATOMIC, 0, data)
    more = pool.alloc(100, ATOMIC, 0, data)
    assert pool.charge(data, 100) + pool.head_charge == PAGE_SIZE
    assert pool.charge(more, 100) == 112
    assert pool.stats.charged == PAGE_SIZE + 112
    pool.free_head(head)
    pool.free(data, 100)
    pool.free(more, 100)


def test_a_rest_too_small_to_describe_goes_with_the_object() -> None:
    pool = new_pool()
    first = pool.alloc(40, ATOMIC)
    second = pool.alloc(40, ATOMIC, 0, first)
    third = pool.alloc(40, ATOMIC, 0, first)
    pool.free(second, 40)
    second = pool.alloc(32, ATOMIC, 0, first)
    assert pool.charge(second, 32) == 48
    for addr, size in ((first, 40), (second, 32), (third, 40)):
        pool.free(addr, size)


@pytest.mark.parametrize("objects", [3, 4, 5])
def test_whatever_the_order_of_freeing_the_page_comes_back_with_the_last_object(objects: int) -> None:
    pool = new_pool()
    for order in permutations(range(objects)):
        live = [pool.alloc(300, ATOMIC)]
        live.extend(pool.alloc(200 + 10 * more, ATOMIC, 0, live[0]) for more in range(1, objects))
        for count, place in enumerate(order, 1):
            assert pool.held_pages() == 1
            pool.free(live[place], 200 + 10 * place if place else 300, 0, live[place])
            assert pool.held_pages() == (count < objects)


# Roles


def test_as_fallback_kmalloc_serves_until_it_cannot() -> None:
    pool = new_pool("fallback", pages=32, min_pages=8)
    ordinary = []
    while (addr := pool.alloc(2048, MEMALLOC)) != NULL and not pool.pfmemalloc:
        ordinary.append(addr)
    assert pool.pages.pages_by_owner()["srog"] == 1
    assert pool.alloc(2048, ATOMIC) == NULL
    head = pool.alloc_head(MEMALLOC, 0, addr)
    clone = pool.alloc_head(MEMALLOC, 0, addr)
    assert pool.pages.pages_by_owner()["srog"] == 1
    assert pool.pages.free_pages == 7
    pool.free_head(head, 0, addr)
    pool.free(addr, 2048)
    pool.free_head(clone)
    assert pool.pages.free_pages == 8
    for addr in ordinary:
        pool.free(addr, 2048)


def test_as_fallback_no_more_payloads_than_allowed_are_in_the_reserve() -> None:
    pool = new_pool("fallback", pages=32, min_pages=16, payloads=3)
    live = []
    while (addr := pool.alloc(4096, MEMALLOC)) != NULL:
        live.append(addr)
    assert pool.pages.pages_by_owner()["srog"] == 3 * 2  # 4096 bytes and the headers take two pages
    pool.free(live.pop(), 4096)
    live.append(pool.alloc(4096, MEMALLOC))
    assert pool.pfmemalloc
    for addr in live:
        pool.free(addr, 4096)


def test_an_ordinary_clone_of_a_packet_in_the_reserve_gets_ordinary_memory() -> None:
    pool = new_pool(pages=16, min_pages=4)
    hog = pool.pages.alloc_bulk(12, ATOMIC, pool.pages.owner_id("hog"))
    data = pool.alloc(1000, MEMALLOC)
    assert pool.pfmemalloc
    assert pool.alloc_head(ATOMIC, 0, data) == NULL
    pool.pages.free_bulk(hog)
    clone = pool.alloc_head(ATOMIC, 0, data)
    assert not pool.pfmemalloc
    assert pool.group_pages(data) == 2
    pool.free(data, 1000)
    pool.free_head(clone)


# What was posted


def orders_that_return_the_page(pool: SrogPool) -> set[tuple[int, ...]]:
    good = set()
    for order in permutations(range(3)):
        before = pool.held_pages()
        data = pool.alloc(700, ATOMIC)
        live = [data, pool.alloc_head(ATOMIC, 0, data), pool.alloc_head(ATOMIC, 0, data)]
        for place in order:
            if place:
                pool.free_head(live[place])
            else:
                pool.free(live[0], 700)
        if pool.held_pages() == before:
            good.add(order)
    return good


def test_as_posted_five_of_six_orders_of_freeing_three_objects_lose_the_page() -> None:
    assert orders_that_return_the_page(posted_pool()) == {(2, 1, 0)}
    assert orders_that_return_the_page(new_pool()) == set(permutations(range(3)))


def test_as_posted_a_packet_without_clones_hides_that() -> None:
    pool = posted_pool()
    data = pool.alloc(700, ATOMIC)
    head = pool.alloc_head(ATOMIC, 0, data)
    pool.free_head(head, 0, data)
    pool.free(data, 700)
    assert pool.held_pages() == 0


def test_as_posted_an_address_beyond_the_first_page_is_not_recognised() -> None:
    pool = posted_pool()
    data = pool.alloc(9018 + 320, ATOMIC)
    head = pool.alloc_head(ATOMIC, 0, data)
    with pytest.raises(Oops, match="magic"):
        pool.alloc_head(ATOMIC, 0, head)
    with pytest.raises(Oops, match="magic"):
        pool.free_head(head)
    pool.free_head(head, 0, data)
    pool.free(data, 9018 + 320)
    assert pool.held_pages() == 0


def test_as_posted_no_memory_for_another_block_is_a_crash() -> None:
    for pool, crashes in ((posted_pool(pages=1), True), (new_pool(pages=1), False)):
        data = pool.alloc(4000, ATOMIC)
        if crashes:
            with pytest.raises(Oops, match="no memory"):
                pool.alloc_head(ATOMIC, 0, data)
        else:
            assert pool.alloc_head(ATOMIC, 0, data) == NULL
            pool.free(data, 4000)


def test_as_posted_linking_a_ring_of_two_blocks_loses_one_of_them() -> None:
    for pool, loses in ((posted_pool(), True), (new_pool(), False)):
        old, new = pool.alloc(4000, ATOMIC), pool.alloc(4000, ATOMIC)
        more = pool.alloc(3000, ATOMIC, 0, new)
        pool.link(old, new)
        assert pool.group_pages(old) == (2 if loses else 3)
        if loses:
            with pytest.raises(Oops, match="not of that group"):
                pool.free(new, 4000, 0, old)
        else:
            for addr, size in ((old, 4000), (more, 3000), (new, 4000)):
                pool.free(addr, size)


def test_as_posted_a_rest_of_four_bytes_overwrites_the_size_of_the_next_object() -> None:
    pool = posted_pool()
    first = pool.alloc(40, ATOMIC)
    second = pool.alloc(40, ATOMIC, 0, first)
    third = pool.alloc(40, ATOMIC, 0, first)
    pool.free(second, 40)
    second = pool.alloc(36, ATOMIC, 0, first)  # leaves 4 bytes between itself and the third
    for addr in (third, second, first):  # the one order that would do
        pool.free(addr, 40)
    assert pool.held_pages() == 1


def test_as_posted_objects_overlap_by_four_bytes_on_a_64_bit_machine() -> None:
    for layout, overlaps in ((POSTED_64, True), (LAYOUT, False)):
        pool = SrogPool(PageAllocator(Arena(4), min_pages=0), layout=layout, faithful=overlaps)
        first = pool.alloc(20, ATOMIC)
        second = pool.alloc(20, ATOMIC, 0, first)
        header_of_the_second = second - layout.offset
        assert (first + 20 > header_of_the_second) == overlaps
        pool.free(second, 20)
        pool.free(first, 20)
        assert (pool.held_pages() == 0) != overlaps  # the size was looked for where it is not


def test_a_freed_head_is_no_data_and_freed_data_no_head() -> None:
    pool = new_pool()
    data = pool.alloc(SKB_HEAD_SIZE, ATOMIC)
    head = pool.alloc_head(ATOMIC, 0, data)
    with pytest.raises(DoubleFree):
        pool.free(head, SKB_HEAD_SIZE)
    with pytest.raises(DoubleFree):
        pool.free_head(data)
    pool.free_head(head)
    pool.free(data, SKB_HEAD_SIZE)
