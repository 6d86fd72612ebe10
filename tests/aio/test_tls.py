"""TLS over our streams, between two stacks in virtual time."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.sim.network import SERVER, Network
from ustack.lab.world import VirtualLoop
from ustack.link.simwire import Impairments

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.sim

NAME = "disk.example"
PAYLOAD = bytes(range(256)) * 2000


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who is trusted."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    """A server called NAME."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    return context


@pytest.fixture
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    """A client that trusts the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def network() -> Iterator[Network]:
    """Two stacks with a wire that loses a frame in a hundred."""
    network = Network(5, Impairments(delay=0.005, loss=0.01))
    yield network
    network.close()


def run(network: Network, story: Callable[[], Awaitable[None]]) -> None:
    """Run `story` in virtual time. Nothing may be complained about."""
    complaints: list[object] = []
    loop = VirtualLoop(network.world)
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def told() -> None:
        await story()
        await asyncio.sleep(1)

    loop.run_until_complete(told())
    loop.close()
    assert not complaints


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send everything back."""
    with suppress(ConnectionError, ssl.SSLError):
        while data := await reader.read(10_000):
            writer.write(data)
            await writer.drain()
    writer.close()


def test_data_goes_there_and_back(network: Network, server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    async def story() -> None:
        server = await network.server.start_server(echo, None, 443, ssl=server_context)
        reader, writer = await network.client.open_connection(SERVER, 443, ssl=client_context, server_hostname=NAME)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert writer.get_extra_info("peername") == (SERVER, 443)
        writer.write(PAYLOAD)
        assert await reader.readexactly(len(PAYLOAD)) == PAYLOAD
        writer.close()
        await writer.wait_closed()
        server.close()

    run(network, story)


def test_the_name_in_the_certificate_is_checked(
    network: Network, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def story() -> None:
        server = await network.server.start_server(echo, None, 443, ssl=server_context)
        with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)ip address mismatch|doesn't match"):
            await network.client.open_connection(SERVER, 443, ssl=client_context)
        server.close()

    run(network, story)


def test_who_signed_it_is_checked(network: Network, server_context: ssl.SSLContext) -> None:
    async def story() -> None:
        server = await network.server.start_server(echo, None, 443, ssl=server_context)
        with pytest.raises(ssl.SSLCertVerificationError):
            await network.client.open_connection(SERVER, 443, ssl=True, server_hostname=NAME)
        server.close()

    run(network, story)


def test_a_peer_that_says_nothing_is_given_up(network: Network, client_context: ssl.SSLContext) -> None:
    async def story() -> None:
        async def listen_and_say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                await reader.read()
            writer.close()

        server = await network.server.start_server(listen_and_say_nothing, None, 443)
        with pytest.raises(ConnectionAbortedError, match="handshake"):
            await network.client.open_connection(SERVER, 443, ssl=client_context, server_hostname=NAME, ssl_handshake_timeout=3)
        server.close()

    run(network, story)


def test_a_connection_in_use_goes_over_to_tls(
    network: Network, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def story() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"go\n")
            await writer.start_tls(server_context)
            writer.write(b"secret")
            assert await reader.read(100) == b"thanks"
            writer.close()

        server = await network.server.start_server(serve, None, 443)
        reader, writer = await network.client.open_connection(SERVER, 443)
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go\n"
        transport = writer.transport
        assert isinstance(transport, asyncio.Transport)
        secured = await network.client.start_tls(transport, transport.get_protocol(), client_context, server_hostname=NAME)
        assert await reader.readexactly(6) == b"secret"
        secured.write(b"thanks")
        assert await reader.read() == b""
        secured.close()
        writer.close()
        server.close()

    run(network, story)


def test_a_name_without_tls_makes_no_sense(network: Network) -> None:
    async def story() -> None:
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await network.client.open_connection(SERVER, 443, server_hostname=NAME)

    run(network, story)
