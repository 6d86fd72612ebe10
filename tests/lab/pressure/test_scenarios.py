"""Every scenario that comes with the program is as it expects, with a few seeds; `make pressure` runs a thousand of each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ustack.lab.pressure.campaign import jobs_of, run_here, run_on_cores
from ustack.lab.pressure.result import to_line
from ustack.lab.pressure.scenario import bundled, bundled_text
from ustack.lab.pressure.virtual import run_virtual

pytestmark = pytest.mark.sim

NAMES = sorted(bundled())

SEEDS = 2


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_scenario_is_as_it_expects(name: str) -> None:
    jobs = jobs_of(name, bundled_text(name), bundled()[name].scenario, (), range(SEEDS))
    failed = {f"{each['pool']}, seed {each['seed']}": each["failed"] for each in run_here(jobs) if not each["passed"]}
    assert not failed


def test_what_the_issue_asks_for_is_there_for_every_pool() -> None:
    from pools.base import names

    scenarios = {name: named.scenario for name, named in bundled().items()}
    assert scenarios["control"].memory.reserve == "off"
    assert scenarios["treatment"].memory.reserve == "auto"
    assert scenarios["control"].traffic == scenarios["treatment"].traffic
    assert scenarios["control"].tcp == scenarios["treatment"].tcp
    for name in ("control", "treatment", "link-cut", "peer-mac", "server-restart", "server-crash"):
        assert scenarios[name].memory.pool == names()


@pytest.mark.parametrize("name", ["bad-link", "floods", "allocation-failures"])
def test_the_same_seed_is_the_same_line(name: str) -> None:
    job, *_ = jobs_of(name, bundled_text(name), bundled()[name].scenario, ("kmalloc",), [4711])
    other, *_ = jobs_of(name, bundled_text(name), bundled()[name].scenario, ("kmalloc",), [4712])
    line = to_line(run_virtual(job))
    assert to_line(run_virtual(job)) == line
    assert to_line(run_virtual(other)) != line
    program = (
        "from ustack.lab.pressure.campaign import *; from ustack.lab.pressure.result import *;"
        "from ustack.lab.pressure.scenario import bundled_text;"
        f"print(to_line(run_virtual(Job({name!r}, bundled_text({name!r}), 'kmalloc', 4711))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == line, "another process, with other hashes and other addresses"


def test_processes_give_the_same_results_in_the_same_order() -> None:
    jobs = jobs_of("treatment", bundled_text("treatment"), bundled()["treatment"].scenario, ("nta", "srog"), range(4))
    assert list(run_on_cores(jobs, 2)) == list(run_here(jobs))
