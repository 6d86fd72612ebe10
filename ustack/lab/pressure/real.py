"""A scenario in real time: the stack on a TAP, the kernel as its peer, in this process's own network namespace.

The namespace must have been entered before (`netns.enter_own`). What the wire of the scenario does to frames is done by
`ImpairedTap`; a scenario whose wire is good runs on the TAP itself, with its offloads.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

import uvloop
from pyroute2 import IPRoute

from ustack.daemon.link import bring_up
from ustack.lab.demo_peer import DemoPeer
from ustack.lab.impaired import ImpairedTap
from ustack.lab.pressure.campaign import raised
from ustack.lab.pressure.frames import FloodTraffic
from ustack.lab.pressure.run import run
from ustack.lab.pressure.scenario import Cut, Link, LinkFault, PeerMac, Scenario, ServerRestart, TcpBlocked, parse
from ustack.lab.pressure.subject import PEER, PREFIX_LEN, Subject, tcp_port, udp_port
from ustack.lab.pressure.wire_faults import WireFaults
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import Impairments
from ustack.link.tap import TapDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from ustack.lab.pressure.result import Job, Result
    from ustack.link.device import Device

TAP: Final = "ustack0"


def run_real(job: Job) -> Result:
    """Run `job` on a TAP. Raises ConfigError for its text; what else goes wrong is in the result."""
    scenario = parse(job.text, job.name).scenario
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(job, scenario))
    except Exception as error:
        return raised(job, "real", error)


async def _run(job: Job, scenario: Scenario) -> Result:
    random = Random(f"{job.seed} {job.pool}")
    subject = Subject(scenario, job.pool, random)
    async with DemoPeer("ustack.lab.pressure.real_peer") as process:
        impaired = needs_a_bad_wire(scenario)
        tap = await asyncio.to_thread(_open_tap, scenario, not impaired and scenario.device.offload)
        wire: ImpairedTap | None = None
        device: Device = tap
        if impaired:
            ring = LinearRing if scenario.device.mode == "linear" else PagedRing
            device = wire = ImpairedTap(tap, _impairments(scenario.link), seed=job.seed, ring=ring)
        polled = subject.attach(device)
        if wire is not None:
            wire.start(subject.stack, polled)
        peer = RealPeer(process, scenario, tap, wire, random)
        async with subject.stack:
            result = await run(job, scenario, "real", subject, peer, PEER, random)
    result["failed"] += [f"left behind: {what}" for what in subject.left_behind()]
    result["passed"] = not result["failed"]
    return result


def needs_a_bad_wire(scenario: Scenario) -> bool:
    """Whether frames must pass through a wire of ours."""
    if scenario.link != Link():
        return True
    return any(
        isinstance(fault, Cut | LinkFault) or (isinstance(fault, ServerRestart) and fault.crash) for fault in scenario.fault
    )


def _impairments(link: Link) -> Impairments:
    return Impairments(delay=link.delay, jitter=link.jitter, loss=link.loss, duplicate=link.duplicate, corrupt=link.corrupt)


def _open_tap(scenario: Scenario, offload: bool) -> TapDevice:
    tap = TapDevice(TAP, mode=scenario.device.mode, offload=offload)
    try:
        with IPRoute() as ip:
            ip.link("set", index=socket.if_nametoindex(TAP), mtu=scenario.device.mtu)
        tap.mtu = scenario.device.mtu
        bring_up(TAP, f"{PEER}/{PREFIX_LEN}")
    except BaseException:
        tap.close()
        raise
    return tap


class RealPeer:
    """The kernel as the peer: see `run.Peer`."""

    def __init__(self, process: DemoPeer, scenario: Scenario, tap: TapDevice, wire: ImpairedTap | None, random: Random) -> None:
        self._process = process
        self._scenario = scenario
        self._tap = tap
        self._random = random
        self._orders = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._wire = wire
        self._faults = None if wire is None else WireFaults(wire.there, wire.back)

    async def serve(self, size: int) -> int:
        """See `run.Peer`."""
        return int(await self._process.do("serve", size=size))

    async def begin(self) -> None:
        """See `run.Peer`."""
        for number, traffic in enumerate(self._scenario.traffic):
            seed = self._random.getrandbits(32)
            plan = traffic.model_dump(mode="json")
            if isinstance(traffic, TcpBlocked):
                self._at(traffic.start, partial(self._do, "send", port=tcp_port(number), traffic=plan, seed=seed))
            elif isinstance(traffic, FloodTraffic):
                order = {
                    "device": TAP,
                    "subject_mac": self._tap.mac.hex(),
                    "traffic": plan,
                    "seed": seed,
                    "mtu": self._scenario.device.mtu,
                    "first_port": udp_port(self._scenario, number),
                }
                self._at(traffic.start, partial(self._do, "flood", **order))
        if self._faults is not None:
            self._faults.begin(self._scenario)
        for fault in self._scenario.fault:
            if isinstance(fault, PeerMac):
                self._at(fault.start, partial(self._do, "change_mac", device=TAP, announce=fault.announce))
            elif isinstance(fault, ServerRestart):
                self._at(fault.start, partial(self._restart, fault))

    def _at(self, seconds: float, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def act() -> None:
            await asyncio.sleep(seconds)
            await action()

        self._tasks.append(asyncio.get_running_loop().create_task(act()))

    async def _do(self, what: str, **arguments: Any) -> None:
        async with self._orders:  # one answer at a time
            await self._process.do(what, **arguments)

    async def _restart(self, fault: ServerRestart) -> None:
        if fault.crash:
            assert self._faults is not None
            self._faults.cut("both")
        await self._do("stop_server")
        await asyncio.sleep(fault.down)
        if fault.crash:
            assert self._faults is not None
            self._faults.mend("both")
        await self._do("start_server")

    def wire(self) -> Result:
        """See `run.Peer`."""
        stats = self._tap.stats
        if self._faults is None:
            return {"out": stats.tx_packets, "in": stats.rx_packets, "lost": 0, "duplicated": 0, "corrupted": 0}
        return self._faults.report()

    async def end(self) -> None:
        """See `run.Peer`."""
        for task in self._tasks:
            task.cancel()
        if self._faults is not None:
            self._faults.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._do("end")
