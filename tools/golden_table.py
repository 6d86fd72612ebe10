"""Makes docs/reference/throughput.md, the golden table: how fast one connection is over a simulated wire, by loss, delay and
the buffer before the bottleneck, for each congestion control.

Everything is in virtual time and from a seed, so that a figure changes only when the code does. tests/docs/test_golden_table.py
measures some of the cells again and compares them with the page: whoever makes recovery slower notices, and whoever makes it
faster runs this program and commits the page.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ustack.lab.world import World  # noqa: E402  # the tool runs without being installed
from ustack.link.simwire import Impairments, SimDevice, SimWire  # noqa: E402
from ustack.stack import Stack  # noqa: E402
from ustack.transport.events import nobody  # noqa: E402
from ustack.transport.options import SocketOptions  # noqa: E402
from ustack.transport.tcp.config import TcpConfig  # noqa: E402

PAGE: Final = ROOT / "docs" / "reference" / "throughput.md"

CONTROLS: Final = ("reno", "cubic", "bbr")
LOSSES: Final = (0.0, 0.1, 1.0, 5.0)
"""Per cent of the data packets, at random."""
DELAYS: Final = (1, 20, 100)
"""Milliseconds of the round trip."""
BUFFERS: Final = (0.5, 2.0)
"""The bottleneck's buffer, in bandwidth-delay products, but 8 packets at least."""

RATE: Final = 4_000_000
"""Bits per second of the bottleneck."""
SECONDS: Final = 8.0
"""Of virtual time that a transfer is watched, after as many round trips as a connection takes to get going."""
WARM_UP: Final = 2.0
PACKET: Final = 1514
SEED: Final = 2006

ROW: Final = re.compile(r"\| (?P<delay>\d+) ms \| (?P<buffer>[0-9.]+) \| (?P<loss>[0-9.]+) % \|(?P<figures>.*)\|")

INTRODUCTION: Final = f"""# Throughput over a simulated wire

<!-- Made by tools/golden_table.py: `make golden`. -->

One connection, {RATE // 1_000_000} Mbit/s, packets of 1500 bytes without offload; Mbit/s of payload that the receiver's program
has read in {SECONDS:.0f} s of virtual time, after {WARM_UP:.0f} s. The buffer is that of the bottleneck, in bandwidth-delay
products (8 packets at least); losses hit data packets at random. `make golden` measures everything again; tests compare some
cells, so that nobody makes recovery slower without noticing.
"""


class Cell(NamedTuple):
    """One path: round trip in milliseconds, buffer in bandwidth-delay products, loss in per cent."""

    delay: int
    buffer: float
    loss: float


def measure(control: str, cell: Cell) -> float:
    """Mbit/s that a connection with the congestion control `control` gets over the path `cell`."""
    world = World(SEED)
    delay = cell.delay / 2000
    queue = max(int(cell.buffer * RATE / 8 * cell.delay / 1000), 8 * PACKET)
    devices = [SimDevice(f"sim{n}", bytes((2, 0, 0, 0, 0, n)), 1500, 0) for n in (1, 2)]
    there = Impairments(delay=delay, rate=RATE, queue=queue, loss=cell.loss / 100)
    SimWire(world, devices[0], devices[1], there, Impairments(delay=delay))
    stacks = [Stack(memory=8 << 20, reserve=0, tcp=TcpConfig(congestion=control), random=Random(SEED + n)) for n in (0, 1)]
    for number, (stack, device) in enumerate(zip(stacks, devices, strict=True), 1):
        world.add(stack, device)
        stack.add_interface(device, f"10.0.0.{number}/24")
    received = 0
    block = bytes(65536)
    target = memoryview(bytearray(65536))
    listener = stacks[1].tcp.listen(None, 80, 1, SocketOptions())

    def accept(_: int) -> None:
        conn = listener.accept()

        def read(_: int) -> None:
            nonlocal received
            while conn.readable and not conn.at_end:
                received += conn.recv_into(target)

        conn.wake = read

    listener.wake = accept
    sender = stacks[0].tcp.connect(stacks[0].ip.path(bytes((10, 0, 0, 2))), 0, 80, SocketOptions())

    def write(_: int) -> None:
        with suppress(BlockingIOError):
            while sender.synchronized:
                sender.send(block)

    sender.wake = write
    world.run(WARM_UP)
    before = received
    world.run(SECONDS)
    sender.wake = listener.wake = nobody
    for stack in stacks:
        stack.close()
    return (received - before) * 8 / SECONDS / 1e6


def cells() -> list[Cell]:
    """Every path of the table, in its order."""
    return [Cell(delay, buffer, loss) for delay in DELAYS for buffer in BUFFERS for loss in LOSSES]


def read() -> dict[tuple[str, Cell], float]:
    """The figures of the page."""
    found = {}
    for match in ROW.finditer(PAGE.read_text()):
        cell = Cell(int(match["delay"]), float(match["buffer"]), float(match["loss"]))
        for control, figure in zip(CONTROLS, match["figures"].split("|"), strict=True):
            found[control, cell] = float(figure)
    return found


def main() -> None:
    """Measure everything, and write the page."""
    lines = [
        INTRODUCTION,
        "| round trip | buffer | loss | " + " | ".join(CONTROLS) + " |",
        "| - | - | - |" + " - |" * len(CONTROLS),
    ]
    for cell in cells():
        figures = " | ".join(f"{measure(control, cell):.2f}" for control in CONTROLS)
        lines.append(f"| {cell.delay} ms | {cell.buffer:g} | {cell.loss:g} % | {figures} |")
        print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
