"""Sizes as people write them: bytes, or a number with a unit that is a power of 1024."""

from __future__ import annotations

import re
from typing import Final

EXAMPLES: Final = 'bytes, or a string with a unit of K, M, G or T, such as "64M"'
"""What a size may look like, for messages."""

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes of "4096", "256K", "64M", "1GiB". Raises ValueError that says what a size looks like."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(EXAMPLES)
    return int(match[1]) << _UNITS[match[2].upper()]
