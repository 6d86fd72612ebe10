"""What is said about scenario files: good ones are taken as they are, and of bad ones every fault gets a line."""

from __future__ import annotations

import pytest

from ustack.daemon.sections import ConfigError
from ustack.lab.pressure.scenario import TcpBlocked, parse

LEAST = 'about = "nothing"\n'


def complaints(text: str) -> list[str]:
    """What is said about a bad file."""
    with pytest.raises(ConfigError) as refused:
        parse(text, "s.toml")
    return refused.value.problems


def test_a_sentence_is_enough() -> None:
    named = parse(LEAST, "some/where/s.toml")
    assert named.name == "s"
    scenario = named.scenario
    assert scenario.memory.pool == ["kmalloc"]
    assert scenario.memory.reserve_of_stack() == "auto"
    assert scenario.must_finish


def test_sizes_pools_and_bounds_have_short_forms() -> None:
    scenario = parse(
        LEAST
        + """
[memory]
pool = ["nta", "srog"]
reserve = "off"
[[traffic]]
kind = "tcp_blocked"
write = [100, "1K"]
[expect]
standstill = 5
[expect.drops]
NOMEM = 3
PFMEMALLOC = { min = 1 }
""",
        "s.toml",
    ).scenario
    assert scenario.memory.pool == ["nta", "srog"]
    assert scenario.memory.reserve_of_stack() == 0
    (traffic,) = scenario.traffic
    assert isinstance(traffic, TcpBlocked)
    assert traffic.write == (100, 1024)
    assert (scenario.expect.drops["NOMEM"].min, scenario.expect.drops["NOMEM"].max) == (3, 3)
    assert scenario.expect.drops["PFMEMALLOC"].max is None
    assert not scenario.must_finish


def test_every_fault_is_named_at_once() -> None:
    assert complaints(LEAST + "[memory]\nsize = 'big'\n[nbd]\ndepth = 0\n[[fault]]\nkind = 'cut'\nduration = -1\n") == [
        's.toml: [memory] size = "big": allowed is bytes, or a string with a unit of K, M, G or T, such as "64M"',
        "s.toml: [[fault]] number 1, duration = -1: allowed is more than 0",
        "s.toml: [nbd] depth = 0: allowed is at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "about is missing"),
        ("about = ''\n", 'about = "": allowed is a string that is not empty'),
        ("abuot = 'x'\n" + LEAST, "abuot: unknown key; did you mean 'about'?"),
        (LEAST + "[memroy]\n", "[memroy]: unknown section; did you mean 'memory'?"),
        (LEAST + "[memory]\npol = 'nta'\n", "[memory] pol: unknown key; did you mean 'pool'?"),
        (
            LEAST + "[memory]\npool = 'slub'\n",
            '[memory] pool = "slub": allowed is "all", a pool or an array of',
        ),
        (LEAST + "[memory]\npool = []\n", '[memory] pool = []: allowed is "all", a pool or an array of pools'),
        (LEAST + "[memory]\nreserve = 'no'\n", '[memory] reserve = "no": allowed is "auto", "off", bytes'),
        (LEAST + "[memory]\nreserve = '2M'\n", "[memory] reserve = 2097152: allowed is less than the whole memory, 2097152"),
        (
            LEAST + "[memory.parameters]\nlanes = [1]\n",
            "[memory] parameters = [1]: allowed is true or false, a number, a",
        ),
        (LEAST + "[memory.parameters]\nlines = 2\n", "[memory.parameters] lines = 2: allowed for kmalloc is lanes"),
        (
            LEAST + "[memory]\npool = 'nta'\n[memory.parameters]\nversion = 'v3'\n",
            'version: allowed is "v1", "v2" or a table of grain',
        ),
        (LEAST + "[tcp]\nrto_min = '1'\n", '[tcp] rto_min = "1": allowed is a number'),
        (LEAST + "[udp]\nmem_lo = 1\n", "[udp] mem_lo: unknown key; did you mean 'mem_low'?"),
        (LEAST + "[[traffic]]\ncount = 3\n", "[[traffic]] number 1, kind is missing"),
        (
            LEAST + "[[traffic]]\nkind = 'tcp_blokced'\n",
            '[[traffic]] number 1, kind = "tcp_blokced": did you mean "tcp_blocked"?',
        ),
        (LEAST + "[[traffic]]\nkind = 'hog'\nsise = 3\n", "[[traffic]] number 1, sise: unknown key; did you mean 'size'?"),
        (
            LEAST + "[[traffic]]\nkind = 'hog'\n[[traffic]]\nkind = 'local'\nsize = [5, 3]\n",
            "[[traffic]] number 2, size = [5, 3]: allowed is a size of at least 1",
        ),
        (LEAST + "[[traffic]]\nkind = 'hog'\nstart = 2\nstop = 1\n", "number 1, stop = 1: allowed is more than start, 2"),
        (LEAST + "[[traffic]]\nkind = 'udp_blocked'\nsize = 65508\n", "size = 65508: allowed is at most 65507"),
        (LEAST + "[[traffic]]\nkind = 'udp_blocked'\nrate = inf\n", "rate = inf: allowed is a finite number"),
        (LEAST + "[traffic]\nkind = 'hog'\n", "[traffic]: allowed is an array of tables"),
        (LEAST + "[[fault]]\nkind = 'allocation'\nsite = 'tcp'\n", 'site = "tcp": allowed is one of "rx_ring", "tcp_receive"'),
        (LEAST + "[[fault]]\nkind = 'allocation'\nprobability = 2\n", "probability = 2: allowed is at most 1"),
        (LEAST + "[nbd]\nstart = 'now'\n", '[nbd] start = "now": allowed is a number of seconds, at least 0, or "full"'),
        (LEAST + "[nbd]\nrequest_size = '1M'\n", "[nbd] request_size = 1048576: allowed is a share of the disk"),
        (LEAST + "[expect.drops]\nPFMEMALOC = 1\n", "[expect.drops] PFMEMALOC: unknown name; did you mean 'PFMEMALLOC'?"),
        (LEAST + "[expect.counters]\nTcpInSegs = { min = 5, max = 1 }\n", "TcpInSegs = 1: allowed is at least min, 5"),
        (LEAST + "[expect]\nfinishes = true\nstandstill = 1\n", "[expect] standstill: work that finishes does not stand still"),
        ("about = \n", "not TOML: "),
    ],
)
def test_a_fault_is_named_with_file_place_value_and_what_is_allowed(text: str, complaint: str) -> None:
    (line,) = complaints(text)
    assert line.startswith("s.toml: ")
    assert complaint in line
