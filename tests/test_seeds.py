"""A test that takes a seed runs once for each seed asked for, and one of them can be repeated alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STORY = "def test_story(seed): assert seed != 7\n"


@pytest.mark.parametrize(
    ("options", "closing"),
    [(["--seeds", "9"], "1 failed, 8 passed"), (["--seeds", "7"], "7 passed"), (["--seed", "7"], "1 failed")],
)
def test_seeds_are_chosen_on_the_command_line(tmp_path: Path, options: list[str], closing: str) -> None:
    story = tmp_path / "test_story.py"
    story.write_text(STORY)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-c",
        str(ROOT / "pyproject.toml"),
        *options,
        str(story),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert closing in done.stdout, done.stdout + done.stderr
    assert ("test_story[seed=7]" in done.stdout) == ("failed" in closing)
