"""`python -m tools.swaplab host`: real swap over ustack on this machine, broken on purpose, verified page by page."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict

import click

from pools.base import names as pool_names
from tools.swaplab.host import Lab, Plan, Result
from ustack.lab.netns import enter_own


@click.group()
def main() -> None:
    """Real swap over ustack."""


@main.command()
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Runs with each pool.")
@click.option("--pool", "pools", multiple=True, type=click.Choice(pool_names()), help="Only this pool; may be repeated.")
@click.option("--limit", type=int, default=64, show_default=True, help="MiB that the program may have.")
@click.option("--hog", type=int, default=256, show_default=True, help="MiB that it touches.")
@click.option("--passes", type=int, default=3, show_default=True, help="Times that it checks every page.")
@click.option("--direct-io/--no-direct-io", default=True, show_default=True, help="Of the loop device.")
@click.option("--disturb/--quiet", default=True, show_default=True, help="Kill the server and cut the link in the second pass.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON a run.")
def host(
    runs: int, pools: tuple[str, ...], limit: int, hog: int, passes: int, direct_io: bool, disturb: bool, as_json: bool
) -> None:
    """Swap on this machine over FUSE and a loop device. Needs root; exit code 1 when a run was not verified."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up all the same
    enter_own()
    verified = 0
    total = 0
    for pool in pools or pool_names():
        for seed in range(1, runs + 1):
            result = run(Plan(pool, limit, hog, passes, seed, direct_io=direct_io, disturb=disturb))
            click.echo(json.dumps(asdict(result)) if as_json else result.line())
            total += 1
            verified += result.verdict == "VERIFIED"
    if not as_json:
        click.echo(f"{verified} of {total} verified")
    sys.exit(verified != total)


def run(plan: Plan) -> Result:
    """One run, from nothing to nothing."""
    with Lab(plan) as lab:
        return lab.run()


if __name__ == "__main__":
    main()
