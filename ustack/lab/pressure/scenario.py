"""A scenario: what a TOML file of the pressure lab says.

The models below are the reference: docs/reference/pressure-scenarios.md is made from their fields, defaults and docstrings.
Times are seconds from the moment when the disk has been attached, in virtual time or, with `--real`, in real time. Sizes are
bytes, or strings such as "64K". Probabilities lie between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from inspect import Parameter, signature
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from pools.arena import PAGE_SIZE, Arena
from pools.base import by_name
from pools.base import names as pool_names
from pools.buddy import PageAllocator
from pools.nta import V1, V2
from ustack.daemon.config import MEMORY_MIN, Tcp, Udp
from ustack.daemon.sections import ConfigError, Section, as_size, parse_toml, place, read_text, toml_value
from ustack.daemon.size import EXAMPLES
from ustack.drops import DropReason
from ustack.lab.pressure.faults import SITES
from ustack.mib import Mib
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.udp import UdpConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

EVERY_POOL: Final = "all"

DATAGRAM_MAX: Final = 65507
"""Bytes of payload in the largest UDP datagram over IPv4."""


# -- values ------------------------------------------------------------------------------------------------------------------


def _pools(value: object) -> object:
    known = pool_names()
    allowed = f'"{EVERY_POOL}", a pool or an array of pools; there are ' + ", ".join(f'"{name}"' for name in known)
    if value == EVERY_POOL:
        return list(known)
    wanted = [value] if isinstance(value, str) else value
    if not isinstance(wanted, list) or not wanted or any(name not in known for name in wanted):
        raise ValueError(allowed)
    return list(dict.fromkeys(wanted))


def _reserve(value: object) -> object:
    allowed = f'"auto", "off", {EXAMPLES}'
    if value in ("auto", "off"):
        return value
    try:
        nbytes = as_size(value)
    except ValueError:
        raise ValueError(allowed) from None
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        raise ValueError(allowed)
    return nbytes


def _between(value: object) -> object:
    """A size, or the smallest and the largest of sizes drawn at random."""
    try:
        bounds = [as_size(each) for each in value] if isinstance(value, list | tuple) else [as_size(value)] * 2
    except ValueError:
        bounds = []
    if len(bounds) == 2:
        low, high = bounds
        if type(low) is int and type(high) is int and 0 < low <= high:
            return (low, high)
    raise ValueError(f"a size of at least 1 ({EXAMPLES}), or an array of the smallest and the largest")


def _start(value: object) -> object:
    if value == "full" or (type(value) in (int, float) and 0 <= value < inf):  # type: ignore[operator]  # a number
        return value
    raise ValueError('a number of seconds, at least 0, or "full"')


def _site(value: object) -> object:
    if value not in SITES:
        raise ValueError("one of " + ", ".join(f'"{site}"' for site in SITES))
    return value


def _parameter(value: object) -> object:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict) and all(isinstance(each, int) for each in value.values()):
        return value
    raise ValueError("true or false, a number, a string, or a table of integers")


Size = Annotated[int, BeforeValidator(as_size), Field(ge=0)]
PositiveSize = Annotated[int, BeforeValidator(as_size), Field(gt=0)]
Sizes = Annotated[tuple[int, int], BeforeValidator(_between)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]


# -- the stack under test ----------------------------------------------------------------------------------------------------


class Memory(Section):
    """The packet memory of the stack under test."""

    pool: Annotated[list[str], BeforeValidator(_pools)] = ["kmalloc"]  # noqa: RUF012 (pydantic copies it)
    """The pool, an array of pools, or `"all"`: the scenario is run with each of them."""
    size: Annotated[int, BeforeValidator(as_size), Field(ge=MEMORY_MIN)] = 2 << 20
    """Bytes of packet memory."""
    reserve: Annotated[Literal["auto", "off"] | int, BeforeValidator(_reserve)] = "auto"
    """Bytes that only memalloc sockets may use; `auto`: as many as the requests of `[nbd]` need, `off`: none. When they need
    more than half of `size`, the disk cannot be attached, and the run ends as `raised`."""
    parameters: dict[str, Annotated[Any, BeforeValidator(_parameter)]] = {}  # noqa: RUF012
    """Parameters of the pool, by the names that its class has, such as `lanes = 2`. For `nta`, `version` is `"v1"` or `"v2"`,
    or a table of constants that differ from those of v2."""

    def reserve_of_stack(self) -> int | Literal["auto"]:
        """The reserve as a stack takes it: bytes, or "auto"."""
        return 0 if self.reserve == "off" else self.reserve


class Device(Section):
    """The device of the stack under test."""

    mode: Literal["paged", "linear"] = "paged"
    """The receive ring: `paged` (packet split, small frames copied) or `linear` (one contiguous buffer a frame)."""
    offload: bool = True
    """Checksum offload and super-frames of up to 64 KiB. A linear ring receives no super-frames. With `--real` there are none
    when the wire is bad, or is cut: bits that flip on the wire must be noticed."""
    mtu: Annotated[int, Field(ge=576, le=9000)] = 1500
    """Bytes of the largest IP packet; 9000 for jumbo frames."""


class Link(Section):
    """What the wire does to every frame, in both directions, during the whole run."""

    delay: Seconds = 50e-6
    """Seconds that a frame travels. With `--real`: on top of the time it takes."""
    jitter: Seconds = 0.0
    """Seconds that a frame travels longer at most; frames overtake each other."""
    rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Bits per second; 0 is no limit. Not with `--real`."""
    queue: Size = 0
    """Bytes of frames that wait for the rate; what comes on top is lost. 0 is no limit. Not with `--real`."""
    loss: Probability = 0.0
    """Probability that a frame is lost."""
    duplicate: Probability = 0.0
    """Probability that a frame arrives twice."""
    corrupt: Probability = 0.0
    """Probability that one bit of a frame is flipped; of a frame that is not IPv4, that it is lost."""


# -- traffic -----------------------------------------------------------------------------------------------------------------


class _Traffic(Section):
    start: Seconds = 0.0
    """When it begins."""
    stop: PositiveSeconds | None = None
    """When it ends, and what it holds is given back. Default: with the run."""


class TcpBlocked(_Traffic):
    """Connections whose reader never reads: what the peer sends waits in packet memory until the limit of the socket."""

    kind: Literal["tcp_blocked"]
    """`"tcp_blocked"`"""
    count: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Connections."""
    size: PositiveSize | None = None
    """Bytes that the peer sends on each. Default: without end."""
    write: Sizes = (65536, 65536)
    """Bytes that the peer sends at a time: a size, or an array of the smallest and the largest. Small ones make small
    segments."""


class UdpBlocked(_Traffic):
    """Datagram sockets that nobody reads. A datagram that does not fit the MTU comes as fragments."""

    kind: Literal["udp_blocked"]
    """`"udp_blocked"`"""
    count: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Sockets."""
    size: Sizes = (1472, 1472)
    """Bytes of payload of a datagram: a size, or an array of the smallest and the largest, each octave as often as the next.
    At most 65507."""
    rate: Rate = 1000.0
    """Datagrams a second, for all sockets together."""
    rcvbuf: PositiveSize | None = None
    """Receive limit of each socket (SO_RCVBUF) before doubling. Default: that of the stack."""


class LocalSockets(_Traffic):
    """Packets of sockets on the same machine, such as unix sockets: of any size, from the same memory, never from the
    reserve."""

    kind: Literal["local"]
    """`"local"`"""
    size: Sizes = (64, 16384)
    """Bytes of a packet: a size, or an array of the smallest and the largest, each octave as often as the next."""
    rate: Rate = 1000.0
    """Packets a second."""
    hold: PositiveSeconds | None = None
    """Mean of the time that a packet waits, exponentially distributed. Default: nobody reads."""


class Fragments(_Traffic):
    """Fragments of datagrams for a socket that does not exist."""

    kind: Literal["fragments"]
    """`"fragments"`"""
    size: Sizes = (8000, 8000)
    """Bytes of payload of a datagram, at most 65507."""
    rate: Rate = 100.0
    """Datagrams a second."""
    complete: bool = False
    """Whether all fragments come; else the last one never does, and what came waits in vain."""


class ArpFlood(_Traffic):
    """ARP requests for the address of the stack, from stations that come and go."""

    kind: Literal["arp_flood"]
    """`"arp_flood"`"""
    rate: Rate = 1000.0
    """Requests a second."""
    sources: Annotated[int, Field(ge=1, le=60_000)] = 1000
    """Stations, each with an address of its own."""


class SynFlood(_Traffic):
    """SYNs from addresses that never answer, for a port on which the stack listens."""

    kind: Literal["syn_flood"]
    """`"syn_flood"`"""
    rate: Rate = 1000.0
    """SYNs a second."""
    sources: Annotated[int, Field(ge=1, le=60_000)] = 1000
    """Addresses, all on our network: the stack asks for them by ARP, in vain."""


class IcmpFlood(_Traffic):
    """Echo requests from the peer."""

    kind: Literal["icmp_flood"]
    """`"icmp_flood"`"""
    rate: Rate = 1000.0
    """Requests a second."""
    size: Sizes = (56, 56)
    """Bytes of payload, at most what the MTU leaves."""


class MemoryHog(_Traffic):
    """Somebody else on the machine takes pages, and never from the reserve."""

    kind: Literal["hog"]
    """`"hog"`"""
    size: PositiveSize | None = None
    """Bytes that it takes. Default: whatever it gets."""
    rate: PositiveSize | None = None
    """Bytes that it takes a second. Default: all at once."""
    hold: PositiveSeconds | None = None
    """How long it keeps them, from `start` on; then it begins again after as long a pause. Default: to the end."""


Traffic = Annotated[
    TcpBlocked | UdpBlocked | LocalSockets | Fragments | ArpFlood | SynFlood | IcmpFlood | MemoryHog,
    Field(discriminator="kind"),
]


# -- faults ------------------------------------------------------------------------------------------------------------------


class _Fault(Section):
    start: Seconds = 0.0
    """When it begins."""


class AllocationFault(_Fault):
    """Allocations of the stack under test fail."""

    kind: Literal["allocation"]
    """`"allocation"`"""
    stop: PositiveSeconds | None = None
    """When it ends. Default: with the run."""
    probability: Probability = 1.0
    """How probable it is that an allocation that is meant fails."""
    site: Annotated[str, BeforeValidator(_site)] | None = None
    """Who allocates: one of the call sites below. Default: everybody."""
    min_size: Size = 0
    """Only allocations of at least so many bytes."""
    max_size: PositiveSize | None = None
    """Only allocations of at most so many bytes. Default: of any size."""
    memalloc: bool = True
    """Whether allocations that may use the reserve fail as well."""


class LinkFault(_Fault):
    """The wire gets worse for a while. A key that is left out stays as in `[link]`."""

    kind: Literal["link"]
    """`"link"`"""
    stop: PositiveSeconds | None = None
    """When it ends. Default: with the run."""
    direction: Literal["both", "in", "out"] = "both"
    """Frames to the stack under test (`in`), from it (`out`), or both."""
    delay: Seconds | None = None
    """As in `[link]`."""
    jitter: Seconds | None = None
    """As in `[link]`."""
    loss: Probability | None = None
    """As in `[link]`."""
    duplicate: Probability | None = None
    """As in `[link]`."""
    corrupt: Probability | None = None
    """As in `[link]`."""


class Cut(_Fault):
    """The cable is out: every frame is lost."""

    kind: Literal["cut"]
    """`"cut"`"""
    duration: PositiveSeconds = 200.0
    """For how long."""
    direction: Literal["both", "in", "out"] = "both"
    """Frames to the stack under test (`in`), from it (`out`), or both."""


class PeerMac(_Fault):
    """The peer's Ethernet address changes, as when another machine takes over: frames to the old one reach nobody."""

    kind: Literal["peer_mac"]
    """`"peer_mac"`"""
    announce: bool = True
    """Whether the new station announces itself (gratuitous ARP)."""


class ServerRestart(_Fault):
    """The NBD server ends, and starts again on the same disk."""

    kind: Literal["server_restart"]
    """`"server_restart"`"""
    down: Seconds = 1.0
    """Seconds until it listens again; until then connecting is refused."""
    crash: bool = False
    """Its end is not told to anybody: the machine loses its power, and does not answer while it is down."""


Fault = Annotated[AllocationFault | LinkFault | Cut | PeerMac | ServerRestart, Field(discriminator="kind")]


# -- what must go on, and what is expected -----------------------------------------------------------------------------------


class Nbd(Section):
    """The critical load: reads and writes on a disk over NBD. The disk is attached before anything else happens; every byte
    that is read is compared with what was written."""

    disk: Annotated[int, BeforeValidator(as_size), Field(ge=65536, le=1 << 30)] = 1 << 20
    """Bytes of the disk."""
    requests: Annotated[int, Field(ge=1)] = 200
    """Reads and writes to be done."""
    request_size: Sizes = (4096, 4096)
    """Bytes of a request: a size, or an array of the smallest and the largest. Rounded down to sectors of 512."""
    depth: Annotated[int, Field(ge=1, le=128)] = 8
    """Requests at a time, each on a part of the disk of its own."""
    reads: Probability = 0.5
    """Share of the requests that read."""
    start: Annotated[float | Literal["full"], BeforeValidator(_start)] = "full"
    """When the work begins; `full`: as soon as an allocation has failed, or a frame was dropped for want of memory (`NOMEM`,
    `PROTO_MEM`, `MEM_PRESSURE`), and nobody has got more memory for 20 ms."""
    pause: Seconds = 0.0
    """Mean of the time between the end of a request and the next of the same worker, exponentially distributed."""
    request_timeout: PositiveSeconds = 30.0
    """Seconds without a sign of life, while a request waits, after which the connection counts as lost: another is made, as
    often as it takes, and what was not answered is sent again."""
    heartbeat: Seconds = 0.0
    """Seconds between two reads of a sector that go on beside the work until it is done; 0: no heartbeat."""


class Bounds(Section):
    """From `min` to `max`; what is left out does not bound. An integer instead of the table is both."""

    min: Annotated[int, Field(ge=0)] = 0
    """At least so many."""
    max: Annotated[int, Field(ge=0)] | None = None
    """At most so many."""


def _bounds(value: object) -> object:
    return {"min": value, "max": value} if type(value) is int and value >= 0 else value


CounterBounds = Annotated[Bounds, BeforeValidator(_bounds)]


class Expect(Section):
    """What must be true at the end for a run to be passed. That everything has been given back when all is closed, and that
    no byte that was read is wrong, is expected of every run."""

    finishes: bool | None = None
    """Whether all requests are done within `duration`, without errors. Default: true, unless `standstill` is given."""
    standstill: PositiveSeconds | None = None
    """The work stands still: from some moment on no request is done for so many seconds. The run ends there."""
    progress_gap: PositiveSeconds | None = None
    """Seconds that may pass without any request being done while the work goes on, at most."""
    heartbeat_gap: PositiveSeconds | None = None
    """Seconds between the ends of two heartbeats, at most."""
    latency: PositiveSeconds | None = None
    """Seconds that a request takes, at most."""
    max_memory: PositiveSize | None = None
    """Bytes of packet memory that are in use, at most."""
    reserve_left: Size | None = None
    """Bytes of the reserve that are free at any time, at least."""
    counters: dict[str, CounterBounds] = {}  # noqa: RUF012
    """Counters of the stack under test at the end, by name: `TcpRetransSegs = { max = 100 }`."""
    drops: dict[str, CounterBounds] = {}  # noqa: RUF012
    """Frames that it dropped, by reason: `PFMEMALLOC = { min = 1 }`."""


class Scenario(Section):
    """A whole file. `tcp` has the fields of `TcpConfig`, `udp` those of `UdpConfig`."""

    about: Annotated[str, Field(min_length=1)]
    """What it shows, in a sentence."""
    duration: PositiveSeconds = 600.0
    """When the run ends, if the work is not done before."""
    memory: Memory = Memory()
    device: Device = Device()
    link: Link = Link()
    tcp: Tcp = Tcp()
    udp: Udp = Udp()
    traffic: list[Traffic] = []  # noqa: RUF012
    fault: list[Fault] = []  # noqa: RUF012
    nbd: Nbd = Nbd()
    expect: Expect = Expect()

    def tcp_config(self) -> TcpConfig:
        """The section `tcp` as the stack takes it."""
        return TcpConfig(**self.tcp.model_dump())

    def udp_config(self) -> UdpConfig:
        """The section `udp` as the stack takes it."""
        return UdpConfig(**self.udp.model_dump())

    @property
    def must_finish(self) -> bool:
        """Whether all requests must be done."""
        expect = self.expect
        return expect.standstill is None if expect.finishes is None else expect.finishes


# -- pools with parameters ---------------------------------------------------------------------------------------------------


def pool_options(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` as the class of the pool `name` takes them. Raises ValueError for a value that is none."""
    options = dict(parameters)
    version = options.get("version")
    if name == "nta" and version is not None:
        try:
            options["version"] = V2._replace(**version) if isinstance(version, dict) else {"v1": V1, "v2": V2}[version]
        except (KeyError, ValueError):
            constants = ", ".join(V2._fields)
            raise ValueError(f'version: allowed is "v1", "v2" or a table of {constants}') from None
    return options


def _parameters_of(name: str) -> list[str]:
    """The parameters of the pool `name`; none when its class, compiled or from elsewhere, does not say."""
    try:
        parameters = signature(by_name(name)).parameters.values()
    except ValueError:
        return []
    if any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        return []
    return [each.name for each in parameters if each.kind is Parameter.KEYWORD_ONLY]


def check_parameters(name: str, memory: Memory) -> None:
    """Make the pool once. Raises ValueError, which says what is allowed, when it has no such parameters, or does not take their
    values.
    """
    known = _parameters_of(name)
    for parameter, value in memory.parameters.items():
        if known and parameter not in known:
            raise ValueError(f"{parameter} = {toml_value(value)}: allowed for {name} is {', '.join(known)}")
    try:
        by_name(name)(PageAllocator(Arena(memory.size // PAGE_SIZE)), **pool_options(name, memory.parameters))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{name} does not take these parameters: {error}") from None


# -- reading -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedScenario:
    """A scenario with its name, which is that of its file."""

    name: str
    scenario: Scenario


def load(path: str | Path) -> NamedScenario:
    """Read the file at `path`. Raises ConfigError."""
    return parse(read_text(path), str(path))


def parse(text: str, origin: str) -> NamedScenario:
    """Read a scenario from `text`; `origin` is its file. Raises ConfigError."""
    scenario = parse_toml(text, origin, Scenario)
    problems = list(_contradictions(scenario))
    if problems:
        raise ConfigError([f"{origin}: {problem}" for problem in problems])
    return NamedScenario(Path(origin).stem, scenario)


def bundled() -> dict[str, NamedScenario]:
    """The scenarios that come with the package, by name."""
    found = (each for each in files("ustack.lab.pressure").joinpath("scenarios").iterdir() if each.name.endswith(".toml"))
    named = (parse(each.read_text("utf-8"), each.name) for each in sorted(found, key=lambda each: each.name))
    return {each.name: each for each in named}


def bundled_text(name: str) -> str:
    """The file of a bundled scenario. Raises KeyError."""
    file = files("ustack.lab.pressure").joinpath("scenarios", f"{name}.toml")
    if not file.is_file():
        raise KeyError(name)
    return file.read_text("utf-8")


def _contradictions(scenario: Scenario) -> Iterator[str]:
    """What is right by itself and wrong together."""
    memory = scenario.memory
    reserve = memory.reserve_of_stack()
    if isinstance(reserve, int) and reserve > memory.size - PAGE_SIZE:
        yield f"[memory] reserve = {reserve}: allowed is less than the whole memory, {memory.size}"
    if memory.parameters:
        for name in memory.pool:
            try:
                check_parameters(name, memory)
            except ValueError as error:
                yield f"[memory.parameters] {error}"
    for number, traffic in enumerate(scenario.traffic):
        if traffic.stop is not None and traffic.stop <= traffic.start:
            yield f"{place(('traffic', number), 'stop')} = {traffic.stop:g}: allowed is more than start, {traffic.start:g}"
        if isinstance(traffic, UdpBlocked | Fragments) and traffic.size[1] > DATAGRAM_MAX:
            yield f"{place(('traffic', number), 'size')} = {traffic.size[1]}: allowed is at most {DATAGRAM_MAX}"
        if isinstance(traffic, IcmpFlood) and traffic.size[1] > scenario.device.mtu - 28:
            yield f"{place(('traffic', number), 'size')} = {traffic.size[1]}: allowed is at most {scenario.device.mtu - 28}"
    for number, fault in enumerate(scenario.fault):
        if isinstance(fault, AllocationFault | LinkFault) and fault.stop is not None and fault.stop <= fault.start:
            yield f"{place(('fault', number), 'stop')} = {fault.stop:g}: allowed is more than start, {fault.start:g}"
    nbd = scenario.nbd
    if nbd.request_size[0] < 512:
        yield f"[nbd] request_size = {nbd.request_size[0]}: allowed is at least a sector, 512"
    if nbd.request_size[1] > (share := nbd.disk // (nbd.depth + 1)):
        yield f"[nbd] request_size = {nbd.request_size[1]}: allowed is a share of the disk for each of depth workers, {share}"
    expect = scenario.expect
    if expect.finishes and expect.standstill is not None:
        yield "[expect] standstill: work that finishes does not stand still"
    yield from _unknown("expect.counters", expect.counters, Mib().as_dict())
    yield from _unknown("expect.drops", expect.drops, [reason.name for reason in DropReason])


def _unknown(section: str, given: dict[str, Bounds], known: Iterable[str]) -> Iterator[str]:
    for name, bounds in given.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            yield f"{place((section,), name)}: unknown name" + (f"; did you mean {close[0]!r}?" if close else "")
        elif bounds.max is not None and bounds.max < bounds.min:
            yield f"{place((section,), name)} = {toml_value(bounds.max)}: allowed is at least min, {bounds.min}"
