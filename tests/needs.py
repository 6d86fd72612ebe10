"""What a test needs of the machine. Where it is missing, the test is skipped and says so; with CI=true it fails instead."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

BACKPORTS_QEMU = Path(__file__).parents[1] / "build/backports/usr/bin/qemu-nbd"
"""Where `tools/install-system-packages` unpacks a newer qemu-nbd when the system's is old."""


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


def require_userfaultfd() -> None:
    """Go on only where page faults can be handled by a program."""
    from ustack.nbd.userfaultfd import open_userfaultfd

    try:
        os.close(open_userfaultfd())
    except OSError as error:
        _missing(f"needs userfaultfd: {error.strerror}")


@cache
def extended_qemu_nbd() -> str:
    """A qemu-nbd that speaks extended headers, which version 8.2 was the first to do. It is skipped where there is none: the
    mirror may have no backports."""
    for program in (shutil.which("qemu-nbd"), str(BACKPORTS_QEMU)):
        if program is not None and Path(program).exists():
            said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.search(r"qemu-nbd (\d+)\.(\d+)", said)
            if version is not None and (int(version[1]), int(version[2])) >= (8, 2):
                return program
    pytest.skip("no qemu-nbd of version 8.2 or newer: run tools/install-system-packages")


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
