"""An export as memory, paged by userfaultfd: all verified; what goes wrong is an error or SIGBUS, never other bytes."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.nbd.servers import MIB
from tests.nbd.test_cli_nbd import serving
from tests.needs import require_tool, require_userfaultfd
from ustack import nbd

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

SIZE = 2 * MIB + 512
"""Not whole pages: the last one is half ours."""


@pytest.fixture
def uri() -> Iterator[str]:
    """A server in a process of its own: a thread of ours could not answer while another of ours waits for its page."""
    require_userfaultfd()
    with serving("--memory", str(SIZE), "--port", "0") as (uri,):
        yield uri


def served(*nbdkit: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the URI of an nbdkit as its argument."""
    require_userfaultfd()
    command = [require_tool("nbdkit"), "-U", "-", *nbdkit, "--run", f'exec {sys.executable} -c "$PROGRAM" "$uri"']
    environment = {"PATH": "/usr/bin:/bin", "PROGRAM": program, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_what_is_written_is_read_back_though_most_of_it_is_never_here(uri: str) -> None:
    chance = random.Random(1)
    model = bytearray(SIZE)
    with nbd.RemoteMemory(uri, resident=256 << 10) as memory:
        assert len(memory) == SIZE
        for _ in range(600):
            length = chance.choice([1, 8, 100, 9000])
            offset = chance.randrange(SIZE - length)
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                memory[offset : offset + length] = data
                model[offset : offset + length] = data
            else:
                assert memory[offset : offset + length] == model[offset : offset + length]
        memory[SIZE - 1] = model[SIZE - 1] = 7
        memory.flush()
        with nbd.open_file(uri) as file:
            assert file.read() == model
        counters = memory.counters()
        assert counters["evicted"] > 100
        assert counters["written"] > 100
        # Written after the flush, and brought out by `close`.
        memory[5:10] = model[5:10] = b"later"
    memory.close()
    with nbd.open_file(uri) as file:
        assert file.read() == model
    with nbd.RemoteMemory(uri, resident=64 << 10) as memory:
        assert bytes(memory.view) == model


def test_threads_that_write_to_the_same_pages_lose_nothing(uri: str) -> None:
    with nbd.RemoteMemory(uri, resident=64 << 10, readahead=2) as memory:

        def work(lane: int) -> None:
            for round_ in range(3):
                for at in range(lane, 64 * 4096, 1024):
                    memory.view[at] = (lane + round_) & 255

        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(memory[at] == ((at & 1023) + 2) & 255 for at in range(64 * 4096) if at & 1023 < 4)


def test_what_cannot_be_mapped_says_why(uri: str) -> None:
    with (
        serving("--memory", "1M", "--read-only", "--port", "0") as (fixed,),
        pytest.raises(OSError, match="read-only") as caught,
    ):
        nbd.RemoteMemory(fixed)
    assert caught.value.errno == errno.EROFS
    with pytest.raises(OSError, match="no export named 'other'"):
        nbd.RemoteMemory(uri.replace("memory", "other"))
    with pytest.raises(OSError, match="scheme"):
        nbd.RemoteMemory("http://example.com/")


OPEN = "import sys, os, signal; from ustack.nbd import RemoteMemory; memory = RemoteMemory(sys.argv[1], dead_after=0); "


def test_a_page_that_cannot_be_read_is_sigbus() -> None:
    result = served("--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%", program=OPEN + "memory[0]")
    assert result.returncode in (-signal.SIGBUS, 128 + signal.SIGBUS), result.stderr


def test_the_death_of_the_pager_is_sigbus_and_no_endless_wait() -> None:
    kill = "os.kill(memory._process.pid, signal.SIGKILL); signal.pause()"
    result = served("memory", "1M", program=OPEN + kill)
    assert result.returncode in (-signal.SIGBUS, 128 + signal.SIGBUS), result.stderr


def test_what_cannot_be_written_is_an_error_of_flush() -> None:
    program = (
        OPEN
        + "memory[0] = 1\ntry:\n    memory.flush()\nexcept OSError as error:\n    print(error.errno, flush=True)\nos._exit(0)"
    )
    result = served("--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", program=program)
    assert result.stdout.strip() == str(errno.ENOSPC), result.stderr
