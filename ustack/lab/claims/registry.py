"""Claims and their numbers. An experiment is a function that measures and says a word and a sentence about the claim.

The word is `true`, `false` or `partly`, and follows from what was measured: no experiment knows its verdict beforehand. What
was expected before anything had been measured, the prior, is kept beside it; where the measurement says otherwise,
`contradicts` says so, and the measurement stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Verdict = Literal["true", "false", "partly"]

Figure = float | str | list["Figure"] | dict[str, "Figure"]
"""A measured value, as JSON has it."""

MODULES: Final = ("sharing", "packing", "classes", "pages", "groups", "lanes", "delivery", "reserve", "speed")

SEED: Final = 2006


class Terms(NamedTuple):
    """What an experiment is run with: the seed of its traffic, and whether it may take its time (`full`)."""

    seed: int = SEED
    full: bool = False

    def size(self, quick: int, full: int) -> int:
        """The one or the other size."""
        return full if self.full else quick


class Outcome(NamedTuple):
    """What came out: the word, a sentence with the figures that decide, all figures by name, and what the prior had wrong."""

    verdict: Verdict
    finding: str
    figures: dict[str, Figure]
    contradicts: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the thread: its number, who made it (EP: Evgeniy Polyakov, PZ: Peter Zijlstra), and the experiment.

    `prior` is what was expected. `timed`: the figures are times of this machine and differ from run to run.
    """

    number: int
    who: str
    text: str
    prior: str
    measure: Callable[[Terms], Outcome]
    timed: bool = False

    def report(self, terms: Terms) -> dict[str, Figure]:
        """Measure, and tell it as the object that `ustack pressure claims --json` prints."""
        outcome = self.measure(terms)
        repeat = f"ustack pressure claims --only {self.number}"
        if terms.full:
            repeat += " --full"
        if terms.seed != SEED:
            repeat += f" --seed {terms.seed}"
        return {
            "number": self.number,
            "who": self.who,
            "claim": self.text,
            "measured": {"finding": outcome.finding, "contradicts": outcome.contradicts, "figures": dict(outcome.figures)},
            "verdict": outcome.verdict,
            "repeat": repeat,
        }


_claims: dict[int, Claim] = {}


def claim(
    number: int, who: str, text: str, *, prior: str, timed: bool = False
) -> Callable[[Callable[[Terms], Outcome]], Callable[[Terms], Outcome]]:
    """Register an experiment under the number of its claim."""

    def register(measure: Callable[[Terms], Outcome]) -> Callable[[Terms], Outcome]:
        assert number not in _claims, f"two experiments for claim {number}"
        _claims[number] = Claim(number, who, text, prior, measure, timed)
        return measure

    return register


def claims(only: Iterable[int] = ()) -> list[Claim]:
    """The claims that can be measured, by number; only those asked for, if any are. Raises `KeyError` for one there is not."""
    for module in MODULES:
        import_module(f"ustack.lab.claims.{module}")
    wanted = sorted(set(only)) or sorted(_claims)
    for number in wanted:
        if number not in _claims:
            raise KeyError(f"no claim {number} can be measured; there are: {', '.join(map(str, sorted(_claims)))}")
    return [_claims[number] for number in wanted]


def shares(figures: dict[str, Figure]) -> str:
    """Shares by name, in words."""
    return ", ".join(f"{value:.0%} ({name})" for name, value in figures.items() if isinstance(value, float))


def in_words(report: dict[str, Figure]) -> str:
    """What was measured, in words, with what it contradicts."""
    measured = report["measured"]
    assert isinstance(measured, dict)
    contradicts = f" Against what was expected: {measured['contradicts']}." if measured["contradicts"] else ""
    return f"{measured['finding']}{contradicts}"
