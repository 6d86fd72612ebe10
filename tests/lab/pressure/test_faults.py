"""Allocations fail where, when and as often as a scenario says, and every call site has its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ustack.lab.pressure.campaign import run_job
from ustack.lab.pressure.faults import SITES, AllocationFaults, FaultyPages
from ustack.lab.pressure.result import Job
from ustack.lab.pressure.scenario import parse
from ustack.lab.pressure.subject import Subject
from ustack.lab.pressure.virtual import run_virtual

if TYPE_CHECKING:
    from random import Random

pytestmark = pytest.mark.sim

BUSY = """
about = "everybody allocates"
duration = 20.0
[memory]
size = "4M"
[device]
offload = false
[[traffic]]
kind = "tcp_blocked"
count = 5
size = 20000
[[traffic]]
kind = "udp_blocked"
count = 2
size = [64, 1400]
rate = 500
stop = 0.5
[[traffic]]
kind = "local"
rate = 500
hold = 0.05
stop = 0.5
[[traffic]]
kind = "syn_flood"
rate = 200
sources = 20
stop = 0.5
[[traffic]]
kind = "icmp_flood"
rate = 200
stop = 0.5
[[traffic]]
kind = "fragments"
rate = 200
stop = 0.5
[nbd]
start = 0.0
requests = 100
pause = 0.02
[expect]
progress_gap = 15.0
"""


def ran(text: str, pool: str = "kmalloc", seed: int = 1) -> dict[str, Any]:
    """The result of a run, which must be as expected."""
    result = run_job(Job("s", text, pool, seed))
    assert not result["failed"]
    return result


def fault(**keys: object) -> str:
    """A fault of kind `allocation`, as a section."""
    lines = (f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}".lower() for key, value in keys.items())
    return "\n".join(["[[fault]]", 'kind = "allocation"', *lines, ""])


SEEN_HERE = sorted(SITES.keys() - {"rx_ring", "icmp_receive", "tcp_receive"})


@pytest.mark.parametrize("site", SEEN_HERE)
@pytest.mark.parametrize("mode", ["paged", "linear"])
def test_a_fault_at_a_site_strikes_there_and_nowhere_else(site: str, mode: str) -> None:
    text = BUSY.replace("[device]", f'[device]\nmode = "{mode}"')
    result = ran(text + fault(site=site, probability=0.3, stop=0.4))
    assert set(result["injected"]) == {site}, result["injected"]


def test_the_sites_of_receiving_have_their_names() -> None:
    """In a linear ring, memory is taken when buffers are posted and when a head is wanted; a paged ring keeps copies."""
    linear = BUSY.replace("[device]", '[device]\nmode = "linear"')
    assert ran(linear + fault(site="rx_ring", probability=0.3, stop=0.4))["injected"].keys() == {"rx_ring"}
    blocked = BUSY.replace("size = 20000", "size = 200000")
    assert ran(blocked + fault(site="tcp_receive", probability=0.3, stop=2.0))["injected"].keys() == {"tcp_receive"}


def test_who_allocates_is_known_of_everything_that_happens() -> None:
    """A fault without a site strikes everybody, and what it has struck has one of the names."""
    injected = ran(BUSY + fault(probability=0.05))["injected"]
    assert injected.keys() <= SITES.keys()
    assert {"skb_head", "udp_receive", "tcp_send", "local"} <= injected.keys()


def test_a_fault_has_its_time() -> None:
    before = ran(BUSY + fault(start=15.0))
    assert before["injected"] == {}, "the work was done earlier"
    assert before["nbd"]["done"] == 100


def test_sizes_and_the_right_to_the_reserve_choose_what_fails() -> None:
    small = ran(BUSY + fault(site="udp_receive", max_size=100, stop=0.4))
    large = ran(BUSY + fault(site="udp_receive", min_size=1000, stop=0.4))
    every = ran(BUSY + fault(site="udp_receive", stop=0.4))
    assert 0 < small["injected"]["udp_receive"] < every["injected"]["udp_receive"]
    assert 0 < large["injected"]["udp_receive"] < every["injected"]["udp_receive"]
    spared = ran(BUSY + fault(site="tcp_send", memalloc=False, stop=0.4))
    assert spared["injected"] == {}, "only NBD sends, and it may use the reserve"


def test_work_whose_every_send_fails_stands_still_and_leaves_nothing_behind() -> None:
    text = BUSY.replace("progress_gap = 15.0", "standstill = 5.0") + fault(site="tcp_send")
    assert ran(text)["ending"] == "standstill"


def test_a_stack_without_faults_has_none_of_this() -> None:
    scenario = parse(BUSY, "s").scenario
    subject = Subject(scenario, "kmalloc", _random())
    assert subject.faults is None
    assert type(subject.stack.pages).__name__ == "PageAllocator"
    assert type(subject.stack.pool).__name__ == "KmallocPool"
    subject.stack.close()


def test_an_injected_failure_counts_as_a_failure_of_the_allocator() -> None:
    from pools.arena import Arena

    faults = AllocationFaults([], _random())
    pages = FaultyPages(Arena(16), faults, 0)
    mine = pages.owner_id("me")
    assert pages.alloc(0, 0, mine) >= 0
    scenario = parse(BUSY + fault(), "s").scenario
    faults._active += [each for each in scenario.fault if each.kind == "allocation"]
    assert pages.alloc(0, 0, mine) == -1
    assert not pages.alloc_bulk(2, 0, mine)
    assert pages.failures[0] == 2
    assert faults.injected == {"pool_pages": 2}


@pytest.mark.parametrize("pool", ["nta", "page_frag", "page_per_object", "srog"])
def test_every_pool_survives_failures_everywhere(pool: str) -> None:
    ran(BUSY + fault(probability=0.05), pool)


WIRE = """
about = "a wire with faults"
duration = 60.0
[nbd]
start = 0.0
requests = 60
depth = 2
pause = 0.05
"""


def test_cuts_and_worse_wires_overlap_and_end() -> None:
    text = WIRE + (
        '[[fault]]\nkind = "link"\nstart = 0.1\nstop = 1.0\nduplicate = 0.5\n'
        '[[fault]]\nkind = "link"\nstart = 0.2\nstop = 0.8\ndirection = "in"\nloss = 0.2\n'
        '[[fault]]\nkind = "cut"\nstart = 0.3\nduration = 0.4\n'
        '[[fault]]\nkind = "cut"\nstart = 0.5\nduration = 0.4\ndirection = "out"\n'
    )
    result = ran(text)
    assert result["wire"]["lost"] > 0
    assert result["wire"]["duplicated"] > 0
    assert result["nbd"]["gap"] > 0.5, "the cuts together"


@pytest.mark.parametrize("announce", [True, False])
def test_frames_to_a_station_that_is_gone_go_astray_until_the_new_one_is_known(announce: bool) -> None:
    text = WIRE + f'[[fault]]\nkind = "peer_mac"\nstart = 0.5\nannounce = {str(announce).lower()}\n'
    result = run_virtual(Job("s", text, "kmalloc", 3))
    assert not result["failed"]
    assert (result["wire"]["astray"] == 0) == announce
    assert (result["nbd"]["gap"] < 0.5) == announce


@pytest.mark.parametrize("crash", [True, False])
def test_requests_outlive_a_server_that_is_restarted(crash: bool) -> None:
    text = WIRE + f'[[fault]]\nkind = "server_restart"\nstart = 0.5\ndown = 4.0\ncrash = {str(crash).lower()}\n'
    result = ran(text)
    assert 4.0 < result["nbd"]["gap"] < 15.0
    connections = result["nbd"]["connections"]
    assert connections["lost"] == 1
    assert connections["connected"] == 2
    assert connections["replayed"] > 0 or not crash, "in an orderly end nothing need be in flight"


def test_a_connection_without_a_sign_of_life_is_given_up_when_the_scenario_says() -> None:
    text = WIRE.replace("[nbd]", "[nbd]\nrequest_timeout = 2.0") + '[[fault]]\nkind = "cut"\nstart = 0.5\nduration = 30.0\n'
    result = ran(text)
    assert result["nbd"]["connections"]["lost"] == 1
    assert 30.0 < result["nbd"]["gap"] < 36.0


def _random() -> Random:
    from random import Random

    return Random(1)
