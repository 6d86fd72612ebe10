"""The reference pages that are made from the code say what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_reference_marks_what_the_daemon_refuses_to_change() -> None:
    """Every key that is not marked must be missing from the daemon's list, and the other way round."""
    from ustack.daemon.config import SECTIONS, parse
    from ustack.daemon.daemon import _fixed_changes

    page = (ROOT / "docs/reference/configuration.md").read_text()
    config = parse('[device]\nname = "tap0"\n[[address]]\naddress = "10.77.0.2/24"\n', "example")
    for name, section in SECTIONS.items():
        if name in ("address", "route", "nbd"):
            continue
        part = page.partition(f"\n## `[{name}]`\n")[2].partition("\n## ")[0]
        for key in section.model_fields:
            changed = config.model_copy(
                update={name: getattr(config, name).model_copy(update={key: object()})}  # anything else than it was
            )
            refused = bool(list(_fixed_changes(config, changed)))
            assert (f"| `{key}`\\* |" in part) == refused, f"[{name}] {key}"
