"""The daemon's life: open the TAP, build the stack, attach the exports, serve the control socket; then undo it in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_network
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from pools.arena import PAGE_SIZE
from ustack.daemon import doctor, reports
from ustack.daemon.arm import Arming
from ustack.daemon.attachment import Attachment
from ustack.daemon.config import Config, Disks, load
from ustack.daemon.control import ControlServer
from ustack.daemon.link import bring_up, exists
from ustack.daemon.notify import notify
from ustack.daemon.paths import default_control_path
from ustack.daemon.sections import ConfigError, validate
from ustack.daemon.services import Services
from ustack.daemon.watchdog import BEAT, COMPLETED, DROPS, RESERVE, RESERVE_FREE, Watchdog
from ustack.link.tap import TapDevice
from ustack.stack import Stack
from ustack.transport.tcp.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ustack.daemon.config import Nbd, Route

CLOSE_TIMEOUT: Final = 3.0
"""Seconds that connections have to end in order when the daemon stops; then they are reset."""

CLOSE_POLL: Final = 0.02
"""Seconds between two looks at whether they have."""

HEARTBEAT: Final = 1.0
"""Seconds between two signs of life for the watchdog at most; otherwise a quarter of what it waits."""

log = logging.getLogger("ustack")


class Daemon:
    """One stack, as `config` from the file `path` describes it. Made before there is an event loop; `run` is its life.

    Raises ConfigError for what only trying shows to be wrong, OSError when the device or the memory cannot be had.
    """

    def __init__(self, config: Config, path: str) -> None:
        self.config = config
        self.path = path
        self._started = monotonic()
        self._stop = asyncio.Event()
        self._warned = False
        self._arming: Arming | None = None
        self._watchdog: Watchdog | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        if config.arm.enabled:
            self._arming = Arming(config.arm)
            self._arming.before_threads()
        self._stack = self._build_stack()
        self._services = Services(self._stack)
        self._attachments: dict[str, Attachment] = {}
        self._reloads: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises OSError when the control socket or a port cannot be had."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="ustack: %(message)s")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        async with self._stack:
            control = ControlServer(self._stack, self.status, {"attach": self.attach, "detach": self.detach})
            control.calls["doctor"] = self.doctor
            try:
                await self._serve(control)
            finally:
                notify("STOPPING=1")
                await self._shut_down(control)

    async def _serve(self, control: ControlServer) -> None:
        config = self.config
        control_path = config.control.path or default_control_path()
        try:
            await control.listen(control_path, int(config.control.mode, 8))
        except OSError as error:
            error.filename = error.filename or control_path
            raise
        await self._services.set(**config.service.model_dump())
        if self._arming is not None:
            self._arm(self._arming)
        self._attach()
        gc.collect()
        gc.freeze()  # what exists now stays: the collector need not look at it again
        log.info("%s: %s on %s, control socket %s", self.path, config.addresses(), config.device.name, control_path)
        self._say_status("READY=1")
        await self._stop.wait()

    # -- start --

    def _build_stack(self) -> Stack:
        config = self.config
        memory = config.memory
        try:
            stack = Stack(
                memory=memory.size,
                pool=memory.pool,
                reserve=memory.reserve,
                lock_memory=memory.lock,
                capture=config.capture_bytes(),
                zero_copy=None if memory.zero_copy == "off" else memory.zero_copy,
                tcp=config.tcp_config(),
                udp=config.udp_config(),
                ipv4=config.ipv4_config(),
                ipv6=config.ipv6_config(),
            )
        except OSError as error:
            if memory.lock and error.errno in (errno.ENOMEM, errno.EPERM):
                hint = "locking so much memory needs CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK, or [memory] lock = false"
                raise OSError(error.errno, f"{error.strerror}; {hint}") from None
            raise
        try:
            links = {0: stack.add_interface(self._open_tap())}
            for own in config.address:
                if own.vlan not in links:
                    links[own.vlan] = stack.add_vlan(links[0], own.vlan)
                stack.add_address(links[own.vlan], own.address, own.gateway)
            for route in config.route:
                stack.add_route(route.network, route.via, route.metric, route.congestion)
        except ValueError as error:
            stack.close()
            raise ConfigError([f"{self.path}: {error}"]) from None
        except BaseException:
            stack.close()
            raise
        return stack

    def _open_tap(self) -> TapDevice:
        device = self.config.device
        if not device.create and not exists(device.name):
            hint = f"make it (ip tuntap add {device.name} mode tap), or set [device] create = true"
            raise OSError(errno.ENODEV, f"no such interface; {hint}", device.name)
        mac = None if device.mac is None else bytes.fromhex(device.mac.replace(":", ""))
        try:
            tap = TapDevice(device.name, mode=device.mode, offload=device.offload, mac=mac)
        except OSError as error:
            raise OSError(error.errno, _HINTS.get(error.errno or 0, error.strerror), device.name) from None
        if device.create:
            bring_up(device.name)
        return tap

    def _on_stop_signal(self) -> None:
        """Whoever stops us while the machine swaps over us probably does not know; the second time they do."""
        swaps = [device for each in self._attachments.values() for device in each.swaps()]
        if swaps and not self._warned:
            self._warned = True
            log.critical(
                "%s: swap, and would be lost: run `ustack swap off`; a second signal stops us all the same", ", ".join(swaps)
            )
            return
        self._stop.set()

    def _arm(self, arming: Arming) -> None:
        if self.config.arm.watchdog:
            self._watchdog = Watchdog(self.config.arm.watchdog)
            try:
                self._watchdog.start()
            except OSError as error:
                arming.missing.append(f"no watchdog: {error.strerror}")
            self._beat()
        arming.lock(self._busy)
        for missing in arming.missing:
            log.warning("not armed in full: %s", missing)

    def _busy(self) -> bool:
        """Somebody waits for a disk."""
        return any(each.client is not None and each.client.requests_in_flight for each in self._attachments.values())

    def _beat(self) -> None:
        """Tell the watchdog that we are alive, and how things are."""
        if self._watchdog is None:
            return
        cells, pages = self._watchdog.board.cells, self._stack.pages
        cells[BEAT] = monotonic()
        cells[COMPLETED] = float(sum(each.fuse.completed for each in self._attachments.values() if each.fuse is not None))
        cells[RESERVE_FREE] = float(min(pages.free_pages, pages.min_pages))
        cells[RESERVE] = float(pages.min_pages)
        cells[DROPS] = float(self._stack.drops.total())
        self._heartbeat = asyncio.get_running_loop().call_later(min(HEARTBEAT, self.config.arm.watchdog / 4), self._beat)

    # -- while it runs --

    def status(self) -> dict[str, Any]:
        """The answer to the call `status`."""
        return {
            "version": _version(),
            "pid": os.getpid(),
            "uptime": monotonic() - self._started,
            "config": self.path,
            "devices": reports.devices(self._stack),
            "routes": reports.routes(self._stack),
            "nbd": [attachment.report() for attachment in self._attachments.values()],
            "process": self._arming.report() if self._arming is not None else None,
        }

    def doctor(self) -> list[dict[str, Any]]:
        """The answer to the call `doctor`: what swapping over this daemon needs, and what of it is in force."""
        watchdog = self._watchdog.pid if self._watchdog is not None else None
        checks = [
            *doctor.process_checks(self._arming, watchdog, self.config.arm.priority),
            *doctor.machine_checks(),
            *doctor.export_checks((nbd.config.name, nbd.config.uri) for nbd in self._attachments.values()),
        ]
        return [check.as_dict() for check in checks]

    def _say_status(self, *more: str) -> None:
        attached = sum(attachment.state == "attached" for attachment in self._attachments.values())
        exports = f", {attached} of {len(self._attachments)} exports attached" if self._attachments else ""
        notify(*more, f"STATUS={self.config.addresses()} on {self.config.device.name}{exports}")

    def _attach(self) -> None:
        for nbd in self.config.nbd:
            if nbd.name not in self._attachments:
                self._attachments[nbd.name] = self._attachment(nbd)

    def _attachment(self, nbd: Nbd) -> Attachment:
        board = self._watchdog.board if self._watchdog is not None else None
        attachment = Attachment(self._stack, nbd, self._say_status, board)
        attachment.first.add_done_callback(self._on_built)
        return attachment

    def _on_built(self, _: object) -> None:
        if self._arming is not None:
            self._arming.settle()

    async def attach(self, **disk: Any) -> dict[str, Any]:
        """The call `attach`: what a section [[nbd]] may say, until the daemon stops or is told to `detach`. Answers with its
        report when the disk is there. Raises OSError."""
        try:
            nbd = validate({"nbd": [disk]}, "attach", Disks).nbd[0]
        except ConfigError as error:
            raise OSError(errno.EINVAL, "; ".join(error.problems)) from None
        if nbd.name in self._attachments:
            raise OSError(errno.EEXIST, f"there is an attached disk named {nbd.name!r} already")
        self._attachments[nbd.name] = attachment = self._attachment(nbd)
        try:
            await asyncio.shield(attachment.first)
        except BaseException:
            await self._attachments.pop(nbd.name).close()
            self._say_status()
            raise
        return attachment.report()

    async def detach(self, name: str) -> dict[str, Any]:
        """The call `detach`: let go of the disk of this name, and answer with the last report of it. Raises OSError ENOENT."""
        if name not in self._attachments:
            known = ", ".join(self._attachments) or "none"
            raise OSError(errno.ENOENT, f"no attached disk is named {name!r}; there is {known}")
        swaps = self._attachments[name].swaps()
        if swaps:
            raise OSError(errno.EBUSY, f"{name} is swap: {', '.join(swaps)}; end it first (swapoff)")
        attachment = self._attachments.pop(name)
        report = attachment.report()
        await attachment.close()
        self._say_status()
        log.info("nbd %s: detached", name)
        return report

    # -- reload --

    def _reload_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        """Read the file again and do what can be done while running; when anything else has changed, do nothing at all."""
        notify("RELOADING=1", f"MONOTONIC_USEC={int(monotonic() * 1_000_000)}")
        try:
            new = await asyncio.to_thread(load, self.path)
            refused = list(_fixed_changes(self.config, new))
            if refused:
                raise ConfigError([f"{self.path}: {change}" for change in refused])
            await self._apply(new)
        except ConfigError as error:
            for problem in error.problems:
                log.error("%s", problem)
            log.error("%s: not reloaded, nothing was changed", self.path)
        except (OSError, ValueError) as error:
            log.error("%s: reloaded in part: %s", self.path, error)
        else:
            log.info("%s: reloaded", self.path)
        self._say_status("READY=1")

    async def _apply(self, new: Config) -> None:
        old, self.config = self.config, new
        stack = self._stack
        for name, value in new.tcp.model_dump().items():
            setattr(stack.tcp.config, name, value)  # in force for new connections
        reserve = new.memory.reserve
        stack.reserve.fix(None if reserve == "auto" else int(reserve) // PAGE_SIZE)
        for route in old.route:
            if route not in new.route:
                self._remove_route(route)
        for route in new.route:
            if route not in old.route:
                stack.add_route(route.network, route.via, route.metric, route.congestion)
        await self._services.set(**new.service.model_dump())
        for nbd in old.nbd:
            if nbd not in new.nbd:
                if nbd.name in self._attachments:
                    await self._attachments.pop(nbd.name).close()
        self._attach()

    def _remove_route(self, route: Route) -> None:
        network = ip_network(route.network)
        table = self._stack.ip.routes if network.version == 4 else self._stack.ip6.routes
        for each in list(table):
            if (each.network, each.prefix_len, each.metric) == (
                network.network_address.packed,
                network.prefixlen,
                route.metric,
            ):
                table.remove(each)

    # -- end --

    async def _shut_down(self, control: ControlServer) -> None:
        """End everything in order, within a bounded time; leaving `async with stack` resets what is left."""
        await control.close()
        await self._services.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.gather(*(attachment.close() for attachment in self._attachments.values()))
                while self._open_connections():  # noqa: ASYNC110 (a connection that nobody owns any more tells nobody)
                    await asyncio.sleep(CLOSE_POLL)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._arming is not None:
            self._arming.disarm()
        if self._watchdog is not None:
            await asyncio.to_thread(self._watchdog.close)
        left = self._open_connections()
        log.info("stopped%s", f"; {left} connections did not end in time and were reset" if left else "")

    def _open_connections(self) -> int:
        return sum(isinstance(each, Connection) for each in self._stack.tcp.connections.values())


_HINTS: Final = {
    errno.EPERM: "not permitted: it needs CAP_NET_ADMIN, or an interface of this user (ip tuntap add ... user NAME)",
    errno.EACCES: "no permission to open /dev/net/tun",
    errno.EBUSY: "another process holds it",
    errno.ENOENT: "there is no /dev/net/tun: modprobe tun, or give the device to the container",
    errno.ENODEV: "there is no /dev/net/tun: modprobe tun, or give the device to the container",
    errno.EINVAL: "it exists and is no TAP interface, or is one without vnet_hdr or with several queues",
}
"""What the errors of opening a TAP mean."""


MEM_KEYS: Final = ["rmem_min", "wmem_min", "mem_low", "mem_pressure", "mem_high"]
"""Keys of [tcp] that are about all connections together."""


def _fixed_changes(old: Config, new: Config) -> Iterator[str]:
    """What has changed in the file that cannot change while the daemon runs."""
    for section, keys in (
        ("device", list(type(old.device).model_fields)),
        ("memory", ["pool", "size", "lock", "capture", "zero_copy"]),
        ("tcp", MEM_KEYS),
        ("ipv4", list(type(old.ipv4).model_fields)),
        ("ipv6", list(type(old.ipv6).model_fields)),
        ("udp", list(type(old.udp).model_fields)),
        ("arm", list(type(old.arm).model_fields)),
        ("control", list(type(old.control).model_fields)),
    ):
        before, after = getattr(old, section), getattr(new, section)
        for key in keys:
            if getattr(before, key) != getattr(after, key):
                yield f"[{section}] {key} cannot change while the daemon runs: restart it"
    if old.address != new.address:
        yield "[[address]] cannot change while the daemon runs: restart it"


def _version() -> str:
    try:
        return version("ustack")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
