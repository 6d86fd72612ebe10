"""Pools by name: ours, and those that others bring through an entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from pools import base
from pools.kmalloc import KmallocPool


class PoolFromElsewhere(KmallocPool):
    name = "elsewhere"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("elsewhere", f"{__name__}:PoolFromElsewhere", base.ENTRY_POINT_GROUP),
        EntryPoint("no-pool", "builtins:int", base.ENTRY_POINT_GROUP),
        EntryPoint("kmalloc", f"{__name__}:PoolFromElsewhere", base.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(base, "entry_points", lambda group: points if group == base.ENTRY_POINT_GROUP else [])


def test_our_pools_are_found_without_importing_them_first() -> None:
    for name in ("kmalloc", "nta", "page_frag", "page_per_object", "srog"):
        assert base.by_name(name).name == name
        assert name in base.names()


@pytest.mark.usefixtures("elsewhere")
def test_a_pool_from_elsewhere_is_found_by_its_entry_point() -> None:
    assert base.by_name("elsewhere") is PoolFromElsewhere
    assert "elsewhere" in base.names()


@pytest.mark.usefixtures("elsewhere")
def test_the_name_of_a_pool_of_ours_cannot_be_taken() -> None:
    assert base.by_name("kmalloc") is KmallocPool


@pytest.mark.usefixtures("elsewhere")
def test_an_entry_point_that_is_no_pool_is_refused_with_its_name() -> None:
    with pytest.raises(TypeError, match="builtins:int"):
        base.by_name("no-pool")


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(KeyError, match=r"no pool 'slob'; there are: .*kmalloc"):
        base.by_name("slob")
