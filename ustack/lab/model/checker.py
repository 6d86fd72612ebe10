"""An explicit-state checker: explores every state of a small model, and says whether it can get stuck.

A model is a first state and a function from a state to its steps; states are immutable and hashable. Some steps are progress.
Two questions are asked, in this order.

* Is there a state from which no progress can be reached any more? A deadlock, where nothing can happen at all, is the plain
  case; a system that keeps busy and never gets on is the other. In CTL: AG EF progress.
* Is there a fair run without progress? A run is fair when an action that can happen infinitely often does happen infinitely
  often (strong fairness) for each action that the model calls fair. Found as a strongly connected part of the graph without
  its progress steps; a part that starves a fair action is searched again without the states in which that action can happen
  (the emptiness check of Streett automata; Baier and Katoen, Principles of Model Checking, section 6.5).

The search is breadth first, so the way to the point of no return is a shortest one. Everything is kept in memory: meant for up
to some 100,000 states.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable


S = TypeVar("S", bound="Hashable")


class Step(NamedTuple, Generic[S]):
    """What may happen next: an `action` by name, what is told about it, where it leads, and whether that is progress."""

    action: str
    text: str
    state: S
    progress: bool = False


class Model(Protocol[S]):
    """What is checked."""

    @property
    def fair(self) -> frozenset[str]:
        """The actions that are not put off for ever."""

    def first(self) -> S:
        """The state in which everything begins."""

    def steps(self, state: S) -> Iterable[Step[S]]:
        """All that may happen in `state`. A step that changes nothing must not be among them."""


class Verdict(Enum):
    """What was found."""

    PROGRESS = "progress"
    """From every state, and in every fair run, there is progress again and again."""
    DEADLOCK = "deadlock"
    """A state can be reached in which nothing can happen."""
    STANDSTILL = "standstill"
    """A state can be reached after which much may happen, but never progress."""
    LIVELOCK = "livelock"
    """Progress stays possible, and a fair run avoids it for ever."""


class TooManyStates(Exception):
    """The model has more states than it was given room for."""


@dataclass(slots=True)
class Result(Generic[S]):
    """What was found, and how: `trace` leads from the first state to where it stands still (empty when there is progress).

    From `lost` on, an index into `trace`, no step leads to progress any more. `cycle` is what goes on for ever then, if
    anything does.
    """

    verdict: Verdict
    states: int
    steps: int
    trace: list[Step[S]] = field(default_factory=list)
    lost: int = 0
    cycle: list[Step[S]] = field(default_factory=list)


def check(model: Model[S], max_states: int = 500_000) -> Result[S]:
    """Explore `model` exhaustively. Raises TooManyStates beyond `max_states`."""
    graph, parents = _explore(model, max_states)
    count = sum(map(len, graph.values()))
    hopeful = _can_reach_progress(graph)
    for state in graph:  # in breadth-first order
        if state not in hopeful:
            return _stuck(graph, parents, state, count)
    part = _fair_part_without_progress(graph, model.fair)
    if part:
        entry = next(state for state in graph if state in part)
        way = _way_to(parents, entry)
        return Result(Verdict.LIVELOCK, len(graph), count, way, len(way), _around(graph, part, entry))
    return Result(Verdict.PROGRESS, len(graph), count)


_Graph = dict[S, list[Step[S]]]
_Parents = dict[S, "tuple[S, Step[S]] | None"]


def _explore(model: Model[S], max_states: int) -> tuple[_Graph[S], _Parents[S]]:
    first = model.first()
    graph: _Graph[S] = {}
    parents: _Parents[S] = {first: None}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        graph[state] = steps = list(model.steps(state))
        for step in steps:
            if step.state not in parents:
                parents[step.state] = (state, step)
                waiting.append(step.state)
        if len(parents) > max_states:
            raise TooManyStates(f"more than {max_states} states")
    return graph, parents


def _can_reach_progress(graph: _Graph[S]) -> set[S]:
    before: dict[S, list[S]] = {state: [] for state in graph}
    waiting: list[S] = []
    for state, steps in graph.items():
        for step in steps:
            before[step.state].append(state)
        if any(step.progress for step in steps):
            waiting.append(state)
    reached = set(waiting)
    while waiting:
        for state in before[waiting.pop()]:
            if state not in reached:
                reached.add(state)
                waiting.append(state)
    return reached


def _way_to(parents: _Parents[S], state: S) -> list[Step[S]]:
    way: list[Step[S]] = []
    link = parents[state]
    while link is not None:
        state, step = link
        way.append(step)
        link = parents[state]
    return way[::-1]


def _stuck(graph: _Graph[S], parents: _Parents[S], lost: S, count: int) -> Result[S]:
    """The way to the state `lost`, and on to where nothing happens any more, or the same again and again."""
    way = _way_to(parents, lost)
    on: _Parents[S] = {lost: None}
    waiting = deque([lost])
    while waiting:
        state = waiting.popleft()
        if not graph[state]:
            return Result(Verdict.DEADLOCK, len(graph), count, [*way, *_way_to(on, state)], len(way))
        for step in graph[state]:
            if step.state not in on:
                on[step.state] = (state, step)
                waiting.append(step.state)
    for part in _components({state: graph[state] for state in on}):
        if all(step.state in part for state in part for step in graph[state]):  # nothing leads out of it
            entry = next(state for state in on if state in part)
            way += _way_to(on, entry)
            return Result(Verdict.STANDSTILL, len(graph), count, way, len(_way_to(parents, lost)), _around(graph, part, entry))
    raise AssertionError("a finite graph has a part that nothing leads out of")


def _around(graph: _Graph[S], part: set[S], entry: S) -> list[Step[S]]:
    """A shortest way from `entry` within `part` back to `entry`."""
    parents: _Parents[S] = {}
    waiting = deque([entry])
    while waiting:
        state = waiting.popleft()
        for step in graph[state]:
            if step.progress or step.state not in part:
                continue
            if step.state == entry:
                way = [step]
                while state != entry:
                    link = parents[state]
                    assert link is not None
                    state, before = link
                    way.append(before)
                return way[::-1]
            if step.state not in parents:
                parents[step.state] = (state, step)
                waiting.append(step.state)
    return []


def _fair_part_without_progress(graph: _Graph[S], fair: frozenset[str]) -> set[S]:
    """States among which a fair run can go on for ever without progress; empty when there are none."""
    waiting = [set(graph)]
    while waiting:
        inside = waiting.pop()
        quiet = {
            state: [step for step in graph[state] if not step.progress and step.state in inside]
            for state in graph
            if state in inside
        }
        for part in _components(quiet):
            happens = {step.action for state in part for step in quiet[state] if step.state in part}
            if not happens:
                continue  # a single state that is left at once
            possible = {state: {step.action for step in graph[state]} & fair for state in part}
            starved = set().union(*possible.values()) - happens
            if not starved:
                return part
            rest = {state for state in part if not possible[state] & starved}
            if rest:
                waiting.append(rest)
    return set()


def _components(graph: _Graph[S]) -> list[set[S]]:
    """The strongly connected components of `graph` (Tarjan's algorithm, without recursion)."""
    order: dict[S, int] = {}
    low: dict[S, int] = {}
    stack: list[S] = []
    stacked: set[S] = set()
    found: list[set[S]] = []
    for root in graph:
        if root in order:
            continue
        order[root] = low[root] = len(order)
        stack.append(root)
        stacked.add(root)
        work = [(root, iter(graph[root]))]
        while work:
            state, rest = work[-1]
            for step in rest:
                after = step.state
                if after not in order:
                    order[after] = low[after] = len(order)
                    stack.append(after)
                    stacked.add(after)
                    work.append((after, iter(graph[after])))
                    break
                if after in stacked:
                    low[state] = min(low[state], order[after])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[state])
                if low[state] == order[state]:
                    part: set[S] = set()
                    while state not in part:
                        member = stack.pop()
                        stacked.remove(member)
                        part.add(member)
                    found.append(part)
    return found
