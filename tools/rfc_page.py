"""Makes docs/rfc.md: what each RFC asks for, section by section, and the test that shows that we do it, or why we do not.

The requirements are in tests/conformance/requirements/rfcNNNN.toml. A script of tests/conformance covers those that its heading
names; other tests are named in the files. Raises ValueError for a requirement that nothing covers and that gives no reason, and
for a test that does not exist.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.conformance.charts import read_charts  # noqa: E402  # the tool runs without being installed

PAGE: Final = ROOT / "docs" / "rfc.md"
CONFORMANCE: Final = ROOT / "tests" / "conformance"
REQUIREMENTS: Final = CONFORMANCE / "requirements"

INTRODUCTION: Final = """# RFCs

<!-- Made by tools/rfc_page.py from tests/conformance/requirements: change these files, then run it. -->

What each RFC asks of us, in our words, by section; and the test that shows that we do it, or why we do not. Names such as
MUST-4 are those of the RFC where it gives any (RFC 9293, appendix B), and otherwise numbered here. Tests that end in `.chart`
are [conformance scripts](reference/conformance-scripts.md).
"""


def scripts_by_requirement() -> dict[tuple[str, str], list[str]]:
    """The scripts that cover a requirement, by RFC and name."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(CONFORMANCE.glob("*.chart")):
        for chart in read_charts(path):
            for name in chart.covers:
                found.setdefault((chart.rfc, name), []).append(f"{path.name}: {chart.title}")
    return found


def test_exists(test: str) -> bool:
    """Whether `path::name` is a test of ours."""
    path, _, name = test.partition("::")
    source = ROOT / path
    if not source.is_file():
        return False
    return any(getattr(node, "name", None) == name for node in ast.walk(ast.parse(source.read_text())))


def table(rfc: dict[str, Any], scripts: dict[tuple[str, str], list[str]]) -> str:
    """One RFC: its heading and its table."""
    number = str(rfc["rfc"])
    lines = [f"## RFC {number}: {rfc['title']}", "", "| section | | requirement | shown by |", "| - | - | - | - |"]
    for requirement in rfc["requirement"]:
        name = requirement["id"]
        tests = requirement.get("tests", [])
        for test in tests:
            if not test_exists(test):
                raise ValueError(f"rfc{number}.toml: {name}: there is no test {test}")
        shown = [*scripts.pop((number, name), []), *(test.rpartition("/")[2] for test in tests)]
        gap = requirement.get("gap")
        if not shown and not gap:
            raise ValueError(f"rfc{number}.toml: {name} is covered by nothing, and gives no reason as its gap")
        cell = "<br>".join(f"`{each}`" for each in shown) + ("<br>" if shown and gap else "") + (f"Gap: {gap}" if gap else "")
        lines.append(f"| {requirement['section']} | {name} | {requirement['text']} | {cell} |")
    return "\n".join(lines)


def rendered() -> str:
    """The text of the page."""
    scripts = scripts_by_requirement()
    files = sorted(REQUIREMENTS.glob("rfc*.toml"), key=lambda path: int(path.stem.removeprefix("rfc")))
    rfcs = [tomllib.loads(path.read_text()) for path in files]
    tables = [table(rfc, scripts) for rfc in rfcs]
    if scripts:
        raise ValueError(f"scripts cover requirements that no file has: {sorted(scripts)}")
    every = [requirement for rfc in rfcs for requirement in rfc["requirement"]]
    gaps = sum("gap" in requirement for requirement in every)
    summary = f"{len(every)} requirements of {len(rfcs)} RFCs; {gaps} of them with a gap."
    return "\n\n".join([INTRODUCTION.rstrip(), summary, *tables]) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(rendered())


if __name__ == "__main__":
    main()
