"""The program `ustack` as a whole: its commands are there, help is quick, and mistakes are told from failures."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from tests.daemon.running import environment
from ustack.cli import COMMANDS, main
from ustack.cli.ping import _line, _milliseconds

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = ("asyncio", "pydantic", "pyroute2", "rich", "uvloop", "ustack.stack")


def test_help_lists_every_command_with_a_sentence() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    for name in COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) > 4


def test_help_imports_nothing_heavy() -> None:
    """What is imported decides how long a user waits for help."""
    code = (
        "import sys\nfrom ustack.cli import main\n"
        f"try: main(['--help'])\nexcept SystemExit: print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


def test_an_unknown_command_is_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["frobnicate"])
    assert done.exit_code == 2
    assert "No such command 'frobnicate'" in done.output


@pytest.mark.parametrize("arguments", [["10.0.0.1"], ["10.0.0.1", "0"], ["10.0.0.1", "http"], ["1", "2", "3"], ["-l", "70000"]])
def test_nc_without_a_place_to_go_is_a_usage_error(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, ["nc", *arguments]).exit_code == 2


@pytest.mark.parametrize("size", ["0", "1000", "-1", "many"])
def test_a_demo_of_an_odd_size_is_a_usage_error(size: str) -> None:
    done = CliRunner().invoke(main, ["demo", "--size", size])
    assert done.exit_code == 2
    assert "allowed is" in done.output


def test_the_daemon_checks_a_file_without_starting(tmp_path: Path) -> None:
    file = tmp_path / "u.toml"
    file.write_text('[device]\nname = "tap0"\n[[address]]\naddress = "10.0.0.1/8"\n')
    assert CliRunner().invoke(main, ["daemon", "--check", "-c", str(file)]).exit_code == 0
    file.write_text("[device]\n")
    done = CliRunner().invoke(main, ["daemon", "--check", "-c", str(file)])
    assert done.exit_code == 2
    assert done.stderr == f"{file}: [device] name is missing\n"


@pytest.mark.parametrize(("value", "text"), [(0.0456, "0.046"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123")])
def test_ping_shows_three_digits_that_count(value: float, text: str) -> None:
    assert _milliseconds(value) == text


def test_ping_marks_duplicates_and_names_errors() -> None:
    reply = {"from": "10.0.0.1", "seq": 3, "bytes": 64, "ttl": 64, "time": None, "duplicate": True}
    assert _line(reply) == "64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 (DUP!)"
    assert _line({"to": "10.0.0.9", "seq": 1, "error": "Destination Host Unreachable"}) == (
        "To 10.0.0.9 icmp_seq=1 Destination Host Unreachable"
    )


def test_commands_are_click_commands() -> None:
    with click.Context(main) as ctx:
        assert all(isinstance(main.get_command(ctx, name), click.Command) for name in COMMANDS)
