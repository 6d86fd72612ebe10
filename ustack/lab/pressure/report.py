"""Results as one HTML page with tables and plots, which needs no network and no other file to be looked at.

Needs the extra `lab`: jinja2 and matplotlib.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from pools.arena import PAGE_SHIFT, Arena
from pools.base import NULL, by_name
from pools.base import names as pool_names
from pools.buddy import PageAllocator
from pools.gfp import ATOMIC
from ustack.lab.pressure.result import FORMAT, Result
from ustack.lab.pressure.work import Latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes

WASTE_SIZES: Final = (64, 128, 200, 256, 400, 512, 700, 1024, 1400, 1514, 2048, 3000, 4096, 6000, 8192, 9018, 12000, 16384)
"""Bytes of the requests of the waste curves."""

WASTE_PAGES: Final = 256
"""Pages of the arena that is filled for a point of a waste curve."""

COLORS: Final = ("#3b6ea5", "#c8553d", "#5b8c5a", "#b08ea2", "#d9a441", "#4f4f6b", "#7fb7be", "#8a5a44", "#999999", "#2f4858")


class BadResults(Exception):
    """A file is not what `ustack pressure run --json` writes; the message says where."""


@dataclass
class Group:
    """The runs of one scenario with one pool."""

    scenario: str
    pool: str
    mode: str
    runs: int = 0
    passed: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    gap: float = 0.0
    low_water: int | None = None
    reserve: int = 0
    refused: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)
    failures: list[tuple[int, str]] = field(default_factory=list)
    shown: Result | None = None
    """The run whose course is drawn: the first that failed, or the first."""

    def add(self, result: Result) -> None:
        """Count a run."""
        self.runs += 1
        self.passed += bool(result["passed"])
        self.endings[result["ending"]] += 1
        self.failures += [(result["seed"], text) for text in result["failed"]]
        if "samples" not in result:
            return
        if self.shown is None or (self.shown["passed"] and not result["passed"]):
            self.shown = result
        nbd, memory = result["nbd"], result["memory"]
        self.gap = max(self.gap, nbd["gap"], nbd["standing"])
        low_water = memory["reserve_low_water"]
        self.low_water = low_water if self.low_water is None else min(self.low_water, low_water)
        self.reserve = memory["reserve"]
        self.refused += memory["refused"]
        self.drops.update(result["drops"])
        self.latencies.merge(nbd["latency"])


def read_results(paths: Iterable[str | Path]) -> list[Result]:
    """The lines of the files. Raises BadResults, OSError."""
    found = []
    for path in paths:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    result = json.loads(line)
                    if result["format"] != FORMAT:
                        raise BadResults(f"{path}, line {number}: format {result['format']}, and this program reads {FORMAT}")
                    found.append({**result, "scenario": str(result["scenario"]), "pool": str(result["pool"])})
                except (ValueError, KeyError, TypeError):
                    raise BadResults(f"{path}, line {number}: not a line of `ustack pressure run --json`") from None
    if not found:
        raise BadResults("no results")
    return found


def write_report(results: Sequence[Result], path: Path) -> None:
    """Write the page. Raises BadResults, OSError."""
    groups: dict[tuple[str, str, str], Group] = {}
    for number, result in enumerate(results):
        key = (result["scenario"], result["pool"], str(result.get("mode")))
        try:
            groups.setdefault(key, Group(*key)).add(result)
        except (KeyError, TypeError) as error:
            raise BadResults(f"result {number + 1}: {error} is missing or wrong") from None
    scenarios: dict[str, list[Group]] = {}
    for group in groups.values():
        scenarios.setdefault(group.scenario, []).append(group)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kib"] = lambda nbytes: "" if nbytes is None else f"{nbytes / 1024:,.0f}"
    environment.filters["ms"] = lambda seconds: f"{seconds * 1000:,.3g}"
    template = environment.from_string(files("ustack.lab.pressure").joinpath("report.html.j2").read_text("utf-8"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ustack", "font.size": 8, "axes.spines.top": False}):
        page = template.render(
            groups=list(groups.values()),
            runs=len(results),
            passed=sum(group.passed for group in groups.values()),
            scenarios=[
                {
                    "name": name,
                    "groups": each,
                    "arena": arena_map(each),
                    "latency": latency_plot(each),
                    "reserve": reserve_plot(each),
                    "drops": drops_plot(each),
                }
                for name, each in scenarios.items()
            ],
            waste=waste_plot(sorted({group.pool for group in groups.values()} & set(pool_names()))),
        )
    path.write_text(page, encoding="utf-8")


# -- plots -------------------------------------------------------------------------------------------------------------------


def _svg(figure: Figure) -> Markup:
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])


def _one(draw: Callable[[Axes], None], width: float = 6.4, height: float = 2.8) -> Markup:
    figure = Figure(figsize=(width, height))
    draw(figure.add_subplot())
    return _svg(figure)


def arena_map(groups: Sequence[Group]) -> Markup | None:
    """Who holds the arena over time: a panel for each pool."""
    drawn = [group for group in groups if group.shown is not None]
    if not drawn:
        return None
    figure = Figure(figsize=(3.0 * len(drawn) + 0.8, 2.8))
    owners = sorted({name for group in drawn for name in _samples(group)["owners"]})
    color = dict(zip(owners, COLORS * len(owners), strict=False))
    for number, group in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), number + 1)
        samples = _samples(group)
        layers = [[nbytes / 1024 for nbytes in series] for series in samples["owners"].values()]
        if layers:
            axes.stackplot(samples["time"], *layers, colors=[color[name] for name in samples["owners"]], step="post")
        assert group.shown is not None
        size = group.shown["memory"]["size"] / 1024
        axes.axhline(size - group.reserve / 1024, color="black", linewidth=0.6, linestyle=":")
        axes.set(ylim=(0, size), title=f"{group.pool}, seed {group.shown['seed']}", xlabel="s", ylabel="" if number else "KiB")
        axes.tick_params(labelleft=not number)
    handles = [mpl.patches.Patch(color=color[name], label=name) for name in owners]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.3), ncols=6, frameon=False)
    return _svg(figure)


def _samples(group: Group) -> dict[str, Any]:
    assert group.shown is not None
    samples: dict[str, Any] = group.shown["samples"]
    return samples


def latency_plot(groups: Sequence[Group]) -> Markup | None:
    """The share of all requests that was done within a time."""
    drawn = [group for group in groups if group.latencies.count]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for group, color in zip(drawn, COLORS, strict=False):
            times, shares = group.latencies.cumulative()
            axes.step([time * 1000 for time in times], shares, where="post", label=group.pool, color=color)
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="ms", ylabel="share of requests")
        axes.legend(frameon=False)

    return _one(draw)


def reserve_plot(groups: Sequence[Group]) -> Markup | None:
    """The low-water mark of the reserve over time."""
    drawn = [group for group in groups if group.shown is not None and group.reserve]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for group, color in zip(drawn, COLORS, strict=False):
            samples = _samples(group)
            series = [nbytes / 1024 for nbytes in samples["reserve_low_water"]]
            axes.step(samples["time"], series, where="post", label=group.pool, color=color)
        axes.set(ylim=(0, max(group.reserve for group in drawn) / 1024 * 1.05), xlabel="s", ylabel="KiB never used")
        axes.legend(frameon=False)

    return _one(draw)


def drops_plot(groups: Sequence[Group]) -> Markup | None:
    """Frames dropped in a run on average, by reason."""
    reasons = sorted({reason for group in groups for reason in group.drops})
    if not reasons:
        return None

    def draw(axes: Axes) -> None:
        height = 0.8 / len(groups)
        for number, (group, color) in enumerate(zip(groups, COLORS * len(groups), strict=False)):
            places = [row + number * height for row in range(len(reasons))]
            axes.barh(places, [group.drops[reason] / group.runs for reason in reasons], height, color=color, label=group.pool)
        axes.set(yticks=[row + 0.4 - height / 2 for row in range(len(reasons))], yticklabels=reasons, xlabel="frames a run")
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _one(draw, height=0.6 + 0.4 * len(reasons))


def waste(pool: str, size: int) -> float | None:
    """The share of the pages held that nobody asked for when a fresh arena is filled with objects of `size` bytes; None when
    the pool has no such objects.
    """
    pages = PageAllocator(Arena(WASTE_PAGES), min_pages=0)
    made = by_name(pool)(pages)
    if size > made.max_size:
        return None
    objects = 0
    while made.alloc(size, ATOMIC) != NULL:
        objects += 1
    held = made.held_pages() << PAGE_SHIFT
    return 1 - objects * size / held if held else None


def waste_plot(pools: Sequence[str]) -> Markup:
    """Waste by size of the request, a curve for each pool."""

    def draw(axes: Axes) -> None:
        for pool, color in zip(pools, COLORS, strict=False):
            points = [(size, share) for size in WASTE_SIZES if (share := waste(pool, size)) is not None]
            axes.plot(*zip(*points, strict=True), marker=".", label=pool, color=color)
        axes.set(xscale="log", ylim=(0, 1), xlabel="bytes asked for", ylabel="share wasted")
        axes.set_xticks([64, 256, 1024, 4096, 16384], labels=["64", "256", "1 Ki", "4 Ki", "16 Ki"])
        axes.legend(frameon=False)

    return _one(draw, width=7.5, height=3.4)
