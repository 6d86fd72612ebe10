"""What the checker found about the reserve, as lines to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ustack.lab.model.checker import Result, Step
    from ustack.lab.model.reserve_model import ReserveModel, ReserveState


def trace_lines(model: ReserveModel, result: Result[ReserveState]) -> list[str]:
    """The counterexample, a line for each step, with where the pages are after it. Empty when there is none."""
    if not result.trace:
        return []
    lines = ["   free  ring  blocked  sending  received", _line(model, 0, model.first(), "the ring is full, no pressure yet")]
    for number, step in enumerate(result.trace, 1):
        lines.append(_line(model, number, step.state, step.text))
        if number == result.lost:
            lines.append("   -- from here on no request can be completed")
    if result.cycle:
        lines.append("   -- and for ever:")
        lines += [
            _line(model, len(result.trace) + number, step.state, step.text) for number, step in enumerate(result.cycle, 1)
        ]
    else:
        lines.append("   -- nothing can happen any more: " + "; ".join(_reasons(model, _last(result.trace))))
    return lines


def _last(trace: list[Step[ReserveState]]) -> ReserveState:
    return trace[-1].state


def _line(model: ReserveModel, number: int, state: ReserveState, text: str) -> str:
    ring = "".join("r" if reserved else "o" for reserved in state.ring).ljust(model.posted, "-") if model.linear else "full"
    held = f"{state.unread}+{state.ahead.bit_count()}"
    sending = state.written - state.acked
    return f"{number:2} {model.free(state):4}  {ring:4}  {state.blocked:7}  {sending:7}  {held:>8}  {text}"


def _reasons(model: ReserveModel, state: ReserveState) -> list[str]:
    """Why the exchange does not go on from `state`, in which nothing can happen."""
    free = model.free(state)
    reasons = [f"{state.blocked} pages are blocked sockets'"]
    if model.linear and not state.ring:
        reasons.append("the ring is empty" + (", and may not use the reserve" if free and not model.emergency else ""))
    if not free:
        reasons.append("no page is free")
    elif free <= model.reserve and not model.memalloc:
        reasons.append("the NBD socket may not use the reserve")
    elif model.admission and free * 2 <= model.reserve and state.written == 0:
        reasons.append("not more than half of the reserve is free, so no request may begin")
    if state.ahead:
        reasons.append(f"{state.ahead.bit_count()} out-of-order frames wait for the one before them")
    return reasons
