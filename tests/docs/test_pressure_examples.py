"""The scenarios in the documentation are scenarios, and run as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ustack.lab.pressure.campaign import jobs_of, run_here
from ustack.lab.pressure.scenario import parse

PAGE = Path(__file__).parents[2] / "docs/how-to/put-memory-under-pressure.md"

EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES, ids=["first", "control"])
def test_a_scenario_on_the_page_is_as_it_expects(text: str) -> None:
    results = list(run_here(jobs_of("example", text, parse(text, "example").scenario, (), [1])))
    assert [each["failed"] for each in results] == [[]] * len(results)
