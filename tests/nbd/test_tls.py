"""TLS: with real servers, and with ones that try to get around it."""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nbd import wire
from tests.nbd.servers import MIB, scripted
from tests.nbd.test_interop import activated, free_port, nbdkit
from tests.needs import extended_qemu_nbd, require_tool
from ustack import nbd
from ustack.nbd.connection import Connection
from ustack.nbd.tls import TlsSettings, settings_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from tests.nbd.test_interop import Running

STARTTLS = 5


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as nbdkit and libnbd want it: an authority, a server named localhost, and a client."""
    folder = tmp_path_factory.mktemp("pki")

    def openssl(*arguments: str) -> None:
        subprocess.run([require_tool("openssl"), *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=authority", "-days", "2")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text("subjectAltName=DNS:localhost\n")
        signed = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}-cert.pem")
    return folder


def secure(uri: str, *parameters: str) -> str:
    return "&".join([uri.replace("nbd+unix:", "nbds+unix:"), *parameters])


@pytest.mark.e2e
@pytest.mark.parametrize("verify", [(), ("--tls-verify-peer",)])
async def test_a_disk_is_written_and_read_through_tls(certificates: Path, tmp_path: Path, verify: tuple[str, ...]) -> None:
    content = random.Random(5).randbytes(3 * MIB)
    arguments = ("--tls=require", f"--tls-certificates={certificates}", *verify, "memory", "4M")
    async with (
        nbdkit(tmp_path, *arguments) as (uri, _),
        nbd.connect(secure(uri, f"tls-certificates={certificates}")) as disk,
    ):
        assert disk.tls
        await disk.pwrite(content, 4096)
        parts = await asyncio.gather(*(disk.pread(4096, 4096 + 4096 * n) for n in range(100)))
        assert b"".join(parts) == content[:409600]
        assert await disk.pread(3 * MIB, 4096) == content
        listed = await nbd.list_exports(secure(uri, f"tls-certificates={certificates}"))
        assert listed[0].info is not None


@asynccontextmanager
async def nbd_server_with_tls(folder: Path, certificates: Path) -> AsyncIterator[Running]:
    """nbd-server, which speaks TLS only over TCP, and nothing else then."""
    port = free_port()
    generic = f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nforce_tls = true\ncacertfile = {certificates}/ca-cert.pem\n"
    files = f"certfile = {certificates}/server-cert.pem\nkeyfile = {certificates}/server-key.pem\n"
    (folder / "config").write_text(generic + files + f"[disk]\nexportname = {folder / 'image'}\nflush = true\n")
    server = subprocess.Popen([require_tool("nbd-server"), "-d", "-C", str(folder / "config")])
    try:
        async with asyncio.timeout(20):
            while not listens(port):
                assert server.poll() is None, "nbd-server has ended"
                await asyncio.sleep(0.02)
        yield f"nbds://127.0.0.1:{port}/disk", server
    finally:
        server.kill()
        server.wait()


def listens(port: int) -> bool:
    """Somebody listens there, as /proc tells: who connected to see would be the one client that nbd-server -d serves."""
    wanted = f"0100007F:{port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(line[1] == wanted and line[3] == "0A" for line in lines)


def qemu_nbd_with_tls(folder: Path, certificates: Path, program: str = "qemu-nbd") -> AbstractAsyncContextManager[Running]:
    """qemu-nbd, which checks our certificate too."""
    credentials = f"tls-creds-x509,id=t,dir={certificates},endpoint=server,verify-peer=on"
    image = str(folder / "image")
    return activated(folder, program, "-t", "-f", "raw", "--object", credentials, "--tls-creds", "t", image)


def newer_qemu_nbd_with_tls(folder: Path, certificates: Path) -> AbstractAsyncContextManager[Running]:
    """The one with extended headers."""
    return qemu_nbd_with_tls(folder, certificates, extended_qemu_nbd())


@pytest.mark.e2e
@pytest.mark.parametrize("server", [qemu_nbd_with_tls, newer_qemu_nbd_with_tls, nbd_server_with_tls])
async def test_other_servers_speak_tls_with_us_too(
    server: Callable[[Path, Path], AbstractAsyncContextManager[Running]], certificates: Path, tmp_path: Path
) -> None:
    content = random.Random(6).randbytes(MIB)
    (tmp_path / "image").write_bytes(bytes(2 * MIB))
    async with server(tmp_path, certificates) as (uri, _):
        parameters = [f"tls-certificates={certificates}", "tls-hostname=localhost"]
        wanted = "&".join([uri.replace("nbd+unix:", "nbds+unix:") + ("" if "?" in uri else "?x-=1"), *parameters])
        async with nbd.connect(wanted) as disk:
            assert disk.tls
            await disk.pwrite(content, 4096)
            await disk.flush()
            parts = await asyncio.gather(*(disk.pread(65536, 4096 + 65536 * n) for n in range(16)))
            assert b"".join(parts) == content
            if disk.can_block_status:
                assert sum(extent.length for extent in await disk.block_status(2 * MIB, 0)) == 2 * MIB
    assert (tmp_path / "image").read_bytes()[4096 : 4096 + MIB] == content


@pytest.mark.e2e
async def test_who_the_server_is_matters(certificates: Path, tmp_path: Path) -> None:
    async with nbdkit(tmp_path, "--tls=require", f"--tls-certificates={certificates}", "memory", "1M") as (uri, _):
        for parameters, complaint in (
            ([f"tls-certificates={certificates}", "tls-hostname=elsewhere"], "elsewhere"),
            ([], "self.signed certificate|unable to get local issuer"),
        ):
            with pytest.raises(OSError, match=complaint):
                async with nbd.connect(secure(uri, *parameters)):
                    pass
        async with nbd.connect(secure(uri, "tls-verify-peer=0")) as disk:
            assert disk.tls
        with pytest.raises(nbd.NbdOptionError, match="requires TLS"):
            async with nbd.connect(uri):
                pass


@pytest.mark.e2e
async def test_a_server_without_tls_gets_no_plaintext_instead(tmp_path: Path) -> None:
    async with nbdkit(tmp_path, "--tls=off", "memory", "1M") as (uri, _):
        with pytest.raises(nbd.NbdOptionError) as caught:
            async with nbd.connect(secure(uri, "tls-verify-peer=0")):
                pass
        assert caught.value.option == STARTTLS


def lenient() -> TlsSettings:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return TlsSettings(context, None)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (wire.reply(STARTTLS, wire.ACK) + wire.reply(wire.STRUCTURED, wire.ACK), "in the clear where TLS begins"),
        (wire.reply(STARTTLS, wire.ACK) + b"\x16", "in the clear where TLS begins"),
        (wire.reply(STARTTLS, wire.UNSUP), "NBD_OPT_STARTTLS refused"),
        (wire.reply(STARTTLS, wire.POLICY), "NBD_OPT_STARTTLS refused"),
        (wire.reply(STARTTLS, wire.ACK, b"x"), "carries 1 bytes"),
    ],
)
async def test_a_server_in_the_middle_cannot_talk_us_out_of_tls(answer: bytes, complaint: str) -> None:
    async with scripted(wire.GREETING, 20, answer, then_close=False) as (connector, heard):
        with pytest.raises(OSError, match=complaint):
            await Connection.open(connector, tls=lenient())
    assert wire.option(wire.STRUCTURED) not in heard
    assert heard[4:].startswith(wire.option(STARTTLS))


async def test_nonsense_instead_of_tls_is_an_error() -> None:
    async with scripted(wire.GREETING, 20, wire.reply(STARTTLS, wire.ACK), 100, b"no TLS record" * 9) as (connector, _):
        with pytest.raises(OSError, match="TLS"):
            await Connection.open(connector, tls=lenient())


async def test_a_server_that_does_not_speak_in_the_tls_handshake_is_a_timeout() -> None:
    async with scripted(wire.GREETING, 20, wire.reply(STARTTLS, wire.ACK), then_close=False) as (connector, _):
        with pytest.raises(TimeoutError, match="TLS handshake"):
            await Connection.open(connector, tls=lenient(), connect_timeout=0.2)


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    assert settings_for(nbd.NbdUri.parse("nbd://localhost/")) is None
    keys = tmp_path / "keys"
    keys.write_text("alice:0123abcd\n")
    cases = {
        "nbds://localhost/?tls-type=anon": (errno.EOPNOTSUPP, "anonymous"),
        f"nbds://localhost/?tls-certificates={tmp_path}": (errno.ENOENT, "cannot load the certificates"),
    }
    if hasattr(ssl.SSLContext, "set_psk_client_callback"):
        cases[f"nbds://bob@localhost/?tls-type=psk&tls-psk-file={keys}"] = (errno.EACCES, "no key for 'bob'")
    else:
        cases[f"nbds://alice@localhost/?tls-type=psk&tls-psk-file={keys}"] = (errno.EOPNOTSUPP, "Python 3.13")
    for uri, (code, complaint) in cases.items():
        with pytest.raises(OSError, match=complaint) as caught:
            settings_for(nbd.NbdUri.parse(uri))
        assert caught.value.errno == code
