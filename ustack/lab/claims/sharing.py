"""Claims 1 to 5: who sees what, when the pages of packets are mapped into processes."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from pools.arena import PAGE_SHIFT, PAGE_SIZE
from pools.base import SKB_HEAD_SIZE
from ustack.lab.claims.registry import Figure, Outcome, Terms, claim, shares
from ustack.lab.trace import LivePacket, Replay, make_pool
from ustack.lab.traffic import ACK_FRAME, MTU_FRAME, SHINFO, churn, mtu_and_ack
from ustack.lab.world import World
from ustack.link.descriptor_ring import RingReader, shared_fds
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.simwire import SimDevice, SimWire
from ustack.stack import Stack
from ustack.transport.options import SocketOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.link.sniffer import Sniffer as StackSniffer

POOLS: Final = ("kmalloc", "nta", "page_frag", "srog", "page_per_object")
PACKING: Final = ("kmalloc", "nta", "page_frag")
"""The pools that put several packets on a page."""


def touched(addr: int, size: int) -> range:
    """The pages that an object lies on."""
    return range(addr >> PAGE_SHIFT, (addr + size - 1 >> PAGE_SHIFT) + 1)


def mark(replay: Replay, packet: LivePacket) -> None:
    """Fill the frame, but not the `skb_shared_info` behind it, with the number of the socket plus one."""
    length = packet.size - SHINFO
    replay.pool.pages.arena.mem[packet.addr : packet.addr + length] = bytes((packet.socket + 1,)) * length


def receive(replay: Replay, packets: int, sockets: Iterable[int], size: int = MTU_FRAME) -> None:
    """Receive so many marked packets, each for the next socket of `sockets`."""
    for number, socket in zip(range(packets), sockets, strict=False):
        made = replay.alloc(number, size, 0, socket)
        assert made is not None
        mark(replay, made)


def exposed(replay: Replay, reader: int, other: int) -> float:
    """The share of the packets of `reader` on whose pages a byte of `other` can be read."""
    arena = replay.pool.pages.arena
    needle = bytes((other + 1,)) * 8
    mine = [packet for packet in replay.live.values() if packet.socket == reader]
    seen = 0
    for packet in mine:
        seen += any(needle in bytes(arena.page(pfn)) for pfn in touched(packet.addr, packet.size))
    return seen / len(mine)


def mappable(replay: Replay) -> float:
    """The share of the live packets whose pages hold data of no other socket."""
    owners: dict[int, set[int]] = {}
    for packet in replay.live.values():
        for pfn in touched(packet.addr, packet.size):
            owners.setdefault(pfn, set()).add(packet.socket)
    count = 0
    for packet in replay.live.values():
        count += all(len(owners[pfn]) == 1 for pfn in touched(packet.addr, packet.size))
    return count / len(replay.live)


def showing_heads(replay: Replay) -> float:
    """The share of the live packets on whose pages a head lies, with the kernel's pointers in it."""
    heads = {pfn for packet in replay.live.values() for pfn in touched(packet.head, SKB_HEAD_SIZE)}
    return sum(any(pfn in heads for pfn in touched(one.addr, one.size)) for one in replay.live.values()) / len(replay.live)


@claim(
    1,
    "PZ",
    "Two packets on one page: map it, and one process reads the other's bytes",
    prior="kmalloc, nta and page_frag leak, srog and page_per_object do not",
)
def one_page_two_sockets(terms: Terms) -> Outcome:
    """Packets of two sockets, marked: look for the marks of one on the pages of the other, alive and after they are freed."""
    random = Random(terms.seed)
    packets = terms.size(200, 2000)
    live: dict[str, Figure] = {}
    dead: dict[str, Figure] = {}
    for name in POOLS:
        run = Replay(make_pool(name))
        receive(run, packets, (random.randrange(2) for _ in range(packets)))
        live[name] = exposed(run, 0, 1)
        run.clear()
        run = Replay(make_pool(name))
        receive(run, packets, (1 for _ in range(packets)))
        run.clear()
        run.pool.reap()
        receive(run, packets, (0 for _ in range(packets)), ACK_FRAME)
        dead[name] = exposed(run, 0, 1)
    leaking = [name for name in POOLS if live[name] != 0]
    stale = [name for name in POOLS if dead[name] != 0]
    tight = [name for name in POOLS if name not in leaking]
    contradicts = ""
    if set(stale) & set(tight):
        contradicts = (
            f"{' and '.join(name for name in tight if name in stale)} share no page and leak all the same: what a packet "
            f"leaves free "
            "of its page shows the packet that was there before, unless somebody clears it"
        )
    return Outcome(
        "true" if leaking else "false",
        f"Live bytes of the other socket can be read beside {shares(live)} of the packets; bytes of packets that were freed "
        f"before, "
        f"beside {shares(dead)}.",
        {"live": live, "freed": dead},
        contradicts,
    )


@claim(
    2,
    "PZ",
    "Zero-copy receive needs pages with no more than one packet",
    prior="true for several sockets",
)
def packets_per_page(terms: Terms) -> Outcome:
    """Which share of the packets can be mapped, for 1, 2 and 8 sockets."""
    random = Random(terms.seed)
    packets = terms.size(400, 4000)
    alone: dict[str, Figure] = {}
    heads: dict[str, Figure] = {}
    by: dict[tuple[str, int], float] = {}
    for name in POOLS:
        for sockets in (1, 2, 8):
            run = Replay(make_pool(name, 16384))
            receive(run, packets, (random.randrange(sockets) for _ in range(packets)))
            by[name, sockets] = mappable(run)
            heads[name] = showing_heads(run)
        alone[name] = {str(sockets): by[name, sockets] for sockets in (1, 2, 8)}
    one = all(by[name, 1] == 1.0 for name in POOLS)
    several = max(by[name, 8] for name in PACKING)
    apart = min(by[name, 8] for name in ("srog", "page_per_object"))
    return Outcome(
        "partly" if one and several < 0.5 and apart == 1.0 else "true" if apart == 1.0 and several < 0.5 else "false",
        f"With one socket every pool can map all of its packets. With eight, those that pack can map at most {several:.0%}, "
        f"srog and page_per_object {apart:.0%}. But a page of srog shows the head of its packet too ({heads['srog']:.0%} do).",
        {"mappable": alone, "with a head on the page": heads},
    )


def copied(pattern: list[int], size: int) -> tuple[float, float]:
    """The share of packets copied if each page goes to the owner of its first packet, and if only pages of one owner are
    mapped.
    """
    run = Replay(make_pool("kmalloc", lanes=1), heads=False)
    for number, socket in enumerate(pattern):
        assert run.alloc(number, size, 0, socket) is not None
    pages: dict[int, list[int]] = {}
    for packet in run.live.values():
        pages.setdefault(packet.addr >> PAGE_SHIFT, []).append(packet.socket)
    full = [owners for owners in pages.values() if len(owners) == PAGE_SIZE // size]
    count = sum(len(owners) for owners in full)
    first = sum(sum(owner != owners[0] for owner in owners) for owners in full)
    single = sum(len(owners) for owners in full if len(set(owners)) > 1)
    return first / count, single / count


@claim(
    3,
    "EP/PZ",
    "If packets are copied when their neighbour is another socket's, two alternating sockets have half of them copied, or more",
    prior="depends on the policy, which nobody stated: 1/2 if a page goes to one owner, all if only unshared pages are mapped",
)
def alternating_sockets(terms: Terms) -> Outcome:
    """Interleaved flows, two or four packets on a page, and the two policies that the sentence can mean."""
    random = Random(terms.seed)
    packets = terms.size(4000, 16000)
    given: dict[str, Figure] = {}
    unshared: dict[str, Figure] = {}
    measured: dict[tuple[int, int, str], tuple[float, float]] = {}
    for per_page, size in ((2, 2048), (4, 1024)):
        for flows in (2, 8):
            for order in ("in turn", "at random"):
                pattern = [n % flows if order == "in turn" else random.randrange(flows) for n in range(packets)]
                measured[per_page, flows, order] = copied(pattern, size)
                key = f"{per_page} on a page, {flows} flows {order}"
                given[key], unshared[key] = measured[per_page, flows, order]
    turn_given, turn_unshared = measured[2, 2, "in turn"]
    half, all_of_them = abs(turn_given - 0.5) < 0.02, turn_unshared > 0.98
    return Outcome(
        "partly" if half and all_of_them else "true" if half else "false",
        f"Two flows in turn: {turn_given:.0%} copied if a page goes to one owner, {turn_unshared:.0%} if only unshared pages "
        f"are "
        f"mapped. At random with two on a page: {measured[2, 2, 'at random'][1]:.0%} for 2 flows and "
        f"{measured[2, 8, 'at random'][1]:.0%} for 8 by the second policy; with four on a page "
        f"{measured[4, 2, 'at random'][1]:.0%} and {measured[4, 8, 'at random'][1]:.1%}.",
        {"page to one owner": given, "unshared pages only": unshared},
    )


class Sniffer:
    """A ring of descriptors, filled when a packet is freed: the packet stays until the sniffer has read its descriptor.

    When the ring is full the packet is a miss. `pinned` are bytes that wait for the sniffer; `read` counts packets read in
    place, `spoiled` those whose bytes had changed by then.
    """

    def __init__(self, replay: Replay, ring: int) -> None:
        self.replay = replay
        self.size = ring
        self.ring: deque[int] = deque()
        self.misses = self.read = self.spoiled = self.pinned = self.pinned_peak = 0

    def offer(self, packet: int) -> None:
        """A packet is at its end: note it for the sniffer, or let it go."""
        if len(self.ring) >= self.size:
            self.misses += 1
            self.replay.free(packet)
            return
        kept = self.replay.live[packet]
        self.ring.append(packet)
        self.pinned += self.replay.pool.charge(kept.addr, kept.size)
        self.pinned_peak = max(self.pinned_peak, self.pinned)

    def take(self) -> None:
        """Read the oldest packet where it lies, and release it."""
        if not self.ring:
            return
        packet = self.ring.popleft()
        kept = self.replay.live[packet]
        mem = self.replay.pool.pages.arena.mem
        self.spoiled += mem[kept.addr] != kept.socket + 1 or mem[kept.addr + kept.size - SHINFO - 1] != kept.socket + 1
        self.read += 1
        self.pinned -= self.replay.pool.charge(kept.addr, kept.size)
        self.replay.free(packet)


def sniff(terms: Terms, name: str, ring: int, pace: float) -> Sniffer:
    """Traffic with a sniffer that reads `pace` packets for each one that arrives."""
    trace = churn("sniffed", mtu_and_ack, packets=terms.size(12000, 40000), live=50, seed=terms.seed)
    run = Replay(make_pool(name))
    sniffer = Sniffer(run, ring)
    owed = 0.0
    for step in trace.steps:
        if not step.size:
            sniffer.offer(step.packet)
            continue
        made = run.alloc(step.packet, step.size, step.lane, step.socket)
        assert made is not None
        mark(run, made)
        owed += pace
        while owed >= 1:
            owed -= 1
            sniffer.take()
    return sniffer


class Sniffed(NamedTuple):
    """What sniffing one end of a transfer took: frames, those missed, and the bytes that were copied for it and referenced."""

    frames: int
    missed: int
    copied: int
    referenced: int


def sniff_transfer(size: int, chunk: int, seed: int) -> tuple[Sniffed, Sniffed]:
    """Sniff both ends of a connection, the sender's and the receiver's, that carries `size` bytes written `chunk` at a time."""
    world = World(seed)
    features = FEATURE_CSUM | FEATURE_TSO
    devices = [SimDevice(f"sim{n}", bytes((2, 0, 0, 0, 0, n)), features=features) for n in (1, 2)]
    wire = SimWire(world, devices[0], devices[1])
    stacks = [Stack(memory=8 << 20, capture=4 << 20, random=Random(seed + n)) for n in (1, 2)]
    sniffers: list[StackSniffer] = []
    readers: list[RingReader] = []
    for number, (stack, device) in enumerate(zip(stacks, devices, strict=True), 1):
        world.add(stack, device)
        stack.add_interface(device, f"10.0.0.{number}/24")
        sniffers.append(stack.sniffers.add())
        ring = sniffers[-1].ring
        readers.append(RingReader([os.dup(fd) for fd in shared_fds(stack.arena, ring)], stack.arena.size, ring.slots))
    listener = stacks[1].tcp.listen(None, 80, 1, SocketOptions())
    sender = stacks[0].tcp.connect(stacks[0].ip.path(bytes((10, 0, 0, 2))), 0, 80, SocketOptions())
    receiver = None
    sent = received = 0
    data = bytes(chunk)
    while received < size:
        world.step()
        for reader in readers:
            with suppress(BlockingIOError):
                reader.read()
            reader.release(reader.number)
        if receiver is None and listener.queue:
            receiver = listener.accept()
        while sender.synchronized and sent < size and sender.writable:
            try:
                sent += sender.send(memoryview(data)[: size - sent])
            except BlockingIOError:
                break
        while receiver is not None and receiver.readable:
            received += len(receiver.recv(1 << 20))
    wire.unplug()
    found = [
        Sniffed(sniffer.ring.written, sniffer.missed, stack.sniffers.copied, stack.sniffers.referenced)
        for stack, sniffer in zip(stacks, sniffers, strict=True)
    ]
    for stack, reader in zip(stacks, readers, strict=True):
        reader.close()
        stack.close()
    return found[0], found[1]


@claim(
    4,
    "EP",
    "A privileged sniffer can do without any copy",
    prior="true, but a slow reader pins the pool and needs a limit of its own",
)
def sniffer_without_copies(terms: Terms) -> Outcome:
    """A ring of descriptors, read at twice and at half the pace of the traffic; and what the stack copies for a sniffer."""
    copies: dict[str, Figure] = {}
    for writes, chunk in (("large writes", 1 << 16), ("small writes", 200)):
        for end, sniffed in zip(
            ("sender", "receiver"), sniff_transfer(terms.size(1 << 20, 8 << 20), chunk, terms.seed), strict=True
        ):
            copies[f"{end}, {writes}"] = sniffed.copied / (sniffed.copied + sniffed.referenced)
    large = max(float(str(copies[f"{end}, large writes"])) for end in ("sender", "receiver"))
    small = float(str(copies["sender, small writes"]))
    fast = sniff(terms, "nta", 64, 2.0)
    slow: dict[str, Figure] = {}
    pinned: dict[str, Figure] = {}
    spoiled = fast.spoiled
    most = 0
    for ring in (64, 256, 1024):
        sniffer = sniff(terms, "nta", ring, 0.5)
        spoiled += sniffer.spoiled
        slow[str(ring)] = sniffer.misses / (sniffer.misses + sniffer.read + len(sniffer.ring))
        pinned[str(ring)] = most = sniffer.pinned_peak
    return Outcome(
        "true" if not spoiled and not fast.misses else "partly" if not spoiled else "false",
        f"A sniffer that keeps up reads {fast.read} packets where they lie and misses {fast.misses}. At half the pace it "
        f"misses "
        f"{slow['64']:.0%} with a ring of 64 and {slow['1024']:.0%} with one of 1024, which pins {most / 1024:.0f} KiB: a "
        f"larger ring pins more and saves little. Our stack copies {large:.1%} of the bytes for a sniffer, the headers of what "
        f"is sent, but by its own choice {small:.0%} at a sender of small writes, which share buffers.",
        {
            "copied on a running stack": copies,
            "misses of a slow sniffer by ring": slow,
            "bytes pinned by ring": pinned,
            "read": fast.read,
            "spoiled": spoiled,
        },
    )


@claim(
    5,
    "PZ",
    "Zero-copy for a sniffer is of no general use",
    prior="a judgement; the figures are to be published",
)
def zero_copy_in_general(terms: Terms) -> Outcome:
    """The share of packets that need no copy: for a sniffer, and for 1, 2, 8 and 64 receivers."""
    random = Random(terms.seed)
    packets = terms.size(512, 4096)
    uncopied: dict[str, Figure] = {"sniffer": 1.0}
    by: dict[tuple[str, int], float] = {}
    for sockets in (1, 2, 8, 64):
        for name in ("nta", "srog"):
            run = Replay(make_pool(name))
            receive(run, packets, (random.randrange(sockets) for _ in range(packets)))
            by[name, sockets] = mappable(run)
        uncopied[f"{sockets} sockets"] = {name: by[name, sockets] for name in ("nta", "srog")}
    useless, other_way = by["nta", 8] < 0.5, by["srog", 64] > 0.99
    return Outcome(
        "partly" if useless and other_way else "true" if useless else "false",
        f"On nta, every packet for a sniffer or a single socket, but {by['nta', 2]:.0%} for two sockets and {by['nta', 8]:.0%} "
        f"for eight. That is the packing, not zero-copy: with a page for each packet it is {by['srog', 64]:.0%} for 64 "
        f"sockets.",
        uncopied,
    )
