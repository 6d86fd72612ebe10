"""Where things are by default."""

from __future__ import annotations

import os


def default_control_path() -> str:
    """The control socket's path: under /run for root, in the user's runtime folder for others (XDG base directories)."""
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    return f"{runtime}/ustack/control.sock"
