"""The checker finds what it should in small puzzles; the reserve model keeps its promises, and each rule left out is found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from ustack.cli import main
from ustack.lab.model.checker import Step, TooManyStates, Verdict, check
from ustack.lab.model.report import trace_lines
from ustack.lab.model.reserve_model import ReserveModel, ReserveState, configurations

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Graph:
    """A model spelt out: `edges` maps a state to the states that follow; an upper-case action is progress."""

    edges: dict[int, list[tuple[str, int]]]
    fair: frozenset[str] = frozenset()

    def first(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[Step[int]]:
        for action, after in self.edges.get(state, []):
            yield Step(action, action, after, action.isupper())


def test_a_model_that_gets_on_for_ever() -> None:
    result = check(Graph({0: [("a", 1)], 1: [("P", 0)]}))
    assert (result.verdict, result.states, result.steps, result.trace) == (Verdict.PROGRESS, 2, 2, [])


def test_the_shortest_way_into_a_deadlock_and_where_it_was_lost() -> None:
    edges = {0: [("long", 1), ("wrong", 3)], 1: [("way", 2)], 2: [("P", 0), ("wrong", 3)], 3: [("on", 4)]}
    result = check(Graph(edges))
    assert result.verdict is Verdict.DEADLOCK
    assert [step.action for step in result.trace] == ["wrong", "on"]
    assert result.lost == 1


def test_being_busy_without_a_chance_is_no_progress() -> None:
    result = check(Graph({0: [("P", 0), ("in", 1)], 1: [("there", 2)], 2: [("back", 1)]}))
    assert result.verdict is Verdict.STANDSTILL
    assert [step.action for step in result.trace] == ["in"]
    assert [step.action for step in result.cycle] == ["there", "back"]


def test_a_fair_run_that_avoids_progress_for_ever_is_found() -> None:
    edges = {0: [("there", 1), ("P", 0)], 1: [("back", 0)]}
    result = check(Graph(edges))
    assert result.verdict is Verdict.LIVELOCK
    assert [step.action for step in result.cycle] == ["there", "back"]
    assert check(Graph(edges, frozenset({"P"}))).verdict is Verdict.PROGRESS, "possible again and again, so it happens"


def test_a_cycle_is_searched_again_without_the_states_in_which_a_fair_action_starves() -> None:
    edges = {0: [("a", 1), ("P", 0)], 1: [("b", 0), ("c", 2)], 2: [("d", 1)]}
    result = check(Graph(edges, frozenset({"P"})))
    assert result.verdict is Verdict.LIVELOCK
    assert sorted(step.action for step in result.cycle) == ["c", "d"]


def test_two_philosophers_starve_unless_one_is_left_handed() -> None:
    @dataclass
    class Philosophers:
        orders: tuple[tuple[int, int], tuple[int, int]]
        fair: frozenset[str] = frozenset({"take 0", "take 1", "EAT 0", "EAT 1"})

        def first(self) -> tuple[int, int]:
            return (0, 0)  # how many forks each holds

        def steps(self, state: tuple[int, int]) -> Iterator[Step[tuple[int, int]]]:
            taken = {self.orders[who][n] for who in (0, 1) for n in range(state[who])}
            for who in (0, 1):
                held = state[who]
                if held == 2:
                    after = (0, state[1]) if who == 0 else (state[0], 0)
                    yield Step(f"EAT {who}", "", after, True)
                elif self.orders[who][held] not in taken:
                    after = (held + 1, state[1]) if who == 0 else (state[0], held + 1)
                    yield Step(f"take {who}", "", after)

    assert check(Philosophers(((0, 1), (1, 0)))).verdict is Verdict.DEADLOCK
    assert check(Philosophers(((0, 1), (0, 1)))).verdict is Verdict.PROGRESS


def test_a_model_larger_than_its_room_is_refused() -> None:
    with pytest.raises(TooManyStates):
        check(Graph({n: [("a", n + 1)] for n in range(100)}), max_states=50)


# -- the reserve --

VERDICTS = {
    "paged": True,
    "paged, no reserve": False,
    "paged, NBD socket not memalloc": False,
    "paged, out of order, given up": True,
    "paged, out of order, never given up": False,
    "linear": True,
    "linear, no reserve": False,
    "linear, NBD socket not memalloc": False,
    "linear, no drop rule": False,
    "linear, ring never from the reserve": False,
    "linear, reserve as large as the ring": False,
    "linear, out of order, reserve for it": True,
    "linear, out of order, reserve too small": False,
    "linear, admission, larger reserve": True,
    "linear, admission, reserve twice the ring": False,
    "linear, no reserve, blocked are limited": True,
    "linear, head last": True,
    "linear, head last, no drop rule": True,
    "linear, head last, no reserve": False,
}


@pytest.mark.parametrize("model", configurations(), ids=lambda model: model.name)
def test_with_all_rules_there_is_progress_and_each_rule_left_out_is_a_deadlock(model: ReserveModel) -> None:
    assert check(model).verdict is (Verdict.PROGRESS if VERDICTS[model.name] else Verdict.DEADLOCK)


def test_no_page_is_lost_or_held_twice_in_any_state() -> None:
    for model in configurations():
        seen: set[ReserveState] = set()
        waiting = [model.first()]
        while waiting:
            state = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            assert 0 <= model.free(state) <= model.pages
            assert 0 <= state.acked <= state.reached <= state.written <= model.depth * model.request
            assert not state.ahead & 1, "the next expected frame is never out of order"
            assert state.unread + state.ahead.bit_count() <= model.window
            for step in model.steps(state):
                assert step.state != state
                waiting.append(step.state)


def bounded(linear: bool, reserve: int, posted: int, depth: int, request: int, reply: int, window: int) -> ReserveModel:
    """All rules, with memory for the ring, the reserve and two ordinary frames."""
    return ReserveModel(
        name="",
        linear=linear,
        reserve=reserve,
        pages=reserve + posted + 2,
        posted=posted,
        depth=depth,
        request=request,
        reply=reply,
        window=window,
    )


@pytest.mark.parametrize(
    "bounds",
    [
        *product((False,), (1,), (1, 2, 3), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        *product((True,), (1, 2), (1, 2), (1, 2), (1, 3), (1, 4)),
    ],
)
def test_the_smallest_reserve_with_progress_is_the_one_computed(bounds: tuple[bool, int, int, int, int, int]) -> None:
    linear, *sizes = bounds
    enough = bounded(linear, 0, *sizes).enough
    assert check(bounded(linear, enough, *sizes)).verdict is Verdict.PROGRESS
    assert check(bounded(linear, enough - 1, *sizes)).verdict is not Verdict.PROGRESS


@pytest.mark.parametrize("more", range(4))
def test_a_larger_reserve_is_as_good(more: int) -> None:
    for linear in (False, True):
        model = bounded(linear, 0, 2, 2, 1, 2, 2)
        reserve = model.enough + more
        assert check(replace(model, reserve=reserve, pages=reserve + 4)).verdict is Verdict.PROGRESS


def test_admission_wants_a_reserve_of_more_than_twice_the_ring() -> None:
    for posted in (1, 2):
        for more, verdict in ((0, Verdict.DEADLOCK), (1, Verdict.PROGRESS)):
            model = bounded(True, 2 * posted + more, posted, 1, 1, 1, 1)
            assert check(replace(model, admission=True)).verdict is verdict


def test_blocked_sockets_are_harmless_below_a_limit_and_deadly_at_the_whole_pool() -> None:
    unprotected = next(model for model in configurations() if model.name == "linear, no reserve, blocked are limited")
    verdicts = [check(replace(unprotected, limit=limit)).verdict for limit in range(unprotected.pages + 1)]
    harmless = verdicts.index(Verdict.DEADLOCK)
    assert 0 < harmless < unprotected.pages
    assert set(verdicts[harmless:]) == {Verdict.DEADLOCK}


# -- what is shown --


def test_the_trace_says_where_it_is_lost_and_why() -> None:
    model = next(model for model in configurations() if model.name == "linear, no drop rule")
    lines = trace_lines(model, check(model))
    assert any("takes a buffer from the reserve along" in line for line in lines)
    assert sum("no request can be completed" in line for line in lines) == 1
    assert (
        lines[-1].strip() == "-- nothing can happen any more: 7 pages are blocked sockets'; the ring is empty; no page is free"
    )


def test_the_program_prints_the_table_and_the_traces_that_were_asked_for() -> None:
    done = CliRunner().invoke(main, ["pressure", "model", "paged", "--trace"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "paged, no reserve: deadlock" in done.output
    assert "linear" not in done.output


def test_the_program_refuses_a_name_that_no_configuration_has() -> None:
    done = CliRunner().invoke(main, ["pressure", "model", "circular"])
    assert done.exit_code == 2
    assert "no configuration begins with 'circular'" in done.output
