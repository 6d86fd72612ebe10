"""`ustack nbd` as its users meet it: on uvloop, in a process of its own where it has to be."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from tests.nbd.test_tls import certificates
from tests.needs import require_tool
from ustack.cli.nbd import nbd
from ustack.cli.nbd_options import human_size
from ustack.nbd import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["certificates"]

SERVE = "import sys; from ustack.cli.nbd import nbd; nbd(['serve', *sys.argv[1:]])"


@contextmanager
def serving(*arguments: str) -> Iterator[list[str]]:
    """`ustack nbd serve` in another process; gives the URIs that it prints. It must end well when interrupted."""
    server = subprocess.Popen([sys.executable, "-c", SERVE, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        exports = arguments.count("--memory") + sum(not a.startswith("-") for a in arguments[:1])
        yield [server.stdout.readline().split("\t")[0] for _ in range(exports)]
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.communicate()


def ustack_nbd(*arguments: str, status: int = 0) -> Result:
    """Run the command in this process; it must end with this status."""
    result = CliRunner().invoke(nbd, arguments)
    assert result.exit_code == status, result.output
    return result


def test_info_looks_like_nbdinfo() -> None:
    with serving("--memory", "8M", "--port", "0") as (uri,):
        assert ustack_nbd("info", uri).stdout.splitlines() == [
            "protocol: newstyle-fixed without TLS, using extended packets",
            'export="memory":',
            "\texport-size: 8388608 (8M)",
            f"\turi: {uri}",
            "\tcontexts:",
            "\t\tbase:allocation",
            "\tis_rotational: false",
            "\tis_read_only: false",
            "\tcan_cache: true",
            "\tcan_df: true",
            "\tcan_fast_zero: true",
            "\tcan_flush: true",
            "\tcan_fua: true",
            "\tcan_multi_conn: true",
            "\tcan_trim: true",
            "\tcan_zero: true",
            "\tblock_size_minimum: 1",
            "\tblock_size_preferred: 4096",
            "\tblock_size_maximum: 33554432",
        ]
        assert ustack_nbd("info", "--size", uri).stdout == "8388608\n"


def test_map_looks_like_nbdinfos(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as image:
        image.truncate(8 << 20)
        image.seek(3 << 20)
        image.write(b"x" * 65536)
    with serving(str(tmp_path / "image"), "--port", "0") as (uri,):
        for options in ((), ("--totals",)):
            theirs = subprocess.run(
                [require_tool("nbdinfo"), "--map", *options, uri], capture_output=True, text=True, check=True
            )
            assert ustack_nbd("map", *options, uri).stdout == theirs.stdout
            theirs = subprocess.run(
                [require_tool("nbdinfo"), "--map", "--json", *options, uri], capture_output=True, text=True, check=True
            )
            assert json.loads(ustack_nbd("map", "--json", *options, uri).stdout) == json.loads(theirs.stdout)
        refused = ustack_nbd("map", "--context", "x:y", uri, status=1)
        assert "'x:y'" in refused.stderr


def test_bench_measures_and_writes_only_when_told_to() -> None:
    with serving("--memory", "8M", "--port", "0") as (uri,):
        options = ("--runtime", "0.05", "--iodepth", "4", "--bs", "4K")
        for pattern in ("read", "randread", "randwrite"):
            result = json.loads(ustack_nbd("bench", "--json", "--overwrite", "--rw", pattern, *options, uri).stdout)
            assert result["requests"] >= 4
            assert result["bytes-per-second"] == pytest.approx(4096 * result["iops"])
            assert 0 < result["latency-us"]["50"] <= result["latency-us"]["99.9"]
        assert "IOPS" in ustack_nbd("bench", *options, uri).stdout
        assert "--overwrite" in ustack_nbd("bench", "--rw", "write", uri, status=2).stderr
        assert "leaves no block" in ustack_nbd("bench", "--bs", "16M", uri, status=2).stderr


def test_servers_that_are_too_old_to_be_asked_are_used_for_a_moment() -> None:
    program = "import sys; from ustack.cli.nbd import nbd; nbd([*sys.argv[1:]])"
    for options, words in (("--mask-handshake=0", "newstyle without"), ("--no-sr", "newstyle-fixed without")):
        looking = shlex.join([sys.executable, "-c", program, "info"]) + " $uri"
        command = [require_tool("nbdkit"), "-U", "-", options, "memory", "1M", "--run", looking]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.startswith(f"protocol: {words} TLS, using simple packets\n")
        assert "export-size: 1048576 (1M)" in result.stdout


def test_a_failed_copy_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(random.Random(3).randbytes(1 << 20))
    old = tmp_path / "old"
    old.write_bytes(b"what was there before")
    pread = "if [ $4 -ge 2097152 ]; then echo EIO scratched >&2; exit 1; fi; dd if=/dev/zero bs=$3 count=1 2>/dev/null"
    broken = ["nbdkit", "-U", "-", "eval", "get_size=echo 4M", f"pread={pread}"]
    program = "import sys; from ustack.cli.nbd import nbd; nbd(['copy', '-S0', '--no-extents', *sys.argv[1:]])"
    for target in (tmp_path / "new", old):
        copying = shlex.join([sys.executable, "-c", program]) + f" $uri {shlex.quote(str(target))}"
        require_tool("nbdkit")
        result = subprocess.run([*broken, "--run", copying], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "scratched" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]
    assert old.read_bytes() == b"what was there before"


def test_json_has_the_keys_of_nbdinfo_and_list_has_every_export(tmp_path: Path) -> None:
    (tmp_path / "an image").write_bytes(bytes(512))
    with serving(str(tmp_path / "an image"), "--memory", "1M", "--read-only", "--unix", str(tmp_path / "socket")) as uris:
        listed = json.loads(ustack_nbd("info", "--list", "--json", uris[0]).stdout)
        assert listed["protocol"] == "newstyle-fixed"
        memory, image = listed["exports"]
        assert (memory["export-name"], memory["export-size-str"], memory["is_read_only"]) == ("memory", "1M", True)
        assert (image["export-name"], image["export-size"], image["uri"]) == ("an image", 512, uris[1])
        assert "%20image" in uris[1]
        text = ustack_nbd("list", uris[0]).stdout
        assert text == ustack_nbd("info", "--list", uris[0]).stdout
        assert text.count("export=") == 2
    assert not (tmp_path / "socket").exists()


def test_serve_forwards_to_another_server_and_to_a_file_at_once(tmp_path: Path) -> None:
    front = tmp_path / "front"
    (tmp_path / "image").write_bytes(random.Random(4).randbytes(1 << 20))
    with (
        serving("--memory", "2M", "--port", "0") as (uri,),
        serving(uri, str(tmp_path / "image"), "--unix", str(front)) as (first,),
    ):
        assert first == f"nbd+unix:///memory?socket={front}"
        ustack_nbd("copy", str(tmp_path / "image"), first)
        ustack_nbd("copy", uri, str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes()[: 1 << 20] == (tmp_path / "image").read_bytes()
        assert "export-size: 1048576" in ustack_nbd("info", f"nbd+unix:///image?socket={front}").stdout


async def read_from(uri: str) -> None:
    """Wait for some bytes of it."""
    async with connect(uri, dead_after=0) as disk:
        await disk.pread(512, 0)


def test_serve_ends_with_the_reason_when_a_disk_is_given_up(tmp_path: Path) -> None:
    far = subprocess.Popen(
        [sys.executable, "-c", SERVE, "--memory", "1M", "--unix", str(tmp_path / "far")], stdout=subprocess.PIPE, text=True
    )
    assert far.stdout is not None
    uri = far.stdout.readline().split("\t")[0]
    near = subprocess.Popen(
        [sys.executable, "-c", SERVE, uri, "--unix", str(tmp_path / "near"), "--dead-after", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert near.stdout is not None
        assert near.stderr is not None
        near.stdout.readline()
        far.kill()
        far.wait()
        front = f"nbd+unix:///memory?socket={tmp_path}/near"
        ustack_nbd("info", front)  # as long as nobody waits for it, it may be away
        with pytest.raises(OSError, match=r"lost|closed|disk"):
            asyncio.run(read_from(front))
        assert near.wait(20) == 1
        assert "the server is dead" in near.stderr.read()
    finally:
        for program in (far, near):
            program.kill()
            program.communicate()


def test_serve_with_certificates_requires_tls(certificates: Path, tmp_path: Path) -> None:
    front = tmp_path / "front"
    options = ("--tls-certificates", str(certificates), "--tls-verify-peer")
    with serving("--memory", "1M", "--unix", str(front), *options) as (uri,):
        assert uri == f"nbds+unix:///memory?socket={front}"
        seen = ustack_nbd("info", f"{uri}&tls-certificates={certificates}").stdout
        assert "with TLS" in seen
        assert "requires TLS" in ustack_nbd("info", uri.replace("nbds", "nbd"), status=1).stderr


@pytest.mark.parametrize("options", [(), ("--progress",), ("-R", "3", "--request-size", "10000", "-S", "0", "--no-flush")])
def test_copy_brings_back_what_it_took(options: tuple[str, ...], tmp_path: Path) -> None:
    content = random.Random(8).randbytes(3 << 20) + bytes(1 << 20)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    with serving("--memory", "4M", "--port", "0") as (uri,):
        done = json.loads(ustack_nbd("copy", "--json", "--allocated", str(source), uri).stdout)
        assert (done["bytes"], done["zero-bytes"]) == (4 << 20, 1 << 20)
        there = ustack_nbd("copy", *options, str(source), uri)
        assert there.stdout.startswith("4194304 bytes (4M) in ")
        assert ("4.2/4.2 MB" in there.stderr or "4.0/4.0 MiB" in there.stderr) == ("--progress" in options)
        assert there.stdout.endswith(f"{0 if '-S' in options else 1 << 20} of them as zeroes\n")
        ustack_nbd("copy", *options, uri, str(target))
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (("info", "http://example.com"), 2, "scheme is 'http'"),
        (("info", "nbds://localhost/?tls-type=anon"), 1, "anonymous TLS is no protection"),
        (("info", "nbd+unix:///?socket=/nonexistent"), 1, "cannot connect: No such file"),
        (("copy", "/nonexistent", "nbd://localhost/"), 1, "/nonexistent: No such file"),
        (("copy", "--request-size", "many", "a", "b"), 2, "'many' is no size"),
        (("copy", "--requests", "0", "a", "b"), 2, "requests"),
        (("serve",), 2, "nothing to serve"),
        (("serve", "--memory", "1M", "--address", "192.0.2.1", "--port", "0"), 1, "assign requested address"),
        (("serve", "/dev/null", "--port", "0"), 1, "/dev/null: neither a regular file"),
        (("serve", "/nonexistent", "--port", "0"), 1, "/nonexistent: No such file"),
        (("serve", "nbd+unix:///?socket=/nonexistent", "--port", "0"), 1, "cannot connect: No such file"),
        (("serve", "--memory", "1M", "--tls", "on"), 2, "--tls needs --tls-certificates"),
        (("serve", "--memory", "1M", "--tls-verify-peer"), 2, "--tls-verify-peer needs --tls-certificates"),
        (("serve", "--memory", "1M", "--port", "0", "--tls-certificates", "/usr"), 1, "/usr: cannot load the certificates"),
        (("attach", "nbd://192.0.2.1/", "--control", "/nonexistent"), 1, "no daemon listens there"),
        (("detach", "disk", "--control", "/nonexistent"), 1, "no daemon listens there"),
    ],
)
def test_mistakes_end_with_one_clear_line(arguments: tuple[str, ...], status: int, complaint: str) -> None:
    assert complaint in ustack_nbd(*arguments, status=status).stderr


def test_a_failing_copy_says_which_side_failed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(2 << 20))
    with serving("--memory", "1M", "--port", "0") as (uri,):
        too_small = ustack_nbd("copy", str(tmp_path / "source"), uri, status=1)
        assert "the target has 1048576 bytes, the source 2097152" in too_small.stderr
        unknown = ustack_nbd("copy", uri.replace("memory", "other"), str(tmp_path / "target"), status=1)
        assert "no export named 'other'" in unknown.stderr


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1K"), (1536, "1536"), (1 << 30, "1G"), (1253376, "1224K"), (3 << 60, "3E")],
)
def test_sizes_are_written_in_the_largest_unit_that_divides_them(size: int, text: str) -> None:
    assert human_size(size) == text


def test_help_does_not_load_what_only_the_work_needs() -> None:
    heavy = "('asyncio', 'uvloop', 'rich', 'ustack.nbd')"
    check = f"import sys, ustack.cli.nbd; print(*(name for name in {heavy} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert loaded.stdout == "\n"
