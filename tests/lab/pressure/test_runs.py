"""`ustack pressure run`: exit codes, lines and words; on the machine's cores, on a Dask cluster, and on a real TAP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.daemon.running import environment
from ustack.cli import main
from ustack.lab.pressure.campaign import jobs_of, run_here, run_on_dask
from ustack.lab.pressure.result import Job
from ustack.lab.pressure.scenario import bundled, bundled_text
from ustack.lab.pressure.virtual import run_virtual

if TYPE_CHECKING:
    from pathlib import Path

    from ustack.lab.pressure.result import Result

QUICK = """
about = "a few requests, and nothing that disturbs them"
[nbd]
start = 0.0
requests = 5
"""


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return path


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["pressure", "run", *arguments])
    return done.exit_code, done.output


def test_a_run_says_what_it_came_to(quick: Path) -> None:
    code, said = run(str(quick), "--seeds", "3", "--jobs", "1")
    assert code == 0
    assert said.startswith("quick kmalloc: 3/3 passed (finished); gap ")


def test_results_are_lines_of_json_and_nothing_else_is_on_standard_output(quick: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert run(str(quick), "--seeds", "2", "--pool", "nta", "--pool", "srog", "--json", str(output))[0] == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(each["pool"], each["seed"]) for each in results] == [("nta", 0), ("nta", 1), ("srog", 0), ("srog", 1)]
    done = CliRunner().invoke(main, ["pressure", "run", str(quick), "--seed", "1", "--pool", "nta", "--json", "-"])
    assert done.stdout == output.read_text().splitlines()[1] + "\n"


def test_a_run_that_is_not_as_expected_fails_and_says_how_to_repeat_it(quick: Path) -> None:
    quick.write_text(QUICK + "[expect]\nlatency = 1e-6\ncounters.TcpInSegs = 0\n")
    code, said = run(str(quick), "--seed", "7")
    assert code == 1
    assert "quick --pool kmalloc --seed 7: latency: 0.0" in said
    assert "quick --pool kmalloc --seed 7: counter TcpInSegs: " in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such-scenario"], "no-such-scenario: neither a file nor one of the scenarios that `ustack pressure list` shows"),
        (["/no/such.toml"], "/no/such.toml: No such file or directory"),
        (["treatment", "--pool", "slub"], "there is no pool 'slub'"),
        (["treatment", "--real", "--dask", "tcp://127.0.0.1:1"], "--real runs on this machine"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_run(arguments: list[str], complaint: str) -> None:
    code, said = run(*arguments)
    assert code == 2
    assert complaint in said


def test_a_scenario_that_comes_along_can_be_shown_and_run_from_its_own_file(tmp_path: Path) -> None:
    shown = CliRunner().invoke(main, ["pressure", "show", "memory-hog"])
    path = tmp_path / "mine.toml"
    path.write_text(shown.output)
    assert run(str(path), "--pool", "page_frag")[0] == 0
    assert CliRunner().invoke(main, ["pressure", "list", "--names"]).output.split() == list(bundled())


def test_a_dask_cluster_gives_the_same_results() -> None:
    from distributed import Scheduler, Worker

    todo = jobs_of("datagrams", bundled_text("datagrams"), bundled()["datagrams"].scenario, ("kmalloc", "nta"), range(2))

    async def on_cluster() -> list[Result]:
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler,
            Worker(scheduler.address, nthreads=1, dashboard=False),
        ):
            return await asyncio.to_thread(lambda: list(run_on_dask(todo, scheduler.address)))

    assert asyncio.run(on_cluster()) == list(run_here(todo))


@pytest.mark.e2e
def test_the_same_file_runs_on_a_tap_in_real_time(tmp_path: Path) -> None:
    """The treatment, then the control arm with a shorter wait, then a cut: in namespaces that are gone with the process."""
    control = tmp_path / "control.toml"
    control.write_text(bundled_text("control").replace("standstill = 30.0", "standstill = 2.0"))
    cut = tmp_path / "cut.toml"
    cut.write_text(QUICK + 'depth = 1\npause = 0.2\n[[fault]]\nkind = "cut"\nstart = 0.1\nduration = 0.5\n')
    command = [sys.executable, "-m", "ustack", "pressure", "run", "treatment", str(control), str(cut), "--real", "--json", "-"]
    done = subprocess.run(
        [*command, "--pool", "kmalloc"], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["mode"], each["ending"], each["failed"]) for each in results] == [
        ("real", "finished", []),
        ("real", "standstill", []),
        ("real", "finished", []),
    ], done.stderr
    assert results[2]["wire"]["lost"] > 0
    assert done.returncode == 0


@pytest.mark.parametrize("pool", ["nta", "page_frag"])
def test_memory_is_not_full_as_long_as_others_still_get_some(pool: str) -> None:
    """The first allocation that fails is one of several pages in a row: single ones are still there, and so is NBD's."""
    text = """
        about = "Blocked datagram sockets, and no reserve."
        duration = 20

        [memory]
        size = "1M"
        reserve = "off"

        [udp]
        mem_low = "4M"
        mem_pressure = "4M"
        mem_high = "4M"

        [[traffic]]
        kind = "udp_blocked"
        count = 30
        size = [1, 1472]
        rate = 3000
        rcvbuf = "1M"

        [expect]
        standstill = 2
    """
    result = run_virtual(Job("filling", text, pool, 1))
    assert result["failed"] == []
    assert result["nbd"]["done"] < 10


def test_a_pool_that_does_not_take_the_parameters_of_the_file_is_a_mistake(quick: Path) -> None:
    quick.write_text(QUICK + "[memory]\npool = 'srog'\nparameters = { role = 'fallback' }\n")
    assert run(str(quick))[0] == 0
    code, said = run(str(quick), "--pool", "page_frag")
    assert code == 2
    assert "role" in said
    assert "lanes" in said
