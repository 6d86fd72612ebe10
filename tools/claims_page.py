#!/usr/bin/env python3
"""Write the article about the dispute of 2006, its tables and its plots, from what `ustack pressure claims --json` says.

    python -m tools.claims_page [FILE]

FILE has the JSON; without it, the claims are measured now, which takes some seconds. The plots need matplotlib (the extra
`docs`). tests/docs/test_claims_page.py fails when the page is not what a new measurement would write, figures within 5 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pools.nta import V2
from ustack.lab.claims.registry import SEED, Terms, claims
from ustack.lab.trace import replay
from ustack.lab.traffic import workloads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from matplotlib.axes import Axes

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
PAGE: Final = DOCS / "claims.md"
PLOTS: Final = DOCS / "claims"

Report = dict[str, Any]

POOLS: Final[dict[str, dict[str, Any]]] = {
    "kmalloc": {"lanes": 1},
    "nta": {"lanes": 1, "version": V2._replace(initial_regions=1)},
    "srog": {},
    "page_per_object": {"max_order": 2},
    "page_frag": {"lanes": 1},
}
"""All pools, with one lane, and nothing taken in advance."""

WORKLOADS: Final = {
    "mtu+ack": "A bulk transfer: two full Ethernet frames for each ACK, 400 alive on average",
    "jumbo": "Frames of 9018 bytes",
    "odd": "Local sockets: any size from 64 bytes to 16 KiB",
    "grains": "19, 37 and 79 grains of 64 bytes in equal shares, no heads",
    "long-lived": "The bulk transfer, with 2% that stay",
    "sent": "The bulk transfer as its sender has it: each packet with a clone, so that it takes two heads",
    "burst": "1500 packets of a bulk transfer, of which 15 are left in the end",
    "standing": "400 packets, of which now and then one is replaced",
}

INTRODUCTION: Final = """\
# Who was right in 2006

In August 2006 Evgeniy Polyakov posted a network memory allocator, NTA, to linux-kernel. Peter Zijlstra, who was at work on
swapping over the network, had posted one of his own two days before, SROG. In the argument that followed, both said much
about SLAB, about each other's design, and about whether an allocator can keep a machine alive that swaps over the network;
and neither ran the other's test. The allocators are all here, as [pools](explanation/pools/index.md) that count as the
originals did, and so is the network: the tests can be run.

This page is made from the output of `ustack pressure claims --json`. Each line of its tables is an experiment: it has the
number of a claim, who made it (EP is Polyakov, PZ is Zijlstra, DP is Daniel Phillips, AKPM is Andrew Morton), and a verdict,
which is computed from what was measured. `ustack pressure claims --only 18` repeats number 18. The traffic is seeded, so what
is repeated is the same to the last byte, except for times.

In short: they argued about different things, and each was right about his own. Polyakov spoke of packing and of allocations
that succeed, and NTA packs best and heals, as long as packets are short-lived. Zijlstra spoke of the time until one socket is
served when everything else is stuck; for that it takes a reserve and a rule about who may be dropped, and any allocator will
do. A pool of its own saves nobody: blocked sockets fill it as they fill the machine's. Limits save those who stay below them.
And the reserve that is needed can be computed; it is a few requests large.

Some of what came out we had not expected. Another size class makes Ethernet frames cheaper by the account and saves no page. A
page for each packet is not enough to show it to a process, since the packet before has left its bytes there. And where posted
receive buffers stay posted, next to nothing is needed to read: what cannot be kept is dropped, and comes again.

## The same traces on every pool

A trace is a list of allocations and frees; every pool gets the same. What is lost inside is 1 - requested/charged, what is
lost between is 1 - charged/held, and waste is both together: the share of the pages held that nobody asked for, on average
over the trace. SROG and page_per_object charge whole pages, so that nearly all of their losses are inside; page_frag
charges the bytes of a fragment and holds 32 KiB for it, so that all of its losses are between. page_per_object has blocks
of up to four pages here, because its pages alone refuse a jumbo frame.
"""

SECTIONS: Final[tuple[tuple[str, str, tuple[int, ...], tuple[tuple[str, str], ...]], ...]] = (
    (
        "Who is served when memory is out",
        """\
This is what the thread was about. A machine swaps to a disk that is behind its network. To free memory it must send a page,
and to send a page it must receive the acknowledgment and the answer, for which it needs memory. Programs that do not read hold
all of it.

Here the machine is a stack with a megabyte of packet memory and a receive ring as in 2006; a peer sends to sockets that nobody
reads until they get no more, and goes on sending; and 50 pages are to be swapped. Without a reserve not one is, on any
allocator (7), and having had a pool of one's own is no help (6). Limits for each socket help exactly as far as they add up to
less than the memory (8); a limit for all of TCP helps as long as nobody uses UDP (9, 11). A pool that grows has what is left
when it grows, and no more (14, 15).

With the reserve under the watermark of the same allocator, and one flag on the socket of the disk, every page is swapped and
nobody waits noticeably, on all six (7, 13). Zijlstra had the requirement right. That it took an allocator of its own, SROG, he
took back himself two weeks later.

Polyakov's question which sockets are critical has an answer for protocols, and none for people: a new hardware address of the
server is learned while memory is out, since ARP needs no memory of an ordinary kind; the administrator who would like to log in
does not get in (43). And Phillips was right that somebody must bound what is in flight: the reserve is made for so many
requests, and with more of them it runs out (44).
""",
        (6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 43, 44, 45, 46),
        (),
    ),
    (
        "How much of a page is of use",
        """\
Polyakov's case against powers of two is exact to the byte, and it is half of the truth. A jumbo frame in a chunk of NTA
wastes nothing inside; but a region of 16 KiB, which is what the first version had, holds one of them, and the rest of the
region is as lost as if it had been rounded up. The second version has regions twice as large, and that is what makes the
claim true. The size of the region, not that of the grain, decides.

The two pairs of figures for size-64 were quoted as if one of them had to be wrong. A cache that has seen a burst looks like
the one, a cache that has not looks like the other. And the counter-test with 19, 37 and 79 grains, read as bytes by
Polyakov and run by nobody, takes about one part in twenty: less than what any other pool loses to the same sizes.
""",
        (16, 17, 18, 19, 20, 21, 22, 30, 40),
        (("overhead-by-size", "Bytes lost for each byte requested, by the size of the request."),),
    ),
    (
        "Another size class",
        """\
Zijlstra's answer to the waste of powers of two was to profile, and add a class; Polyakov's was that this does not scale.
A class of 1856 bytes should help Ethernet frames, one would think. By the account it does: it removes more than half of
what they waste of their charge. But two objects of 1856 bytes fit a page, and so do two of 2048. SLAB makes its
slabs no larger to fit more on them, so a class for jumbo frames saves nothing either. Where one more object does fit a
page, a class is worth having: that can be computed, and `pools.adviser` does.
""",
        (25, 26),
        (),
    ),
    (
        "Pages in one piece, and pages that come back",
        """\
Here Zijlstra was right, and for a simple reason: when the pages that are free lie at random places, there are next to no
free neighbours. Single pages are always to be had. Packet split, which some drivers did and others did not, is all the
difference.

What comes back after a burst is a question of how many packets share a page, and of how many stay. For Ethernet frames SLAB
is not bad: only two of them share a page. It is bad for small objects, and the heads of packets are such, as
Polyakov said. NTA as posted gives nothing back at all, which is a matter of code that was not written, not of the design.

Self-defragmentation is real. It ends with the first packet that waits in a queue: since nothing can be moved, what stays
cuts the regions, and the longer the traffic has gone on, the more evenly it is spread. SROG has the same enemy. A packet
that stays pins its page, and the page allocator is in pieces.
""",
        (23, 24, 28, 29, 31, 32, 39, 42),
        (
            ("broken-memory", "The share of the free memory that can be had in blocks of 1, 2, 4 and 8 pages."),
            ("back-after-a-burst", "The share of the pages that is back when 99% of a burst has been freed at random."),
            ("self-defragmentation", "NTA: jumbo frames that fit beside 60 survivors, by the share of packets that stayed."),
        ),
    ),
    (
        "Packets on pages of their own",
        """\
SROG keeps its promise to the page, if a freed piece is put where it belongs. As posted it is always put in front, and the
page of a packet with a clone is lost in five of six orders. It also tells exactly how many more packets there is memory
for; clones of Ethernet frames do not even disturb that.

That the two designs would meet in the end does not follow from anything measured here. They buy different things with the
same pages: NTA serves nearly twice as many frames from the same reserve, and SROG has the reserve back when they are gone.
""",
        (33, 34, 35, 41),
        (),
    ),
    (
        "Speed",
        """\
NTA was posted with figures of a web server, and nobody else ran one. Here it makes no difference. In Python an allocation is a
matter of a microsecond or two in a request of many hundred, so the honest answer is the share: what the allocator could win at
most. Where the rest of a packet's way is compiled as well, it would be more.
""",
        (36,),
        (),
    ),
    (
        "Memory that belongs to a CPU",
        """\
Both SLAB and NTA keep memory near the CPU that uses it, and both pay for it in memory that is free and of no use. SLAB pays
in seconds, until its reaper has come round often enough. NTA pays in what is parked for an owner, and as posted an owner
that never frees never gets it back: a receive path that hands its packets to others is just that. A reserve that is divided
among CPUs is not a reserve.
""",
        (27, 37, 38),
        (),
    ),
    (
        "Pages that others can see",
        """\
Zero-copy was to be the reason for NTA. Zijlstra's objection, that two packets on a page show one process the bytes of the
other, holds for every pool that packs. The answer, to copy when the neighbour belongs to somebody else, costs half of the
packets or all of them, depending on a policy that was not stated.

A page for each packet, however, is not enough. What a packet does not fill of its page shows the packet that was there
before, on SROG and page_per_object as well; and on SROG it shows the head of the packet, which has the kernel's pointers in
it. A receiver may be shown pages that hold nothing but its own bytes, and that have been cleared.
""",
        (1, 2, 3, 4, 5),
        (("copied", "The share of packets that are copied when they share pages, by policy."),),
    ),
)

EXPECTED: Final = """\
## Where we had expected something else

Before anything was measured, an expectation was written down for each claim. These were wrong, or not quite right; the
measurement stands.
"""


def measure() -> tuple[list[Report], dict[str, dict[str, Report]]]:
    """All claims and all traces."""
    return [claim.report(Terms()) for claim in claims()], replay_all()


def replay_all() -> dict[str, dict[str, Report]]:
    """The figures of every pool on every trace."""
    figures: dict[str, dict[str, Report]] = {}
    for name, trace in workloads(SEED).items():
        for pool, options in POOLS.items():
            result = replay(trace, pool, **options)
            figures.setdefault(name, {})[pool] = {
                "internal": result.mean.internal,
                "external": result.mean.external,
                "waste": result.mean.waste,
                "peak": result.peak.pages,
                "end": result.end.pages,
                "failures": result.failures,
            }
    return figures


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def trace_tables(figures: dict[str, dict[str, Report]]) -> Iterator[str]:
    """A table for each trace."""
    for name, title in WORKLOADS.items():
        yield f"{title}:\n"
        yield row("pool", "lost inside", "lost between", "waste", "pages at the peak", "pages at the end", "refused")
        yield "|-|-|-|-|-|-|-|"
        for pool, of in figures[name].items():
            inside, between, waste = (
                f"{of[key] + 0.0:.1%}".replace("-0.0%", "0.0%") for key in ("internal", "external", "waste")
            )
            yield row(pool, inside, between, waste, f"{of['peak']:.0f}", f"{of['end']:.0f}", of["failures"])
        yield ""


def claim_table(reports: Iterable[Report]) -> Iterator[str]:
    """The claims of a section."""
    yield row("#", "who", "claim", "verdict", "measured")
    yield "|-|-|-|-|-|"
    for report in reports:
        yield row(report["number"], report["who"], report["claim"], report["verdict"], report["measured"]["finding"])
    yield ""


def write_page(reports: list[Report], figures: dict[str, dict[str, Report]]) -> str:
    """The article."""
    by_number = {report["number"]: report for report in reports}
    lines = [INTRODUCTION, *trace_tables(figures)]
    for title, prose, numbers, plots in SECTIONS:
        lines += [f"## {title}\n", prose]
        lines += [f"![{caption}](claims/{plot}.svg)\n\n{caption}\n" for plot, caption in plots]
        lines += claim_table(by_number.pop(number) for number in numbers)
    assert not by_number, f"claims without a section: {sorted(by_number)}"
    lines.append(EXPECTED)
    priors = {claim.number: claim.prior for claim in claims()}
    lines += [row("#", "expected", "measured"), "|-|-|-|"]
    for report in reports:
        if report["measured"]["contradicts"]:
            lines.append(row(report["number"], priors[report["number"]], report["measured"]["contradicts"]))
    return "\n".join(lines) + "\n"


# Plots


def plot_overhead(axes: Axes, figures: Report) -> None:
    """Claim 21."""
    curves = figures["overhead by size"]
    for name in ("powers of two", "pages", "nta"):
        axes.plot([size / 1024 for size in curves["size"]], [100 * lost for lost in curves[name]], label=name, linewidth=1)
    axes.set(xlabel="size, KiB", ylabel="overhead, %", ylim=(0, 150))
    axes.legend()


def plot_copied(axes: Axes, figures: Report) -> None:
    """Claim 3."""
    names = list(figures["unshared pages only"])
    for shift, policy in ((-0.2, "page to one owner"), (0.2, "unshared pages only")):
        places = [place + shift for place in range(len(names))]
        axes.barh(places, [100 * figures[policy][name] for name in names], 0.4, label=policy)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="packets copied, %", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)


def plot_broken(axes: Axes, figures: Report) -> None:
    """Claim 24."""
    for order, shares in figures.items():
        free = [float(level.split("%")[0]) for level in shares]
        axes.plot(free, [100 * share for share in shares.values()], marker="o", markersize=3, label=order)
    axes.set(xlabel="pages free at random places, %", ylabel="of the free memory, %", ylim=(0, 103))
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.95))


def plot_back(axes: Axes, figures: Report) -> None:
    """Claim 29."""
    names = list(figures["packets"])
    for shift, kind in ((-0.2, "packets"), (0.2, "64 bytes")):
        places = [place + shift for place, name in enumerate(names) if name in figures[kind]]
        axes.barh(places, [100 * share for share in figures[kind].values()], 0.4, label=kind)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="pages that are back, %", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2)


def plot_healing(axes: Axes, figures: Report) -> None:
    """Claim 39."""
    shares = figures["jumbo frames that fit, by share that stays"]
    stayed = {float(name.rstrip("%")): 100 * share for name, share in shares.items() if name != "0%"}
    axes.plot(list(stayed), list(stayed.values()), marker="o", markersize=3)
    axes.set(xlabel="packets that stay, %", ylabel="jumbo frames that fit, %", ylim=(70, 101))


DRAWINGS: Final = {
    "overhead-by-size": (21, plot_overhead),
    "copied": (3, plot_copied),
    "broken-memory": (24, plot_broken),
    "back-after-a-burst": (29, plot_back),
    "self-defragmentation": (39, plot_healing),
}


def draw(reports: list[Report]) -> None:
    """Write the plots."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ustack", "font.size": 9})
    by_number = {report["number"]: report for report in reports}
    PLOTS.mkdir(exist_ok=True)
    for name, (number, drawing) in DRAWINGS.items():
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        drawing(axes, by_number[number]["measured"]["figures"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Write the page and its plots."""
    if len(sys.argv) > 1:
        reports, figures = json.loads(Path(sys.argv[1]).read_text()), replay_all()
    else:
        reports, figures = measure()
    draw(reports)
    PAGE.write_text(write_page(reports, figures))
    print(PAGE)


if __name__ == "__main__":
    main()
