"""Lines in, replies out, and every call a task of its own, so that one that waits holds up nobody."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import signal
from contextlib import AsyncExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from tools.sockdriver.arguments import Arguments, BadRequest, Unsupported
from tools.sockdriver.calls import Calls
from tools.sockdriver.host import make_stack, set_up

if TYPE_CHECKING:
    from tools.sockdriver.calls import Call, Reply
    from ustack.stack import Stack

CHUNK: Final = 1 << 16
"""Bytes that are read from stdin at once."""

NAMES: Final = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}
"""Of two names for a number the one that sockets use."""

log: Final = logging.getLogger(__name__)


class Request:
    """One line: a call with its number, and whether the bench expects it to wait."""

    __slots__ = ("args", "blocking", "call", "id")

    def __init__(self, line: bytes) -> None:
        """Raises BadRequest for what is no request."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise BadRequest("not a JSON object")
        self.id = fields.get("id")
        self.call = fields.get("call")
        self.blocking = bool(fields.get("blocking"))
        args = fields.get("args")
        self.args = Arguments(args if isinstance(args, dict) else {})


class Driver:
    """Reads requests from the descriptor `requests` and writes replies to `replies`."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests = requests
        self._replies = replies
        self._rest = b""
        self._stack: Stack | None = None
        self._calls: Calls | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._own: dict[str, Call] = {"init": self._init, "hints": self._hints, "bye": self._bye}
        self._life = AsyncExitStack()
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Serve until stdin ends, `bye` or SIGTERM; then the stack is closed, and with it every connection."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)
        loop.add_reader(self._requests, self._on_readable)
        async with self._life:
            await self._over.wait()
            loop.remove_reader(self._requests)
            for task in self._tasks:
                task.cancel()

    def _on_readable(self) -> None:
        chunk = os.read(self._requests, CHUNK)
        if not chunk:
            self._over.set()
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                self._on_line(line)

    def _on_line(self, line: bytes) -> None:
        try:
            request = Request(line)
        except BadRequest as error:
            self._write({"id": None, **_failed(errno.EINVAL, str(error))})
            return
        task = asyncio.get_running_loop().create_task(self._serve(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if request.blocking:
            # After the first step of the task: then the call either waits, or its reply has said that it was started.
            asyncio.get_running_loop().call_soon(self._say_started, request)

    async def _serve(self, request: Request) -> None:
        reply = await self._answer(request)
        reply["t"] = monotonic()
        self._say_started(request)
        self._write({"id": request.id, **reply})
        if request.call == "bye":
            self._over.set()

    def _say_started(self, request: Request) -> None:
        if request.blocking:
            request.blocking = False
            self._write({"id": request.id, "started": True})

    async def _answer(self, request: Request) -> Reply:
        """Make the call. Whatever goes wrong is an answer."""
        try:
            return {"errno": 0, **await self._find(request.call)(request.args)}
        except Unsupported as error:
            return {**_failed(errno.ENOSYS, str(error)), "unsupported": True}
        except BadRequest as error:
            return _failed(errno.EINVAL, str(error))
        except (OverflowError, ValueError) as error:
            return _failed(errno.EINVAL, str(error))
        except OSError as error:
            # The negative numbers are those of getaddrinfo: an address that is none.
            return _failed(error.errno if error.errno is not None and error.errno > 0 else errno.EINVAL, str(error))
        except Exception as error:
            log.exception("%s failed", request.call)
            return _failed(errno.EIO, repr(error))

    def _find(self, name: Any) -> Call:
        call = self._own.get(name) if isinstance(name, str) else None
        if call is not None:
            return call
        if self._calls is None:
            raise BadRequest(f"{name!r} before init")
        call = self._calls.table.get(name) if isinstance(name, str) else None
        if call is None:
            raise Unsupported(f"no call {name!r}")
        return call

    def _write(self, reply: dict[str, Any]) -> None:
        line = json.dumps(reply, separators=(",", ":")).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._replies, line) :]
        except BrokenPipeError:
            self._over.set()

    # -- life --

    async def _init(self, args: Arguments) -> Reply:
        if self._stack is not None:
            raise BadRequest("init again")
        stack = make_stack(args)
        await self._life.enter_async_context(stack)
        self._stack = stack
        self._calls = Calls(stack)
        gc.collect()
        gc.freeze()  # what is there by now stays: collections look at the little that comes and goes, and are over at once
        return {"ret": 0, "started": True}

    async def _hints(self, args: Arguments) -> Reply:
        if self._stack is None:
            raise BadRequest("hints before init")
        set_up(self._stack.tcp.config, args)
        return {"ret": 0}

    async def _bye(self, _args: Arguments) -> Reply:
        return {"ret": 0}


def _failed(number: int, reason: str) -> Reply:
    return {"ret": -1, "errno": NAMES.get(number, number), "reason": reason}
