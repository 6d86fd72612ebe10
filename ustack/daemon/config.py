"""The daemon's configuration file: what may stand in it, and what is said when something else does.

The file is TOML. The models below are the reference: docs/reference/configuration.md is made from their fields, defaults
and docstrings. Values have the types of TOML (no "yes", no quoted numbers), keys that nobody knows are refused, and every
error names the file, the section, the key, the value, and what is allowed.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

from pydantic import BeforeValidator, Field, create_model

from pools.arena import PAGE_SIZE
from pools.base import names as pool_names
from ustack.daemon.sections import ConfigError, Section, as_size, parse_toml, place, read_text, toml_value
from ustack.daemon.size import EXAMPLES
from ustack.link.vlan import VID_MAX
from ustack.nbd.uri import NbdUri
from ustack.net.interface import check_host
from ustack.net.ipv4 import Ipv4Config
from ustack.net.ipv6 import Ipv6Config
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.udp import UdpConfig

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

CAPTURE_SHARE: Final = 16
"""The part of packet memory that captures may pin, unless the file says otherwise."""

MEMORY_MIN: Final = 1 << 20
"""Bytes of the smallest arena that is of any use: a receive ring and a connection."""


# -- values ------------------------------------------------------------------------------------------------------------------


def _interface_address(value: object) -> object:
    allowed = 'an address with its prefix length, such as "10.77.0.2/24" or "fd00:77::2/64"'
    own = ip_interface(_as(ip_interface, value, allowed, needs="/"))
    try:
        check_host(own.ip.packed, own.network.prefixlen)
    except ValueError as error:
        raise ValueError(f"{allowed} ({error})") from None
    return value


def _host_address(value: object) -> object:
    return _as(ip_address, value, 'an address, such as "10.77.0.1" or "fd00:77::1"')


def _network(value: object) -> object:
    return _as(ip_network, value, 'a network without host bits, such as "10.1.0.0/16" or "fd01::/64"', needs="/")


def _as(kind: Callable[[str], Any], value: object, allowed: str, needs: str = "") -> str:
    """Check by `kind`, and keep the string as it is."""
    try:
        if not isinstance(value, str) or needs not in value:
            raise ValueError
        kind(value)
    except ValueError:
        raise ValueError(allowed) from None
    return value


def _mac(value: object) -> object:
    allowed = 'a unicast Ethernet address, such as "02:00:00:00:00:02"'
    try:
        octets = bytes.fromhex(value.replace(":", "")) if isinstance(value, str) else b""
    except ValueError:
        raise ValueError(allowed) from None
    if len(octets) != 6 or octets[0] & 1 or not any(octets):
        raise ValueError(allowed)
    return value


def _file_mode(value: object) -> object:
    allowed = 'permission bits as an octal string, such as "0600"'
    if not isinstance(value, str):
        raise ValueError(allowed)
    try:
        mode = int(value, 8)
    except ValueError:
        raise ValueError(allowed) from None
    if mode & ~0o777:
        raise ValueError(allowed)
    return value


def _nbd_device(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"auto|/dev/nbd\d{1,5}", value):
        raise ValueError('"auto" or a device of the kernel\'s nbd, such as "/dev/nbd0"')
    return value


def _pool(value: object) -> object:
    if value not in pool_names():
        raise ValueError("one of " + ", ".join(f'"{name}"' for name in pool_names()))
    return value


def _uri(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError('an NBD URI, such as "nbd://10.77.0.1/disk"')
    try:
        uri = NbdUri.parse(value)
    except ValueError as error:
        raise ValueError(f'an NBD URI, such as "nbd://10.77.0.1/disk" ({error})') from None
    if uri.socket is None:
        _as(ip_address, uri.host, "an NBD URI whose host is an address: the stack has no name service")
    return value


def _auto_or_size(value: object) -> object:
    allowed = f'"auto", {EXAMPLES}'
    if value == "auto":
        return value
    try:
        nbytes = as_size(value)
    except ValueError:
        raise ValueError(allowed) from None
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        raise ValueError(allowed)
    return nbytes


# -- sections ----------------------------------------------------------------------------------------------------------------


class Device(Section):
    """The TAP device that the stack receives from and sends to."""

    name: Annotated[str, Field(min_length=1, max_length=15)]
    """Name of the interface."""
    mode: Literal["paged", "linear"] = "paged"
    """How frames are received: `paged` (packet split, small frames copied) or `linear` (one contiguous buffer a frame)."""
    offload: bool = True
    """Checksum offload and super-frames of up to 64 KiB."""
    mac: Annotated[str, BeforeValidator(_mac)] | None = None
    """The stack's own Ethernet address. Default: made from the name of the interface."""
    create: bool = True
    """Make the interface if it does not exist, and bring it up. `false`: it must exist, and is left as it is."""


class Address(Section):
    """An address of the stack on the device. There may be several, and none where routers give one (`[ipv6] autoconf`)."""

    address: Annotated[str, BeforeValidator(_interface_address)]
    """IPv4 or IPv6 address and prefix length. An IPv6 address can be used once nobody has objected to it for a second."""
    gateway: Annotated[str, BeforeValidator(_host_address)] | None = None
    """Router for everything of that version that no route covers; of IPv6 it may be link-local. Default: none."""
    vlan: Annotated[int, Field(ge=0, le=VID_MAX)] = 0
    """The VLAN on the device that the address is in, by its 802.1Q tag; 0: frames without a tag."""


class Route(Section):
    """A network that is reached by way of a router."""

    network: Annotated[str, BeforeValidator(_network)]
    """Where the route leads."""
    via: Annotated[str, BeforeValidator(_host_address)]
    """The router, which must be on the network of an address of ours, or link-local."""
    metric: Annotated[int, Field(ge=0)] = 0
    """Of two routes to the same network the one with the lower metric is taken."""
    congestion: Literal["", "reno", "newreno", "cubic", "bbr"] = ""
    """Congestion control of TCP connections that take the route, unless the socket names one; empty: that of `[tcp]`."""


class Memory(Section):
    """Packet memory: taken when the daemon starts, and never more than that."""

    pool: Annotated[str, BeforeValidator(_pool)] = "kmalloc"
    """The allocator that lays packets on pages."""
    size: Annotated[int, BeforeValidator(as_size), Field(ge=MEMORY_MIN)] = 64 << 20
    """Bytes of packet memory."""
    reserve: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_size)] = "auto"
    """Bytes that only memalloc sockets may use. `auto`: as many as the NBD exports need by their `requests` and
    `request_size`."""
    capture: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_size)] = "auto"
    """Bytes of it that captures may pin, all together (`ustack capture`). `auto`: a sixteenth of the memory, or 0 with
    `zero_copy`. 0: nobody may capture, and no other process can map the memory.
    """
    zero_copy: Literal["off", "copy", "scrub"] = "off"
    """Whether clients of the control socket may map what a connection of theirs has received, and what happens to a page that
    holds data of others as well: `copy` (the page stays, and the connection's data is copied) or `scrub` (the page is given
    away, and the others' data is moved). Every page needs a file descriptor, and nobody may capture.
    """
    lock: bool = False
    """Keep the memory from being swapped out (mlock(2); needs CAP_IPC_LOCK or a sufficient RLIMIT_MEMLOCK)."""


class Nbd(Section):
    """An NBD export that the daemon attaches over its stack, with a memalloc socket, and attaches again when it is lost."""

    name: Annotated[str, Field(min_length=1)]
    """The name under which status shows it."""
    uri: Annotated[str, BeforeValidator(_uri)]
    """Where the export is. The host is an address: the stack has no name service."""
    requests: Annotated[int, Field(ge=1, le=1024)] = 64
    """Requests in flight."""
    request_size: Annotated[int, BeforeValidator(as_size), Field(ge=512, le=32 << 20)] = 64 << 10
    """Bytes of data of one request, for which the reserve is made; of larger ones fewer are in flight."""
    dead_after: Annotated[float, Field(ge=0)] = 0.0
    """Seconds without an answer after which requests fail; 0: never, callers wait until the server is back."""
    unix: Annotated[str, Field(min_length=1, max_length=107)] | None = None
    """Path of a unix socket that speaks NBD and leads to the disk: for QEMU, libnbd, fio, nbd-client."""
    unix_mode: Annotated[str, BeforeValidator(_file_mode)] = "0600"
    """Who may connect to it: its permission bits."""
    device: Annotated[str, BeforeValidator(_nbd_device)] | None = None
    """A device of the kernel's nbd that is the disk, such as `/dev/nbd0`, or `auto` for any that is free (needs CAP_SYS_ADMIN
    and the module nbd)."""
    fuse: Annotated[str, Field(min_length=1)] | None = None
    """Path of a file that is the disk (FUSE; needs CAP_SYS_ADMIN and /dev/fuse): for loop devices, and swap on them. There must
    be nothing, or an empty file."""


class Disks(Section):
    """What is attached by a call of the control socket: sections [[nbd]] and nothing else."""

    nbd: list[Nbd]


class Arm(Section):
    """The process itself: what others swap over must not wait for memory. `ustack doctor` says what is in force."""

    enabled: bool = False
    """Lock and stock the process's memory, set PR_SET_IO_FLUSHER and oom_score_adj -1000, keep the garbage collector out of the
    way, and take real-time priority. Needs CAP_IPC_LOCK, CAP_SYS_RESOURCE and CAP_SYS_NICE; what cannot be had is logged."""
    priority: Annotated[int, Field(ge=0, le=98)] = 1
    """Priority under SCHED_FIFO; 0: none. A process that uses the CPU for a second without a pause loses it for five."""
    stock: Annotated[int, BeforeValidator(as_size), Field(ge=0)] = 16 << 20
    """Bytes of heap that are taken beforehand."""
    cgroup: Annotated[str, Field(min_length=1)] | None = None
    """Folder of a cgroup to move to, one without a memory limit. Default: stay."""
    watchdog: Annotated[float, Field(ge=0)] = 10.0
    """Seconds that a request, or the event loop, may be stuck before the watchdog says so on stderr and in the kernel's log; 0:
    no watchdog."""


class Control(Section):
    """The socket through which `ustack ss`, `ustack ping` and their like talk to the daemon."""

    path: Annotated[str, Field(min_length=1, max_length=107)] | None = None
    """Path of the unix socket. Default: `/run/ustack/control.sock` for root, else `$XDG_RUNTIME_DIR/ustack/control.sock`."""
    mode: Annotated[str, BeforeValidator(_file_mode)] = "0600"
    """Who may connect: its permission bits."""


class Service(Section):
    """Small servers for tests, on the ports of RFC 862 to 864."""

    echo: bool = False
    """TCP and UDP port 7: what comes goes back (RFC 862)."""
    discard: bool = False
    """TCP port 9: what comes is read and forgotten (RFC 863)."""
    chargen: bool = False
    """TCP port 19: bytes without end (RFC 864)."""


CongestionName = Literal["reno", "newreno", "cubic", "bbr"]
SWITCHES: Final = frozenset({"ecn", "syncookies", "fastopen", "dad_transmits", "max_addresses", "router_solicitations"})
"""Settings of which 0 means off."""

CHOICES: Final[dict[str, Any]] = {
    "addr_gen_mode": Literal["stable_privacy", "eui64"],
    "rp_filter": Annotated[int, Field(ge=0, le=2)],
}
"""Settings that are one of a few names or numbers."""


def _section_of(settings: type, name: str, doc: str) -> type[Section]:
    """A section with the fields and defaults of the dataclass `settings`, whose docstrings are the documentation."""
    hints = get_type_hints(settings)
    definitions: dict[str, Any] = {}
    for field in fields(settings):
        assert field.default is not MISSING
        kind: Any = hints[field.name]
        if field.name in CHOICES:
            kind = CHOICES[field.name]
        elif kind is bool or kind is str:
            pass
        elif field.name == "congestion":
            kind = CongestionName
        elif field.name in SWITCHES:
            kind = Annotated[int, Field(ge=0)]
        elif "mem_" in field.name:
            kind = Annotated[int, BeforeValidator(as_size), Field(ge=bool(field.default))]  # 0 stays 0: by the memory
        elif kind is float:
            kind = Annotated[float, Field(gt=0, allow_inf_nan=False)]
        else:
            kind = Annotated[kind, Field(gt=0)]
        definitions[field.name] = (kind, field.default)
    section: type[Section] = create_model(name, __base__=Section, __doc__=doc, **definitions)
    return section


if TYPE_CHECKING:
    Ipv4 = Section
    Ipv6 = Section
    Tcp = Section
    Udp = Section
else:
    Ipv4 = _section_of(Ipv4Config, "Ipv4", "Which packets are believed to come from where they say.")
    Ipv6 = _section_of(Ipv6Config, "Ipv6", "What routers may say, and how our own IPv6 addresses are made.")
    Tcp = _section_of(TcpConfig, "Tcp", "Limits and times of TCP.")
    Udp = _section_of(UdpConfig, "Udp", "Limits of UDP.")

ASCENDING: Final = (
    ("rmem_min", "rmem_default", "rmem_max"),
    ("wmem_min", "wmem_default", "wmem_max"),
    ("mem_low", "mem_pressure", "mem_high"),
    ("rto_min", "rto_max"),
    ("initial_rto", "rto_max"),
)
"""Settings of [tcp] and [udp] none of which may be more than the next, as far as a section has them and they are not 0."""


class Config(Section):
    """A whole configuration file. `ipv4`, `ipv6`, `tcp` and `udp` have the fields of `Ipv4Config` and so on."""

    device: Device
    address: list[Address] = []  # noqa: RUF012 (pydantic copies it)
    route: list[Route] = []  # noqa: RUF012
    ipv4: Ipv4 = Ipv4()
    ipv6: Ipv6 = Ipv6()
    memory: Memory = Memory()
    tcp: Tcp = Tcp()
    udp: Udp = Udp()
    nbd: list[Nbd] = []  # noqa: RUF012
    arm: Arm = Arm()
    control: Control = Control()
    service: Service = Service()

    def addresses(self) -> str:
        """The stack's addresses, for people."""
        return ", ".join(own.address for own in self.address) or "addresses from routers"

    def ipv4_config(self) -> Ipv4Config:
        """The section `ipv4` as the stack takes it."""
        return Ipv4Config(**self.ipv4.model_dump())

    def ipv6_config(self) -> Ipv6Config:
        """The section `ipv6` as the stack takes it."""
        return Ipv6Config(**self.ipv6.model_dump())

    def tcp_config(self) -> TcpConfig:
        """The section `tcp` as the stack takes it."""
        return TcpConfig(**self.tcp.model_dump())

    def udp_config(self) -> UdpConfig:
        """The section `udp` as the stack takes it."""
        return UdpConfig(**self.udp.model_dump())

    def capture_bytes(self) -> int:
        """What captures may pin, in bytes."""
        memory = self.memory
        if isinstance(memory.capture, str):
            return memory.size // CAPTURE_SHARE if memory.zero_copy == "off" else 0
        return memory.capture


# -- reading -----------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Config:
    """Read the file at `path`. Raises ConfigError."""
    return parse(read_text(path), str(path))


def parse(text: str, origin: str) -> Config:
    """Read a configuration from `text`; `origin` names it in messages. Raises ConfigError."""
    config = parse_toml(text, origin, Config)
    problems = list(_contradictions(config))
    if problems:
        raise ConfigError([f"{origin}: {problem}" for problem in problems])
    return config


def _contradictions(config: Config) -> Iterator[str]:
    """What is right by itself and wrong together."""
    if not config.address and not config.ipv6_config().autoconf:
        yield "[[address]] is missing: allowed is none only with [ipv6] autoconf = true"
    yield from _unreachable_routers(config)
    names = [nbd.name for nbd in config.nbd]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield f"{place(('nbd', number), 'name')} = {toml_value(name)}: allowed is each name only once"
    for key in ("fuse", "unix", "device"):
        places = [getattr(nbd, key) for nbd in config.nbd]
        for number, place_ in enumerate(places):
            if place_ not in (None, "auto") and place_ in places[:number]:
                yield f"{place(('nbd', number), key)} = {toml_value(place_)}: allowed is each only once"
    reserve = config.memory.reserve
    if isinstance(reserve, int) and reserve > config.memory.size - PAGE_SIZE:
        yield f"[memory] reserve = {reserve}: allowed is less than the whole memory, {config.memory.size}"
    if config.capture_bytes() and config.memory.zero_copy != "off":
        yield f"[memory] capture = {config.capture_bytes()}: allowed with zero_copy is only 0"
    if config.capture_bytes() > config.memory.size // 2:
        yield f"[memory] capture = {config.capture_bytes()}: allowed is at most half of the memory, {config.memory.size // 2}"
    yield from _descents("tcp", config.tcp)
    yield from _descents("udp", config.udp)


def _descents(name: str, section: Section) -> Iterator[str]:
    """Settings of `section` that must not be more than others, and are. What the file says is blamed, not what is a
    default.
    """
    for limits in ASCENDING:
        values = {key: getattr(section, key) for key in limits if getattr(section, key, 0)}
        for (lower, least), (upper, most) in pairwise(values.items()):
            if least <= most:
                continue
            if upper in section.model_fields_set:
                yield f"[{name}] {upper} = {most}: allowed is at least {lower}, {least}"
            else:
                yield f"[{name}] {lower} = {least}: allowed is at most {upper}, {most}"


def _unreachable_routers(config: Config) -> Iterator[str]:
    """Addresses that we have twice, and routers that are no other host on a network of ours."""
    all_ours = [ip_interface(own.address) for own in config.address]
    for number, (own, ours) in enumerate(zip(config.address, all_ours, strict=True)):
        if ours.ip in (other.ip for other in all_ours[:number]):
            yield f"{place(('address', number), 'address')} = {toml_value(own.address)}: allowed is each address only once"
        if own.gateway is not None and not _neighbour(ours, own.gateway):
            allowed = f"allowed is a host on our network, {ours.network}, other than {ours.ip}"
            yield f"{place(('address', number), 'gateway')} = {toml_value(own.gateway)}: {allowed}"
    for number, route in enumerate(config.route):
        where = f"{place(('route', number), 'via')} = {toml_value(route.via)}"
        version = ip_network(route.network).version
        if ip_address(route.via).version != version:
            yield f"{where}: allowed is a router of IPv{version}, as the network is"
        elif not (version == 6 and ip_address(route.via).is_link_local) and not any(_neighbour(x, route.via) for x in all_ours):
            networks = ", ".join(str(ours.network) for ours in all_ours if ours.version == version) or "none"
            ips = ", ".join(str(ours.ip) for ours in all_ours if ours.version == version)
            yield f"{where}: allowed is a host on our network, {networks}, other than {ips}"


def _neighbour(ours: IPv4Interface | IPv6Interface, router: str) -> bool:
    """Whether `router` can be another host on the network of `ours`, or on its link."""
    address = ip_address(router)
    if address.version != ours.version:
        return False
    network = ours.network
    unusable = {ours.ip}
    if ours.version == 4 and network.prefixlen < 31:
        unusable |= {network.network_address, network.broadcast_address}
    link_local = ours.version == 6 and address.is_link_local
    return (address in network or link_local) and address not in unusable


SECTIONS: Final[dict[str, type[Section]]] = {
    "device": Device,
    "address": Address,
    "route": Route,
    "ipv4": Ipv4,
    "ipv6": Ipv6,
    "memory": Memory,
    "tcp": Tcp,
    "udp": Udp,
    "nbd": Nbd,
    "arm": Arm,
    "control": Control,
    "service": Service,
}
"""The sections of the file in the order in which it is best read."""
