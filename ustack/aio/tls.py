"""TLS over our streams: asyncio's own TLS protocol between a transport of ours and the user's protocol.

`asyncio.sslproto` does no I/O. It is what asyncio's selector loops use over the kernel's sockets, so contexts, host-name
checks, time-outs, errors and the closing handshake are those that programs know.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable


class TlsOptions:
    """What the user asked of TLS: `context`, and `server_hostname` (the name to check; "" checks none), times in seconds.

    Raises TypeError for a context that is none, ValueError for a client that names nobody.
    """

    __slots__ = ("context", "handshake_timeout", "server_hostname", "server_side", "shutdown_timeout")

    def __init__(
        self,
        context: ssl.SSLContext | bool,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        handshake_timeout: int | None = None,
        shutdown_timeout: int | None = None,
    ) -> None:
        if context is True and not server_side:
            context = ssl.create_default_context()
        if not isinstance(context, ssl.SSLContext):
            raise TypeError(f"sslcontext is expected to be an instance of ssl.SSLContext, got {context!r}")
        if not server_side and server_hostname is None:
            raise ValueError("server_hostname is needed to check the peer; it may be empty for a context that checks none")
        self.context = context
        self.server_side = server_side
        self.server_hostname = server_hostname or None
        self.handshake_timeout = handshake_timeout
        self.shutdown_timeout = shutdown_timeout


def tls_protocol(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.BaseProtocol,
    options: TlsOptions,
    made: asyncio.Future[Any] | None = None,
    *,
    call_connection_made: bool = True,
) -> SSLProtocol:
    """The protocol to give to a transport so that `protocol` gets a TLS transport when the handshake is done. `made` is told of
    that, or of the error that prevented it.
    """
    return SSLProtocol(
        loop,
        protocol,
        options.context,
        made,  # type: ignore[arg-type]  # None is what a server of asyncio's gives
        options.server_side,
        options.server_hostname,
        call_connection_made=call_connection_made,
        ssl_handshake_timeout=options.handshake_timeout,
        ssl_shutdown_timeout=options.shutdown_timeout,
    )


async def handshake(
    protocol: asyncio.BaseProtocol,
    options: TlsOptions,
    start: Callable[[SSLProtocol], asyncio.Transport],
    *,
    call_connection_made: bool = True,
) -> asyncio.Transport:
    """Make the handshake over the transport that `start` gives to a TLS protocol; return the TLS transport.

    Raises what the handshake does: ssl.SSLError, ssl.SSLCertVerificationError, ConnectionError, TimeoutError. The transport is
    closed then.
    """
    loop = asyncio.get_running_loop()
    made = loop.create_future()
    secured = tls_protocol(loop, protocol, options, made, call_connection_made=call_connection_made)
    transport = start(secured)
    try:
        await made
    except BaseException:
        transport.close()
        raise
    return cast("asyncio.Transport", secured._app_transport)


async def start_tls(
    transport: asyncio.Transport,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: int | None = None,
    ssl_shutdown_timeout: int | None = None,
) -> asyncio.Transport:
    """Go over to TLS on a connection in use (`loop.start_tls`): returns the transport that `protocol` writes to from now on.

    What the peer has sent in the clear and the protocol has not taken yet is taken for its part of the handshake, which then
    fails: nothing can be slipped in.
    """
    options = TlsOptions(
        context,
        server_side=server_side,
        server_hostname="" if server_hostname is None else server_hostname,
        handshake_timeout=ssl_handshake_timeout,
        shutdown_timeout=ssl_shutdown_timeout,
    )

    def start(secured: SSLProtocol) -> asyncio.Transport:
        transport.set_protocol(secured)
        asyncio.get_running_loop().call_soon(secured.connection_made, transport)
        asyncio.get_running_loop().call_soon(transport.resume_reading)
        return transport

    transport.pause_reading()
    return await handshake(protocol, options, start, call_connection_made=False)
