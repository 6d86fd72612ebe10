"""The Internet checksum: what it is, and that pieces sum up to the whole."""

from __future__ import annotations

from dpkt.dpkt import in_cksum
from hypothesis import given
from hypothesis import strategies as st

from ustack.wire import checksum


def by_the_book(data: bytes) -> int:
    """RFC 1071, section 4.1, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_the_example_of_rfc_1071() -> None:
    assert checksum.ones_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert checksum.finish(0xDDF2) == 0x220D


def test_only_zero_bytes_sum_up_to_zero() -> None:
    assert checksum.ones_sum(b"") == 0
    assert checksum.ones_sum(bytes(10)) == 0
    assert checksum.finish(0) == 0xFFFF
    assert checksum.ones_sum(b"\xff\xff") == 0xFFFF
    assert checksum.finish(0xFFFF) == 0
    assert checksum.finish(2 * 0xFFFF) == 0


@given(st.binary(max_size=200))
def test_the_sum_is_that_of_the_rfc_and_of_dpkt(data: bytes) -> None:
    assert checksum.ones_sum(data) == by_the_book(data)
    assert checksum.finish(checksum.ones_sum(data)) == in_cksum(data)
    assert checksum.ones_sum(memoryview(bytearray(data))) == by_the_book(data)


@given(st.lists(st.binary(max_size=9)))
def test_pieces_of_any_length_sum_up_to_the_whole(pieces: list[bytes]) -> None:
    assert checksum.ones_sum_views(pieces) == by_the_book(b"".join(pieces))


@given(st.binary(min_size=2, max_size=64).filter(any))
def test_data_with_its_checksum_sums_up_to_all_ones(data: bytes) -> None:
    data += bytes(len(data) & 1)
    field = checksum.finish(checksum.ones_sum(data))
    assert checksum.finish(checksum.ones_sum(data + field.to_bytes(2, "big"))) == 0


@given(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4), st.integers(0, 255), st.integers(0, 0xFFFF))
def test_the_pseudo_header_of_ipv4(source: bytes, destination: bytes, protocol: int, length: int) -> None:
    spelled_out = source + destination + bytes((0, protocol)) + length.to_bytes(2, "big")
    assert checksum.pseudo_v4(source, destination, protocol, length) == by_the_book(spelled_out)


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), st.integers(0, 255), st.integers(0, 0xFFFFFF))
def test_the_pseudo_header_of_ipv6(source: bytes, destination: bytes, protocol: int, length: int) -> None:
    spelled_out = source + destination + length.to_bytes(4, "big") + bytes((0, 0, 0, protocol))
    assert checksum.pseudo_v6(source, destination, protocol, length) == by_the_book(spelled_out)
