"""`ustack capture`: what tcpdump is to the kernel, for a running daemon.

The frames are read where they lie in the daemon's packet memory (see `ustack.link.sniffer`), which is mapped read-only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from ustack.cli.control import Control, call, control_option

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

    from ustack.cli.mirror import Mirror
    from ustack.cli.pcapng import PcapngWriter
    from ustack.link.descriptor_ring import Descriptor, RingReader

SNAPLEN: Final = 262144
"""Bytes of a frame that are captured: tcpdump's default, and more than any frame has."""

DESCRIPTORS: Final = 4
"""That come with the daemon's answer."""


class Capture:
    """A running capture. `writer` is None to print lines; `wanted` tells which frames are captured, `most` how many."""

    def __init__(
        self,
        reader: RingReader,
        answer: dict[str, Any],
        writer: PcapngWriter | None,
        mirrors: Sequence[Mirror],
        wanted: Callable[[bytes, int], bool] | None,
        most: int | None,
    ) -> None:
        self._reader = reader
        self._interfaces: list[dict[str, Any]] = answer["interfaces"]
        self._reasons: list[str] = answer["reasons"]
        self._writer = writer
        self._mirrors = mirrors
        self._wanted = wanted
        self._most = most
        self.captured = 0

    @property
    def complete(self) -> bool:
        """Whether there are as many as were asked for."""
        return self._most is not None and self.captured >= self._most

    def run(self, daemon: socket.socket, stop: int) -> None:
        """Go on until the descriptor `stop` is readable, the daemon ends or the capture is complete."""
        fds = [self._reader.wait_fd, daemon.fileno(), stop]
        while not self.complete:
            ready, _, _ = select.select(fds, [], [])
            if self._reader.wait_fd in ready:
                try:
                    self._take()
                except EOFError:
                    return
            elif ready:
                return

    def _take(self) -> None:
        for descriptor in self._reader.read():
            if not self.complete:
                self._look_at(descriptor)
            self._reader.release(descriptor.number + 1)
        if self._writer is not None:
            self._writer.flush()

    def _look_at(self, descriptor: Descriptor) -> None:
        pieces = self._reader.pieces(descriptor)
        frame = b"".join(pieces)
        length = descriptor.length
        if self._wanted is not None and not self._wanted(frame, length):
            return
        self.captured += 1
        comment = ""
        if descriptor.reason < len(self._reasons):
            comment = f"dropped: {self._reasons[descriptor.reason]}"
        at = descriptor.interface
        outgoing = descriptor.direction == 1
        if self._writer is not None:
            self._writer.write(descriptor.stamp, at, outgoing, frame, length, comment)
        elif not self._mirrors:
            from ustack.cli.packet_line import line

            click.echo(line(descriptor.stamp, self._interfaces[at]["name"], outgoing, frame, length, comment))
        for mirror in self._mirrors:
            if not mirror.is_own(frame):
                mirror.send(pieces, length)


def _compile(expression: str) -> Callable[[bytes, int], bool] | None:
    """The tcpdump filter `expression`; None for none."""
    if not expression:
        return None
    try:
        import cypcap
    except ImportError:
        raise click.ClickException("a filter needs the package cypcap: pip install 'ustack[capture]'") from None
    try:
        program = cypcap.compile(cypcap.DatalinkType.EN10MB, SNAPLEN, expression, True, cypcap.NETMASK_UNKNOWN)
    except cypcap.Error as error:
        raise click.ClickException(f"filter {expression!r}: {error.args[-1]}") from None
    return lambda frame, length: program.offline_filter(cypcap.Pkthdr(0.0, len(frame), length), frame)


def _mirrors(uris: Sequence[str], opened: ExitStack) -> list[Mirror]:
    from ustack.cli.mirror import Mirror, reason_of

    found = []
    for uri in uris:
        try:
            mirror = Mirror(uri)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--mirror") from None
        except OSError as error:
            raise click.ClickException(f"{uri}: {reason_of(error)}") from None
        opened.callback(mirror.close)
        found.append(mirror)
    return found


@contextlib.contextmanager
def _told_to_stop() -> Iterator[int]:
    """A descriptor that is readable once there was SIGINT or SIGTERM: neither ends us in the middle of a block."""
    told, tell = os.pipe()

    def stop(*_: object) -> None:
        os.write(tell, b"\0")

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield told
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        os.close(told)
        os.close(tell)


def _show_interfaces(control: str) -> None:
    for number, device in enumerate(call(control, "status")["devices"], 1):
        click.echo(f"{number}.{device['name']}")


@click.command()
@click.option("-i", "interface", metavar="NAME", help="Only this interface. Default, and `any`: all of them.")
@click.option(
    "-w", "target", metavar="FILE", help="Write pcapng to FILE, - for standard output. Default: print a line for each packet."
)
@click.option("-c", "count", type=click.IntRange(min=1), metavar="N", help="End after N packets.")
@click.option(
    "-s",
    "snaplen",
    type=click.IntRange(0, SNAPLEN),
    default=SNAPLEN,
    show_default=True,
    metavar="BYTES",
    help="Capture only the start of each packet; 0 is all of it.",
)
@click.option("-D", "--list-interfaces", "show", is_flag=True, help="List the interfaces and exit.")
@click.option(
    "--mirror",
    "uris",
    multiple=True,
    metavar="URI",
    help="Send the packets to another host: erspan://HOST?session=N, tzsp://HOST:PORT or vxlan://HOST:PORT?vni=N.",
)
@click.argument("expression", nargs=-1, metavar="[FILTER]")
@control_option
def capture(
    interface: str | None,
    target: str | None,
    count: int | None,
    snaplen: int,
    show: bool,
    uris: tuple[str, ...],
    expression: tuple[str, ...],
    control: str,
) -> None:
    """Capture the packets of a running daemon that match FILTER, which has the syntax of tcpdump.

    Needs to be root or the user who runs the daemon. Ctrl-C ends it. A packet that the stack dropped says why.
    """
    if show:
        _show_interfaces(control)
        return
    from ustack.link.descriptor_ring import RingReader

    wanted = _compile(" ".join(expression))
    snaplen = snaplen or SNAPLEN
    with ExitStack() as opened:
        mirrors = _mirrors(uris, opened)
        stop = opened.enter_context(_told_to_stop())
        try:
            daemon = opened.enter_context(Control(control))
            wish = None if interface == "any" else interface
            answer, fds = daemon.call_for_descriptors("capture", DESCRIPTORS, interface=wish, snaplen=snaplen)
            reader = RingReader(fds, answer["size"], answer["slots"])
            opened.callback(reader.close)
            writer = _writer(target, answer["interfaces"], snaplen, opened)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from None
        names = interface or ", ".join(each["name"] for each in answer["interfaces"])
        click.echo(f"capturing on {names}, link-type EN10MB (Ethernet), snapshot length {snaplen} bytes", err=True)
        running = Capture(reader, answer, writer, mirrors, wanted, count)
        try:
            running.run(daemon.socket, stop)
        except BrokenPipeError:  # who reads our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            raise click.ClickException(f"{target}: {error.strerror or error}") from None
        finally:
            click.echo(f"{running.captured} packets captured, {reader.missed} missed", err=True)
            for uri, mirror in zip(uris, mirrors, strict=True):
                click.echo(f"{uri}: {mirror.sent} packets mirrored, {mirror.cut} cut, {mirror.lost} lost", err=True)


def _writer(target: str | None, interfaces: list[dict[str, Any]], snaplen: int, opened: ExitStack) -> PcapngWriter | None:
    from ustack.cli.pcapng import PcapngWriter

    if target is None:
        return None
    file: IO[bytes] = sys.stdout.buffer
    if target != "-":
        file = Path(target).open("wb")  # noqa: SIM115 (it stays open as long as `opened`)
        opened.callback(file.close)
    return PcapngWriter(file, interfaces, snaplen)
