"""NBD under full memory on a real TAP, as the command measures it. How fast this machine is, is not for a test to say."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.daemon.running import environment
from ustack.cli import main
from ustack.lab.throughput import Round, Throughput


def test_the_rate_is_compared_with_the_mean_of_before_and_after_and_the_median_counts() -> None:
    rounds = [Round(100.0, 90.0, 100.0, 0.1), Round(80.0, 100.0, 120.0, 0.2), Round(100.0, 10.0, 100.0, 0.1)]
    assert [each.ratio for each in rounds] == [0.9, 1.0, 0.1]
    assert Throughput("kmalloc", rounds).ratio == 0.9


@pytest.mark.e2e
@pytest.mark.parametrize(("pool", "mode"), [("kmalloc", "paged"), ("srog", "linear")])
async def test_nbd_goes_on_under_pressure(pool: str, mode: str) -> None:
    command = [sys.executable, "-m", "ustack", "pressure", "throughput", "--json", "--pool", pool, "--mode", mode]
    command += ["--seconds", "0.5", "--rounds", "1"]
    done = await asyncio.to_thread(subprocess.run, command, env=environment(), capture_output=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr.decode()
    (row,) = json.loads(done.stdout)
    assert row["pool"] == pool
    assert row["rounds"][0]["pressed"] > 0
    assert row["ratio"] > 0


@pytest.mark.parametrize("option", [["--pool", "slub"], ["--request-size", "1000"], ["--request-size", "16M"]])
def test_impossible_options_are_refused(option: list[str]) -> None:
    assert CliRunner().invoke(main, ["pressure", "throughput", *option]).exit_code == 2
