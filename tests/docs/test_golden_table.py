"""Cells of docs/reference/throughput.md, measured again: recovery is as fast as it was."""

from __future__ import annotations

import pytest

from tools.golden_table import CONTROLS, Cell, cells, measure, read

TOLERANCE = 0.15
"""Part by which a figure may move before somebody has to look at it."""

FLOOR = 0.05
"""Mbit/s that do not matter."""


def test_every_cell_is_on_the_page() -> None:
    assert set(read()) == {(control, cell) for control in CONTROLS for cell in cells()}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("cell", [Cell(20, 0.5, 0.0), Cell(20, 2.0, 1.0), Cell(100, 2.0, 5.0)], ids=str)
def test_throughput_is_what_the_page_says(control: str, cell: Cell) -> None:
    assert measure(control, cell) == pytest.approx(read()[control, cell], rel=TOLERANCE, abs=FLOOR)
