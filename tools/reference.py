#!/usr/bin/env python3
"""Write the reference pages that are made from the code: the configuration file and the command line.

tools/reference.py            write them into docs/reference
tools/reference.py --check    say which are not up to date; exit code 1 if there are any
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

import click

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ustack.cli import main  # noqa: E402
from ustack.daemon.config import SECTIONS, Ipv4, Ipv6, Tcp, Udp  # noqa: E402
from ustack.daemon.daemon import MEM_KEYS  # noqa: E402
from ustack.net.ipv4 import Ipv4Config  # noqa: E402
from ustack.net.ipv6 import Ipv6Config  # noqa: E402
from ustack.transport.tcp.config import TcpConfig  # noqa: E402
from ustack.transport.udp import UdpConfig  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

FOLDER: Final = ROOT / "docs" / "reference"
ARRAYS: Final = frozenset({"address", "route", "nbd"})
WIDTH: Final = 100

CONFIGURATION: Final = """\
# Configuration file

`ustack daemon -c FILE` reads one file, in [TOML](https://toml.io). What it does not name has its default; a key that is not
listed here is refused. Where a size is asked for, a number is bytes, and a string may have a unit: `"64M"` is 67108864. Times
are seconds.

SIGHUP makes a running daemon read its file again. What is marked with * cannot change while it runs: then nothing of the new
file is applied, and the log says why.

The smallest file that works:

```toml
[device]
name = "tap0"

[[address]]
address = "10.77.0.2/24"
```
"""

FIXED: Final = {
    "device": "*",
    "address": "*",
    "ipv4": "*",
    "ipv6": "*",
    "arm": "*",
    "memory": {"pool", "size", "lock", "capture", "zero_copy"},
    "tcp": MEM_KEYS,
    "udp": "*",
    "control": "*",
}
"""What `ustack.daemon.daemon` does not change while it runs."""

SETTINGS: Final[dict[type, type]] = {Ipv4: Ipv4Config, Ipv6: Ipv6Config, Tcp: TcpConfig, Udp: UdpConfig}
"""Sections that are made from a dataclass, whose docstrings say what the keys mean."""

COMMAND_LINE: Final = """# Command line

One program, `ustack`. Commands that talk to a running daemon find it by its control socket. Exit codes: 0 for success, 1 for a
failure, 2 for a mistake in the arguments or the configuration, 130 after an interrupt; `ping` has those of ping.
"""


def configuration() -> str:
    """The page about the configuration file."""
    parts = [CONFIGURATION]
    for name, section in SECTIONS.items():
        heading = f"[[{name}]]" if name in ARRAYS else f"[{name}]"
        parts.append(f"\n## `{heading}`\n\n{inspect.getdoc(section)}\n\n| key | value | default | |\n|-|-|-|-|\n")
        documentation = _attribute_docstrings(SETTINGS[section]) if section in SETTINGS else {}
        for key, field in section.model_fields.items():
            mark = "\\*" if FIXED.get(name) == "*" or key in FIXED.get(name, ()) else ""
            text = documentation.get(key) or field.description or ""
            parts.append(f"| `{key}`{mark} | {_kind(field)} | {_default(field)} | {_one_line(text)} |\n")
    return "".join(parts)


def _kind(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return " or ".join(f'`"{value}"`' for value in get_args(field.annotation))
    if _is_size(field):
        return "size" if field.annotation is int else 'size, or `"auto"`'
    kind = next(each for each in get_args(field.annotation) or (field.annotation,) if each is not NoneType)
    plain = get_args(kind)[0] if get_args(kind) else kind  # what Annotated wraps
    return {str: "string", bool: "`true` or `false`", int: "integer", float: "number"}[plain]


def _is_size(field: FieldInfo) -> bool:
    return any(getattr(getattr(rule, "func", None), "__name__", "") in ("as_size", "_auto_or_size") for rule in field.metadata)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be there"
    value = field.default
    if value is None:
        return ""
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if _is_size(field) and value:
        shift, unit = max((shift, unit) for unit, shift in (("", 0), ("K", 10), ("M", 20)) if value % (1 << shift) == 0)
        return f'`"{value >> shift}{unit}"`' if unit else f"`{value}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The strings that follow the fields of a class."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = str(text.value.value)
    return found


def command_line() -> str:
    """The page about the program."""
    parts = [COMMAND_LINE]
    for path, text in _helps(main, None, "ustack"):
        parts.append(f"\n## {path}\n\n```text\n{text}\n```\n")
    return "".join(parts)


def _helps(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, parent, name, **settings)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            sub = command.get_command(context, each)
            assert sub is not None
            yield from _helps(sub, context, each)


PAGES: Final[dict[str, Any]] = {"configuration.md": configuration, "cli.md": command_line}


def run(arguments: list[str]) -> int:
    """Write or check the pages; returns the exit code."""
    stale = []
    for name, make in PAGES.items():
        path = FOLDER / name
        text = make()
        if "--check" in arguments:
            if not path.exists() or path.read_text() != text:
                stale.append(path.relative_to(ROOT))
        else:
            path.write_text(text)
    for page in stale:
        print(f"{page} is not up to date: run tools/reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
