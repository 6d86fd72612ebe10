"""Mirrors: captured frames sent to another host, in the three ways that collectors and analysers understand.

* `erspan://HOST?session=1`: ERSPAN type II over GRE (draft-foschiano-erspan), what switches send. Needs CAP_NET_RAW.
* `tzsp://HOST:37008`: TaZmen Sniffer Protocol over UDP.
* `vxlan://HOST:4789?vni=1`: VXLAN (RFC 7348) over UDP.

The frames leave through the kernel's sockets, straight from the mapped packet memory. An encapsulation and a frame must fit one
IP packet, so the end of a super-frame is cut off; what does not fit the path's MTU is fragmented.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    Piece = bytes | memoryview

IPPROTO_GRE: Final = 47
TZSP_PORT: Final = 37008
VXLAN_PORT: Final = 4789

PACKET_MAX: Final = 65535 - 60
"""Bytes that fit an IPv4 packet with any header."""

IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DONT: Final = 0
"""Fragment what is too big, do not refuse it (ip(7)); the module `socket` of Python 3.11 knows neither."""

_GRE_ERSPAN: Final = Struct("!HHI")  # flags with S, protocol, sequence number (RFC 2890)
_ERSPAN: Final = Struct("!HHI")  # version and VLAN; COS, encapsulation, T and session; index
_GRE_S: Final = 0x1000
_ETH_P_ERSPAN: Final = 0x88BE
_ERSPAN_II: Final = 1 << 12
_ERSPAN_TRUNCATED: Final = 1 << 10
_TZSP: Final = bytes([1, 0, 0, 1, 1])  # version 1, received packet, Ethernet, and the tag that ends the tags
_VXLAN: Final = Struct("!II")
_VXLAN_I: Final = 0x08000000


class Mirror:
    """Where `uri` says. `sent` counts frames that the kernel took, `cut` those of them that were too long, `lost` those that it
    refused.

    Raises ValueError for a URI that is none of the three, OSError when the host is unknown or the socket is not permitted.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self._scheme = parts.scheme
        default = {"erspan": 0, "tzsp": TZSP_PORT, "vxlan": VXLAN_PORT}.get(parts.scheme)
        if default is None or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"{uri}: allowed are erspan://HOST?session=N, tzsp://HOST:PORT and vxlan://HOST:PORT?vni=N")
        options = parse_qs(parts.query, keep_blank_values=True)
        self._number = 0
        key, largest = {"erspan": ("session", 1023), "vxlan": ("vni", (1 << 24) - 1)}.get(parts.scheme, ("", 0))
        if key:
            self._number = _number(uri, key, options.pop(key, ["1"])[-1], largest)
        if options or (parts.scheme == "erspan" and parts.port is not None):
            raise ValueError(f"{uri}: {parts.scheme} takes no {', '.join(options) or 'port'}")
        kind, protocol = (socket.SOCK_RAW, IPPROTO_GRE) if parts.scheme == "erspan" else (socket.SOCK_DGRAM, 0)
        port = (default if parts.port is None else parts.port) or None  # a raw socket has none
        self._address: Any
        family, _, _, _, self._address = socket.getaddrinfo(parts.hostname, port, type=kind, proto=protocol)[0]
        try:
            self._socket = socket.socket(family, kind, protocol)
        except PermissionError:
            raise PermissionError(errno.EPERM, f"{uri}: ERSPAN needs a raw socket, and so CAP_NET_RAW") from None
        if family == socket.AF_INET:
            self._socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        self.sent = 0
        self.cut = 0
        self.lost = 0

    def send(self, pieces: Sequence[Piece], length: int) -> None:
        """Send a frame of `length` bytes, of which `pieces` were captured."""
        room = PACKET_MAX - 16
        captured = sum(map(len, pieces))
        if captured > room:
            pieces = _first(pieces, room)
            captured = room
        header = self._header(captured < length)
        try:
            self._socket.sendmsg([header, *pieces], [], 0, self._address)
        except OSError:
            self.lost += 1
            return
        self.sent += 1
        self.cut += captured < length

    def _header(self, truncated: bool) -> bytes:
        if self._scheme == "tzsp":
            return _TZSP
        if self._scheme == "vxlan":
            return _VXLAN.pack(_VXLAN_I, self._number << 8)
        session = self._number | (_ERSPAN_TRUNCATED if truncated else 0)
        sequence = (self.sent + self.lost) & 0xFFFFFFFF
        return _GRE_ERSPAN.pack(_GRE_S, _ETH_P_ERSPAN, sequence) + _ERSPAN.pack(_ERSPAN_II, session, 0)

    def is_own(self, frame: bytes) -> bool:
        """Whether `frame` is what a mirror sent: it comes by here when the way to its host leads through the stack, and
        mirroring it would never end.
        """
        if self._socket.family != socket.AF_INET or frame[12:14] != b"\x08\x00":
            return False
        if frame[30:34] != socket.inet_aton(self._address[0]):
            return False
        if self._scheme == "erspan":
            return frame[23] == IPPROTO_GRE
        return frame[23] == socket.IPPROTO_UDP and frame[36:38] == self._address[1].to_bytes(2, "big")

    def close(self) -> None:
        """Send no more."""
        self._socket.close()


def _number(uri: str, key: str, value: str, largest: int) -> int:
    if not value.isascii() or not value.isdigit() or int(value) > largest:
        raise ValueError(f"{uri}: {key} is a number from 0 to {largest}, not {value!r}")
    return int(value)


def _first(pieces: Sequence[Piece], length: int) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        found.append(piece[:length])
        length -= len(found[-1])
    return found


def reason_of(error: OSError) -> str:
    """What went wrong, in words."""
    return error.strerror or os.strerror(error.errno or errno.EIO)
