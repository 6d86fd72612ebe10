"""Every script in a file *.chart of this folder is a test, whose name begins with the section that it is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests import leaks
from tests.conformance.charts import Chart, read_charts, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect files of charts."""
    if file_path.suffix == ".chart":
        return ChartFile.from_parent(parent, path=file_path)
    return None


class ChartFile(pytest.File):
    """A file of charts."""

    def collect(self) -> Iterator[pytest.Item]:
        """One test for each chart."""
        for chart in read_charts(self.path):
            yield ChartItem.from_parent(self, name=chart.name, chart=chart)


class ChartItem(pytest.Item):
    """A chart as a test. As after every test, nothing may be left behind."""

    def __init__(self, chart: Chart, **more: Any) -> None:
        super().__init__(**more)
        self.chart = chart

    def runtest(self) -> None:
        """Play it."""
        leaks.forget()
        run(self.chart, self.path)
        leaks.check()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """What the stack did otherwise, without the way there."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where it is."""
        first = self.chart.lines[0][0] if self.chart.lines else 1
        return self.path, first - 1, self.name
