"""Socket options: how each is set and read, under the names and with the meanings of socket(7), tcp(7) and ip(7)."""

from __future__ import annotations

import errno
import os
import socket as names
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ustack.mem.socket import SOCK_MIN_SNDBUF
from ustack.net.path import HOPS_DEFAULT, PMTUDISC_DONT, PMTUDISC_PROBE
from ustack.transport.tcp.congestion import CONTROLS
from ustack.transport.tcp.fastopen import CLIENT
from ustack.transport.tcp.output import ACK_NONE, QUICK_ACKS, TAIL_BY_OPTIONS, TAIL_SENT, push, send_ack
from ustack.transport.tcp.pacing import update as update_pacing
from ustack.transport.tcp.states import State
from ustack.transport.tcp.timers import start_keepalive

if TYPE_CHECKING:
    from ustack.socket import Socket
    from ustack.transport.tcp.config import TcpConfig

SOCK_MIN_RCVBUF: Final = 2304
"""Bytes below which no receive limit goes."""

CA_NAME_MAX: Final = 16
"""Bytes of a congestion control's name (TCP_CA_NAME_MAX)."""

UNLIMITED_32: Final = (1 << 32) - 1
UNLIMITED_64: Final = (1 << 64) - 1
"""What SO_MAX_PACING_RATE takes for no limit."""

INFO_FIELDS: Final = (
    *(f"tcpi_{name}" for name in ("state", "ca_state", "retransmits", "probes", "backoff", "options")),
    *(f"tcpi_{name}" for name in ("wscales", "delivery_rate_app_limited", "rto", "ato", "snd_mss", "rcv_mss", "unacked")),
    *(f"tcpi_{name}" for name in ("sacked", "lost", "retrans", "fackets", "last_data_sent", "last_ack_sent")),
    *(f"tcpi_{name}" for name in ("last_data_recv", "last_ack_recv", "pmtu", "rcv_ssthresh", "rtt", "rttvar")),
    *(f"tcpi_{name}" for name in ("snd_ssthresh", "snd_cwnd", "advmss", "reordering", "rcv_rtt", "rcv_space")),
    "tcpi_total_retrans",
)
_INFO: Final = struct.Struct("=8B24I")

_LINGER: Final = struct.Struct("ii")

TCP_INQ: Final = 36
"""An option, and the control message that it asks for, by their number in linux/tcp.h; the socket module has no name for it."""

SO_MAX_PACING_RATE: Final = 47
"""Its number in asm-generic/socket.h."""

TCP_FASTOPEN_CONNECT: Final = 30
"""Another such option."""

FIN_TIMEOUT_MAX: Final = 120
"""Seconds of TCP_LINGER2 from which on a closed connection waits for no FIN at all (tcp(7))."""

IP_MTU_DISCOVER: Final = 10
IP_MTU: Final = 14
IPV6_MTU_DISCOVER: Final = 23
IPV6_MTU: Final = 24
"""Options of linux/in.h and linux/in6.h that the socket module has no names for."""

Setter = Callable[["Socket", int, int | bytes], None]
Getter = Callable[["Socket"], int | bytes]


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _number(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    if len(value) == 1:
        return value[0]  # as ip(7) has it
    if len(value) < 4:
        raise _error(errno.EINVAL)
    return int.from_bytes(value[:4], "little", signed=True)


def _set_flag(sock: Socket, name: str, value: int | bytes) -> None:
    setattr(sock.options, name, _number(value) != 0)


def _set_within(sock: Socket, name: str, value: int | bytes, least: int, most: int, unit: float = 1) -> None:
    number = _number(value)
    if not least <= number <= most:
        raise _error(errno.EINVAL)
    setattr(sock.options, name, number * unit if unit != 1 else number)


def _set_buffer(sock: Socket, name: str, least: int, value: int | bytes) -> None:
    """The kernel doubles what is asked for, to allow for truesize, and refuses nothing (socket(7))."""
    limit = max(min(max(_number(value), 0), 1 << 30) * 2, least)
    setattr(sock.options, name, limit)
    if sock.stream is not None:
        setattr(sock.stream, name, limit)


def _set_linger(sock: Socket, _option: int, value: int | bytes) -> None:
    if isinstance(value, int) or len(value) < _LINGER.size:
        raise _error(errno.EINVAL)
    on, seconds = _LINGER.unpack_from(value)
    sock.options.linger = seconds if on else -1


def _set_keepalive(sock: Socket, _option: int, value: int | bytes) -> None:
    sock.options.keepalive = _number(value) != 0
    if sock.stream is not None and sock.stream.synchronized:
        start_keepalive(sock.stream)


def _set_keepalive_time(sock: Socket, option: int, value: int | bytes) -> None:
    _set_within(sock, "keepidle" if option == names.TCP_KEEPIDLE else "keepintvl", value, 1, 32767, 1.0)
    if sock.stream is not None and sock.stream.synchronized and sock.options.keepalive:
        start_keepalive(sock.stream)


def _set_nodelay(sock: Socket, option: int, value: int | bytes) -> None:
    _set_flag(sock, "nodelay" if option == names.TCP_NODELAY else "cork", value)
    if sock.stream is not None:
        sock.host.tick()
        push(sock.stream, TAIL_SENT if sock.options.nodelay and option == names.TCP_NODELAY else TAIL_BY_OPTIONS)


def _set_quickack(sock: Socket, _option: int, value: int | bytes) -> None:
    """Acknowledge at once, or by delay; not for ever, but until the traffic says otherwise (tcp(7))."""
    conn = sock.stream
    if conn is None:
        return
    number = _number(value)
    conn.pingpong = number == 0
    if number:
        conn.quick_acks = QUICK_ACKS
        if conn.ack_due != ACK_NONE:
            sock.host.tick()
            send_ack(conn)
        conn.pingpong = number & 1 == 0


def _set_window_clamp(sock: Socket, _option: int, value: int | bytes) -> None:
    number = _number(value)
    if number <= 0 and sock.stream is not None:
        raise _error(errno.EINVAL)
    sock.options.window_clamp = max(number, SOCK_MIN_RCVBUF // 2) if number > 0 else 0


def _set_linger2(sock: Socket, _option: int, value: int | bytes) -> None:
    seconds = _number(value)
    sock.options.linger2 = float(seconds) if 0 <= seconds <= FIN_TIMEOUT_MAX else -1.0


def _set_defer_accept(sock: Socket, _option: int, value: int | bytes) -> None:
    """Seconds, kept as the timeouts of a SYN-ACK that they take (secs_to_retrans)."""
    config = sock.host.tcp.config
    seconds = _number(value)
    timeouts = 0
    while timeouts < 255 and _seconds_of(timeouts, config) < seconds:
        timeouts += 1
    sock.options.defer_accept = timeouts


def _seconds_of(timeouts: int, config: TcpConfig) -> int:
    """The seconds that so many timeouts of a SYN-ACK take (retrans_to_secs)."""
    return int(sum(min(config.initial_rto * 2**each, config.rto_max) for each in range(timeouts)))


def _set_fastopen_connect(sock: Socket, _option: int, value: int | bytes) -> None:
    if not sock.host.tcp.config.fastopen & CLIENT:
        raise _error(errno.EOPNOTSUPP)
    if sock.stream is not None:
        raise _error(errno.EINVAL)
    _set_within(sock, "fastopen_connect", value, 0, 1)


def _set_notsent_lowat(sock: Socket, _option: int, value: int | bytes) -> None:
    sock.options.notsent_lowat = min(_number(value) & 0xFFFFFFFF, 0x7FFFFFFF)


def _set_rcvlowat(sock: Socket, _option: int, value: int | bytes) -> None:
    """As much as the limit could ever hold, at most; where autotuning is on, the limit is made to fit (tcp_set_rcvlowat)."""
    number = _number(value)
    conn = sock.stream
    config = sock.host.tcp.config
    most = (sock.options.rcvbuf or config.rmem_max) >> 1
    sock.options.rcvlowat = lowat = min(number if number >= 0 else 0x7FFFFFFF, most) or 1
    if conn is not None and not sock.options.rcvbuf and conn.rcvbuf < 2 * lowat:
        conn.rcvbuf = 2 * lowat


def _set_congestion(sock: Socket, _option: int, value: int | bytes) -> None:
    if isinstance(value, int):
        raise _error(errno.EINVAL)
    name = bytes(value).split(b"\0", 1)[0].decode("ascii", "replace")
    if name not in CONTROLS:
        raise _error(errno.ENOENT)
    sock.options.congestion = name
    if sock.stream is not None:
        sock.stream.set_congestion(name)


def _get_congestion(sock: Socket) -> bytes:
    name = sock.stream.cc.name if sock.stream is not None else sock.options.congestion or sock.host.tcp.config.congestion
    return CONTROLS[name].name.encode().ljust(CA_NAME_MAX, b"\0")


def _set_max_pacing_rate(sock: Socket, _option: int, value: int | bytes) -> None:
    number = _unsigned(value)
    sock.options.max_pacing_rate = 0 if number in (UNLIMITED_32, UNLIMITED_64) else max(number, 1)
    if sock.stream is not None:
        update_pacing(sock.stream)


def _unsigned(value: int | bytes) -> int:
    """A number of 4 or 8 bytes."""
    if isinstance(value, int):
        return value & UNLIMITED_64
    if len(value) < 4:
        raise _error(errno.EINVAL)
    return int.from_bytes(value[: 8 if len(value) >= 8 else 4], "little")


def _get_info(sock: Socket) -> bytes:
    """As much of struct tcp_info as programs look at: the layout of linux/tcp.h up to tcpi_total_retrans."""
    info = sock.tcp_info() if sock.stream is not None else {"tcpi_state": int(State.CLOSE)}
    return _INFO.pack(*(int(info.get(name, 0)) for name in INFO_FIELDS))


def _ipv6(sock: Socket, value: int) -> int:
    """`value`, of a socket that knows IPv6. Raises OSError ENOPROTOOPT for another."""
    if sock.family != names.AF_INET6:
        raise _error(errno.ENOPROTOOPT)
    return value


def _set_v6only(sock: Socket, _option: int, value: int | bytes) -> None:
    sock.set_v6only(_ipv6(sock, _number(value)) != 0)


def _set_hops(sock: Socket, _option: int, value: int | bytes) -> None:
    """-1 is what the path says, as for IPV6_TCLASS (ipv6(7))."""
    hops = _ipv6(sock, _number(value))
    if not -1 <= hops <= 255:
        raise _error(errno.EINVAL)
    sock.options.ttl = max(hops, 0)


def _set_tclass(sock: Socket, _option: int, value: int | bytes) -> None:
    tclass = _ipv6(sock, _number(value))
    if not -1 <= tclass <= 255:
        raise _error(errno.EINVAL)
    sock.options.tos = max(tclass, 0)


def _set_mtu_discover6(sock: Socket, _option: int, value: int | bytes) -> None:
    _set_within(sock, "pmtudisc", _ipv6(sock, _number(value)), PMTUDISC_DONT, PMTUDISC_PROBE)


def _get_linger(sock: Socket) -> bytes:
    seconds = sock.options.linger
    return _LINGER.pack(seconds >= 0, max(seconds, 0))


def _get_rcvbuf(sock: Socket) -> int:
    if sock.stream is not None:
        return sock.stream.rcvbuf
    config = sock.host.tcp.config if sock.datagram is None else sock.host.udp.config
    return sock.options.rcvbuf or config.rmem_default


def _get_sndbuf(sock: Socket) -> int:
    if sock.stream is not None:
        return sock.stream.sndbuf
    config = sock.host.tcp.config if sock.datagram is None else sock.host.udp.config
    return sock.options.sndbuf or config.wmem_default


def _get_mtu(sock: Socket) -> int:
    """The path MTU of a connected socket, in bytes (ip(7))."""
    if sock.stream is not None:
        return sock.stream.path.mtu
    mtu = None if sock.datagram is None else sock.datagram.path_mtu
    if mtu is None:
        raise _error(errno.ENOTCONN)
    return mtu


SETTERS: Final[dict[tuple[int, int], Setter]] = {
    (names.SOL_SOCKET, names.SO_RCVBUF): lambda sock, _, value: _set_buffer(sock, "rcvbuf", SOCK_MIN_RCVBUF, value),
    (names.SOL_SOCKET, names.SO_SNDBUF): lambda sock, _, value: _set_buffer(sock, "sndbuf", SOCK_MIN_SNDBUF, value),
    (names.SOL_SOCKET, names.SO_REUSEADDR): lambda sock, _, value: _set_flag(sock, "reuseaddr", value),
    (names.SOL_SOCKET, names.SO_REUSEPORT): lambda sock, _, value: _set_flag(sock, "reuseport", value),
    (names.SOL_SOCKET, names.SO_BROADCAST): lambda sock, _, value: _set_flag(sock, "broadcast", value),
    (names.SOL_SOCKET, names.SO_KEEPALIVE): _set_keepalive,
    (names.SOL_SOCKET, names.SO_LINGER): _set_linger,
    (names.SOL_SOCKET, names.SO_RCVLOWAT): _set_rcvlowat,
    (names.SOL_SOCKET, SO_MAX_PACING_RATE): _set_max_pacing_rate,
    (names.IPPROTO_TCP, names.TCP_CONGESTION): _set_congestion,
    (names.IPPROTO_TCP, names.TCP_NODELAY): _set_nodelay,
    (names.IPPROTO_TCP, names.TCP_CORK): _set_nodelay,
    (names.IPPROTO_TCP, names.TCP_MAXSEG): lambda sock, _, value: _set_within(sock, "maxseg", value, 88, 32767),
    (names.IPPROTO_TCP, names.TCP_QUICKACK): _set_quickack,
    (names.IPPROTO_TCP, names.TCP_DEFER_ACCEPT): _set_defer_accept,
    (names.IPPROTO_TCP, names.TCP_WINDOW_CLAMP): _set_window_clamp,
    (names.IPPROTO_TCP, names.TCP_LINGER2): _set_linger2,
    (names.IPPROTO_TCP, names.TCP_NOTSENT_LOWAT): _set_notsent_lowat,
    (names.IPPROTO_TCP, names.TCP_FASTOPEN): lambda sock, _, value: _set_within(sock, "fastopen", value, 0, 0x7FFFFFFF),
    (names.IPPROTO_TCP, TCP_FASTOPEN_CONNECT): _set_fastopen_connect,
    (names.IPPROTO_TCP, TCP_INQ): lambda sock, _, value: _set_within(sock, "inq", value, 0, 1),
    (names.IPPROTO_TCP, names.TCP_KEEPIDLE): _set_keepalive_time,
    (names.IPPROTO_TCP, names.TCP_KEEPINTVL): _set_keepalive_time,
    (names.IPPROTO_TCP, names.TCP_KEEPCNT): lambda sock, _, value: _set_within(sock, "keepcnt", value, 1, 127),
    (names.IPPROTO_TCP, names.TCP_SYNCNT): lambda sock, _, value: _set_within(sock, "syncnt", value, 1, 127),
    (names.IPPROTO_TCP, names.TCP_USER_TIMEOUT): lambda sock, _, value: _set_within(
        sock, "user_timeout", value, 0, 0x7FFFFFFF, 0.001
    ),
    (names.IPPROTO_IP, names.IP_TOS): lambda sock, _, value: _set_within(sock, "tos", value, 0, 255),
    (names.IPPROTO_IP, names.IP_TTL): lambda sock, _, value: _set_within(sock, "ttl", value, 1, 255),
    (names.IPPROTO_IP, IP_MTU_DISCOVER): lambda sock, _, value: _set_within(
        sock, "pmtudisc", value, PMTUDISC_DONT, PMTUDISC_PROBE
    ),
    (names.IPPROTO_IPV6, names.IPV6_V6ONLY): _set_v6only,
    (names.IPPROTO_IPV6, names.IPV6_UNICAST_HOPS): _set_hops,
    (names.IPPROTO_IPV6, names.IPV6_TCLASS): _set_tclass,
    (names.IPPROTO_IPV6, IPV6_MTU_DISCOVER): _set_mtu_discover6,
}

GETTERS: Final[dict[tuple[int, int], Getter]] = {
    (names.SOL_SOCKET, names.SO_ERROR): lambda sock: sock.take_error(),
    (names.SOL_SOCKET, names.SO_TYPE): lambda sock: sock.type,
    (names.SOL_SOCKET, names.SO_DOMAIN): lambda sock: sock.family,
    (names.SOL_SOCKET, names.SO_PROTOCOL): lambda sock: names.IPPROTO_TCP if sock.datagram is None else names.IPPROTO_UDP,
    (names.SOL_SOCKET, names.SO_ACCEPTCONN): lambda sock: int(sock._listener is not None),
    (names.SOL_SOCKET, names.SO_RCVBUF): _get_rcvbuf,
    (names.SOL_SOCKET, names.SO_SNDBUF): _get_sndbuf,
    (names.SOL_SOCKET, names.SO_REUSEADDR): lambda sock: int(sock.options.reuseaddr),
    (names.SOL_SOCKET, names.SO_REUSEPORT): lambda sock: int(sock.options.reuseport),
    (names.SOL_SOCKET, names.SO_BROADCAST): lambda sock: int(sock.options.broadcast),
    (names.SOL_SOCKET, names.SO_KEEPALIVE): lambda sock: int(sock.options.keepalive),
    (names.SOL_SOCKET, names.SO_LINGER): _get_linger,
    (names.SOL_SOCKET, names.SO_RCVLOWAT): lambda sock: sock.options.rcvlowat,
    (names.SOL_SOCKET, names.SO_SNDLOWAT): lambda sock: 1,
    (names.SOL_SOCKET, SO_MAX_PACING_RATE): lambda sock: (sock.options.max_pacing_rate or UNLIMITED_64).to_bytes(8, "little"),
    (names.IPPROTO_TCP, names.TCP_CONGESTION): _get_congestion,
    (names.IPPROTO_TCP, names.TCP_INFO): _get_info,
    (names.IPPROTO_TCP, names.TCP_NODELAY): lambda sock: int(sock.options.nodelay),
    (names.IPPROTO_TCP, names.TCP_CORK): lambda sock: int(sock.options.cork),
    (names.IPPROTO_TCP, names.TCP_MAXSEG): lambda sock: sock.stream.mss if sock.stream else sock.options.maxseg or 536,
    (names.IPPROTO_TCP, names.TCP_QUICKACK): lambda sock: int(sock.stream is None or not sock.stream.pingpong),
    (names.IPPROTO_TCP, names.TCP_DEFER_ACCEPT): lambda sock: _seconds_of(sock.options.defer_accept, sock.host.tcp.config),
    (names.IPPROTO_TCP, names.TCP_WINDOW_CLAMP): lambda sock: sock.options.window_clamp,
    (names.IPPROTO_TCP, names.TCP_LINGER2): lambda sock: int(sock.options.linger2 or sock.host.tcp.config.fin_timeout),
    (names.IPPROTO_TCP, names.TCP_NOTSENT_LOWAT): lambda sock: sock.options.notsent_lowat,
    (names.IPPROTO_TCP, names.TCP_FASTOPEN): lambda sock: sock.options.fastopen,
    (names.IPPROTO_TCP, TCP_FASTOPEN_CONNECT): lambda sock: int(sock.options.fastopen_connect),
    (names.IPPROTO_TCP, TCP_INQ): lambda sock: int(sock.options.inq),
    (names.IPPROTO_TCP, names.TCP_KEEPIDLE): lambda sock: int(sock.options.keepidle or sock.host.tcp.config.keepalive_time),
    (names.IPPROTO_TCP, names.TCP_KEEPINTVL): lambda sock: int(sock.options.keepintvl or sock.host.tcp.config.keepalive_intvl),
    (names.IPPROTO_TCP, names.TCP_KEEPCNT): lambda sock: sock.options.keepcnt or sock.host.tcp.config.keepalive_probes,
    (names.IPPROTO_TCP, names.TCP_SYNCNT): lambda sock: sock.options.syncnt or sock.host.tcp.config.syn_retries,
    (names.IPPROTO_TCP, names.TCP_USER_TIMEOUT): lambda sock: round(sock.options.user_timeout * 1000),
    (names.IPPROTO_IP, names.IP_TOS): lambda sock: sock.options.tos,
    (names.IPPROTO_IPV6, names.IPV6_V6ONLY): lambda sock: _ipv6(sock, int(sock.options.v6only)),
    (names.IPPROTO_IPV6, names.IPV6_UNICAST_HOPS): lambda sock: _ipv6(sock, sock.options.ttl or HOPS_DEFAULT),
    (names.IPPROTO_IP, names.IP_TTL): lambda sock: sock.options.ttl or HOPS_DEFAULT,
    (names.IPPROTO_IP, IP_MTU_DISCOVER): lambda sock: sock.options.pmtudisc,
    (names.IPPROTO_IP, IP_MTU): _get_mtu,
    (names.IPPROTO_IPV6, names.IPV6_TCLASS): lambda sock: _ipv6(sock, sock.options.tos),
    (names.IPPROTO_IPV6, IPV6_MTU_DISCOVER): lambda sock: _ipv6(sock, sock.options.pmtudisc),
    (names.IPPROTO_IPV6, IPV6_MTU): lambda sock: _ipv6(sock, _get_mtu(sock)),
}
