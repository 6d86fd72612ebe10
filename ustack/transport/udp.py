"""UDP (RFC 768; RFC 1122, section 4.1): sockets, their queues, and finding the socket of a datagram.

A datagram is sent straight from the caller's buffer and received into an skb that is charged to its socket. The limit of a
receive queue is the kernel's: a datagram is taken while what waits does not exceed `rcvbuf`, in bytes of truesize. That is
decided before anything is allocated. Once per batch of frames the user is told by `wake`, called with READABLE or WRITABLE,
and then makes the non-blocking calls; what they raise is what the BSD calls raise.

Left out: multicast, the error queue.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pools.gfp import ATOMIC, MEMALLOC
from ustack.drops import DropReason
from ustack.link.device import ETH_HLEN
from ustack.mem.protocol import ProtocolMemory, limits_for, pages_of
from ustack.mem.socket import SocketMemory
from ustack.net.addresses import ANY4, ANY6, covers, is_any, overlap
from ustack.net.icmpv6 import errno_of
from ustack.net.path import PMTUDISC_DO, PMTUDISC_PROBE, PMTUDISC_WANT
from ustack.skb import Account
from ustack.transport.events import READABLE, SHUT_RD, SHUT_WR, WRITABLE, nobody
from ustack.transport.options import SocketOptions
from ustack.transport.ports import ephemeral_ports
from ustack.wire import icmp, ipv4, udp
from ustack.wire.checksum import finish, ones_sum_views, pseudo_v4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ustack.env import Env
    from ustack.net.ip import Ip
    from ustack.net.layer import IpPacket
    from ustack.net.path import Path
    from ustack.skb import Buffer, Skb

Address = tuple[bytes, int]
"""A packed IP address and a port."""

ANY: Final = ANY4
"""The wildcard address of IPv4."""

PAYLOAD_MAX: Final = ipv4.TOTAL_MAX - ipv4.HEADER_LEN - udp.HEADER_LEN
"""Bytes of the largest datagram."""

UDP_EIGHTHS: Final = 3
"""Eighths of the arena, without its watermarks, that are `high` of all UDP sockets together; see `UdpConfig.mem_high`."""

_ERRNO_OF_UNREACHABLE: Final = {
    icmp.ICMP_PROT_UNREACH: errno.ENOPROTOOPT,
    icmp.ICMP_PORT_UNREACH: errno.ECONNREFUSED,
    icmp.ICMP_FRAG_NEEDED: errno.EMSGSIZE,
}
"""The errors that a connected socket is told; others may pass (net/ipv4/icmp.c, icmp_err_convert)."""


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(slots=True)
class UdpConfig:
    """One stack's UDP settings. Names are those of Linux sysctls (net.ipv4.udp_*, net.core.*) where there is one."""

    rmem_min: int = 4096
    """Bytes of truesize that a socket may receive even when all sockets together are over their limit (udp_rmem_min)."""
    rmem_default: int = 212992
    """Receive limit in bytes of truesize (net.core.rmem_default)."""
    wmem_default: int = 212992
    """Send limit in bytes of truesize, as SO_SNDBUF says it (net.core.wmem_default). Datagrams are sent from the caller's
    buffer and never queued: nothing is ever charged to it.
    """
    mem_low: int = 0
    """Bytes of truesize that all sockets together may hold (udp_mem[0], which counts pages): UDP knows no pressure, so beyond
    that a socket gets no more than `rmem_min`, as in Linux; 0: half of `mem_high`.
    """
    mem_pressure: int = 0
    """Means nothing for UDP, and follows the format of tcp_mem (udp_mem[1]); 0: two thirds of `mem_high`."""
    mem_high: int = 0
    """Where `mem_low` comes from unless it is set (udp_mem[2]); 0: three eighths of the arena, without what its watermarks keep
    free.
    """

    def mem_pages(self) -> tuple[int, int, int]:
        """`mem_low`, `mem_pressure` and `mem_high` in pages."""
        return pages_of(self.mem_low), pages_of(self.mem_pressure), pages_of(self.mem_high)


class Udp:
    """UDP of one stack. All receive queues are charged to `account`, and by pages to `mem`, which knows no pressure."""

    __slots__ = ("_drops", "_mib", "_pending", "_ports", "account", "config", "env", "ip", "mem")

    def __init__(self, env: Env, ip: Ip, config: UdpConfig | None = None) -> None:
        self.env = env
        self.ip = ip
        self.config = config = config or UdpConfig()
        self.account = Account("udp receive")
        pages = env.memory.pages
        self.mem = ProtocolMemory(pages, limits_for(pages, config.mem_pages(), UDP_EIGHTHS), config.rmem_min, config.rmem_min)
        self._drops = env.drops
        self._mib = env.mib
        self._ports: dict[int, list[UdpSocket]] = {}  # by local port; the one bound last comes last
        self._pending: list[UdpSocket] = []
        ip.register(ipv4.IPPROTO_UDP, self.input, self.on_icmp_error, self.on_icmpv6_error)

    def socket(self, options: SocketOptions | None = None, wildcard: bytes | None = ANY) -> UdpSocket:
        """A new socket, not bound yet, for the addresses that `wildcard` stands for (`addresses.is_any`)."""
        return UdpSocket(self, options or SocketOptions(), wildcard)

    def sockets(self) -> list[UdpSocket]:
        """All bound sockets."""
        return [each for sockets in self._ports.values() for each in sockets]

    def queued(self) -> Iterator[Skb]:
        """The packets that wait in the queues of all bound sockets."""
        for socket in self.sockets():
            yield from socket.queued()

    def schedule(self, socket: UdpSocket) -> None:
        """Wake the user of `socket` at the next flush."""
        if not self._pending:
            self.env.want_flush()
        self._pending.append(socket)

    def flush(self) -> None:
        """Once per batch of frames: wake the users of the sockets to which something happened."""
        while self._pending:
            pending = self._pending
            self._pending = []
            for socket in pending:
                mask = socket.wake_mask
                socket.wake_mask = 0
                socket.wake(mask)

    def close(self) -> None:
        """Fail every bound socket with ECONNABORTED, and close it."""
        for socket in self.sockets():
            socket.fail(errno.ECONNABORTED)
        self.flush()
        for socket in self.sockets():
            socket.close()

    # -- in --

    def input(self, packet: IpPacket) -> None:
        """A datagram arrived: check it, find its socket, queue it there."""
        frame = packet.frame
        if packet.l4_len < udp.HEADER_LEN:
            self._refuse(DropReason.PKT_TOO_SMALL)
            return
        sport, dport, length, checksum = udp.HEADER.unpack_from(frame.head, packet.l4)
        if not udp.HEADER_LEN <= length <= packet.l4_len:
            self._refuse(DropReason.UDP_LENGTH)
            return
        if not checksum:
            if len(packet.src) != 4:  # IPv6 has no other checksum (RFC 8200, section 8.1)
                self._refuse(DropReason.UDP_CSUM)
                return
        elif not frame.csum_ok:
            total = pseudo_v4(packet.src, packet.dst, ipv4.IPPROTO_UDP, length)
            if finish(total + ones_sum_views(frame.views(packet.l4, length))):
                self._refuse(DropReason.UDP_CSUM)
                return
        if packet.broadcast:
            receivers = [each for each in self._ports.get(dport, ()) if each.score(packet.dst, packet.src, sport)]
        else:
            receiver = self._find(dport, packet.dst, packet.src, sport)
            receivers = [] if receiver is None else [receiver]
        if not receivers:
            self._mib.UdpNoPorts += 1
            self._drops.count(DropReason.NO_SOCKET)
            self.ip.port_unreachable(packet)
            return
        skb: Skb | None = None
        for receiver in receivers:
            skb = receiver.enqueue(packet, length, sport, skb) or skb

    def _refuse(self, reason: DropReason) -> None:
        self._mib.UdpInErrors += 1
        self._drops.count(reason)

    def _find(self, local_port: int, local: bytes, remote: bytes, remote_port: int) -> UdpSocket | None:
        """The socket that fits best: connected before bound to an address before bound to any; of equals the newest."""
        best: UdpSocket | None = None
        best_score = 1
        for each in self._ports.get(local_port, ()):
            score = each.score(local, remote, remote_port)
            if score >= best_score:
                best, best_score = each, score
        return best

    def on_icmp_error(self, kind: int, code: int, _mtu: int, src: bytes, dst: bytes, quoted: bytes) -> bool:
        """An ICMP error about a datagram that we sent from `src` to `dst`; see `icmp.ErrorHandler`."""
        sport, dport, _, _ = udp.HEADER.unpack_from(quoted)
        socket = self._find(sport, src, dst, dport)
        if socket is None:
            return False
        if socket.remote is not None:
            if kind == icmp.ICMP_DEST_UNREACH and code in _ERRNO_OF_UNREACHABLE:
                socket.fail(_ERRNO_OF_UNREACHABLE[code])
            elif kind == icmp.ICMP_PARAMETERPROB:
                socket.fail(errno.EPROTO)
        return True

    def on_icmpv6_error(self, kind: int, code: int, _mtu: int, src: bytes, dst: bytes, quoted: bytes) -> bool:
        """The same for an ICMPv6 error."""
        sport, dport, _, _ = udp.HEADER.unpack_from(quoted)
        socket = self._find(sport, src, dst, dport)
        if socket is None:
            return False
        number, final = errno_of(kind, code)
        if socket.remote is not None and (final or number == errno.EMSGSIZE):
            socket.fail(number)
        return True

    # -- ports --

    def claim(self, socket: UdpSocket, address: bytes | None, port: int) -> int:
        """Give `socket` the local `port`, or one of the ephemeral ports when it is 0; return it. Raises OSError EADDRINUSE."""
        if port:
            if not self._is_free(socket, address, port):
                raise _error(errno.EADDRINUSE)
        else:
            port = self._ephemeral_port()
        self._ports.setdefault(port, []).append(socket)
        socket.charges.join()
        return port

    def _is_free(self, socket: UdpSocket, address: bytes | None, port: int) -> bool:
        shared = socket.options.reuseaddr or socket.options.reuseport
        return all(
            (shared and (other.options.reuseaddr or other.options.reuseport)) or not overlap(address, other.bound)
            for other in self._ports.get(port, ())
        )

    def _ephemeral_port(self) -> int:
        """A free port: the first from a random one on (RFC 6056, algorithm 1)."""
        for port in ephemeral_ports(self.env.random):
            if port not in self._ports:
                return port
        raise _error(errno.EADDRINUSE)

    def release(self, socket: UdpSocket, port: int) -> None:
        """Take `port` from `socket`."""
        sockets = self._ports[port]
        sockets.remove(socket)
        if not sockets:
            del self._ports[port]
        socket.charges.leave()


class UdpSocket:
    """A UDP socket; made by `Udp.socket`. `bound` is the address and `port` the port that it is bound to, `wildcard` and 0
    before.

    `remote` is the peer of a connected socket. `account` has the truesize of what waits to be received, `charges` the
    pages that it takes. `wake` may be set at any time; `wake_mask` is what it will be called with at the next flush.
    """

    __slots__ = (
        "_drops",
        "_error",
        "_mib",
        "_path",
        "_queue",
        "_shutdown",
        "_udp",
        "account",
        "bound",
        "charges",
        "closed",
        "options",
        "port",
        "remote",
        "wake",
        "wake_mask",
        "wildcard",
    )

    def __init__(self, protocol: Udp, options: SocketOptions, wildcard: bytes | None) -> None:
        self.options = options
        self.wildcard = wildcard
        self.bound = wildcard
        self.port = 0
        self.remote: Address | None = None
        self.wake: Callable[[int], None] = nobody
        self.wake_mask = 0
        self.charges = SocketMemory(protocol.mem, protocol.account, None, None)
        self.account = self.charges.receive
        self.closed = False
        self._udp = protocol
        self._drops = protocol.env.drops
        self._mib = protocol.env.mib
        self._error = 0
        self._shutdown = 0
        self._path: Path | None = None
        self._queue: deque[Skb] = deque()

    # -- names --

    @property
    def local(self) -> tuple[bytes | None, int]:
        """Our address, which may be any (`addresses.is_any`), and port."""
        return (self.bound if self._path is None else self._path.src), self.port

    @property
    def path_mtu(self) -> int | None:
        """Bytes of packet that the path to the peer takes; None without a peer."""
        return None if self._path is None else self._path.mtu

    def bind(self, address: bytes | None, port: int) -> None:
        """Receive what is sent to `address` (packed, or `addresses.is_any` for all of ours) and `port` (0: any free one).

        Raises OSError: EINVAL when bound already, EADDRNOTAVAIL, EADDRINUSE.
        """
        if self.port or self.closed:
            raise _error(errno.EINVAL)
        ip = self._udp.ip
        if address is not None and not is_any(address) and not ip.is_own(address) and not ip.is_broadcast(address):
            raise _error(errno.EADDRNOTAVAIL)
        self.port = self._udp.claim(self, address, port)
        self.bound = address

    def connect(self, address: bytes, port: int) -> None:
        """Send to, and receive from, this peer alone. May be called again.

        Raises OSError: EACCES for a broadcast without the option, EINVAL, and those of `Ipv4.path`.
        """
        if self.closed or not port:
            raise _error(errno.EINVAL)
        path = self._path_to(address)
        if not self.port:
            self.bind(self.wildcard, 0)
        self._path = path
        self.remote = (address, port)

    def disconnect(self) -> None:
        """Have no peer any more (connect(2) with AF_UNSPEC)."""
        self.remote = None
        self._path = None

    def score(self, local: bytes, remote: bytes, remote_port: int) -> int:
        """How well a datagram from `remote` to our address `local` fits a socket on its port: not at all (0), or the better."""
        if self.remote is not None:
            return 3 if self.remote == (remote, remote_port) and local == self.local[0] else 0
        if self.bound == local:
            return 2
        return int(covers(self.bound, local))

    # -- sending --

    def sendto_nowait(self, data: Buffer, destination: Address | None = None) -> int:
        """Send `data` as one datagram, to the peer when no `destination` is given; return its length.

        What is lost below, as when the device is full, is lost silently: this is UDP. Raises OSError: an error that arrived
        earlier, EDESTADDRREQ, EMSGSIZE when the datagram is too long for IP, or for the path and must not be cut, EACCES for a
        broadcast without the option, EPIPE, and those of `Ipv4.path`.
        """
        self._raise_error()
        if self._shutdown & SHUT_WR:
            raise _error(errno.EPIPE)
        if destination is None:
            if self.remote is None or self._path is None:
                raise _error(errno.EDESTADDRREQ)
            path = self._path
            if path.obsolete:
                path = self._path = self._path_to(self.remote[0])
            port = self.remote[1]
        else:
            address, port = destination
            if not port:
                raise _error(errno.EINVAL)
            path = self._path_to(address)
        if isinstance(data, memoryview):
            data = data.cast("B")
        length = len(data)
        pmtudisc = self.options.pmtudisc
        total = path.l4 - ETH_HLEN + udp.HEADER_LEN + length
        fits = total <= (path.device.mtu if pmtudisc == PMTUDISC_PROBE else path.mtu)
        if length > PAYLOAD_MAX or (not fits and pmtudisc >= PMTUDISC_DO):
            raise _error(errno.EMSGSIZE)
        if not self.port:
            self.bind(self.wildcard, 0)
        udp.HEADER.pack_into(path.head, path.l4, self.port, port, udp.HEADER_LEN + length, 0)
        options = self.options
        self._mib.UdpOutDatagrams += 1
        path.send(
            ipv4.IPPROTO_UDP,
            udp.HEADER_LEN,
            (data,) if length else (),
            length,
            csum_at=udp.OFF_CSUM,
            tos=options.tos,
            ttl=options.ttl,
            df=pmtudisc >= PMTUDISC_DO or (fits and pmtudisc == PMTUDISC_WANT),
            probe=pmtudisc == PMTUDISC_PROBE,
            gfp=MEMALLOC if options.memalloc else ATOMIC,
        )
        return length

    def _path_to(self, address: bytes) -> Path:
        if self.closed:
            raise _error(errno.EBADF)
        bound = self.bound
        ip = self._udp.ip
        path = ip.path(address, bound if bound is not None and ip.is_own(bound) else None)
        if path.broadcast and not self.options.broadcast:
            raise _error(errno.EACCES)
        return path

    # -- receiving --

    def enqueue(self, packet: IpPacket, length: int, sport: int, twin: Skb | None) -> Skb | None:
        """Queue the datagram of `length` bytes, header included, that is being delivered; None when it was dropped (and
        counted).

        A frame can be kept once: when another socket has it already as `twin`, this one gets a clone.
        """
        options = self.options
        frame = packet.frame
        if frame.pfmemalloc and not options.memalloc:
            self._drops.count(DropReason.PFMEMALLOC)
            return None
        if self.account.bytes > self.rcvbuf:
            self._mib.UdpRcvbufErrors += 1
            self._refuse(DropReason.SOCKET_RCVBUFF)
            return None
        charges = self.charges
        if not charges.ample(length):
            truesize = frame.truesize(packet.l4, length) if twin is None else twin.truesize
            if not charges.rmem_schedule(truesize, options.memalloc):
                self._mib.UdpMemErrors += 1
                self._refuse(DropReason.PROTO_MEM)
                return None
        gfp = MEMALLOC if options.memalloc else ATOMIC
        skb = self._udp.env.memory.clone(twin, gfp) if twin is not None else frame.keep(packet.l4, length, gfp)
        if skb is None:
            charges.reclaim()
            self._refuse(DropReason.NOMEM)
            return None
        if skb.pfmemalloc and not options.memalloc:
            self._drops.count(DropReason.PFMEMALLOC)
            skb.free()
            charges.reclaim()
            return None
        if twin is None:
            skb.pull(udp.HEADER_LEN)
        skb.peer = (packet.src, sport)
        skb.charge_to(self.account)
        self._queue.append(skb)
        self.notify(READABLE)
        return skb

    @property
    def rcvbuf(self) -> int:
        """Receive limit in bytes of truesize."""
        return self.options.rcvbuf or self._udp.config.rmem_default

    def _refuse(self, reason: DropReason) -> None:
        """A datagram found its socket, and no room there (udp_queue_rcv_skb)."""
        self.charges.drops += 1
        self._mib.UdpInErrors += 1
        self._drops.count(reason)

    def queued(self) -> Iterable[Skb]:
        """The datagrams that wait, the oldest first."""
        return self._queue

    def recvfrom_nowait(self, limit: int, *, peek: bool = False) -> tuple[bytes, Address]:
        """Take the oldest datagram, cut to `limit` bytes, and its sender; with `peek` it stays queued.

        Raises BlockingIOError when none waits, or an error that arrived. After shutdown: no bytes, from nobody.
        """
        skb = self._oldest()
        if skb is None:
            return b"", (self.wildcard or ANY6, 0)
        data = b"".join(skb.views(0, min(limit, skb.len)))
        return data, self._sender(skb, peek)

    def recvfrom_into_nowait(self, target: memoryview, *, peek: bool = False) -> tuple[int, Address]:
        """Like `recvfrom_nowait`, into a writable view of bytes.

        Returns the whole length of the datagram, which may be more than fitted (what MSG_TRUNC asks for).
        """
        skb = self._oldest()
        if skb is None:
            return 0, (self.wildcard or ANY6, 0)
        length = skb.len
        skb.copy_to(target)
        return length, self._sender(skb, peek)

    def _oldest(self) -> Skb | None:
        self._raise_error()
        if self._queue:
            return self._queue[0]
        if self._shutdown & SHUT_RD:
            return None
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _sender(self, skb: Skb, peek: bool) -> Address:
        peer = skb.peer
        assert isinstance(peer, tuple)
        if not peek:
            self._mib.UdpInDatagrams += 1
            self._queue.popleft()
            skb.free()
        return peer

    # -- state --

    @property
    def readable(self) -> bool:
        """Whether receiving would give something or raise at once (poll's POLLIN)."""
        return bool(self._queue or self._error or self._shutdown & SHUT_RD)

    @property
    def writable(self) -> bool:
        """Always: what cannot be sent is lost."""
        return True

    def notify(self, mask: int) -> None:
        """Remember what to tell the user at the next flush."""
        if not self.wake_mask:
            self._udp.schedule(self)
        self.wake_mask |= mask

    def fail(self, number: int) -> None:
        """Let the next call raise OSError with errno `number`, and wake the user."""
        self._error = number
        self.notify(READABLE | WRITABLE)

    @property
    def error(self) -> int:
        """The errno that waits to be reported; 0 for none."""
        return self._error

    def take_error(self) -> int:
        """The errno that waits, which is thereby reported; 0 for none (SO_ERROR)."""
        number = self._error
        self._error = 0
        return number

    def _raise_error(self) -> None:
        if self._error:
            raise _error(self.take_error())
        if self.closed:
            raise _error(errno.EBADF)

    def shutdown(self, how: int) -> None:
        """Receive no more (SHUT_RD), send no more (SHUT_WR), or both. Raises OSError ENOTCONN on a socket that has no peer."""
        if self.remote is None:
            raise _error(errno.ENOTCONN)
        self._shutdown |= how
        self.notify(READABLE | WRITABLE)

    def close(self) -> None:
        """Give the port back and free what nobody received. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.wake = nobody
        if self.port:
            self._udp.release(self, self.port)
        while self._queue:
            self._queue.popleft().free()
