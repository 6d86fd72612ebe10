"""The corpus, replayed, and a short campaign: no exception, no invariant broken, nothing left, and connections are accepted."""

from __future__ import annotations

import pytest

from tests.fuzz.target import Target, corpus

FRAMES = 800


def test_the_corpus_does_no_harm() -> None:
    target = Target(1)
    for frame in corpus().values():
        target.replay(frame)
        target.replay(frame[:-1])
        target.replay(frame + b"\0")
    assert target.accepts()
    assert not target.close()


@pytest.mark.sim
def test_frames_that_no_good_host_sends(seed: int) -> None:
    target = Target(seed)
    target.run(FRAMES if seed else 4 * FRAMES)
    assert target.accepts()
    assert not target.close()
