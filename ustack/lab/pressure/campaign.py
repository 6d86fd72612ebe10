"""Many runs: every scenario with every pool it names and every seed, on this machine's cores or on a Dask cluster.

Results come in the order of the jobs, wherever they were run, so that the same campaign writes the same lines.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from ustack.lab.pressure.result import FORMAT, Job, Result, to_line
from ustack.lab.pressure.virtual import run_virtual

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ustack.lab.pressure.scenario import Scenario

BATCH: Final = 10
"""Runs that travel to a worker together: one takes some tens of milliseconds."""

AHEAD: Final = 8
"""Batches for each worker that are handed out before the first result is fetched."""


def jobs_of(name: str, text: str, scenario: Scenario, pools: Sequence[str], seeds: Iterable[int]) -> list[Job]:
    """The runs of a scenario: with `pools`, or, if there are none, those that it names itself."""
    return [Job(name, text, pool, seed) for pool in pools or scenario.memory.pool for seed in seeds]


def run_job(job: Job) -> Result:
    """Run `job` in virtual time. An exception, which is a bug of ours, is a result that says so."""
    try:
        return run_virtual(job)
    except Exception as error:
        return raised(job, "virtual", error)


def raised(job: Job, mode: str, error: Exception) -> Result:
    """The result of a run that ended with an exception."""
    return {
        "format": FORMAT,
        "scenario": job.name,
        "pool": job.pool,
        "seed": job.seed,
        "mode": mode,
        "passed": False,
        "failed": [f"raised {type(error).__name__}: {error}"],
        "ending": "raised",
    }


def run_batch(jobs: list[Job]) -> list[Result]:
    """Run several, one after the other."""
    found = []
    for job in jobs:
        found.append(run_job(job))
        gc.collect()  # a world is full of cycles, and its arena goes only with them
    return found


def run_here(jobs: Sequence[Job]) -> Iterator[Result]:
    """Run them in this process."""
    gc.freeze()  # what is here already need not be looked at after each run
    try:
        for job in jobs:
            yield from run_batch([job])
    finally:
        gc.unfreeze()


def run_on_cores(jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Run them in so many processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker) as executor:
        try:
            yield from _in_order(jobs, workers, lambda batch: executor.submit(run_batch, batch))
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def run_on_dask(jobs: Sequence[Job], address: str) -> Iterator[Result]:
    """Run them on the Dask cluster whose scheduler is at `address` ("tcp://host:8786"). Its workers need the same ustack.

    Raises ImportError without the extra `dask`, OSError when nobody answers there.
    """
    from distributed import Client

    with Client(address) as client:  # type: ignore[no-untyped-call]
        workers = max(sum(client.nthreads().values()), 1)
        for lines in _in_order(jobs, workers, lambda batch: client.submit(_run_batch_in_text, batch, pure=False)):
            yield json.loads(lines)


def _run_batch_in_text(jobs: list[Job]) -> list[str]:
    """Run several; as text, because on the way over a cluster lists become tuples."""
    return [to_line(found) for found in run_batch(jobs)]


def _in_order(jobs: Sequence[Job], workers: int, submit: Callable[[list[Job]], Any]) -> Iterator[Any]:
    rest = iter(jobs)
    size = max(min(BATCH, len(jobs) // (2 * workers)), 1)
    waiting: deque[Future[list[Any]]] = deque()
    while True:
        while len(waiting) < workers * AHEAD and (batch := list(islice(rest, size))):
            waiting.append(submit(batch))
        if not waiting:
            return
        yield from waiting.popleft().result()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupt is for whoever started us
    gc.freeze()
