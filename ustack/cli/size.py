"""Sizes on the command line."""

from __future__ import annotations

from typing import Any

import click

from ustack.daemon.size import EXAMPLES, parse_size


class Size(click.ParamType[int]):
    """Bytes with an optional K, M, G or T (powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError:
            self.fail(f"{value!r} is no size: allowed is {EXAMPLES}", param, ctx)
