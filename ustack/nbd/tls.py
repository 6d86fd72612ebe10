"""TLS inside of an NBD connection (NBD_OPT_STARTTLS), without I/O: over whatever transport there is, the kernel's or our own.

Certificates are laid out as libnbd and nbdkit have them: a directory with `ca-cert.pem`, and `client-cert.pem` with
`client-key.pem` where the server wants to know who we are. TLS 1.2 is the least. Source: doc/proto.md, "TLS support"; RFC 8446.
"""

from __future__ import annotations

import contextlib
import errno
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ustack.nbd.uri import NbdUri

RECEIVE_BUFFER: Final = 64 << 10
"""Bytes read at once: four records of the largest size."""


class TlsSettings(NamedTuple):
    """How to speak TLS with a server: the context, and the name that its certificate must have."""

    context: ssl.SSLContext
    hostname: str | None


def settings_for(uri: NbdUri, context: ssl.SSLContext | None = None) -> TlsSettings | None:
    """What `uri` asks for, or None when it asks for no TLS. `context` replaces what its parameters say of certificates.

    Raises OSError: EOPNOTSUPP for what this Python's ssl module cannot do, what reading certificates raises.
    """
    if not uri.tls:
        return None
    hostname = uri.tls_hostname or (uri.host if uri.socket is None else "localhost")
    if context is None:
        context = _psk_context(uri) if uri.tls_type == "psk" else _x509_context(uri)
    return TlsSettings(context, hostname)


def server_context(folder: str, *, verify_peer: bool = False) -> ssl.SSLContext:
    """What a server speaks TLS with: `server-cert.pem` and `server-key.pem` of a directory as nbdkit and qemu-nbd want it.

    With `verify_peer` clients need a certificate that `ca-cert.pem` has signed, and `ca-crl.pem`, where there is one, has not
    revoked. Raises OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    place = Path(folder)
    try:
        context.load_cert_chain(place / "server-cert.pem", place / "server-key.pem")
        if verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(place / "ca-cert.pem")
            if (place / "ca-crl.pem").exists():
                context.load_verify_locations(place / "ca-crl.pem")
                context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except OSError as error:
        raise OSError(error.errno, f"cannot load the certificates: {error.strerror or error}", folder) from None
    return context


def _x509_context(uri: NbdUri) -> ssl.SSLContext:
    if uri.tls_type == "anon":
        raise OSError(errno.EOPNOTSUPP, f"{uri}: anonymous TLS is no protection against anybody, and is not offered")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not uri.tls_verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if uri.tls_certificates is None:
        context.load_default_certs()
        return context
    folder = Path(uri.tls_certificates)
    try:
        context.load_verify_locations(folder / "ca-cert.pem")
        if (folder / "client-cert.pem").exists():
            context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    except OSError as error:
        raise OSError(error.errno, f"cannot load the certificates: {error.strerror or error}", str(folder)) from None
    return context


def _psk_context(uri: NbdUri) -> ssl.SSLContext:
    if not hasattr(ssl.SSLContext, "set_psk_client_callback"):
        raise OSError(errno.EOPNOTSUPP, f"{uri}: TLS with pre-shared keys needs Python 3.13 or newer")
    if uri.tls_psk_file is None:
        raise OSError(errno.EINVAL, f"{uri}: tls-type=psk needs tls-psk-file")
    username = uri.username or "nbd"
    key = _psk_key(uri.tls_psk_file, username)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key is the proof
    context.set_ciphers("PSK")
    setter: Any = getattr(context, "set_psk_client_callback")  # noqa: B009  (mypy's stubs are of this Python)
    setter(lambda _hint: (username, key))
    return context


def _psk_key(path: str, username: str) -> bytes:
    """The key of `username` in a file of `name:hex` lines, as psktool(1) makes them."""
    for line in Path(path).read_text().splitlines():
        name, colon, key = line.strip().partition(":")
        if colon and name == username:
            try:
                return bytes.fromhex(key)
            except ValueError:
                break
    raise OSError(errno.EACCES, f"no key for {username!r}", path)


class TlsTransport:
    """Stands between a connection and its `transport`: what is written is encrypted; `received` and `read_into` decrypt.

    What is written before the TLS handshake is over waits for its end. Raises ssl.SSLError where TLS fails.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "_plain", "_ready", "_transport", "buffer")

    def __init__(self, transport: Any, settings: TlsSettings, *, server_side: bool = False) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = settings.context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=settings.hostname
        )
        self._plain: list[bytes] = []
        self._ready = False
        self.buffer = memoryview(bytearray(RECEIVE_BUFFER))
        """Where the transport puts what it receives; follow with `received`."""
        self._handshake()

    @property
    def ready(self) -> bool:
        """The TLS handshake is over."""
        return self._ready

    def received(self, nbytes: int) -> None:
        """`nbytes` bytes of TLS records have arrived in `buffer`."""
        self._incoming.write(self.buffer[:nbytes])
        if not self._ready:
            self._handshake()

    def _handshake(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return
        finally:
            self._flush()
        self._ready = True
        plain, self._plain = self._plain, []
        self.writelines(plain)

    def read_into(self, view: bytearray | memoryview) -> int:
        """Put decrypted bytes into `view`; 0 when there are none for now, or no more will come."""
        if not self._ready:
            return 0
        try:
            got: Any = self._object.read(len(view), view)  # type: ignore[arg-type,unused-ignore]
            return int(got)  # with a buffer, the number of bytes in it
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return 0
        finally:
            self._flush()  # a key update is answered

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data`, encrypted."""
        self.writelines((data,))

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send all pieces, encrypted, in as few records as they fit."""
        if not self._ready:
            self._plain += (bytes(piece) for piece in pieces)
            return
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[self._object.write(view) :]
        self._flush()

    def close(self) -> None:
        """Say close_notify, so that the server knows that nothing was cut off, and close."""
        if self._ready:
            with contextlib.suppress(ssl.SSLError):  # the server's close_notify need not be waited for (RFC 8446, 6.1)
                self._object.unwrap()
            self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close without a word."""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Encrypted bytes that wait in the transport."""
        return int(self._transport.get_write_buffer_size())
