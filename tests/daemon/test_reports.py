"""What a stack says of its memory: the figures behind `ss -m`, `status` and the call `memory`."""

from __future__ import annotations

from tests.sim.network import Network
from ustack.daemon import reports
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.udp import ANY


def test_sockets_and_pages_of_each_protocol_are_as_in_sockstat() -> None:
    network = Network(1, tcp=TcpConfig(mem_high=1 << 20))
    server = network.server
    accepted = network.listen(80)
    conns = [network.connect(80) for _ in range(3)]
    datagrams = server.udp.socket()
    datagrams.bind(ANY, 1000)
    sender = network.client.udp.socket()
    assert network.world.run_until(lambda: len(accepted) == 3, deadline=5.0)
    conns[0].send(bytes(10_000))
    sender.sendto_nowait(bytes(100), (bytes((10, 0, 0, 2)), 1000))
    accepted[1].close()
    network.world.run(1.0)
    told = reports.memory(server)
    held = accepted[0].charges
    assert told["tcp"] == {
        "inuse": 3,
        "mem": (held.rmem_alloc + held.forward_alloc) // 4096,
        "mem_peak": server.tcp.mem.peak,
        "limits": [128, 170, 256],
        "orphan": 1,
        "tw": 0,
        "under_pressure": False,
    }
    assert told["udp"]["inuse"] == 1
    assert told["udp"]["mem"] == 1
    conns[1].close()
    network.world.run(1.0)
    told = reports.memory(server)
    assert (told["tcp"]["inuse"], told["tcp"]["tw"], told["tcp"]["orphan"]) == (2, 1, 0)
    for each in (datagrams, sender):
        each.close()
    network.close()


def test_skmem_of_a_connection_adds_up_to_its_pages() -> None:
    network = Network(2)
    accepted = network.listen(80, rcvbuf=20_000)
    conn = network.connect(80, sndbuf=30_000)
    assert network.world.run_until(lambda: len(accepted) == 1, deadline=5.0)
    conn.send(bytes(100_000))
    network.world.run(5.0)
    (listener, receiver), (sender,) = reports.sockets(network.server), reports.sockets(network.client)
    assert "memory" not in listener
    skmem = receiver["memory"]
    assert skmem["rcvbuf"] == 20_000
    assert skmem["rmem_alloc"] > 0
    assert (skmem["rmem_alloc"] + skmem["fwd_alloc"] + skmem["wmem_queued"]) % 4096 == 0
    skmem = sender["memory"]
    assert skmem["sndbuf"] == 30_000
    assert skmem["wmem_queued"] > 0 == skmem["wmem_alloc"]
    assert list(skmem)[:-1] == [
        *("rmem_alloc", "rcvbuf", "wmem_alloc", "sndbuf", "fwd_alloc", "wmem_queued", "optmem", "backlog", "drops")
    ]
    network.close()
