"""The language of conformance scripts: packet by packet, readable like a sequence chart.

    == 3.5 MUST-4: a listener answers a SYN, and the handshake makes a connection
    user listen
    --> SYN seq 0 <mss 1460>
    <-- SYN ACK seq 0 ack 1
    --> ACK
    user accept
    user write 100
    <-- PSH ACK seq 1 len 100 within 1ms

`-->` is what the peer sends to the stack, `<--` what the stack must send next, and `user` the program on our side. What a line
leaves out is the obvious on the way in, and anything on the way out. docs/reference/conformance-scripts.md has all of it.
"""

from __future__ import annotations

import dataclasses
import errno
import re
import shlex
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.transport.tcp.peer import NAMES, Peer
from ustack.drops import DropReason
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.transport.events import SHUT_RD, SHUT_WR
from ustack.transport.options import SocketOptions
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.info import tcp_info
from ustack.transport.tcp.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.transport.tcp.peer import Seen, User
    from ustack.wire.tcp import TcpOptions

HEADING: Final = re.compile(r"== (?P<section>[0-9A-Z][0-9.A-Z]*)(?P<covers>(?: [A-Z]+-[0-9]+)*): (?P<title>.+)")
DURATION: Final = re.compile(r"(?P<number>[0-9.]+)(?P<unit>ms|s|min)")
UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0}
FLAGS: Final = {name.lstrip(".").removeprefix("W"): flag for flag, name in NAMES}
MARKS: Final = {"noect": 0, "ect1": 1, "ect0": 2, "ce": 3}
"""The ECN field of the IP header."""
SHUTS: Final = {"rd": SHUT_RD, "wr": SHUT_WR, "rdwr": SHUT_RD | SHUT_WR}
OFFLOADS: Final = {"none": 0, "tso": FEATURE_CSUM | FEATURE_TSO}


def _types(of: type) -> dict[str, Any]:
    """The fields of a dataclass by the names of their types, which a compiled one has as types."""
    return {field.name: getattr(field.type, "__name__", field.type) for field in dataclasses.fields(of)}


CONFIG_TYPES: Final = _types(TcpConfig)
OPTION_TYPES: Final = _types(SocketOptions)
CONVERSIONS: Final[dict[Any, Callable[[str], Any]]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"on": True, "off": False}[text],
    "str": str,
}


class ChartError(Exception):
    """A line that is not in the language. The text says why."""


class Chart(NamedTuple):
    """One script: the RFC and section that it is about, the requirements that it covers, its title and its lines by number."""

    rfc: str
    section: str
    covers: tuple[str, ...]
    title: str
    lines: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """The name of the test."""
        return " ".join((self.section, *self.covers)) + ": " + self.title


def read_charts(path: Path) -> Iterator[Chart]:
    """The scripts of a file whose name begins with that of its RFC. Raises ChartError for text outside a script."""
    rfc = re.match(r"rfc(\d+)", path.name)
    if rfc is None:
        raise ChartError(f"{path.name}: the name of a file of charts begins with that of its RFC, like rfc9293-opening.chart")
    heading: re.Match[str] | None = None
    lines: list[tuple[int, str]] = []

    def chart() -> Chart:
        assert heading is not None
        return Chart(rfc[1], heading["section"], tuple(heading["covers"].split()), heading["title"], tuple(lines))

    for number, text in enumerate(path.read_text().splitlines(), 1):
        line = text.split("#", 1)[0].strip()
        if not line:
            continue
        if line.startswith("=="):
            if heading is not None:
                yield chart()
            heading = HEADING.fullmatch(line)
            if heading is None:
                raise ChartError(f"{path.name}:{number}: a heading is '== SECTION [REQUIREMENT...]: title', not {line!r}")
            lines = []
        elif heading is None:
            raise ChartError(f"{path.name}:{number}: {line!r} comes before the first heading")
        else:
            lines.append((number, line))
    if heading is not None:
        yield chart()


class Words:
    """The words of a line, taken one after the other."""

    def __init__(self, text: str) -> None:
        self._words = shlex.split(text)

    def __bool__(self) -> bool:
        return bool(self._words)

    def next(self, what: str = "a word") -> str:
        """The next word. Raises ChartError when there is none."""
        if not self._words:
            raise ChartError(f"{what} is missing")
        return self._words.pop(0)

    def accept(self, word: str) -> bool:
        """Whether the next word is `word`, which is taken then."""
        if self._words[:1] == [word]:
            del self._words[0]
            return True
        return False

    def number(self, what: str = "a number") -> int:
        """The next word, which is a number."""
        word = self.next(what)
        try:
            return int(word)
        except ValueError:
            raise ChartError(f"{word!r} is not {what}") from None

    def duration(self) -> float:
        """The next word, which is a time such as 200ms; seconds."""
        word = self.next("a time")
        match = DURATION.fullmatch(word)
        if match is None:
            raise ChartError(f"{word!r} is not a time such as 200ms, 1.5s or 2min")
        return float(match["number"]) * UNITS[match["unit"]]

    def flags(self) -> int:
        """The words that are TCP flags; at least one, or "-" for none."""
        if self.accept("-"):
            return 0
        flags = 0
        while self._words and self._words[0] in FLAGS:
            flags |= FLAGS[self._words.pop(0)]
        if not flags:
            raise ChartError(f"{self.next('a flag')!r} is not a flag: {', '.join(FLAGS)}")
        return flags

    def settings(self, types: dict[str, Any]) -> dict[str, Any]:
        """The remaining words as `name=value`, of the types that the names have."""
        values = {}
        while self._words:
            name, _, text = self.next().partition("=")
            if name not in types:
                raise ChartError(f"there is no setting {name!r}")
            try:
                values[name] = CONVERSIONS[types[name]](text)
            except (KeyError, ValueError):
                raise ChartError(f"{text!r} is no value for {name}") from None
        return values

    def end(self) -> None:
        """There are no more words."""
        if self._words:
            raise ChartError(f"{' '.join(self._words)!r} is too much")


def run(chart: Chart, path: Path) -> None:
    """Play `chart`. Raises AssertionError for what the stack does otherwise, naming the line, with the exchange so far."""
    with Player(chart) as player:
        for number, line in player.lines:
            try:
                player.play(line)
            except (AssertionError, ChartError, OSError) as error:
                story = player.peer.story()
                raise AssertionError(f"{path.name}:{number}: {line}\n{type(error).__name__}: {error}\n{story}") from error
        player.peer.expects_nothing()


class Player:
    """Plays the lines of a chart on a peer and the stack that it talks to."""

    def __init__(self, chart: Chart) -> None:
        lines = list(chart.lines)
        config: dict[str, Any] = {}
        device: dict[str, Any] = {}
        while lines and lines[0][1].startswith("stack "):
            words = Words(lines.pop(0)[1].removeprefix("stack "))
            settings = words.settings({**CONFIG_TYPES, "mtu": "int", "offload": "str"})
            if "mtu" in settings:
                device["mtu"] = settings.pop("mtu")
            if "offload" in settings:
                device["features"] = OFFLOADS[settings.pop("offload")]
            config |= settings
        self.lines = lines
        self.peer = Peer(config=TcpConfig(**config), **device)
        self._user: User | None = None
        self._actions: dict[str, Callable[[Words], None]] = {
            "user": self._user_does,
            "wait": self._wait,
            "peer": self._peer_is,
            "router": self._router_says,
            "counter": self._counter_is,
            "info": self._info_is,
            "drop": self._drops_are,
        }

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()

    @property
    def user(self) -> User:
        """The program on our side."""
        if self._user is None:
            raise ChartError("nobody has accepted or connected yet")
        return self._user

    def play(self, line: str) -> None:
        """Do what one line says."""
        if line.startswith("-->"):
            self._inject(line.removeprefix("-->"))
        elif line.startswith("<--"):
            self._expect(line.removeprefix("<--"))
        else:
            words = Words(line)
            what = words.next()
            if what not in self._actions:
                raise ChartError(f"a line begins with -->, <--, {', '.join(self._actions)}, not with {what!r}")
            self._actions[what](words)
            words.end()

    # -- the wire --

    def _inject(self, text: str) -> None:
        text, options = _split_options(text)
        words = Words(text)
        sent: dict[str, Any] = {}
        flags = words.flags()
        while words:
            word = words.next()
            if word in {"seq", "ack", "len", "win"}:
                sent[{"len": "length", "win": "window"}.get(word, word)] = words.number()
            elif word == "batched":
                sent["settle"] = False
            elif word in MARKS:
                sent["tos"] = MARKS[word]
            else:
                raise ChartError(f"{word!r} is nothing that a segment has: seq, ack, len, win, <options>, batched")
        if options is not None:
            sent |= _options_to_send(options)
        self.peer.sends(flags, **sent)

    def _expect(self, text: str) -> None:
        text, options = _split_options(text)
        words = Words(text)
        if words.accept("nothing"):
            if words.accept("for"):
                self.peer.expects_nothing_for(words.duration())
            else:
                self.peer.expects_nothing()
            words.end()
            return
        if words.accept("anything"):
            self.peer.ignores()
            words.end()
            return
        if words.accept("data"):
            self._expect_data(words)
            return
        expected: dict[str, Any] = {}
        mark = None
        flags = words.flags()
        while words:
            word = words.next()
            if word in {"seq", "ack", "len", "win"}:
                expected[{"len": "length", "win": "window"}.get(word, word)] = words.number()
            elif word in {"after", "within"}:
                expected[word] = words.duration()
            elif word in MARKS:
                mark = MARKS[word]
            else:
                raise ChartError(f"{word!r} is nothing to expect: seq, ack, len, win, ect0, noect, <options>, after, within")
        seen = self.peer.expects(flags, **expected)
        assert mark is None or seen.tos & 3 == mark, f"the ECN field is {seen.tos & 3}"
        if options is not None:
            _check_options(options, seen)
        if self.peer.ts[0] >= 0 and seen.options.ts_val >= 0:
            self.peer.ts = (self.peer.ts[0], seen.options.ts_val)

    def _expect_data(self, words: Words) -> None:
        """data FIRST:END [size N] [after T | within T]"""
        first, _, end = words.next("a range").partition(":")
        size = words.number() if words.accept("size") else 1460
        more: dict[str, Any] = {}
        for name in ("after", "within"):
            if words.accept(name):
                more[name] = words.duration()
        words.end()
        self.peer.expects_data(int(first), min(int(first) + size, int(end)), size, **more)
        self.peer.expects_data(int(first) + size, int(end), size)

    def _info_is(self, words: Words) -> None:
        """info NAME N"""
        name = words.next("a field of TCP_INFO")
        wanted = words.number()
        info = tcp_info(self.user.conn)
        if name not in info:
            raise ChartError(f"TCP_INFO has no field {name}")
        assert info[name] == wanted, f"{name} is {info[name]}"

    def _router_says(self, words: Words) -> None:
        """router unreachable CODE [mtu N] [seq N]"""
        if not words.accept("unreachable"):
            raise ChartError("a router says: unreachable CODE [mtu N] seq N")
        code = words.number()
        mtu = words.number() if words.accept("mtu") else 0
        seq = words.number() if words.accept("seq") else 1
        self.peer.reports(code, mtu=mtu, seq=seq)

    def _peer_is(self, words: Words) -> None:
        """peer again | peer port N | peer clock N"""
        if words.accept("again"):
            self.peer.returns()
        elif words.accept("port"):
            self.peer.own_port = words.number()
        elif words.accept("clock"):
            self.peer.ts = (words.number(), self.peer.ts[1])
        else:
            raise ChartError("the peer: again, port N or clock N")

    def _wait(self, words: Words) -> None:
        self.peer.waits(words.duration())

    def _counter_is(self, words: Words) -> None:
        name = words.next("a counter")
        wanted = words.number()
        value = getattr(self.peer.stack.mib, name, None)
        if value is None:
            raise ChartError(f"there is no counter {name}")
        assert value == wanted, f"{name} is {value}"

    def _drops_are(self, words: Words) -> None:
        name = words.next("a drop reason")
        wanted = words.number()
        if name not in DropReason.__members__:
            raise ChartError(f"there is no drop reason {name}")
        value = self.peer.stack.drops[DropReason[name]]
        assert value == wanted, f"{value} segments were dropped for {name}"

    # -- the user --

    def _user_does(self, words: Words) -> None:
        peer = self.peer
        verb = words.next("what the user does")
        if verb == "listen":
            peer.listens(**words.settings({**OPTION_TYPES, "backlog": "int"}))
        elif verb == "connect":
            self._user = peer.is_called(**words.settings({**OPTION_TYPES, "early": "int"}))
        elif verb == "accept":
            self._user = peer.user()
        elif verb == "close":
            self.user.closes()
        elif verb == "shutdown":
            self.user.shuts(SHUTS[words.next("rd, wr or rdwr")])
        elif verb == "write":
            self._user_writes(words)
        elif verb == "read":
            if words.accept("end"):
                self.user.reads_end()
            elif words.accept("nothing"):
                self.user.has_nothing_to_read()
            else:
                self.user.reads(words.number())
        elif verb == "is":
            name = words.next("a state")
            assert self.user.is_in(State[name]), f"it is in {self.user.conn.state.name}"
        elif verb == "fails":
            self.user.fails_with(_errno(words.next("an errno")))
        else:
            raise ChartError(f"a user does not {verb}: listen, connect, accept, write, read, shutdown, close, is, fails")

    def _user_writes(self, words: Words) -> None:
        """user write N [more] [takes N | fails ERRNO]"""
        size = words.number()
        more = words.accept("more")
        if words.accept("fails"):
            number = _errno(words.next("an errno"))
            try:
                self.user.sends(size, more=more)
            except OSError as error:
                if error.errno == number:
                    return
                raise
            raise AssertionError("it did not fail")
        taken = self.user.sends(size, more=more)
        wanted = words.number() if words.accept("takes") else size
        assert taken == wanted, f"{taken} bytes were taken"


def _errno(name: str) -> int:
    number = getattr(errno, name, None)
    if not isinstance(number, int):
        raise ChartError(f"{name} is no errno")
    return number


# -- options: <mss 1460, wscale 7, sack, ts 100 0, sack 1:1461 2921:4381, fastopen 0011223344556677> --


def _split_options(text: str) -> tuple[str, str | None]:
    """A line of the wire without its options, and these, if there are any in angle brackets."""
    before, bracket, rest = text.partition("<")
    if not bracket:
        return text, None
    options, bracket, after = rest.partition(">")
    if not bracket:
        raise ChartError("the options have no end")
    return f"{before} {after}", options


def _each_option(text: str) -> Iterator[tuple[str, list[str]]]:
    for option in text.split(","):
        name, *values = option.split()
        yield name, values


def _blocks(values: list[str]) -> tuple[tuple[int, int], ...]:
    pairs = [value.split(":") for value in values]
    if not all(len(pair) == 2 for pair in pairs):
        raise ChartError("a SACK block is two numbers with a colon")
    return tuple((int(left), int(right)) for left, right in pairs)


def _options_to_send(text: str) -> dict[str, Any]:
    """Arguments of `Peer.sends`."""
    sent: dict[str, Any] = {}
    for name, values in _each_option(text):
        match name, values:
            case (("mss" | "wscale"), [value]):
                sent[name] = int(value)
            case "sack", []:
                sent["sack_permitted"] = True
            case "sack", blocks:
                sent["sack"] = _blocks(blocks)
            case "ts", [value, echo]:
                sent["ts"] = (int(value), int(echo))
            case "fastopen", cookie:
                sent["fastopen"] = bytes.fromhex("".join(cookie))
            case "raw", [octets]:
                sent["raw_options"] = bytes.fromhex(octets)
            case _:
                raise ChartError(f"no segment is sent with the option {name} {' '.join(values)}")
    return sent


def _check_options(text: str, seen: Seen) -> None:
    """Raises AssertionError unless the segment has the options, and has not those that are denied."""
    got: TcpOptions = seen.options
    present = {
        "mss": got.mss >= 0,
        "wscale": got.wscale >= 0,
        "ts": got.ts_val >= 0,
        "sack": got.sack_permitted or bool(got.sack),
        "fastopen": got.fastopen is not None,
    }
    for name, values in _each_option(text):
        match name, values:
            case "no", [absent] if absent in present:
                assert not present[absent], f"it has the option {absent}: {got}"
            case (("mss" | "wscale"), [value]):
                assert getattr(got, name) == int(value), f"its {name} is {getattr(got, name)}"
            case "sack", [_, *_]:
                assert got.sack == _blocks(values), f"its blocks are {got.sack}"
            case "ts", ["ecr", value]:
                assert got.ts_ecr == int(value), f"it echoes {got.ts_ecr}"
            case _, [] if name in present:
                assert present[name], f"it does not have the option {name}: {got}"
            case _:
                raise ChartError(f"the option {name} {' '.join(values)} cannot be expected")
