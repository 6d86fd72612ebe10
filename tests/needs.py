"""What a test needs of the machine. Where it is missing, the test is skipped and says so; with CI=true it fails instead."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def require_tool(name: str) -> str:
    """The path of the program `name`, which `tools/install-system-packages` provides."""
    path = shutil.which(name)
    if path is None:
        _missing(f"no program {name}: run tools/install-system-packages")
    return path


def require_root() -> None:
    """Go on only as root (network namespaces, devices)."""
    if os.geteuid() != 0:
        _missing("needs root")


def require_tun() -> None:
    """Go on only where TAP devices can be made."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        _missing("needs /dev/net/tun: modprobe tun, or give it to the container")


def require_path(path: Path, hint: str) -> Path:
    """`path`, where it exists; `hint` says how to get it."""
    if not path.exists():
        _missing(f"no {path}: {hint}")
    return path


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
