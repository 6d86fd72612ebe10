"""NBD URIs: where a server is and which export to use.

Source: NetworkBlockDevice/nbd, doc/uri.md. All four schemes are understood, including the TLS parameters; whether TLS can be
had is for the client to say. Query parameters that nobody knows are diagnosed, except experimental ones (`x-...`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes, urlsplit

from ustack.nbd.constants import MAX_STRING, NBD_DEFAULT_PORT

SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_TLS_TYPES: Final = ("anon", "x509", "psk")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """A parsed NBD URI. `socket` is a path (or an abstract name that starts with NUL) for the +unix schemes and None for TCP,
    where `host` and `port` count. `str()` gives the URI back, percent-encoded."""

    scheme: str = "nbd"
    host: str = "localhost"
    port: int = NBD_DEFAULT_PORT
    export: str = ""
    socket: str | None = None
    username: str | None = None
    tls_type: str | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool = True
    tls_certificates: str | None = None
    tls_psk_file: str | None = None

    @property
    def tls(self) -> bool:
        """TLS is demanded (nbds, nbds+unix): a connection without it must fail."""
        return self.scheme.startswith("nbds")

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Parse a URI; raises ValueError that quotes it and says what is wrong."""
        try:
            return _parse(text)
        except ValueError as error:
            raise ValueError(f"NBD URI {text!r}: {error}") from None

    def __str__(self) -> str:
        user = f"{quote(self.username, safe='')}@" if self.username is not None else ""
        query = []
        if self.socket is not None:
            authority = user
            query.append(f"socket={quote(self.socket)}")
        else:
            host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else quote(self.host)
            authority = f"{user}{host}" + (f":{self.port}" if self.port != NBD_DEFAULT_PORT else "")
        if self.tls_type is not None:
            query.append(f"tls-type={self.tls_type}")
        if self.tls_hostname is not None:
            query.append(f"tls-hostname={quote(self.tls_hostname, safe='')}")
        if not self.tls_verify_peer:
            query.append("tls-verify-peer=0")
        if self.tls_certificates is not None:
            query.append(f"tls-certificates={quote(self.tls_certificates)}")
        if self.tls_psk_file is not None:
            query.append(f"tls-psk-file={quote(self.tls_psk_file)}")
        return f"{self.scheme}://{authority}/{quote(self.export)}" + (f"?{'&'.join(query)}" if query else "")


def _parse(text: str) -> NbdUri:
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in text):
        raise ValueError("contains spaces or control characters; write them as %20 and so on")
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"scheme is {parts.scheme!r}; it must be one of {', '.join(SCHEMES)}")
    if parts.fragment:
        raise ValueError("has a fragment (#...), which means nothing here; write # as %23")
    if not text[len(parts.scheme) + 1 :].startswith("//"):
        raise ValueError(f"has no // after {parts.scheme}:")
    parameters = _parameters(parts.query)
    socket = parameters.pop("socket", None)
    if parts.scheme.endswith("+unix"):
        if not socket:
            raise ValueError("has no socket parameter, as in nbd+unix:///?socket=/run/nbd.sock")
        if parts.hostname or parts.port:
            raise ValueError("names a host, but a unix socket has none; an export named so is written after a third slash")
    elif socket is not None:
        raise ValueError(f"has a socket parameter; the scheme for unix sockets is {parts.scheme}+unix")
    tls_type = parameters.pop("tls-type", None)
    if tls_type is not None and tls_type not in _TLS_TYPES:
        raise ValueError(f"tls-type is {tls_type!r}; it must be one of {', '.join(_TLS_TYPES)}")
    tls_hostname = parameters.pop("tls-hostname", None)
    verify = parameters.pop("tls-verify-peer", "1")
    if verify not in ("0", "1"):
        raise ValueError(f"tls-verify-peer is {verify!r}; it must be 0 or 1")
    certificates = parameters.pop("tls-certificates", None)
    psk_file = parameters.pop("tls-psk-file", None)
    unknown = [name for name in parameters if not name.startswith("x-")]
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0]!r}")
    export = _decode(parts.path[1:])
    if "\0" in export or len(export.encode()) > MAX_STRING:
        raise ValueError(f"an export name has at most {MAX_STRING} bytes and no NUL")
    port = NBD_DEFAULT_PORT if parts.port is None else parts.port
    if not port:
        raise ValueError("port 0 is no port")
    return NbdUri(
        scheme=parts.scheme,
        host=_decode(parts.hostname) if parts.hostname else "localhost",
        port=port,
        export=export,
        socket=socket,
        username=None if parts.username is None else _decode(parts.username),
        tls_type=tls_type,
        tls_hostname=tls_hostname,
        tls_verify_peer=verify == "1",
        tls_certificates=certificates,
        tls_psk_file=psk_file,
    )


def _parameters(query: str) -> dict[str, str]:
    # Not parse_qsl: in a URI, unlike in a web form, "+" is a plus.
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        name = _decode(name)
        if not equals:
            raise ValueError(f"parameter {name!r} has no value")
        if name in found:
            raise ValueError(f"parameter {name!r} is given twice")
        found[name] = _decode(value)
    return found


def _decode(text: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{text!r} is not UTF-8 once decoded") from None
