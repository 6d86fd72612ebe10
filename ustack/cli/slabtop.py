"""`ustack slabtop`: the caches of a running daemon's pool, live, as slabtop(1) shows the kernel's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from ustack.cli.control import call, control_option

if TYPE_CHECKING:
    from rich.table import Table

PAGE_KIB: Final = 4


class Cache(NamedTuple):
    """A line of slabinfo: objects in use and in all, their size in bytes, slabs, and pages of a slab."""

    name: str
    active: int
    objects: int
    size: int
    per_slab: int
    slabs: int
    slab_pages: int

    @property
    def pages(self) -> int:
        """Pages of all its slabs."""
        return self.slabs * self.slab_pages

    @property
    def use(self) -> float:
        """The share of the objects that is in use; those in the arrays of the lanes count, as in the kernel."""
        return self.active / self.objects if self.objects else 0.0


ORDERS: Final = {
    "active": lambda cache: -cache.active,
    "cache-size": lambda cache: -cache.pages,
    "name": lambda cache: cache.name,
    "objects": lambda cache: -cache.objects,
    "size": lambda cache: -cache.size,
    "slabs": lambda cache: -cache.slabs,
    "use": lambda cache: -cache.use,
}


def parse(slabinfo: str) -> list[Cache]:
    """The caches of a text in the format slabinfo 2.1."""
    caches = []
    for line in slabinfo.splitlines():
        if not line.startswith(("#", "slabinfo")):
            name, active, objects, size, per_slab, slab_pages, *rest = line.split()
            slabs = rest[rest.index("slabdata") + 2]
            caches.append(Cache(name, int(active), int(objects), int(size), int(per_slab), int(slabs), int(slab_pages)))
    return caches


def _table(caches: list[Cache], memory: dict[str, int]) -> Table:
    from rich.table import Table

    active = sum(cache.active * cache.size for cache in caches) >> 10
    held = sum(cache.pages for cache in caches) * PAGE_KIB
    title = f"objects {active} of {held} KiB in slabs; packet memory {memory['free'] >> 10} of {memory['size'] >> 10} KiB free"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("OBJS", "ACTIVE", "USE", "OBJ SIZE", "SLABS", "OBJ/SLAB", "CACHE SIZE"):
        table.add_column(column, justify="right")
    table.add_column("NAME")
    for cache in caches:
        table.add_row(
            str(cache.objects),
            str(cache.active),
            f"{cache.use:.0%}",
            str(cache.size),
            str(cache.slabs),
            str(cache.per_slab),
            f"{cache.pages * PAGE_KIB}K",
            cache.name,
        )
    return table


@click.command()
@click.option("-d", "--delay", type=click.FloatRange(min=0.1), default=3.0, metavar="SECONDS", help="Time between two looks.")
@click.option("-o", "--once", is_flag=True, help="Show it once and exit.")
@click.option("-s", "--sort", type=click.Choice(sorted(ORDERS)), default="objects", help="What comes first.")
@control_option
def slabtop(delay: float, once: bool, sort: str, control: str) -> None:
    """Show the caches of the pool, and go on showing them."""
    from rich.console import Console
    from rich.live import Live

    def table() -> Table:
        caches = sorted(parse(call(control, "slabinfo")), key=ORDERS[sort])
        return _table(caches, call(control, "memory"))

    console = Console()
    if once or not console.is_terminal:
        console.print(table())
        return
    with Live(table(), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(delay)
                live.update(table(), refresh=True)
        except KeyboardInterrupt:
            pass
