#!/usr/bin/env python3
"""Write the pages of docs/reference that follow from the code: drop reasons, counters, socket options, settings of TCP and
UDP.

    tools/reference_pages.py

What a name means is said by the docstring behind it; where a drop or a counter is counted is found in the source; what an
option of a socket takes and what it is at first is found by asking a socket. tests/docs/test_reference_pages.py fails when a
page is not what this would write.
"""

from __future__ import annotations

import ast
import inspect
import re
import socket as names
from contextlib import closing
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Final, get_args

from ustack import socket_options as ours
from ustack.drops import DropReason
from ustack.lab.pressure.faults import SITES
from ustack.lab.pressure.scenario import (
    Bounds,
    Device,
    Expect,
    Fault,
    Link,
    Memory,
    Nbd,
    Scenario,
    Traffic,
    bundled,
)
from ustack.mib import Mib
from ustack.socket_options import GETTERS, SETTERS
from ustack.stack import Stack
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.fastopen import CLIENT, SERVER
from ustack.transport.udp import UdpConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ustack.daemon.sections import Section
    from ustack.socket import Socket

ROOT: Final = Path(__file__).resolve().parents[1]
REFERENCE: Final = ROOT / "docs" / "reference"
SOURCE: Final = ROOT / "ustack"

NOWHERE: Final = "nothing yet"
"""What a page says of a name that stands in the table, and that no code counts."""

INT_MIN: Final = -(1 << 31)
INT_MAX: Final = (1 << 31) - 1
VALUES_OF_BYTES: Final = {"SO_LINGER": "two ints", "TCP_CONGESTION": "a name", "SO_MAX_PACING_RATE": "any"}
"""What is written to options whose value is not an int."""

OPTIONS: Final = {
    "SOL_SOCKET": {
        "SO_RCVBUF": "Receive limit in bytes of truesize, data and bookkeeping together. What is asked for is doubled, as in"
        " Linux, and 2304 is the least. Setting it ends autotuning.",
        "SO_SNDBUF": "Send limit of a stream in bytes of truesize; doubled likewise, and 4608 is the least. Setting it ends"
        " autotuning. Datagrams are never queued: for them it does nothing.",
        "SO_REUSEADDR": "Streams: may be bound to a port that connections still use, TIME-WAIT included; never to one on"
        " which another socket listens. Datagrams: sockets that all have it share a port.",
        "SO_REUSEPORT": "Datagrams: the same as SO_REUSEADDR. Streams: nothing.",
        "SO_BROADCAST": "Datagrams may be sent to a broadcast address.",
        "SO_KEEPALIVE": "An idle peer is probed, and the connection fails with ETIMEDOUT when it does not answer.",
        "SO_LINGER": "`struct linger`. On with 0 seconds: closing resets the connection. Everything else is kept and does"
        " nothing, since closing never waits.",
        "SO_RCVLOWAT": "Bytes that must wait before a stream is readable, and before a call that waits returns; the end of the"
        " stream or an error ends the wait too.",
        "SO_SNDLOWAT": "1, as on Linux.",
        "SO_ERROR": "The errno that waits to be reported, 0 for none; reading it clears it.",
        "SO_TYPE": "SOCK_STREAM or SOCK_DGRAM.",
        "SO_DOMAIN": "AF_INET or AF_INET6.",
        "SO_PROTOCOL": "IPPROTO_TCP or IPPROTO_UDP.",
        "SO_ACCEPTCONN": "Whether the socket listens.",
        "SO_MAX_PACING_RATE": "Bytes per second that a stream sends at most, by pacing; 4 or 8 bytes, all ones for no limit.",
    },
    "IPPROTO_TCP": {
        "TCP_CONGESTION": "The congestion control by name: `reno` (or `newreno`), `cubic`, `bbr`; ENOENT for another. Before"
        " there is a connection it is what the next one gets; else it takes over the window as it is.",
        "TCP_INFO": "The inner state of the connection as struct tcp_info, up to `tcpi_total_retrans`. `Socket.tcp_info` gives"
        " a dict with these and all later fields, and the name of the congestion control.",
        "TCP_NODELAY": "Small segments do not wait for the acknowledgment of earlier ones (Nagle). Setting it sends what"
        " waits.",
        "TCP_CORK": "The last segment waits until it is full, or until this is cleared; without the limit of 200 ms that"
        " Linux has.",
        "TCP_MAXSEG": "Upper bound of the payload that we put into a segment, in bytes; from the next handshake, or change of"
        " the path MTU, on. Reading gives the payload of a full segment as it is now.",
        "TCP_KEEPIDLE": "Idle seconds before the first keepalive probe.",
        "TCP_KEEPINTVL": "Seconds between keepalive probes.",
        "TCP_KEEPCNT": "Keepalive probes that go unanswered before the connection fails.",
        "TCP_SYNCNT": "Retransmissions of our SYN before connecting fails.",
        "TCP_QUICKACK": "Acknowledge at once (1) or with delay (0) until the traffic says otherwise; setting it sends an"
        " acknowledgment that is due.",
        "TCP_DEFER_ACCEPT": "Seconds for which a listener lets a handshake be finished by data only; kept as the timeouts of a"
        " SYN-ACK that they take, so reading may give more than was set.",
        "TCP_WINDOW_CLAMP": "Upper bound of the advertised window in bytes, 1152 at least; 0, before there is a"
        " connection: none.",
        "TCP_LINGER2": "Seconds that a closed connection waits in FIN-WAIT-2. Below 0, or more than 120: it is reset instead of"
        " waiting.",
        "TCP_NOTSENT_LOWAT": "Unsent bytes from which on the stream takes no more; it is writable below half of that. 0: as"
        " much as SO_SNDBUF allows.",
        "TCP_FASTOPEN": "A listener takes data with the SYN of clients that have our cookie, from so many at a time whose"
        " handshake is not done (RFC 7413), where `fastopen` is configured.",
        "TCP_FASTOPEN_CONNECT": "Connecting succeeds at once where the server's cookie is known, and the SYN goes with the"
        " first data that is sent.",
        "TCP_INQ": "`Socket.control_messages` says after each call how much is left to read.",
        "TCP_USER_TIMEOUT": "Milliseconds that sent data may stay unacknowledged before the connection fails (RFC 5482); 0:"
        " as many timeouts as configured.",
    },
    "IPPROTO_IP": {
        "IP_TOS": "The type-of-service byte of what the socket sends.",
        "IP_TTL": "The time to live of what the socket sends.",
        "IP_MTU_DISCOVER": "What becomes of a datagram that is longer than the path MTU: 0 never DF, 1 fragments, 2 refused, "
        "3 the device's MTU alone counts (linux/in.h; the value is 10).",
        "IP_MTU": "The path MTU of a connected socket, in bytes; read only (linux/in.h; the value is 14).",
    },
    "IPPROTO_IPV6": {
        "IPV6_V6ONLY": "The socket takes no IPv4. Off, as it is at first, a socket on :: takes both, and shows IPv4 addresses"
        " as `::ffff:192.0.2.1`. EINVAL once it is bound.",
        "IPV6_UNICAST_HOPS": "The hop limit of what the socket sends; -1: what the path says, which is what a router has"
        " advertised, or 64.",
        "IPV6_TCLASS": "The traffic class of what the socket sends; -1 is 0.",
        "IPV6_MTU_DISCOVER": "The same as IP_MTU_DISCOVER: what becomes of a datagram that is longer than the path MTU"
        " (linux/in6.h; the value is 23).",
        "IPV6_MTU": "The same as IP_MTU (linux/in6.h; the value is 24).",
    },
}
"""What each option means, by level and name."""


# -- reading the code --------------------------------------------------------------------------------------------------------


def attribute_docs(kind: type) -> dict[str, str]:
    """The docstrings behind the attributes of the class `kind`, in its body or in its `__init__`, as one line each."""
    tree = ast.parse(dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = dict(_documented(tree.body))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            found.update(_documented(node.body))
    return found


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in pairwise(body):
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        else:
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            name = target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)
            yield name, " ".join(str(following.value.value).split())


@cache
def _sources() -> dict[str, ast.Module]:
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


TELLING: Final = ("drops.py", "link/sniffer.py")


def _files_with(is_it: Callable[[ast.AST], bool]) -> list[str]:
    return [file for file, tree in _sources().items() if any(is_it(node) for node in ast.walk(tree))]


def files_that_drop(reason: str) -> list[str]:
    """The files of ustack/ that name `DropReason.reason`, except those that only tell what has been dropped."""
    naming = _files_with(
        lambda node: (
            isinstance(node, ast.Attribute)
            and node.attr == reason
            and isinstance(node.value, ast.Name)
            and node.value.id == "DropReason"
        )
    )
    return [file for file in naming if file not in TELLING]


def files_that_count(counter: str) -> list[str]:
    """The files of ustack/ that add to `counter`."""
    return _files_with(
        lambda node: isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute) and node.target.attr == counter
    )


# -- pages -------------------------------------------------------------------------------------------------------------------


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["-"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _in_files(files: list[str]) -> str:
    return ", ".join(f"`{file}`" for file in files) or NOWHERE


def drop_reasons() -> str:
    """The page of the drop reasons."""
    docs = attribute_docs(DropReason)
    rows = [[f"`{reason.name}`", docs[reason.name], _in_files(files_that_drop(reason.name))] for reason in DropReason]
    return f"""# Drop reasons

Why a packet, in or out, went no further: the members of `DropReason` in `ustack/drops.py`. Names are those of the kernel's
`enum skb_drop_reason` wherever it has one for the case. A drop is counted where it is decided, and never logged. `ustack nstat`
shows the reasons that occurred, and `stack.drops.by_name()` does in a program.

{_table(["reason", "why", "decided in"], rows)}

Files are those of `ustack/`. A reason that "{NOWHERE}" decides on has its name already and stays at zero.
"""


def counters() -> str:
    """The page of the counters."""
    docs = attribute_docs(Mib)
    rows = [[f"`{name}`", docs[name], _in_files(files_that_count(name))] for name in Mib().as_dict()]
    return f"""# Counters

What `ustack nstat` shows, and `stack.mib.as_dict()` in a program: the attributes of `Mib` in `ustack/mib.py`, under the names
of the kernel's `/proc/net/snmp` and `/proc/net/netstat`. All count up from zero when the stack is made, and are never reset.
Packets that were dropped are counted by [reason](drop-reasons.md) as well; frames and bytes of a device are in its `stats`.

{_table(["counter", "counts", "counted in"], rows)}

Files are those of `ustack/`. A counter that "{NOWHERE}" counts is there because tools expect its name, and stays at zero.
"""


def tcp_settings() -> str:
    """The page of `TcpConfig`."""
    return f"""# Settings of TCP

The limits and times that people argue about: the fields of `TcpConfig` in `ustack/transport/tcp/config.py`. A program hands
one to its stack, `Stack(tcp=TcpConfig(time_wait=1.0))`; the daemon's [configuration file](configuration.md) has them in its
section `[tcp]`. Names are those of the Linux sysctls `net.ipv4.tcp_*` where there is one.

{_settings(TcpConfig)}
"""


def udp_settings() -> str:
    """The page of `UdpConfig`."""
    return f"""# Settings of UDP

The fields of `UdpConfig` in `ustack/transport/udp.py`. A program hands one to its stack, `Stack(udp=UdpConfig(...))`; the
daemon's [configuration file](configuration.md) has them in its section `[udp]`.
[Limits and pressure](../explanation/limits-and-pressure.md) says how they work.

{_settings(UdpConfig)}
"""


def _settings(config: type) -> str:
    docs = attribute_docs(config)
    rows = [[f"`{field.name}`", f"{_value(field.default, docs[field.name])}", docs[field.name]] for field in fields(config)]
    return _table(["setting", "default", "what it is"], rows)


def _value(value: object, doc: str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value >= 1024 and "bytes" in doc.lower():
        return f"{value} ({value >> 20} MiB)" if not value % (1 << 20) else f"{value} ({value >> 10} KiB)"
    return str(value)


def socket_options() -> str:
    """The page of the socket options."""
    described = {(getattr(names, level), _number(name)) for level, options in OPTIONS.items() for name in options}
    assert described == SETTERS.keys() | GETTERS.keys(), "OPTIONS must have what the tables in ustack/socket_options.py have"
    everything = TcpConfig(fastopen=CLIENT | SERVER)
    with (
        closing(Stack(memory=1 << 20, tcp=everything)) as stack,
        stack.socket() as stream,
        stack.socket(type=names.SOCK_DGRAM) as datagram,
        stack.socket(names.AF_INET6) as stream6,
        stack.socket(names.AF_INET6, names.SOCK_DGRAM) as datagram6,
    ):
        pairs = {level: (stream6, datagram6) if level == "IPPROTO_IPV6" else (stream, datagram) for level in OPTIONS}
        tables = "\n\n".join(
            f"## {level}\n\n"
            + _table(
                ["option", "values", "at first", "what it does"],
                [[f"`{name}`", *_asked(*pairs[level], level, name), text] for name, text in options.items()],
            )
            for level, options in OPTIONS.items()
        )
    return f"""# Socket options

What `setsockopt` and `getsockopt` of a socket of ours know: the tables `SETTERS` and `GETTERS` in
`ustack/socket_options.py`. Names and meanings are those of socket(7), tcp(7), ip(7) and ipv6(7). An option that is not here
fails with ENOPROTOOPT, a value out of range with EINVAL. What a listener has is inherited by the connections that it accepts.
An option of TCP on a datagram socket is taken and does nothing; one of IPv6 on an AF_INET socket fails with ENOPROTOOPT.

{tables}

"At first" is the value on a new socket; where streams and datagrams differ, it is that of streams and then that of datagrams.

The right to use the reserve has no option, as it has none in the kernel: `Socket.set_memalloc(True)` gives it, see
[Memory and the reserve](../explanation/memory-and-reserve.md).
"""


def _number(name: str) -> int:
    """The number of an option; those that Python's socket module does not name are ours to name."""
    return int(getattr(names, name, None) or getattr(ours, name))


def _asked(stream: Socket, datagram: Socket, level_name: str, option_name: str) -> tuple[str, str]:
    level, option = getattr(names, level_name), _number(option_name)
    if option_name in ("IP_MTU", "IPV6_MTU"):
        return "to be read only", "ENOTCONN"
    first = [_first(each.getsockopt(level, option)) for each in (stream, datagram)]
    at_first = first[0] if first[0] == first[1] else " / ".join(first)
    if (level, option) not in SETTERS:
        return "to be read only", at_first
    if isinstance(stream.getsockopt(level, option), bytes):
        return VALUES_OF_BYTES[option_name], at_first
    lowest, highest = _range(stream, level, option)
    if (lowest, highest) != (INT_MIN, INT_MAX):
        return f"{lowest} to {highest}", at_first
    stream.setsockopt(level, option, 7)
    flag = stream.getsockopt(level, option) == 1
    return ("not 0 is on" if flag else "any"), ("off" if at_first == "0" and flag else at_first)


def _first(value: int | bytes) -> str:
    """A value as the page has it: a name as it is, a structure as "off", a number of 8 bytes as one."""
    if isinstance(value, int):
        return str(value)
    name = value.rstrip(b"\0")
    if name.isalpha() and len(value) > len(name):
        return name.decode()
    return "no limit" if value == b"\xff" * len(value) else "off"


def _range(sock: Socket, level: int, option: int) -> tuple[int, int]:
    """The lowest and the highest value that the option takes; what is between them it takes as well."""

    def takes(value: int) -> bool:
        try:
            sock.setsockopt(level, option, value)
        except OSError:
            return False
        return True

    inside = next(value for value in (1, 100, 1000) if takes(value))
    return _edge(takes, inside, INT_MIN), _edge(takes, inside, INT_MAX)


def _edge(takes: Callable[[int], bool], good: int, bad: int) -> int:
    if takes(bad):
        return bad
    while abs(bad - good) > 1:
        middle = (good + bad) // 2
        if takes(middle):
            good = middle
        else:
            bad = middle
    return good


# -- scenarios of the pressure lab -------------------------------------------------------------------------------------------

PRESSURE_SECTIONS: Final = (
    ("[memory]", Memory),
    ("[device]", Device),
    ("[link]", Link),
    ("[nbd]", Nbd),
    ("[expect]", Expect),
)
"""Sections that are there once."""

PRESSURE_KINDS: Final = (
    ("[[traffic]]", "What makes memory short. There may be any number, of the same kind or of different ones.", Traffic),
    ("[[fault]]", "What goes wrong. There may be any number; a fault of the wire adds to the others.", Fault),
)
"""Sections that are there any number of times, in kinds."""


def pressure_scenarios() -> str:
    """The page of the format of scenarios."""
    parts = [PRESSURE_SCENARIOS, _keys(Scenario, ("about", "duration"))]
    for heading, section in PRESSURE_SECTIONS:
        parts.append(f"## {heading}\n\n{_doc(section)}\n\n{_keys(section)}")
        if section is Expect:
            parts.append(f"A counter and a drop reason are bounded by\n\n{_keys(Bounds)}")
    for heading, text, kinds in PRESSURE_KINDS:
        parts.append(f"## {heading}\n\n{text}")
        for kind in get_args(get_args(kinds)[0]):
            name = get_args(kind.model_fields["kind"].annotation)[0]
            parts.append(f'### kind = "{name}"\n\n{_doc(kind)}\n\n{_keys(kind)}')
    sites = _table(["site", "who allocates"], [[f"`{name}`", text] for name, text in SITES.items()])
    parts.append(f"## Call sites\n\nNames for `site` of a fault of kind `allocation`.\n\n{sites}\n\n{PRESSURE_SITES}")
    scenarios = [[f"`{name}`", each.scenario.about] for name, each in bundled().items()]
    parts.append(f"## Scenarios that come along\n\n{_table(['name', 'what it shows'], scenarios)}")
    return "\n\n".join(parts) + "\n"


PRESSURE_SCENARIOS: Final = """# Scenarios of the pressure lab

What may stand in a file for `ustack pressure run`; [Put memory under pressure](../how-to/put-memory-under-pressure.md) shows
how to write one. The file is TOML. Values have the types of TOML, keys that nobody knows are refused, and every error names
the file, the place, the value and what is allowed. Only `about` must be there.

Times are seconds from the moment when the disk has been attached, in virtual time or, with `--real`, in real time. Sizes are
bytes, or strings with a unit that is a power of 1024, such as `"64K"`. "Sizes" are one size, or an array of the smallest and
the largest, between which sizes are drawn at random. Rates are per second. The sections `[tcp]` and `[udp]` have the keys of
the [settings of TCP](tcp-settings.md) and [of UDP](udp-settings.md)."""

PRESSURE_SITES: Final = """Memory is allocated on two levels, and a fault strikes on both: a pool is asked for data and heads,
by their bytes, and the page allocator for whole pages, by 4096 bytes each. What a pool asks the page allocator for is
`pool_pages`, whoever asked the pool. A head has two names, `skb_head` and that of who wants the packet; so have pages that a
ring posts because a frame takes others along. The first of the names is the one under which a failure is counted in
`injected`, unless the fault names the other."""


def _doc(section: type) -> str:
    return (inspect.getdoc(section) or "").replace("\n", " ")


def _keys(section: type[Section], only: Iterable[str] = ()) -> str:
    rows = []
    for key, field in section.model_fields.items():
        if only and key not in only:
            continue
        default = "must be there" if field.is_required() else _toml(field.default)
        rows.append([f"`{key}`", _value_of(str(section.__annotations__.get(key, ""))), default, field.description or ""])
    inherited = [base for base in section.__mro__[1:] if base.__module__ == section.__module__]
    for row in rows:
        for base in inherited:
            row[1] = row[1] or _value_of(str(base.__annotations__.get(row[0].strip("`"), "")))
    return _table(["key", "value", "default", "what it is"], [[cell.replace("\n", " ") for cell in row] for row in rows])


def _value_of(annotation: str) -> str:
    """What kind of value an annotation of a scenario means."""
    for pattern, meaning in PRESSURE_VALUES:
        if re.match(pattern, annotation):
            return meaning
    if annotation.startswith("Literal["):
        return " or ".join(f'`"{value}"`' for value in re.findall(r"'([^']+)'", annotation))
    return ""


PRESSURE_VALUES: Final = (
    (r"Annotated\[Literal\[.auto", 'size, `"auto"` or `"off"`'),
    (r"(Positive)?Size\b", "size"),
    (r"Sizes\b", "sizes"),
    (r"(Positive)?Seconds\b", "number"),
    (r"Rate\b", "number"),
    (r"Probability\b", "number from 0 to 1"),
    (r"bool\b", "`true` or `false`"),
    (r"Annotated\[list\[str\]", 'string or array, or `"all"`'),
    (r"Annotated\[float \| Literal\[.full", 'number or `"full"`'),
    (r"Annotated\[int, BeforeValidator\(as_size\)", "size"),
    (r"Annotated\[int", "integer"),
    (r"Annotated\[float", "number"),
    (r"Annotated\[str", "string"),
    (r"dict\[str, CounterBounds", "table of integers or tables"),
    (r"dict\[", "table"),
)


def _toml(value: object) -> str:
    match value:
        case None | {}:
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return f'`"{value}"`'
        case tuple():
            return f"`{value[0]}`" if value[0] == value[1] else f"`[{value[0]}, {value[1]}]`"
        case list():
            return ", ".join(f'`"{each}"`' for each in value)
        case _:
            return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


PAGES: Final[dict[str, Callable[[], str]]] = {
    "pressure-scenarios.md": pressure_scenarios,
    "drop-reasons.md": drop_reasons,
    "counters.md": counters,
    "socket-options.md": socket_options,
    "tcp-settings.md": tcp_settings,
    "udp-settings.md": udp_settings,
}


def rendered(name: str) -> str:
    """The page `name` as it should be."""
    text = PAGES[name]()
    note = "<!-- Made by tools/reference_pages.py: change the docstrings that it reads, then run it. -->"
    return re.sub("\n", f"\n\n{note}\n", text, count=1)


def main() -> None:
    """Write all pages."""
    for name in PAGES:
        (REFERENCE / name).write_text(rendered(name))


if __name__ == "__main__":
    main()
