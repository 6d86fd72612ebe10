"""Random histories for every pool there is, by seed: `--seeds 10000` for a long night, `--seed N` to see one again."""

from __future__ import annotations

import pytest

from pools.base import by_name, names
from pools.srog import SrogPool
from pools.testing import soak


@pytest.mark.parametrize("name", names())
def test_pool_keeps_the_rules_in_a_random_history(name: str, seed: int) -> None:
    soak(by_name(name), operations=5000, seed=seed, check_every=100)


def test_srog_as_fallback_keeps_the_rules_in_a_random_history(seed: int) -> None:
    soak(lambda pages: SrogPool(pages, role="fallback"), operations=5000, seed=seed, check_every=100)
