"""An export as memory: its pages come from the server when they are touched (userfaultfd(2)), without swap or a device.

    with nbd.RemoteMemory("nbd://10.77.0.1/heap", resident=64 << 20) as memory:
        memory[0:5] = b"hello"
        memory.flush()

At most `resident` bytes of it are in this machine's memory at a time. A process of its own fetches and stores the pages
(`pager.py`). Touching a page that is not here stops the thread, and with it everything that waits for the interpreter's lock,
for a round trip to the server, which therefore cannot be in this process. It is meant for data, not for programs that must
answer in time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Self, overload

from ustack.nbd.pager import MESSAGE
from ustack.nbd.userfaultfd import PAGE, UserFaultFd, open_userfaultfd

if TYPE_CHECKING:
    from types import TracebackType

RESIDENT: Final = 64 << 20
"""Bytes kept here unless told otherwise."""
PAGER: Final = "from ustack.nbd.pager import main; main()"
READAHEAD: Final = 8
"""Pages that are brought together."""


class RemoteMemory:
    """The bytes of an export, as a mutable sequence of bytes; `view` has them as a memoryview.

    What cannot be read from the server is SIGBUS for who touches it, as with a mapped file on a broken disk, and so is the
    death of the pager. What cannot be written is an OSError from `flush` or `close`.
    """

    def __init__(self, uri: str, *, resident: int = RESIDENT, readahead: int = READAHEAD, **options: Any) -> None:
        """Map the export at `uri`. `resident` and `readahead` in bytes and pages. `options` are those of `connect` that are
        numbers, strings or truth values. Raises OSError: what `connect` does, EROFS for an export that cannot be written to,
        EINVAL for one whose blocks are larger than pages, EPERM without leave to use userfaultfd."""
        with ExitStack() as stack:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control = stack.enter_context(control)
            alive, held = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, alive)
            try:
                fds = (theirs.fileno(), held)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", PAGER, str(theirs.fileno())], pass_fds=fds, stdin=subprocess.DEVNULL
                )
            finally:
                theirs.close()
                os.close(held)
            stack.callback(self._end)
            wanted = {"uri": uri, "resident": resident // PAGE, "readahead": readahead, "options": options}
            about = self._ask(json.dumps(wanted).encode())
            if about["read_only"]:
                raise OSError(errno.EROFS, f"{uri}: the export is read-only")
            if about["block"] > PAGE:
                raise OSError(errno.EINVAL, f"{uri}: blocks have {about['block']} bytes, more than a page of {PAGE}")
            self.size = int(about["size"])
            length = max(-(-self.size // PAGE), 1) * PAGE
            memory = os.memfd_create("ustack-nbd", os.MFD_CLOEXEC)
            stack.callback(os.close, memory)
            os.ftruncate(memory, length)
            self._map = mmap.mmap(memory, length)
            self._uffd = open_userfaultfd()
            stack.callback(os.close, self._uffd)
            base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            UserFaultFd(self._uffd).register(base, length)
            socket.send_fds(control, [json.dumps({"base": base}).encode()], [self._uffd, memory])
            self._answer()
            # Should the pager die, whoever touches an absent page would wait for ever: die of it instead.
            fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGBUS)
            fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC)
            stack.callback(fcntl.fcntl, alive, fcntl.F_SETFL, 0)
            self.view: memoryview = memoryview(self._map)[: self.size]
            """All of it, writable. Let go of slices before `close`."""
            self._stack = stack.pop_all()

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, where: int) -> int: ...
    @overload
    def __getitem__(self, where: slice) -> bytes: ...
    def __getitem__(self, where: int | slice) -> int | bytes:
        found = self.view[where]
        return bytes(found) if isinstance(found, memoryview) else found

    @overload
    def __setitem__(self, where: int, value: int) -> None: ...
    @overload
    def __setitem__(self, where: slice, value: bytes | bytearray | memoryview) -> None: ...
    def __setitem__(self, where: Any, value: Any) -> None:
        self.view[where] = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def flush(self) -> None:
        """Bring everything that was written to the server's stable storage. Raises OSError."""
        self._ask(b"flush")

    def counters(self) -> dict[str, int]:
        """Page faults, pages loaded, evicted, and written to the server so far."""
        counters: dict[str, int] = self._ask(b"counters")
        return counters

    def close(self) -> None:
        """Flush, and let go of the memory and the pager. Raises OSError when not all could be written. A second call does
        nothing."""
        if self._control.fileno() < 0:
            return
        try:
            self.flush()
        finally:
            self._stack.close()
            self.view.release()
            self._map.close()

    def _ask(self, message: bytes) -> Any:
        self._control.sendall(message)
        return self._answer()

    def _answer(self) -> Any:
        data = self._control.recv(MESSAGE)
        if not data:
            raise OSError(errno.EPIPE, "the pager has ended")
        answer = json.loads(data)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        return answer

    def _end(self) -> None:
        self._control.close()
        self._process.wait()
