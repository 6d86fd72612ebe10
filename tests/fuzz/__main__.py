"""A campaign: `python -m tests.fuzz --frames 10000000 --seed 1`, which `make fuzz` runs."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.target import Target

SPAN = 200_000
"""Frames to one stack; then comes the next, with the next seed."""


def main() -> int:
    """Feed frames; 1 when something was left behind or nobody is accepted any more, with the seed that repeats it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    done = 0
    seed = arguments.seed
    while done < arguments.frames:
        frames = min(SPAN, arguments.frames - done)
        target = Target(seed)
        try:
            target.run(frames)
            accepts = target.accepts()
        except Exception:
            print(f"seed {seed}, frame {target.frames}", file=sys.stderr)
            raise
        left = target.close()
        if left or not accepts:
            print(f"seed {seed}: accepts {accepts}, left behind {left}", file=sys.stderr)
            return 1
        done += frames
        seed += 1
        print(f"{done} frames", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
