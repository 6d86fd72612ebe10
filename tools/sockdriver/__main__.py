"""`python -m tools.sockdriver`: see the package."""

from __future__ import annotations

import asyncio
import logging
import os
import selectors

from tools.sockdriver.driver import Driver


def main() -> None:
    """Run until stdin ends, `bye`, or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="sockdriver: %(message)s")  # stderr
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever prints, stdout carries nothing but replies
    # select(2) takes its timeout in microseconds, where epoll and uvloop round to the next millisecond: timers are on time.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(Driver(0, replies).run())


if __name__ == "__main__":
    main()
