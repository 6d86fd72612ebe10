"""TCP header and options: what we build we can read, so can dpkt, and no bytes at all make the parser raise."""

from __future__ import annotations

import dpkt
from hypothesis import example, given
from hypothesis import strategies as st

from ustack.wire import tcp

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)


@given(U16, U16, U32, U32, st.integers(0, 255), U16, st.integers(0, 10).map(lambda words: b"\x01" * 4 * words), U16, U16)
def test_a_header_reads_back_here_and_in_dpkt(
    sport: int, dport: int, seq: int, ack: int, flags: int, window: int, options: bytes, checksum: int, urgent: int
) -> None:
    wire = tcp.build_header(sport, dport, seq, ack, flags, window, options, checksum, urgent)
    header = tcp.parse_header(b"..." + wire + b"payload", 3, 3 + len(wire) + 7)
    assert header is not None
    fields = (header.sport, header.dport, header.seq, header.ack, header.flags, header.window, header.checksum, header.urgent)
    assert fields == (sport, dport, seq, ack, flags, window, checksum, urgent)
    assert header.length == 20 + len(options)
    theirs = dpkt.tcp.TCP(wire)
    assert (theirs.sport, theirs.dport, theirs.seq, theirs.ack, theirs.flags & 0xFF) == (sport, dport, seq, ack, flags)
    assert (theirs.win, theirs.sum, theirs.urp, theirs.opts) == (window, checksum, urgent, options)


@given(U16, st.integers(-1, 14), st.booleans(), st.one_of(st.just(-1), U32), U32)
def test_the_options_of_a_syn_read_back_here_and_in_dpkt(mss: int, wscale: int, sack: bool, ts_val: int, ts_ecr: int) -> None:
    wire = tcp.build_syn_options(mss, wscale, sack, ts_val, ts_ecr)
    assert len(wire) % 4 == 0
    options = tcp.parse_options(wire, 0, len(wire))
    assert (options.mss, options.wscale, options.sack_permitted, options.ts_val) == (mss, wscale, sack, ts_val)
    assert options.ts_ecr == (ts_ecr if ts_val >= 0 else -1)
    theirs = dict(dpkt.tcp.parse_opts(wire))
    assert theirs[dpkt.tcp.TCP_OPT_MSS] == mss.to_bytes(2, "big")
    assert (dpkt.tcp.TCP_OPT_SACKOK in theirs) == sack
    assert theirs.get(dpkt.tcp.TCP_OPT_WSCALE) == (bytes((wscale,)) if wscale >= 0 else None)


@given(st.one_of(st.just(-1), U32), U32, st.lists(st.tuples(U32, U32), max_size=6))
def test_timestamps_and_sack_read_back_as_far_as_they_fit(ts_val: int, ts_ecr: int, sack: list[tuple[int, int]]) -> None:
    wire = tcp.build_options(ts_val, ts_ecr, sack)
    assert len(wire) % 4 == 0
    assert tcp.HEADER_LEN + len(wire) <= tcp.HEADER_MAX
    options = tcp.parse_options(wire, 0, len(wire))
    assert (options.ts_val, options.ts_ecr) == ((ts_val, ts_ecr) if ts_val >= 0 else (-1, -1))
    assert options.sack == tuple(sack[: 3 if ts_val >= 0 else 4])


@given(st.binary(max_size=64), st.integers(0, 70), st.integers(0, 70))
@example(b"\x08", 0, 1)
@example(b"\x05\x0a1234", 0, 6)
def test_no_bytes_make_the_parsers_raise(data: bytes, start: int, end: int) -> None:
    tcp.parse_options(data, start, end)
    tcp.parse_header(data, start, end)


def test_a_malformed_option_ends_the_parsing_and_keeps_what_came_before() -> None:
    mss = b"\x02\x04\x05\xb4"
    for malformed in (b"\x08\x00", b"\x08\x01", b"\x08\x0a\0\0", b"\x08"):
        options = tcp.parse_options(mss + malformed, 0, 4 + len(malformed))
        assert options.mss == 1460
        assert options.ts_val == -1


def test_options_of_a_wrong_length_and_unknown_ones_are_skipped() -> None:
    wire = b"\xfd\x06abcd" + b"\x02\x03\x05" + b"\x03\x04\x07\x07" + b"\x05\x09" + b"\0" * 7 + b"\x04\x02"
    options = tcp.parse_options(wire, 0, len(wire))
    assert (options.mss, options.wscale, options.sack, options.sack_permitted) == (-1, -1, (), True)


def test_nothing_is_read_behind_the_end_of_the_option_list() -> None:
    options = tcp.parse_options(b"\x00\x02\x04\x05\xb4", 0, 5)
    assert options == tcp.TcpOptions()


def test_a_window_shift_over_14_counts_as_14() -> None:
    assert tcp.parse_options(b"\x03\x03\xff", 0, 3).wscale == 14


def test_a_data_offset_outside_the_segment_is_refused() -> None:
    good = tcp.build_header(1, 2, 3, 4, tcp.ACK, 5)
    assert tcp.parse_header(good, 0, 20) is not None
    assert tcp.parse_header(good[:12] + b"\x40" + good[13:], 0, 20) is None
    assert tcp.parse_header(good[:12] + b"\x60" + good[13:], 0, 20) is None
    assert tcp.parse_header(good, 0, 19) is None
