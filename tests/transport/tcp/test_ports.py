"""Who a segment belongs to: ports, ephemeral ports, names that are in use, and segments that are no segments."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from tests.transport.tcp.peer import PEER_ADDRESS
from ustack.drops import DropReason
from ustack.transport.options import SocketOptions
from ustack.transport.ports import EPHEMERAL
from ustack.transport.tcp.states import State
from ustack.wire.tcp import ACK, FIN, SYN

if TYPE_CHECKING:
    from tests.transport.tcp.peer import Peer
    from ustack.transport.tcp.connection import Connection


def connect(peer: Peer, local_port: int) -> Connection:
    conn = peer.stack.tcp.connect(peer.stack.ip.path(PEER_ADDRESS), local_port, 80, SocketOptions())
    peer.settle()
    return conn


def test_a_port_is_chosen_at_random_from_the_ephemeral_ones(peer: Peer) -> None:
    peer.device.wire = lambda frame: None
    ports = [connect(peer, 0).local[1] for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(port in EPHEMERAL for port in ports)
    assert sorted(ports) != ports


def test_the_same_name_cannot_be_used_twice(peer: Peer) -> None:
    peer.device.wire = lambda frame: None
    connect(peer, 1234)
    with pytest.raises(OSError, match="in use") as failed:
        connect(peer, 1234)
    assert failed.value.errno == errno.EADDRINUSE


def test_a_name_in_time_wait_may_be_used_again_when_timestamps_tell_old_from_new(peer: Peer) -> None:
    """RFC 6191, for the active side; and the new numbers lie beyond the old (RFC 9293, section 3.6.1)."""
    user = peer.accepts(ts=1000)
    user.closes()
    peer.expects(FIN | ACK)
    peer.sends(FIN | ACK)
    peer.expects(ACK)
    old_iss = peer.stack_iss
    peer.returns()
    conn = connect(peer, peer.port)
    peer.expects(SYN, seq=0)
    assert 2 < (peer.stack_iss - old_iss) % (1 << 32) < 1 << 31
    conn.close()


def test_a_name_in_time_wait_is_in_use_without_timestamps(peer: Peer) -> None:
    user = peer.accepts()
    user.closes()
    peer.expects(FIN | ACK)
    peer.sends(FIN | ACK)
    with pytest.raises(OSError, match="in use"):
        connect(peer, peer.port)


def test_a_port_in_use_cannot_be_bound_unless_it_may_be_reused(peer: Peer) -> None:
    tcp = peer.stack.tcp
    listener = peer.listens()
    peer.connects()
    listener.close()
    with pytest.raises(OSError, match="in use"):
        tcp.check_bind(None, peer.port, reuse=False)
    tcp.check_bind(None, peer.port, reuse=True)
    tcp.check_bind(None, 8080, reuse=False)
    assert tcp.free_port() in EPHEMERAL


def test_a_port_is_free_again_when_time_wait_is_over(peer: Peer) -> None:
    user = peer.accepts()
    user.closes()
    peer.expects(FIN | ACK)
    peer.sends(FIN | ACK)
    peer.ignores()
    with pytest.raises(OSError, match="in use"):
        peer.stack.tcp.check_bind(None, peer.port, reuse=False)
    peer.waits(61)
    peer.stack.tcp.check_bind(None, peer.port, reuse=False)


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        (b"", DropReason.PKT_TOO_SMALL),
        (bytes(19), DropReason.PKT_TOO_SMALL),
        (bytes(12) + b"\x40" + bytes(7), DropReason.TCP_HDR),
        (bytes(12) + b"\x60" + bytes(7), DropReason.TCP_HDR),
        (bytes(12) + b"\xf0" + bytes(30), DropReason.TCP_HDR),
    ],
    ids=["nothing", "19 bytes", "header of 16", "header longer than the segment", "header of 60 in 43"],
)
def test_what_is_no_segment_is_counted(peer: Peer, segment: bytes, reason: DropReason) -> None:
    peer.sends_raw(segment)
    assert peer.stack.drops[reason] == 1
    assert peer.stack.mib.TcpInErrs == 1
    peer.expects_nothing()


def test_a_wrong_checksum_is_counted_and_nothing_else(peer: Peer) -> None:
    user = peer.connects()
    segment = bytearray(peer._build(ACK, 1, 1, 1000, b"", b"data"))
    segment[-1] ^= 1
    peer.sends_as_is(bytes(segment))
    user.has_nothing_to_read()
    assert peer.stack.drops[DropReason.TCP_CSUM] == 1
    assert user.is_in(State.ESTABLISHED)
