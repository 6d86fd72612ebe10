"""The ring of descriptors: what is written is read, in order, whatever the two ends do in between; and nothing that the reader
writes can hurt the writer.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pools.arena import Arena
from ustack.link.descriptor_ring import FRAGS_MAX, INLINE_MAX, RingReader, RingWriter, shared_fds

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOTS = 8
STEPS = st.lists(st.one_of(st.just("write"), st.just("read"), st.integers(0, SLOTS)), max_size=80)
NONSENSE = st.lists(st.one_of(st.integers(0, 2 * SLOTS), st.integers(0, 2**64 - 1)), max_size=40)


@contextmanager
def ring() -> Iterator[tuple[Arena, RingWriter, RingReader]]:
    """Both ends, as if the reader had been handed its descriptors."""
    with Arena(4, memfd=True) as arena:
        writer = RingWriter(SLOTS)
        reader = RingReader([os.dup(fd) for fd in shared_fds(arena, writer)], arena.size, SLOTS)
        try:
            yield arena, writer, reader
        finally:
            reader.close()
            writer.close()


def write(writer: RingWriter, number: int) -> None:
    """A descriptor in which everything depends on `number`."""
    writer.write(number * 1000, 60 + number, number % 3, number % 2, number % 40, bytes([number % 256]) * 14, [(number, 46)])


@settings(deadline=None, max_examples=300)
@given(STEPS)
def test_every_descriptor_is_read_once_in_order_and_as_it_was_written(steps: list[str | int]) -> None:
    with ring() as (_, writer, reader):
        held: list[int] = []
        for step in steps:
            if step == "write":
                if writer.room():
                    write(writer, writer.written)
                else:
                    writer.miss()
                    assert reader.missed == writer.missed
            elif step == "read":
                try:
                    found = reader.read()
                except BlockingIOError:
                    continue
                for each in found:
                    assert each.number == (held[-1] + 1 if held else reader.number - len(found))
                    assert (each.stamp, each.length, each.captured) == (each.number * 1000, 60 + each.number, 60)
                    assert each.inline == bytes([each.number % 256]) * 14
                    assert each.frags == [(each.number, 46)]
                    held.append(each.number)
            elif held:
                assert isinstance(step, int)
                done = min(step, len(held))
                held = held[done:]
                reader.release(held[0] if held else reader.number)
                writer.reclaim()
        writer.reclaim()
        assert writer.nonsense == 0
        assert writer.released <= reader.number <= writer.written <= writer.released + SLOTS


@settings(deadline=None, max_examples=300)
@given(NONSENSE)
def test_a_reader_that_writes_nonsense_releases_no_more_than_was_written(said: list[int]) -> None:
    with ring() as (_, writer, reader):
        for number in said:
            if writer.room():
                write(writer, writer.written)
            reader.release(number)
            before = writer.released
            believed = writer.reclaim()
            assert believed >= 0
            assert writer.released == before + believed <= writer.written
            assert believed == 0 or writer.released == number


def test_the_reader_can_write_neither_to_the_arena_nor_to_the_slots() -> None:
    with ring() as (arena, writer, _):
        for fd in (arena.fd, writer.fds[0]):
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # as whoever is handed the descriptor can
            try:
                with pytest.raises(PermissionError):
                    os.pwrite(again, b"x", 0)
                with pytest.raises(PermissionError):
                    mmap.mmap(again, mmap.PAGESIZE, mmap.MAP_SHARED)
                with pytest.raises(PermissionError):
                    os.ftruncate(again, 0)
            finally:
                os.close(again)


def test_a_reader_that_shrinks_or_fills_what_it_may_write_does_not_stop_the_writer() -> None:
    with ring() as (_, writer, reader):
        with pytest.raises(PermissionError):
            os.ftruncate(writer.fds[1], 0)
        pipe = os.open(f"/proc/self/fd/{reader.wait_fd}", os.O_WRONLY | os.O_NONBLOCK)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(pipe, bytes(65536))
        os.close(pipe)
        write(writer, 0)
        assert writer.nonsense == 1


def test_a_descriptor_holds_the_longest_header_and_the_most_runs() -> None:
    with ring() as (arena, writer, reader):
        arena.mem[:INLINE_MAX] = bytes(range(INLINE_MAX))
        runs = [(n, 1) for n in range(FRAGS_MAX)]
        writer.write(2**63, 65549, 0, 1, 0xFFFF, b"h" * INLINE_MAX, runs)
        (only,) = reader.read()
        assert only.captured == INLINE_MAX + FRAGS_MAX
        assert b"".join(reader.pieces(only)) == b"h" * INLINE_MAX + bytes(range(FRAGS_MAX))


def test_the_reader_notices_that_the_writer_has_gone() -> None:
    with Arena(1, memfd=True) as arena:
        writer = RingWriter(SLOTS)
        reader = RingReader([os.dup(fd) for fd in shared_fds(arena, writer)], arena.size, SLOTS)
        with pytest.raises(BlockingIOError):
            reader.read()
        writer.close()
        with pytest.raises(EOFError):
            reader.read()
        reader.close()


def test_the_index_is_one_store_of_eight_bytes() -> None:
    """Of a value written byte by byte the writer could see half."""
    with ring() as (_, writer, reader):
        reader.release(0x0102030405060708)
        assert os.pread(writer.fds[1], 8, 0) == struct.pack("=Q", 0x0102030405060708)
