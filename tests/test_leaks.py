"""The leak registry itself: it sees what is left behind, says all of it, and starts empty for the next test."""

from __future__ import annotations

import pytest

from tests import leaks


def test_a_clean_test_passes() -> None:
    leaks.watch(list)
    leaks.check()


def test_everything_left_behind_is_named_at_once() -> None:
    leaks.watch(lambda: ["a page"])
    leaks.watch(lambda: ["a charge", "a timer"])
    with pytest.raises(AssertionError, match=r"left behind:\n  a page\n  a charge\n  a timer"):
        leaks.check()


def test_a_finding_is_reported_once() -> None:
    leaks.watch(lambda: ["a page"])
    with pytest.raises(AssertionError, match="a page"):
        leaks.check()
    leaks.check()
