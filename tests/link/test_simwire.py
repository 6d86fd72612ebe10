"""The simulated wire: it does what its impairments say, exactly as often with the same seed, and cuts super-frames as Linux
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.gfp import ATOMIC
from tests.net.host import OFFLOADS, make_env
from ustack.drops import DropReason, Drops
from ustack.lab.world import World
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import Impairments, SimDevice, SimWire, segments
from ustack.wire import ethernet, ipv4, tcp
from ustack.wire.checksum import finish, fold, ones_sum, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ustack.link.rxring import RxFrame, RxRing
    from ustack.skb import Skb

SRC = bytes((10, 0, 0, 1))
DST = bytes((10, 0, 0, 2))


class Station:
    """A device and all that it received: time, bytes, whether the checksum is vouched for, segment size."""

    def __init__(self, world: World, name: str, features: int, ring: Callable[..., RxRing], mtu: int) -> None:
        self.world = world
        self.device = SimDevice(name, name.encode().ljust(6), mtu, features, ring)
        self.drops = Drops()
        self.received: list[tuple[float, bytes, bool, int]] = []
        self.device.attach(make_env(4096).memory, self.drops, self.deliver)
        self.device.on_receivable = self.poll

    def poll(self) -> None:
        self.device.poll(64)

    def deliver(self, frame: RxFrame) -> None:
        self.received.append((self.world.now, frame.tobytes(0, frame.len), frame.csum_ok, frame.gso_size))


class Lan:
    """Two stations on a wire in a world."""

    def __init__(
        self, seed: int, features: tuple[int, int], ring: Callable[..., RxRing], mtu: int, **impairments: float
    ) -> None:
        self.world = World(seed)
        self.a, self.b = (Station(self.world, name, feature, ring, mtu) for name, feature in zip("ab", features, strict=True))
        self.wire = SimWire(self.world, self.a.device, self.b.device, Impairments(**impairments))  # type: ignore[arg-type]

    def send(self, *frames: bytes) -> list[tuple[float, bytes, bool, int]]:
        """Send frames from a to b, let everything arrive, and say what did."""
        for frame in frames:
            assert self.a.device.transmit(frame, ())
        self.world.run(1000.0)
        return self.b.received


@pytest.fixture
def make_lan() -> Iterator[Callable[..., Lan]]:
    lans: list[Lan] = []

    def make(
        seed: int = 1,
        features: tuple[int, int] = (OFFLOADS, OFFLOADS),
        ring: Callable[..., RxRing] = PagedRing,
        mtu: int = 1500,
        **impairments: float,
    ) -> Lan:
        lans.append(Lan(seed, features, ring, mtu, **impairments))
        return lans[-1]

    yield make
    for lan in lans:
        lan.a.device.close()
        lan.b.device.close()


def numbered(count: int, size: int = 100) -> list[bytes]:
    return [n.to_bytes(4, "big") * (size // 4) for n in range(count)]


def test_frames_arrive_after_the_delay_as_they_were(make_lan: Callable[..., Lan]) -> None:
    received = make_lan(delay=0.25).send(*numbered(3))
    assert received == [(0.25, frame, False, 0) for frame in numbered(3)]


def test_head_and_payload_are_one_frame(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan()
    lan.a.device.transmit(b"head ", [b"of ", memoryview(b"a frame")])
    lan.world.run(1.0)
    assert lan.b.received[0][1] == b"head of a frame"
    assert (lan.a.device.stats.tx_packets, lan.a.device.stats.tx_bytes) == (1, 15)
    assert (lan.b.device.stats.rx_packets, lan.b.device.stats.rx_bytes) == (1, 15)


def test_the_rate_spaces_frames_out(make_lan: Callable[..., Lan]) -> None:
    received = make_lan(delay=1.0, rate=8000.0).send(*numbered(3, size=500))
    assert [when for when, *_ in received] == [1.5, 2.0, 2.5]


def test_the_queue_before_a_slow_wire_is_bounded(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(delay=0.0, rate=8000.0, queue=1500)
    assert len(lan.send(*numbered(5, size=500))) == 3
    assert lan.wire.there.drops[DropReason.WIRE_QUEUE] == 2
    assert len(lan.send(*numbered(1, size=500))) == 4, "the queue has drained"


def test_loss_and_duplication_happen_about_as_often_as_asked_for(make_lan: Callable[..., Lan], seed: int) -> None:
    lan = make_lan(seed, loss=0.2, duplicate=0.1)
    received = lan.send(*numbered(2000))
    lost = lan.wire.there.drops[DropReason.WIRE_LOSS]
    assert 300 < lost < 500
    assert 100 < lan.wire.there.duplicated < 220
    assert len(received) == 2000 - lost + lan.wire.there.duplicated
    assert lan.wire.there.frames == 2000


def test_jitter_lets_frames_overtake_each_other(make_lan: Callable[..., Lan]) -> None:
    received = [frame for _, frame, *_ in make_lan(jitter=0.01).send(*numbered(100))]
    assert received != numbered(100)
    assert sorted(received) == numbered(100)


def test_the_same_seed_is_the_same_run(make_lan: Callable[..., Lan]) -> None:
    impairments = {"loss": 0.1, "duplicate": 0.1, "corrupt": 0.1, "jitter": 0.01}
    runs = [make_lan(seed, **impairments).send(*numbered(200)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_corruption_flips_one_bit(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(corrupt=1.0)
    sent = segment(b"payload", complete=True)
    for _, frame, csum_ok, _ in lan.send(sent, sent):
        assert sum((x ^ y).bit_count() for x, y in zip(frame, sent, strict=True)) == 1
        assert not csum_ok
    assert lan.wire.there.corrupted == 2


def test_damage_that_no_checksum_would_notice_is_loss(make_lan: Callable[..., Lan]) -> None:
    """ARP has none: the frame check sequence of a real wire guards it."""
    lan = make_lan(corrupt=1.0)
    assert lan.send(ethernet.build_header(bytes(6), bytes(6), ethernet.ETH_P_ARP) + bytes(28)) == []
    assert lan.wire.there.drops.by_name() == {"WIRE_LOSS": 1}


def segment(payload: bytes, flags: int = tcp.ACK | tcp.PSH, complete: bool = False) -> bytes:
    """A TCP frame; its checksum is that of the pseudo-header, or complete."""
    header = tcp.build_header(1, 2, 0xFFFFFF00, 4, flags, 5, tcp.build_options(7, 8))
    length = len(header) + len(payload)
    pseudo = pseudo_v4(SRC, DST, 6, length)
    checksum = finish(pseudo + ones_sum(header + payload)) if complete else fold(pseudo)
    l4 = header[:16] + checksum.to_bytes(2, "big") + header[18:] + payload
    return (
        ethernet.build_header(bytes(6), bytes(6), ethernet.ETH_P_IP) + ipv4.build_header(SRC, DST, 6, length, ident=0xFFFF) + l4
    )


def checksum_is_right(frame: bytes | bytearray) -> bool:
    return finish(pseudo_v4(SRC, DST, 6, len(frame) - 34) + ones_sum(frame[34:])) == 0


def test_a_super_frame_crosses_whole_between_devices_that_can(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan()
    frame = segment(bytes(40000))
    lan.a.device.transmit(frame, (), 34, 16, 1448)
    lan.world.run(1.0)
    assert [(data, csum_ok, gso_size) for _, data, csum_ok, gso_size in lan.b.received] == [(frame, True, 1448)]


def test_for_a_device_that_cannot_it_is_cut_and_its_checksums_completed(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(features=(OFFLOADS, 0))
    lan.a.device.transmit(segment(bytes(4000)), (), 34, 16, 1448)
    lan.world.run(1.0)
    assert [len(data) for _, data, *_ in lan.b.received] == [66 + 1448, 66 + 1448, 66 + 1104]
    assert all(checksum_is_right(data) and not csum_ok for _, data, csum_ok, _ in lan.b.received)


def test_a_damaged_frame_is_never_vouched_for(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(corrupt=1.0)
    lan.a.device.transmit(segment(b"payload"), (), 34, 16)
    lan.world.run(1.0)
    ((_, data, csum_ok, _),) = lan.b.received
    assert not csum_ok
    whole = segment(b"payload", complete=True)
    assert sum((x ^ y).bit_count() for x, y in zip(data, whole, strict=True)) == 1


@given(st.binary(min_size=1, max_size=5000), st.integers(1, 1448), st.integers(0, 255))
def test_the_pieces_of_a_super_frame_are_segments_that_dpkt_puts_together_again(
    payload: bytes, gso_size: int, flags: int
) -> None:
    cut = segments(segment(payload, flags), gso_size)
    packets = [dpkt.ethernet.Ethernet(bytes(frame)).data for frame in cut]
    assert b"".join(packet.data.data for packet in packets) == payload
    assert all(0 < len(packet.data.data) <= gso_size for packet in packets)
    assert [packet.id for packet in packets] == [(0xFFFF + n) & 0xFFFF for n in range(len(cut))]
    assert [packet.data.seq for packet in packets] == [(0xFFFFFF00 + n * gso_size) & 0xFFFFFFFF for n in range(len(cut))]
    for n, frame in enumerate(cut):
        assert finish(ones_sum(frame[14:34])) == 0
        assert checksum_is_right(frame)
        expected = flags
        if n < len(cut) - 1:
            expected &= ~(tcp.FIN | tcp.PSH)
        if n:
            expected &= ~tcp.CWR
        assert packets[n].data.flags & 0xFF == expected


def test_a_tap_sees_what_was_sent_also_if_it_is_lost(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(loss=1.0)
    seen: list[tuple[float, bytes]] = []
    lan.wire.there.tap = lambda now, frame: seen.append((now, frame))
    assert lan.send(b"lost") == []
    assert seen == [(0.0, b"lost")]


def test_impairments_change_at_any_time_in_one_direction_or_both(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan()
    lan.wire.there.impairments = Impairments(loss=1.0)
    assert lan.send(b"lost") == []
    lan.b.device.transmit(b"other way", ())
    lan.world.run(1.0)
    assert lan.a.received[0][1] == b"other way"
    lan.wire.impair(Impairments())
    assert lan.send(b"here")[0][1] == b"here"


def test_an_unplugged_device_refuses_and_what_is_on_its_way_arrives(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan()
    lan.a.device.transmit(b"before", ())
    lan.wire.unplug()
    assert not lan.a.device.transmit(b"after", ())
    assert lan.a.device.stats.tx_errors == 1
    lan.world.run(1.0)
    assert [data for _, data, *_ in lan.b.received] == [b"before"]


def test_a_frame_that_is_too_long_for_the_receiver_is_dropped(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(features=(0, 0))
    assert lan.send(bytes(1515)) == []
    assert lan.b.drops.by_name() == {"PKT_TOO_BIG": 1}


def test_a_linear_ring_that_starves_drops_frames(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan(features=(0, 0), ring=LinearRing)
    memory = lan.b.device.ring.memory
    kept: list[Skb | None] = []
    lan.b.device._deliver = lambda frame: kept.append(frame.keep(0, frame.len, ATOMIC))
    # No page is left, but the heads of skbs that were freed are, scattered over slabs that cannot be given back.
    scattered = [memory.alloc(1, ATOMIC) for _ in range(150)]
    taken: list[int] = []
    while pfns := memory.pages.alloc_bulk(1, ATOMIC, memory.frag_owner):
        taken += pfns
    for skb in [skb for n, skb in enumerate(scattered) if n % 10]:
        free(skb)
    lan.send(*numbered(200))
    assert lan.b.drops.by_name() == {"RING_EMPTY": 200 - len(kept)}
    assert 64 <= len(kept) < 200
    lan.b.device._deliver = lambda _: None
    memory.pages.free_bulk(taken)
    for skb in [*kept, *scattered[::10]]:
        free(skb)
    lan.send(*numbered(1))
    assert lan.b.drops[DropReason.RING_EMPTY] == 200 - len(kept), "the ring is filled again as soon as there is memory"


def free(skb: Skb | None) -> None:
    assert skb is not None
    skb.free()


def test_a_closed_device_is_silent(make_lan: Callable[..., Lan]) -> None:
    lan = make_lan()
    lan.a.device.transmit(b"on its way", ())
    lan.b.device.close()
    lan.world.run(1.0)
    assert lan.b.received == []
    assert lan.b.device.poll(1) == 0
    assert not lan.b.device.transmit(b"x", ())
