"""Every example in the documentation is true: blocks fenced as `python` run, page by page, each page in a namespace of its own.

A block fenced as `python fragment` is shown only (it needs a device, or a server somewhere); it must at least be Python.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

if TYPE_CHECKING:
    from sybil import Document, Example

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def must_parse(example: Example) -> None:
    """Evaluate a fragment: it is not run."""
    ast.parse(example.parsed)


def read(page: Path) -> Document:
    """The examples of one page, in order."""
    parsers = [CodeBlockParser("python", PythonEvaluator()), CodeBlockParser("python fragment", must_parse)]
    return Sybil(parsers=parsers, path=str(ROOT)).parse(page)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_examples_of_this_page_run(page: Path) -> None:
    for example in read(page).examples():
        example.evaluate()


def test_a_wrong_example_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nmtu = 1500\n```\n\n```python\nassert mtu == 9000\n```\n\n```python fragment\ndef\n```\n")
    first, second, third = read(page).examples()
    first.evaluate()
    with pytest.raises(AssertionError):
        second.evaluate()
    with pytest.raises(SyntaxError):
        third.evaluate()
