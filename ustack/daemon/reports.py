"""What a stack has to say about itself, as values that JSON can carry: the answers behind `ustack ss`, `nstat` and their like.

Sizes are bytes, times seconds. Names are those of the kernel's tools where these have one.
"""

from __future__ import annotations

import errno
from itertools import chain
from sys import maxsize
from typing import TYPE_CHECKING, Any

from pools.arena import PAGE_SHIFT
from ustack.net.addresses import text
from ustack.net.neighbour import STATE_NAMES
from ustack.transport.tcp.connection import Connection
from ustack.transport.tcp.info import tcp_info

if TYPE_CHECKING:
    from ustack.mem.protocol import ProtocolMemory
    from ustack.mem.socket import SocketMemory
    from ustack.net.interface import Interface
    from ustack.stack import Stack
    from ustack.transport.tcp.protocol import Tcp
    from ustack.transport.tcp.timewait import TimeWait


def nstat(stack: Stack) -> dict[str, dict[str, int]]:
    """All counters by name (`counters`), and the reasons for which packets were dropped (`drops`)."""
    return {"counters": stack.mib.as_dict(), "drops": stack.drops.by_name()}


def slabinfo(stack: Stack) -> str:
    """The pool's caches as /proc/slabinfo has them. Raises OSError EOPNOTSUPP for a pool without caches."""
    report = getattr(stack.pool, "slabinfo", None)
    if report is None:
        raise OSError(errno.EOPNOTSUPP, f"the pool {stack.pool.name} has no slabs")
    return str(report())


def memory(stack: Stack) -> dict[str, Any]:
    """Packet memory: pages and watermarks, who holds pages, who is charged for packets, what the pool made of it."""
    pages = stack.pages
    stats = stack.pool.stats
    lowest_free = pages.pages - pages.peak_used
    return {
        "size": pages.pages << PAGE_SHIFT,
        "free": pages.free_pages << PAGE_SHIFT,
        "peak_used": pages.peak_used << PAGE_SHIFT,
        "under_pressure": pages.under_pressure,
        "largest_free_order": pages.largest_free_order(),
        "by_owner": {name: count << PAGE_SHIFT for name, count in pages.pages_by_owner().items() if count},
        "charged": charges(stack),
        "captures": {
            "running": len(stack.sniffers),
            "limit": stack.sniffers.limit,
            "pinned": stack.sniffers.pinned,
            "missed": stack.sniffers.misses,
            "copied": stack.sniffers.copied,
            "referenced": stack.sniffers.referenced,
        },
        "zero_copy": _zero_copy(stack),
        "tcp": _tcp_memory(stack.tcp),
        "udp": _protocol_memory(stack.udp.mem),
        "reserve": {
            "size": pages.min_pages << PAGE_SHIFT,
            "free": min(pages.free_pages, pages.min_pages) << PAGE_SHIFT,
            "low_water": min(lowest_free, pages.min_pages) << PAGE_SHIFT,
            "allocations": pages.reserve_allocs,
            "memalloc_sockets": stack.reserve.sockets,
        },
        "pool": {
            "name": stack.pool.name,
            "held": stack.pool.held_pages() << PAGE_SHIFT,
            "requested": stats.requested,
            "requested_peak": stats.requested_peak,
            "charged": stats.charged,
            "charged_peak": stats.charged_peak,
            "allocations": stats.allocs,
            "frees": stats.frees,
            "failures": stats.failures,
        },
    }


def _protocol_memory(mem: ProtocolMemory) -> dict[str, Any]:
    """What all sockets of a protocol hold, in pages as everywhere in Linux, and the limits (tcp_mem, udp_mem)."""
    return {"inuse": mem.sockets, "mem": mem.allocated, "mem_peak": mem.peak, "limits": [mem.low, mem.pressure, mem.high]}


def _tcp_memory(tcp: Tcp) -> dict[str, Any]:
    """The line TCP of /proc/net/sockstat, and more."""
    connections = [each for each in tcp.connections.values() if isinstance(each, Connection)]
    return {
        **_protocol_memory(tcp.mem),
        "orphan": sum(each.orphan for each in connections),
        "tw": len(tcp.connections) - len(connections),
        "under_pressure": tcp.mem.under_pressure(),
    }


def _zero_copy(stack: Stack) -> dict[str, Any] | None:
    """What sockets have given away as pages, in bytes but for `pages` and the share; None where they may not."""
    flipper = stack.flipper
    if flipper is None:
        return None
    return {
        "policy": flipper.policy,
        "pages": flipper.pages,
        "in_place": flipper.in_place,
        "copied": flipper.copied,
        "moved": flipper.moved,
        "copied_share": flipper.copied_share,
    }


def charges(stack: Stack) -> dict[str, int]:
    """Truesize of the packets that wait, by the kind of queue that is charged for them."""
    found: dict[str, int] = {}
    for account in stack.accounts():
        found[account.name] = found.get(account.name, 0) + account.bytes
    return found


def devices(stack: Stack) -> list[dict[str, Any]]:
    """Each interface with its addresses, counters and neighbours."""
    found = []
    for interface in stack.interfaces:
        link = interface.device
        stats = link.stats
        found.append(
            {
                "name": link.name,
                "mac": link.mac.hex(":"),
                "mtu": link.mtu,
                "addresses": _addresses(interface),
                "stats": {name: getattr(stats, name) for name in dir(stats) if not name.startswith("_")},
                "neighbours": [
                    {
                        "address": _text(neighbour.address),
                        "lladdr": neighbour.lladdr.hex(":") if neighbour.lladdr else None,
                        "state": STATE_NAMES[neighbour.state],
                    }
                    for neighbour in chain(interface.neighbours, interface.inet6.neighbours if interface.inet6 else ())
                ],
            }
        )
    return found


def _addresses(interface: Interface) -> list[dict[str, str]]:
    """Each with its prefix length, and its state (RFC 4862, section 5.5.4); one of IPv4 is always preferred."""
    found = [{"address": f"{_text(own.address)}/{own.prefix_len}", "state": "preferred"} for own in interface.addresses]
    inet6 = interface.inet6
    if inet6 is not None:
        for each in inet6.addresses.values():
            found.append({"address": f"{_text(each.address[:16])}/{each.prefix_len}", "state": each.state})
        found += [{"address": _text(address[:16]), "state": "duplicate"} for address in inet6.failed]
    return found


def routes(stack: Stack) -> list[str]:
    """The routes of IPv4 and of IPv6, the most specific first."""
    return [str(route) for route in chain(stack.ip.routes, stack.ip6.routes)]


# -- sockets -----------------------------------------------------------------------------------------------------------------


def sockets(stack: Stack) -> list[dict[str, Any]]:
    """Every socket: listeners, connections (TIME-WAIT included), then UDP."""
    found: list[dict[str, Any]] = [
        {
            "protocol": "tcp",
            "state": "LISTEN",
            "recv_q": len(listener.queue),
            "send_q": listener.backlog,
            "local": [_text(listener.address), listener.port],
            "peer": None,
        }
        for listener in stack.tcp.listeners.values()
    ]
    found += [
        _connection(each) if isinstance(each, Connection) else _time_wait(each) for each in stack.tcp.connections.values()
    ]
    for each in stack.udp.sockets():
        host, port = each.local
        found.append(
            {
                "protocol": "udp",
                "state": "UNCONN" if each.remote is None else "ESTAB",
                "recv_q": each.account.bytes,
                "send_q": 0,
                "local": [_text(host), port],
                "peer": None if each.remote is None else [_text(each.remote[0]), each.remote[1]],
                "memory": _socket_memory(
                    each.charges, each.rcvbuf, each.options.sndbuf or stack.udp.config.wmem_default, each.options.memalloc
                ),
            }
        )
    return found


_STATES = {"ESTABLISHED": "ESTAB"}
"""Where `ss` shortens the name of a state; else it writes it with hyphens."""


def _connection(conn: Connection) -> dict[str, Any]:
    queues = conn.receive_queue
    ssthresh = conn.cc.ssthresh
    return {
        "protocol": "tcp",
        "state": _STATES.get(conn.state.name, conn.state.name.replace("_", "-")),
        "recv_q": max(conn.rcv_nxt - queues.copied_seq, 0) if conn.synchronized else 0,
        "send_q": max(conn.send_queue.end - conn.snd_una, 0) if conn.synchronized else 0,
        "local": [_text(conn.local[0]), conn.local[1]],
        "peer": [_text(conn.remote[0]), conn.remote[1]],
        "memory": _socket_memory(conn.charges, conn.rcvbuf, conn.sndbuf, conn.memalloc),
        "tcp": {
            "timestamps": conn.ts_ok,
            "sack": conn.sack_ok,
            "wscale": [conn.snd_wscale, conn.rcv_wscale],
            "rto": conn.rtt.rto,
            "rtt": conn.rtt.srtt,
            "rttvar": conn.rtt.rttvar,
            "minrtt": conn.rtt.minimum,
            "mss": conn.mss,
            "pmtu": conn.path.mtu,
            "cwnd": conn.cc.cwnd // max(conn.mss, 1),
            "ssthresh": None if ssthresh == maxsize else ssthresh // max(conn.mss, 1),
            "bytes_acked": max(conn.snd_una - conn.iss - 1, 0),
            "bytes_received": max(conn.rcv_nxt - conn.irs - 1, 0) if conn.synchronized else 0,
            "snd_wnd": conn.snd_wnd,
            "rcv_wnd": max(conn.rcv_adv - conn.rcv_nxt, 0),
            "backoff": conn.rtt.backoff_shift,
            "unacked": conn.snd_nxt - conn.snd_una,
            "lost": conn.inflight.lost,
            "info": tcp_info(conn),
        },
    }


def _socket_memory(charges: SocketMemory, rcvbuf: int, sndbuf: int, memalloc: bool) -> dict[str, Any]:
    """What `ss -m` shows (SK_MEMINFO). Nothing of a socket waits below it, there are no ancillary buffers and no backlog."""
    return {
        "rmem_alloc": charges.rmem_alloc,
        "rcvbuf": rcvbuf,
        "wmem_alloc": 0,
        "sndbuf": sndbuf,
        "fwd_alloc": charges.forward_alloc,
        "wmem_queued": charges.send.bytes,
        "optmem": 0,
        "backlog": 0,
        "drops": charges.drops,
        "memalloc": memalloc,
    }


def _time_wait(wait: TimeWait) -> dict[str, Any]:
    return {
        "protocol": "tcp",
        "state": "TIME-WAIT",
        "recv_q": 0,
        "send_q": 0,
        "local": [_text(wait.local[0]), wait.local[1]],
        "peer": [_text(wait.remote[0]), wait.remote[1]],
    }


def _text(address: bytes | None) -> str:
    """An address; "*" stands for all of ours, of both versions."""
    return "*" if address is None else text(address)
