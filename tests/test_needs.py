"""What is missing is skipped on a developer's machine and fails where CI=true: a green CI has run every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import needs


@pytest.fixture(params=["", "true"], ids=["developer", "ci"])
def outcome(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """What a missing thing must lead to, with and without CI=true."""
    monkeypatch.setenv("CI", request.param)
    return pytest.fail.Exception if request.param else pytest.skip.Exception


def test_a_missing_program_names_the_way_to_get_it(outcome: type[BaseException]) -> None:
    with pytest.raises(outcome, match="no program no-such-program: run tools/install-system-packages"):
        needs.require_tool("no-such-program")


def test_a_program_that_is_there_is_found() -> None:
    assert Path(needs.require_tool("sh")).is_absolute()


def test_root_is_asked_for(outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(outcome, match="needs root"):
        needs.require_root()


def test_a_missing_file_names_the_way_to_get_it(outcome: type[BaseException], tmp_path: Path) -> None:
    assert needs.require_path(tmp_path, "cannot be missing") == tmp_path
    with pytest.raises(outcome, match=r"no .*nbd\.so: install python3-libnbd"):
        needs.require_path(tmp_path / "nbd.so", "install python3-libnbd")
