"""The article about the allocators says what a new measurement says: the same words, and figures within 5 %, times excepted."""

from __future__ import annotations

import re

import pytest

from tools.claims_page import DRAWINGS, PAGE, PLOTS, SECTIONS, measure, write_page
from ustack.lab.claims.registry import claims

TOLERANCE = 0.05
"""Of a figure; and one unit, for figures that are rounded to whole ones."""

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def differs(written: str, measured: str, *, timed: bool = False) -> bool:
    """Whether two lines say different things. Of what depends on times, the verdict does as well."""
    if timed:
        written, measured = (
            " ".join(line.replace("| true |", "|").replace("| false |", "|").split()) for line in (written, measured)
        )
    if NUMBER.sub("#", written) != NUMBER.sub("#", measured):
        return True
    pairs = zip(NUMBER.findall(written), NUMBER.findall(measured), strict=True)
    return not timed and any(abs(float(one) - float(other)) > max(1, TOLERANCE * float(other)) for one, other in pairs)


def test_lines_differ_by_their_words_and_by_more_than_the_tolerance() -> None:
    assert not differs("| 30% of 100 pages", "| 30.5% of 104 pages")
    assert differs("| 30% of 100 pages", "| 30% of 106 pages")
    assert differs("| 30% of 100 pages", "| 30% of 100 frames")
    assert differs("| true | 5", "| false | 5")
    assert not differs("| 1.2 µs", "| 9.2 µs", timed=True)
    assert not differs("| 36 | true | 1.2 µs", "| 36 | false | 9.2 µs", timed=True)
    assert differs("| 36 | true | 1.2 µs", "| 36 | false | 9.2 frames", timed=True)


def test_the_page_is_what_a_new_measurement_would_write() -> None:
    reports, figures = measure()
    timed = tuple(f"| {claim.number} |" for claim in claims() if claim.timed)
    written, measured = PAGE.read_text().splitlines(), write_page(reports, figures).splitlines()
    wrong = [
        f"  page:     {one}\n  measured: {other}"
        for one, other in zip(written, measured, strict=True)
        if differs(one, other, timed=one.startswith(timed))
    ]
    assert not wrong, "run `python -m tools.claims_page`:\n" + "\n".join(wrong)


def test_every_claim_has_its_place_and_every_plot_is_there() -> None:
    numbers = [number for _, _, of_section, _ in SECTIONS for number in of_section]
    assert sorted(numbers) == [claim.number for claim in claims()]
    shown = {plot for _, _, _, plots in SECTIONS for plot, _ in plots}
    assert shown == set(DRAWINGS) == {path.stem for path in PLOTS.glob("*.svg")}


@pytest.mark.parametrize("plot", sorted(DRAWINGS))
def test_a_plot_is_small_enough_to_be_kept(plot: str) -> None:
    assert (PLOTS / f"{plot}.svg").stat().st_size < 40_000
