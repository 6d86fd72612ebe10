"""The kernel's side of the demo: an NBD server and a crowd of senders, on the kernel's sockets, in a process of its own.

In a process, so that our stack has its event loop for itself. It is told what to do by JSON lines on its standard input and
answers each with one on its standard output; when the input ends, because the demo is over or was killed, so does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
from typing import Any, Final, Self

CHUNK: Final = bytes(64 << 10)


class DemoPeer:
    """The demo's end of it: starts the process, in the same network namespace, and talks to it. `module` is what it runs."""

    def __init__(self, module: str = __name__) -> None:
        self._module = module
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        # A session of its own: an interrupt from the terminal is for the demo, which then ends us.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self._module, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def do(self, what: str, **args: Any) -> Any:
        """Let it do `what` (a method of the object that obeys) and return the answer. Raises OSError with its words."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, args]).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise OSError(f"the process on the kernel's side ended ({await self._process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(f"the process on the kernel's side: {answer['error']}")
        return answer["ok"]


class _Peer:
    """What it can do."""

    def __init__(self) -> None:
        self._export: Any = None
        self._crowd: list[asyncio.Task[None]] = []

    async def serve(self, size: int) -> int:
        """Export `size` bytes of memory over NBD; returns the port."""
        from ustack.nbd.export import MemoryExport
        from ustack.nbd.server import NbdServer

        self._export = MemoryExport(size, "disk")
        return await NbdServer([self._export]).listen_tcp("0.0.0.0", 0)

    async def sha256(self) -> str:
        """The digest of what the export holds."""
        return hashlib.sha256(self._export.read(0, self._export.info.size)).hexdigest()

    async def crowd(self, host: str, port: int, connections: int) -> int:
        """Connect `connections` times and send without end; returns how many connections there are."""
        opened = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(connections)))
        self._crowd += [asyncio.create_task(_send_without_end(writer)) for _, writer in opened]
        return len(self._crowd)

    async def disperse(self) -> None:
        """Close the connections of the crowd."""
        for task in self._crowd:
            task.cancel()
        await asyncio.gather(*self._crowd, return_exceptions=True)
        self._crowd.clear()


async def _send_without_end(writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            writer.write(CHUNK)
            await writer.drain()
    finally:
        writer.transport.abort()


async def obey(peer: object) -> None:
    """Do what the lines of the standard input say, which are methods of `peer` and their arguments, until it ends."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    answer: asyncio.Task[None] | None = None
    while line := await commands.readline():
        if answer is not None:
            await answer
        answer = loop.create_task(_answer(peer, *json.loads(line)))  # a task, so that the end of input ends it too


async def _answer(peer: object, what: str, args: dict[str, Any]) -> None:
    try:
        answer = {"ok": await getattr(peer, what)(**args)}
    except OSError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    import uvloop

    uvloop.run(obey(_Peer()))
