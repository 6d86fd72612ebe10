"""What a run came to, and whether it is what the scenario expects: one object, one line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pools.arena import PAGE_SHIFT

if TYPE_CHECKING:
    from ustack.lab.pressure.scenario import Bounds, Scenario
    from ustack.lab.pressure.subject import Subject
    from ustack.lab.pressure.work import DiskWork

FORMAT: Final = 1
"""Version of the lines: readers refuse others."""

Result = dict[str, Any]

Ending = Literal["finished", "standstill", "duration", "failure", "never full"]
"""Why a run ended: the work was done, it stood still for as long as expected, time was up, a request failed, or the memory was
never full, so that the work did not begin.
"""


@dataclass(frozen=True)
class Job:
    """One run: a scenario (its name and its file's text, which travels to other processes), a pool and a seed."""

    name: str
    text: str
    pool: str
    seed: int


def report(job: Job, mode: str, ending: Ending, seconds: float, subject: Subject, work: DiskWork, wire: Result) -> Result:
    """The result of a run, `failed` still without what is left behind. To be called before anything is closed."""
    stack = subject.stack
    pages = stack.pages
    lowest = pages.pages - pages.peak_used
    counters = stack.mib.as_dict()
    found: Result = {
        "format": FORMAT,
        "scenario": job.name,
        "pool": job.pool,
        "seed": job.seed,
        "mode": mode,
        "passed": True,
        "failed": [],
        "ending": ending,
        "seconds": round(seconds, 6),
        "nbd": work.report(work.standing if work.began and ending != "finished" else 0.0),
        "memory": {
            "size": pages.pages << PAGE_SHIFT,
            "peak_used": pages.peak_used << PAGE_SHIFT,
            "refused": sum(pages.failures),
            "reserve": pages.min_pages << PAGE_SHIFT,
            "reserve_low_water": min(lowest, pages.min_pages) << PAGE_SHIFT,
            "reserve_allocations": pages.reserve_allocs,
        },
        "injected": {} if subject.faults is None else dict(sorted(subject.faults.injected.items())),
        "drops": stack.drops.by_name(),
        "counters": {name: count for name, count in counters.items() if count},
        "wire": wire,
        "samples": subject.recorder.report(),
    }
    judge(found, subject.scenario, counters)
    return found


def judge(found: Result, scenario: Scenario, counters: dict[str, int]) -> None:
    """Write into `failed` what is not as expected."""
    expect = scenario.expect
    nbd, memory = found["nbd"], found["memory"]
    failed: list[str] = found["failed"]
    if nbd["failure"]:
        failed.append(f"NBD: {nbd['failure']}")
    done = f"{nbd['done']} of {nbd['requests']} requests are done"
    if found["ending"] == "never full":
        failed.append("the memory was never full, so that the work did not begin")
    elif scenario.must_finish and found["ending"] != "finished":
        failed.append(f"finishes: {done} ({found['ending']})")
    if expect.finishes is False and found["ending"] == "finished":
        failed.append("finishes = false: all requests are done")
    if expect.standstill is not None and found["ending"] not in ("standstill", "never full"):
        failed.append(f"standstill: {done}, and the work has not stood still for {expect.standstill:g} s ({found['ending']})")
    gap = max(nbd["gap"], nbd["standing"])
    for name, limit, value in (
        ("progress_gap", expect.progress_gap, gap),
        ("heartbeat_gap", expect.heartbeat_gap, nbd["heartbeat_gap"]),
        ("latency", expect.latency, nbd["latency"]["max"]),
    ):
        if limit is not None and value > limit:
            failed.append(f"{name}: {value:g} s, expected at most {limit:g}")
    if expect.max_memory is not None and memory["peak_used"] > expect.max_memory:
        failed.append(f"max_memory: {memory['peak_used']} bytes were in use, expected at most {expect.max_memory}")
    if expect.reserve_left is not None and memory["reserve_low_water"] < expect.reserve_left:
        failed.append(f"reserve_left: {memory['reserve_low_water']} bytes, expected at least {expect.reserve_left}")
    for name, bounds in expect.counters.items():
        _bounded(failed, f"counter {name}", counters[name], bounds)
    for name, bounds in expect.drops.items():
        _bounded(failed, f"drops {name}", found["drops"].get(name, 0), bounds)
    found["passed"] = not failed


def _bounded(failed: list[str], name: str, value: int, bounds: Bounds) -> None:
    if value < bounds.min:
        failed.append(f"{name}: {value}, expected at least {bounds.min}")
    if bounds.max is not None and value > bounds.max:
        failed.append(f"{name}: {value}, expected at most {bounds.max}")


def to_line(found: Result) -> str:
    """The line of JSON, without the line end."""
    return json.dumps(found, separators=(",", ":"))
