"""The rule that nothing is left behind, for every test: pools have given all pages back and all charges are zero.

The factories that make pools and stacks for tests register them here; the autouse fixture in `tests/conftest.py` checks them
when the test has ended, after every fixture of the test has been torn down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from pools.base import Pool

PoolT = TypeVar("PoolT", bound="Pool")

_checks: list[Callable[[], list[str]]] = []


def watch(findings: Callable[[], list[str]]) -> None:
    """Call `findings` after the test. Every line that it returns names something left behind, and fails the test."""
    _checks.append(findings)


def watch_pool(pool: PoolT) -> PoolT:
    """Expect `pool` to be consistent and empty after the test: no byte requested, and no page held once it is reaped."""

    def findings() -> list[str]:
        found = []
        try:
            pool.check()
        except AssertionError as broken:
            found.append(f"pool {pool.name}: inconsistent: {broken}")
        if pool.stats.requested:
            found.append(f"pool {pool.name}: {pool.stats.requested} bytes still allocated")
        pool.reap()
        if pages := pool.held_pages():
            found.append(f"pool {pool.name}: {pages} pages still held after reaping")
        return found

    watch(findings)
    return pool


def forget() -> None:
    """Drop every check: a test starts with none."""
    _checks.clear()


def check() -> None:
    """Run and drop every check; raises `AssertionError` with all that was found."""
    checks = _checks[:]
    _checks.clear()
    found = [line for findings in checks for line in findings()]
    assert not found, "left behind:\n  " + "\n  ".join(found)
