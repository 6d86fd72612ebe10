"""`ustack pressure run`, `list`, `show` and `report`: scenarios and what they came to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ustack.lab.pressure.result import Job, Result
    from ustack.lab.pressure.scenario import NamedScenario


@click.command()
@click.argument("scenarios", nargs=-1, required=True, metavar="SCENARIO...")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Run with the seeds 0 to N-1.")
@click.option("--seed", type=click.IntRange(min=0), help="Run with this seed only.")
@click.option("--pool", "pools", multiple=True, metavar="NAME", help="Run with this pool instead of those that the file names.")
@click.option("--real", is_flag=True, help="Run on a TAP in real time, in a network namespace of its own.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; default: as many as there are cores.")
@click.option("--dask", metavar="ADDRESS", help="Run on the Dask cluster with this scheduler, such as tcp://10.0.0.1:8786.")
@click.option("--json", "json_path", metavar="FILE", help="Write a line of JSON for each run; - is the standard output.")
def run(
    scenarios: tuple[str, ...],
    seeds: int,
    seed: int | None,
    pools: tuple[str, ...],
    real: bool,
    jobs: int | None,
    dask: str | None,
    json_path: str | None,
) -> None:
    """Run scenarios: files, or names of those that `ustack pressure list` shows.

    A run is a scenario with a pool and a seed; in virtual time the same run gives the same line of JSON. Exit code: 0 when all
    runs are as their scenarios expect, 1 when one is not, 2 for a mistake in a file.
    """
    from pools.base import names
    from ustack.lab.pressure.campaign import jobs_of
    from ustack.lab.pressure.scenario import check_parameters

    for pool in pools:
        if pool not in names():
            raise click.BadParameter(f"there is no pool {pool!r}; there are {', '.join(names())}", param_hint="--pool")
    if real and dask is not None:
        raise click.UsageError("--real runs on this machine: not with --dask")
    numbers = range(seeds) if seed is None else [seed]
    todo: list[Job] = []
    for text, named in _read(scenarios):
        for pool in pools:
            try:
                check_parameters(pool, named.scenario.memory)
            except ValueError as error:
                raise click.BadParameter(f"{named.name}: [memory.parameters] {error}", param_hint="--pool") from None
        todo += jobs_of(named.name, text, named.scenario, pools, numbers)
    results = _run_real(todo) if real else _run_virtual(todo, jobs, dask)
    sys.exit(_show(results, todo, json_path))


def _read(scenarios: tuple[str, ...]) -> list[tuple[str, NamedScenario]]:
    from ustack.daemon.sections import ConfigError, read_text
    from ustack.lab.pressure.scenario import bundled_text, parse

    found = []
    problems = []
    for each in scenarios:
        try:
            if Path(each).exists() or "/" in each or each.endswith(".toml"):
                text = read_text(each)
            else:
                text = bundled_text(each)
            found.append((text, parse(text, each)))
        except KeyError:
            problems.append(f"{each}: neither a file nor one of the scenarios that `ustack pressure list` shows")
        except ConfigError as error:
            problems += error.problems
    if problems:
        click.echo("\n".join(problems), err=True)
        sys.exit(2)
    return found


def _run_virtual(todo: Sequence[Job], jobs: int | None, dask: str | None) -> Iterator[Result]:
    import os

    from ustack.lab.pressure.campaign import run_here, run_on_cores, run_on_dask

    if dask is not None:
        try:
            import distributed  # noqa: F401
        except ImportError:
            raise click.ClickException("--dask needs Dask: pip install 'ustack[dask]'") from None
        return run_on_dask(todo, dask)
    workers = min(jobs or os.cpu_count() or 1, len(todo))
    return run_here(todo) if workers == 1 or len(todo) < 2 * workers else run_on_cores(todo, workers)


def _run_real(todo: Sequence[Job]) -> Iterator[Result]:
    from ustack.lab.netns import enter_own
    from ustack.lab.pressure.real import run_real

    try:
        enter_own()
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    return (run_real(job) for job in todo)


def _show(results: Iterator[Result], todo: Sequence[Job], json_path: str | None) -> int:
    """Show the runs as they come, then a table; returns the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ustack.lab.pressure.result import to_line

    console = Console(stderr=json_path == "-", highlight=False)
    lines: TextIO | None = None
    if json_path is not None:
        try:
            lines = sys.stdout if json_path == "-" else Path(json_path).open("w", encoding="utf-8")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise click.ClickException(f"{json_path}: {error.strerror}") from None
    totals: dict[tuple[str, str], _Total] = {}
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    try:
        with bar:
            task = bar.add_task("", total=len(todo))
            last: tuple[str, str] | None = None
            for result in results:
                key = (str(result["scenario"]), str(result["pool"]))
                if last not in (None, key) and not console.is_terminal:
                    console.print(totals[last].line(*last), soft_wrap=True)
                last = key
                totals.setdefault(key, _Total()).add(result)
                if lines is not None:
                    lines.write(to_line(result) + "\n")
                for failure in result["failed"]:
                    bar.console.print(f"{_repeat(result)}: {failure}", style="red", soft_wrap=True)
                bar.update(task, advance=1, description=f"{key[0]} {key[1]}")
            if last is not None and not console.is_terminal:
                console.print(totals[last].line(*last), soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except OSError as error:
        raise click.ClickException(str(error)) from None
    finally:
        if lines is not None:
            lines.flush()
            if lines is not sys.stdout:
                lines.close()
    if console.is_terminal:
        _table(console, totals)
    return 0 if all(total.passed == total.runs for total in totals.values()) else 1


def _repeat(result: Result) -> str:
    """The arguments that repeat a run."""
    real = " --real" if result["mode"] == "real" else ""
    return f"{result['scenario']} --pool {result['pool']} --seed {result['seed']}{real}"


class _Total:
    """What the runs of a scenario with a pool have in common."""

    def __init__(self) -> None:
        self.runs = 0
        self.passed = 0
        self.endings: dict[str, int] = {}
        self.gap = 0.0
        self.p99 = 0.0
        self.low_water = 0

    def add(self, result: dict[str, Any]) -> None:
        self.runs += 1
        self.passed += bool(result["passed"])
        self.endings[result["ending"]] = self.endings.get(result["ending"], 0) + 1
        if "nbd" in result:
            low_water = int(result["memory"]["reserve_low_water"])
            self.gap = max(self.gap, result["nbd"]["gap"], result["nbd"]["standing"])
            self.p99 = max(self.p99, result["nbd"]["latency"]["p99"])
            self.low_water = low_water if self.runs == 1 else min(self.low_water, low_water)

    def cells(self) -> tuple[str, str, str, str, str]:
        endings = ", ".join(f"{ending} {count}" if len(self.endings) > 1 else ending for ending, count in self.endings.items())
        return f"{self.passed}/{self.runs}", endings, f"{self.gap:.4g}", f"{self.p99:.4g}", str(self.low_water >> 10)

    def line(self, scenario: str, pool: str) -> str:
        passed, endings, gap, p99, low_water = self.cells()
        return f"{scenario} {pool}: {passed} passed ({endings}); gap {gap} s, p99 {p99} s, {low_water} KiB of reserve left"


def _table(console: Any, totals: dict[tuple[str, str], _Total]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("scenario", "pool", "passed", "ended by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("longest gap, s", "worst p99, s", "reserve left, KiB"):
        table.add_column(heading, justify="right")
    for (scenario, pool), total in totals.items():
        style = None if total.passed == total.runs else "red"
        table.add_row(scenario, pool, *total.cells(), style=style)
    console.print(table)


@click.command(name="list")
@click.option("--names", is_flag=True, help="Print the names only.")
def list_scenarios(names: bool) -> None:
    """List the scenarios that come with the program."""
    from rich.console import Console
    from rich.table import Table

    from ustack.lab.pressure.scenario import bundled

    if names:
        click.echo("\n".join(bundled()))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    for name, named in bundled().items():
        table.add_row(name, named.scenario.about)
    Console(highlight=False).print(table)


@click.command()
@click.argument("name", metavar="NAME")
def show(name: str) -> None:
    """Print the file of a scenario that comes with the program, to begin one of your own from."""
    from ustack.lab.pressure.scenario import bundled_text

    try:
        click.echo(bundled_text(name), nl=False)
    except KeyError:
        raise click.BadParameter(
            f"there is no scenario {name!r}; `ustack pressure list` shows them", param_hint="NAME"
        ) from None


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS.jsonl...")
@click.option("-o", "--output", required=True, metavar="FILE", help="The page to write.")
def report(results: tuple[str, ...], output: str) -> None:
    """Make one HTML page of results that `run --json` has written. It needs nothing else, and no network, to be looked at."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise click.ClickException(f"the report needs {missing.name}: pip install 'ustack[lab]'") from None
    from ustack.lab.pressure.report import BadResults, read_results, write_report

    try:
        write_report(read_results(results), Path(output))
    except BadResults as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
