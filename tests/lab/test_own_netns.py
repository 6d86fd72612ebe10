"""A network namespace of one's own: as root, and as somebody else, where it works or says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.running import environment

pytestmark = pytest.mark.root

ENTER = """
import ctypes, os, sys
from ustack.lab.netns import enter_own
if sys.argv[1] == "nobody":
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: a process that changed its user may not write its uid_map otherwise
try:
    enter_own()
except OSError as error:
    sys.exit(error.strerror)
print(os.geteuid(), os.stat("/proc/self/ns/net").st_ino)
"""


def enter(user: str) -> subprocess.CompletedProcess[str]:
    """Enter a namespace in a process of its own."""
    return subprocess.run([sys.executable, "-c", ENTER, user], env=environment(), capture_output=True, text=True)


def test_root_enters_and_is_elsewhere() -> None:
    done = enter("root")
    assert done.returncode == 0, done.stderr
    user, network = map(int, done.stdout.split())
    assert user == 0
    assert network != Path("/proc/self/ns/net").stat().st_ino


def test_an_ordinary_user_enters_as_root_of_it_or_is_told_what_is_missing() -> None:
    done = enter("nobody")
    if done.returncode == 0:
        assert done.stdout.startswith("0 ")
    else:
        assert "run as root" in done.stderr
