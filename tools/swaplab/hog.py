"""A program that needs more memory than it has: fills it with a pattern, and checks and rewrites every page, again and again.

    python hog.py MIB PASSES SEED

Every page has a pattern of its own that changes when it is rewritten, so that a page that comes back from the wrong place, or
from an earlier time, is noticed. Says one line of JSON about each pass. Exit code 1 when a page is wrong.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
from array import array
from hashlib import blake2b
from time import monotonic

PAGE = 4096
DIGEST = 64


def pattern(page: int, generation: int) -> bytes:
    """What must be on this page."""
    return blake2b(page.to_bytes(8, "little") + generation.to_bytes(8, "little"), digest_size=DIGEST).digest() * (
        PAGE // DIGEST
    )


def main(mib: int, passes: int, seed: int) -> int:
    """Fill, then `passes` times check all pages in random order and rewrite every second one."""
    pages = mib << 8
    memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = memoryview(memory)
    generations = array("L", bytes(8 * pages))
    order = array("L", range(pages))
    rng = random.Random(seed)
    began = monotonic()
    for page in range(pages):
        view[page * PAGE : (page + 1) * PAGE] = pattern(page, 0)
    say("fill", pages, monotonic() - began, 0.0)
    for number in range(passes):
        rng.shuffle(order)
        worst = 0.0
        began = monotonic()
        for turn, page in enumerate(order):
            wanted = pattern(page, generations[page])
            before = monotonic()
            at = page * PAGE
            same = view[at : at + PAGE] == wanted
            worst = max(worst, monotonic() - before)
            if not same:
                print(json.dumps({"wrong": page, "pass": number}), flush=True)
                return 1
            if turn & 1:
                generations[page] += 1
                view[at : at + PAGE] = pattern(page, generations[page])
        say(f"pass {number + 1}", pages, monotonic() - began, worst)
    print(json.dumps({"verified": pages * passes}), flush=True)
    return 0


def say(what: str, pages: int, seconds: float, worst: float) -> None:
    """One line of JSON: how many pages, in how many seconds, and the longest wait for one of them."""
    line = {
        "what": what,
        "pages": pages,
        "seconds": round(seconds, 3),
        "rate": round(pages / seconds),
        "worst": round(worst, 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4])))
