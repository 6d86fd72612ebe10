"""The report is one page that needs nothing else, and says what the lines say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from ustack.cli import main
from ustack.lab.pressure.campaign import jobs_of, raised, run_here
from ustack.lab.pressure.report import BadResults, read_results, waste, write_report
from ustack.lab.pressure.result import to_line
from ustack.lab.pressure.scenario import bundled, bundled_text

if TYPE_CHECKING:
    from pathlib import Path


class Page(HTMLParser):
    """What a page asks the network for, and the tags that are open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and str(value)[0] != "#"]
        if tag in ("script", "link", "iframe"):
            self.asked.append(tag)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Results of a run that is as expected, of one that is not, and of one that raised."""
    todo = [
        *jobs_of("treatment", bundled_text("treatment"), bundled()["treatment"].scenario, ("kmalloc", "srog"), [1]),
        *jobs_of("wrong", bundled_text("treatment") + "latency = 1e-9\n", bundled()["treatment"].scenario, ("nta",), [7]),
    ]
    results = [*run_here(todo), raised(todo[0], "virtual", ValueError("<b>odd</b>"))]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(to_line(each) + "\n" for each in results))
    return path


def test_a_report_is_one_page_without_anything_from_elsewhere(lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["pressure", "report", str(lines), "-o", str(output)])
    assert done.exit_code == 0, done.output
    text = output.read_text()
    assert not Page(text).asked
    assert not re.search(r"url\((?!#)|@import", text)
    assert "2 of 4 runs are as their scenarios expect" in text
    assert "ustack pressure run wrong --pool nta --seed 7" in text
    assert "&lt;b&gt;odd&lt;/b&gt;" in text
    assert text.count("<svg") == 4 + 4 + 1, "four plots for each scenario, and the waste"


def test_the_same_results_are_the_same_page(lines: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_report(read_results([lines]), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "scenario": "a", "pool": "b"}'])
def test_what_is_no_result_is_refused_with_its_place(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n" if line else "")
    with pytest.raises(BadResults, match=r"x.jsonl, line 1: |no results"):
        read_results([path])


def test_waste_is_what_the_pools_say() -> None:
    assert waste("page_per_object", 1024) == 0.75
    assert waste("page_per_object", 8192) is None
    kmalloc = waste("kmalloc", 1100)
    assert kmalloc is not None
    assert 0.46 < kmalloc < 0.5, "an object of 2048 bytes"
