"""Claims 25 and 26: would it have been enough to give kmalloc another size class?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pools.adviser import advise, page_share
from pools.kmalloc import KmallocPool
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim
from ustack.lab.trace import Replay, Step, Trace, make_pool
from ustack.lab.traffic import SHINFO, churn, jumbo, mtu_and_ack, odd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from ustack.lab.trace import Result

CLASSES: Final = 3
"""Classes that may be added."""


def with_classes(trace: Trace, classes: tuple[int, ...]) -> Result:
    """Replay a trace on kmalloc with classes added."""
    pool = make_pool("kmalloc", 16384, lanes=1)
    assert isinstance(pool, KmallocPool)
    for size in classes:
        pool.add_class(size)
    return Replay(pool, trace.heads).run(trace.steps)


def datagrams(_: Random) -> int:
    """1000 bytes and nothing else, as a service of its own protocol might send."""
    return 1000 + SHINFO


def mixed(random: Random) -> int:
    """Half a bulk transfer, half local sockets."""
    return mtu_and_ack(random) if random.random() < 0.5 else odd(random)


def traffic(terms: Terms) -> dict[str, Trace]:
    """The traces that are profiled, and those to which the profile is carried over."""
    packets = terms.size(4000, 40000)
    kinds = {"mtu+ack": mtu_and_ack, "datagrams": datagrams, "odd": odd, "mixed": mixed, "jumbo": jumbo}
    return {
        name: churn(name, sizes, packets=packets, live=1000, seed=terms.seed + number)
        for number, (name, sizes) in enumerate(kinds.items())
    }


@claim(
    25,
    "PZ",
    "One could profile, and add a size class for what is used most",
    prior="helps the traffic that was profiled, carries over in part",
)
def profiled_classes(terms: Terms) -> Outcome:
    """The best classes, three at most, for three kinds of traffic; what they save of its pages, and of other traffic's."""
    traces = traffic(terms)
    before = {name: with_classes(trace, ()) for name, trace in traces.items()}
    figures: dict[str, Figure] = {}
    saved: dict[tuple[str, str], tuple[float, float]] = {}
    chosen: dict[str, tuple[int, ...]] = {}
    for profiled in ("mtu+ack", "datagrams", "odd"):
        chosen[profiled] = advise(traces[profiled].live_sizes(), CLASSES).classes
        of_this: dict[str, Figure] = {"classes": list(chosen[profiled])}
        for name, trace in traces.items():
            after = with_classes(trace, chosen[profiled]).mean
            charged = 1 - after.charged / before[name].mean.charged
            pages = 1 - after.pages / before[name].mean.pages
            saved[profiled, name] = charged, pages
            of_this[name] = {"charged": charged, "pages": pages}
        figures[f"profile of {profiled}"] = of_this
    own = {name: saved[name, name][1] for name in chosen}
    helped = sum(pages > 0.05 for pages in own.values())
    return Outcome(
        "true" if helped == len(own) else "partly" if helped else "false",
        f"It depends on whether one more fits a page. A class of {', '.join(map(str, chosen['datagrams']))} saves "
        f"{own['datagrams']:.0%} of the pages of datagrams of 1000 bytes. The best for a bulk transfer "
        f"({', '.join(map(str, chosen['mtu+ack']))}) save {own['mtu+ack']:.1%} of its pages, the best for odd sizes "
        f"({', '.join(map(str, chosen['odd']))}) {own['odd']:.1%}, and carried over to mixed traffic "
        f"{saved['odd', 'mixed'][1]:.1%}.",
        figures,
    )


def adapting(trace: Trace, *, every: int) -> Result:
    """kmalloc with the classes that the adviser wants after each `every` steps, for what was alive since; at most `CLASSES`."""
    pool = make_pool("kmalloc", 16384, lanes=1)
    assert isinstance(pool, KmallocPool)
    run = Replay(pool, trace.heads)
    room = CLASSES

    def steps() -> Iterator[Step]:
        nonlocal room
        for start in range(0, len(trace.steps), every):
            yield from trace.steps[start : start + every]
            seen: dict[int, float] = {}
            for packet in run.live.values():
                seen[packet.size] = seen.get(packet.size, 0) + 1
            given = tuple(cache.size for cache in pool.general_caches())
            for size in advise(seen, room, classes=given).classes:
                pool.add_class(size)
                room -= 1

    return run.run(steps())


def signed(change: float) -> str:
    """A change in per cent; none at all is +0.0%."""
    return f"{round(change, 3) + 0.0:+.1%}"


@claim(
    26,
    "EP",
    "Profiling does not scale: kmalloc cannot know what will be used",
    prior="one class, such as 1856, removes most of the waste of Ethernet frames; its value falls with mixed traffic",
)
def what_a_profile_is_worth(terms: Terms) -> Outcome:
    """One class for Ethernet frames in bytes charged and in pages held, and classes added while the traffic changes."""
    traces = traffic(terms)
    plain, one = with_classes(traces["mtu+ack"], ()), with_classes(traces["mtu+ack"], (1856,))
    truesize = (plain.mean.internal - one.mean.internal) / plain.mean.internal
    pages = 1 - one.mean.pages / plain.mean.pages
    jumbo_gain = 1 - with_classes(traces["jumbo"], (9344,)).mean.pages / with_classes(traces["jumbo"], ()).mean.pages
    shift = len(traces["mtu+ack"].steps)
    bulk, local = traces["mtu+ack"].steps, traces["odd"].steps
    alive = {step.packet for step in bulk if step.size} - {step.packet for step in bulk if not step.size}
    ended = (Step(packet, 0) for packet in sorted(alive))
    changing = Trace("changing", (*bulk, *ended, *(step._replace(packet=step.packet + shift) for step in local)))
    nothing = with_classes(changing, ()).mean.pages
    early = with_classes(changing, advise(traces["mtu+ack"].live_sizes(), CLASSES).classes).mean.pages / nothing - 1
    online = adapting(changing, every=len(changing.steps) // 10).mean.pages / nothing - 1
    best = with_classes(changing, advise(changing.live_sizes(), CLASSES).classes).mean.pages / nothing - 1
    contradicts = ""
    if truesize > 0.3 and pages < 0.05:
        contradicts = (
            "a class of 1856 bytes makes frames cheaper by the account and saves no page: two fit a page, as two of 2048 did. "
            f"A class of 9344 for jumbo frames saves {jumbo_gain:.0%}, for SLAB takes no larger block to fit more than one on "
            f"it"
        )
    return Outcome(
        "true" if max(early, online) > best / 2 and pages < 0.05 else "partly" if early > best / 2 else "false",
        f"A class of 1856 bytes removes {truesize:.0%} of what Ethernet frames waste of their charge and {pages:.1%} of the "
        f"pages. "
        f"When the traffic changes, the pages held change by {signed(early)} with classes from an early profile, "
        f"{signed(online)} "
        f"with "
        f"classes added while it runs, and {signed(best)} with the best of hindsight.",
        {
            "class 1856, waste of charge removed": truesize,
            "class 1856, pages saved": pages,
            "class 9344, pages saved for jumbo frames": jumbo_gain,
            "share of a page for 1856": page_share(1856),
            "share of a page for 2048": page_share(2048),
            "change of pages when traffic changes": {"early profile": early, "while it runs": online, "hindsight": best},
        },
        contradicts,
    )
