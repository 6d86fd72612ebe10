"""TLS at our server: with libnbd, qemu-img and our own client, with and without certificates of clients, and with those who try
to do without."""

from __future__ import annotations

import asyncio
import random
import ssl
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.nbd import wire
from tests.nbd.servers import MIB
from tests.nbd.test_interop import run
from tests.nbd.test_tls import certificates, secure
from tests.needs import require_tool
from ustack import nbd
from ustack.nbd.export import MemoryExport
from ustack.nbd.server import NbdServer
from ustack.nbd.server_handshake import TlsPolicy
from ustack.nbd.tls import server_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["certificates"]

STARTTLS = 5


@asynccontextmanager
async def serving(
    certificates: Path, folder: Path, policy: TlsPolicy = TlsPolicy.REQUIRE, *, verify_peer: bool = False
) -> AsyncIterator[str]:
    """Our server on a unix socket; gives its URI, without TLS in it."""
    server = NbdServer(
        [MemoryExport(8 * MIB, "disk")],
        tls=policy,
        tls_context=server_context(str(certificates), verify_peer=verify_peer),
    )
    try:
        await server.listen_unix(str(folder / "socket"))
        yield f"nbd+unix:///disk?socket={folder}/socket"
    finally:
        await server.close()


async def test_many_requests_of_all_sizes_go_through_tls(certificates: Path, tmp_path: Path) -> None:
    content = random.Random(31).randbytes(5 * MIB)
    async with (
        serving(certificates, tmp_path) as uri,
        nbd.connect(secure(uri, f"tls-certificates={certificates}")) as disk,
    ):
        assert disk.tls
        await disk.pwrite(content, 777)
        parts = await asyncio.gather(*(disk.pread(5000, 777 + 5000 * n) for n in range(200)))
        assert b"".join(parts) == content[:1_000_000]
        big = await asyncio.gather(*(disk.pread(5 * MIB, 777) for _ in range(4)))
        assert all(each == content for each in big)
        await asyncio.gather(*(disk.pwrite(content[n * 4096 : (n + 1) * 4096], n * 4096) for n in range(300)))
        assert await disk.pread(300 * 4096, 0) == content[: 300 * 4096]


async def test_a_client_that_takes_nothing_through_tls_is_not_read_from_and_later_gets_all(
    certificates: Path, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=str(certificates / "ca-cert.pem"))
    async with serving(certificates, tmp_path):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write(b"\0\0\0\x03" + wire.option(STARTTLS))
        await reader.readexactly(18 + 20)
        await writer.start_tls(context, server_hostname="localhost")
        writer.write(wire.option(wire.GO, wire.info_data("disk")))
        await reader.readexactly(32 + 20)
        writer.write(b"".join(wire.request(wire.READ, n, 0, MIB) for n in range(40)))
        for _ in range(20):
            await asyncio.sleep(0)
        for n in range(40):
            assert (await reader.readexactly(16 + MIB))[:16] == wire.simple(n)
        writer.close()


@pytest.mark.parametrize("policy", [TlsPolicy.REQUIRE, TlsPolicy.ON])
async def test_tls_is_there_for_who_asks_and_required_is_required(
    certificates: Path, tmp_path: Path, policy: TlsPolicy
) -> None:
    async with serving(certificates, tmp_path, policy) as uri:
        async with nbd.connect(secure(uri, f"tls-certificates={certificates}")) as disk:
            assert disk.tls
        if policy is TlsPolicy.ON:
            async with nbd.connect(uri) as disk:
                assert not disk.tls
        else:
            with pytest.raises(nbd.NbdOptionError, match="requires TLS"):
                async with nbd.connect(uri):
                    pass


async def test_clients_show_certificates_of_our_authority_or_go(certificates: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    (without / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    subprocess.run(
        [
            *(require_tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", "client-key.pem", "-out", "client-cert.pem", "-subj", "/CN=stranger", "-days", "2"),
        ],
        cwd=stranger,
        check=True,
        capture_output=True,
    )
    async with serving(certificates, tmp_path, verify_peer=True) as uri:
        for folder in (without, stranger):
            with pytest.raises(OSError, match=r"TLS|lost|closed|reset"):
                async with nbd.connect(secure(uri, f"tls-certificates={folder}"), dead_after=0) as disk:
                    await disk.pread(512, 0)
        async with nbd.connect(secure(uri, f"tls-certificates={certificates}")) as disk:
            assert await disk.pread(4, 0) == bytes(4)


@pytest.mark.parametrize("nonsense", [b"no TLS at all" * 10, b"\x16\x03\x01\xff\xff" + bytes(1000), b""])
async def test_nonsense_instead_of_tls_ends_the_connection_and_not_the_server(
    certificates: Path, tmp_path: Path, nonsense: bytes
) -> None:
    async with serving(certificates, tmp_path) as uri:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write(b"\0\0\0\x03" + wire.option(STARTTLS))
        await reader.readexactly(18 + 20)
        writer.write(nonsense)
        writer.write_eof()
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()
        async with nbd.connect(secure(uri, f"tls-certificates={certificates}")) as disk:
            assert disk.tls


async def test_old_versions_of_tls_are_no_tls(certificates: Path, tmp_path: Path) -> None:
    assert server_context(str(certificates)).minimum_version is ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError, match="cannot load the certificates"):
        server_context(str(tmp_path))
    with pytest.raises(ValueError, match="certificates"):
        NbdServer([MemoryExport(1)], tls=TlsPolicy.ON)


@pytest.mark.e2e
@pytest.mark.parametrize("verify_peer", [False, True])
async def test_libnbd_and_qemu_speak_tls_with_us(certificates: Path, tmp_path: Path, verify_peer: bool) -> None:
    content = random.Random(33).randbytes(8 * MIB)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    async with serving(certificates, tmp_path, verify_peer=verify_peer) as uri:
        front = secure(uri, f"tls-certificates={certificates}")
        assert "with TLS" in await run("nbdinfo", front)
        await run("nbdcopy", str(source), front)
        await run("nbdcopy", "-C1", front, str(target))
        assert target.read_bytes() == content
        await run("nbdinfo", uri, status=1)
        tls = ("--object", f"tls-creds-x509,id=t,endpoint=client,dir={certificates}")
        image = f"driver=nbd,server.type=unix,server.path={tmp_path}/socket,export=disk,tls-creds=t,tls-hostname=localhost"
        await run("qemu-img", "compare", *tls, "--image-opts", f"driver=raw,file.filename={source}", image)
