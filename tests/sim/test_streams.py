"""Whatever the wire does, both byte streams arrive intact, the run ends, and nothing is left."""

from __future__ import annotations

import errno
from random import Random

import pytest

from tests.sim.network import Network, Talker
from ustack.link.device import FEATURE_CSUM, FEATURE_TSO
from ustack.link.rxring import LinearRing, PagedRing
from ustack.link.simwire import Impairments
from ustack.transport.tcp.config import TcpConfig

pytestmark = pytest.mark.sim

AN_HOUR = 3600.0


def some_impairments(random: Random) -> Impairments:
    """A wire with up to 20 % loss, and some of everything else."""
    return Impairments(
        delay=random.choice((0.0, 0.0005, 0.02, 0.2)),
        jitter=random.choice((0.0, 0.0, 0.001, 0.05)),
        rate=random.choice((0, 0, 1_000_000, 100_000_000)),
        queue=random.choice((0, 20_000, 200_000)),
        loss=random.choice((0.0, 0.01, 0.05, 0.2)),
        duplicate=random.choice((0.0, 0.01, 0.1)),
        corrupt=random.choice((0.0, 0.01, 0.05)),
    )


def some_network(seed: int) -> tuple[Network, Random]:
    """A network in which everything that may vary is drawn from the seed."""
    random = Random(seed)
    features = random.choice((0, FEATURE_CSUM, FEATURE_CSUM | FEATURE_TSO))
    network = Network(
        seed,
        some_impairments(random),
        features=features,
        mtu=random.choice((576, 1500, 1500, 9000)),
        ring=PagedRing if features & FEATURE_TSO else random.choice((PagedRing, LinearRing)),
        tcp=TcpConfig(
            timestamps=random.random() < 0.7,
            sack=random.random() < 0.7,
            window_scaling=random.random() < 0.8,
            time_wait=1.0,
        ),
    )
    return network, random


def test_both_streams_arrive_intact(seed: int) -> None:
    network, random = some_network(seed)
    there = random.randbytes(random.choice((0, 1, 1000, 50_000, 300_000)))
    back = random.randbytes(random.choice((0, 1, 1000, 50_000, 300_000)))
    talkers: list[Talker] = []
    network.listen(on_accept=lambda conn: talkers.append(Talker(conn, back, random.choice((100, 5000, 65536)))))
    nodelay = random.random() < 0.5
    chunk = random.choice((100, 5000, 65536))
    compacting = random.random() < 0.3
    client = Talker(network.connect(nodelay=nodelay), there, chunk)

    def everything_is_said() -> bool:
        nonlocal client
        if client.error == errno.EHOSTUNREACH and not client.incoming:
            # Three ARP requests were lost: a program tries again.
            client = Talker(network.connect(nodelay=nodelay), there, chunk)
        if compacting and random.random() < 0.02:
            for stack in network.stacks:  # packets may be moved at any time
                stack.compact()
        return bool(client.error or (client.finished and talkers and talkers[0].finished))

    ended = network.world.run_until(everything_is_said, deadline=20 * AN_HOUR)

    story = f"seed {seed}, {network.world.now:.3f} s, {network.wire.there.impairments}"
    assert ended, story
    assert client.error == 0, story
    server = talkers[0]
    assert bytes(server.incoming) == there, story
    assert bytes(client.incoming) == back, story
    client.conn.close()
    server.conn.close()
    gone = network.world.run_until(
        lambda: not (network.client.tcp.connections or network.server.tcp.connections), network.world.now + AN_HOUR
    )
    assert gone, story
    network.close()
