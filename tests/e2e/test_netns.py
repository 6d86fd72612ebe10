"""The namespaces that end-to-end tests stand on: separate from each other and from us, and gone with all they hold."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pytun import IFF_NO_PI, IFF_TAP, TunTapDevice

from tests.needs import require_tool
from tests.netns import Namespace

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

pytestmark = pytest.mark.e2e

LOOPBACK = 1
ALICE, BOB = "10.77.1.1", "10.77.1.2"


@pytest.fixture
def alice_and_bob(make_netns: Callable[[str], Namespace]) -> tuple[Namespace, Namespace]:
    """Two kernels with a cable between them."""
    alice, bob = make_netns("alice"), make_netns("bob")
    alice.add_veth("eth0", bob, "eth0")
    alice.set_up("eth0", f"{ALICE}/24", "fd77::1/64")
    bob.set_up("eth0", f"{BOB}/24", "fd77::2/64")
    return alice, bob


def links(namespace: Namespace) -> set[str]:
    return namespace.netlink(lambda ip: {link.get("ifname") for link in ip.get_links()})


def test_a_new_namespace_has_loopback_and_nothing_else(netns: Namespace) -> None:
    assert links(netns) == {"lo"}
    netns.open(socket.create_server, ("127.0.0.1", 0)).close()


def test_we_stay_outside(netns: Namespace) -> None:
    before = Path("/proc/thread-self/ns/net").readlink()
    inside = netns.open(Path("/proc/thread-self/ns/net").readlink)
    assert inside != before
    assert Path("/proc/thread-self/ns/net").readlink() == before


def test_two_kernels_talk_over_a_cable(alice_and_bob: tuple[Namespace, Namespace]) -> None:
    alice, bob = alice_and_bob
    with (
        bob.open(socket.create_server, (BOB, 0)) as listener,
        alice.open(socket.create_connection, listener.getsockname(), 5.0) as client,
    ):
        server, peer = listener.accept()
        with server:
            assert peer[0] == ALICE
            client.sendall(b"over the cable")
            assert server.recv(100) == b"over the cable"


def test_an_ipv6_address_can_be_used_at_once(alice_and_bob: tuple[Namespace, Namespace]) -> None:
    alice, bob = alice_and_bob
    with bob.open(socket.create_server, ("fd77::2", 0), family=socket.AF_INET6) as listener:
        alice.open(socket.create_connection, listener.getsockname()[:2], 5.0).close()


def test_each_has_its_own_ports_and_addresses(alice_and_bob: tuple[Namespace, Namespace]) -> None:
    alice, bob = alice_and_bob
    for namespace in (alice, bob):
        namespace.add_address("lo", "10.77.9.9/32")
    with alice.open(socket.create_server, ("10.77.9.9", 8000)), bob.open(socket.create_server, ("10.77.9.9", 8000)):
        pass


def test_both_ends_know_the_hardware_address(alice_and_bob: tuple[Namespace, Namespace]) -> None:
    alice, bob = alice_and_bob
    require_tool("ip")
    assert alice.mac("eth0") != bob.mac("eth0")
    assert alice.mac("eth0") in alice.run("ip", "link", "show", "eth0").stdout.decode()


def test_a_setting_is_changed_here_only(alice_and_bob: tuple[Namespace, Namespace]) -> None:
    alice, bob = alice_and_bob
    setting = Path("/proc/sys/net/ipv4/ip_default_ttl")
    alice.sysctl("net.ipv4.ip_default_ttl", 17)
    assert alice.open(setting.read_text) == "17\n"
    assert bob.open(setting.read_text) != "17\n"


def test_a_tap_opened_inside_is_used_from_outside(netns: Namespace) -> None:
    tap = netns.open(TunTapDevice, name="tap0", flags=IFF_TAP | IFF_NO_PI)
    try:
        netns.sysctl("net.ipv6.conf.tap0.disable_ipv6", 1)
        netns.set_up("tap0", "10.77.2.1/24")
        with netns.open(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.sendto(b"who has", ("10.77.2.2", 9))
        frame = tap.read(2048)
        assert frame[:6] == b"\xff" * 6
        assert frame[12:14] == b"\x08\x06", "an ARP request"
        assert frame[6:12] == bytes.fromhex(netns.mac("tap0").replace(":", ""))
    finally:
        tap.close()
    assert links(netns) == {"lo"}


def test_the_mtu_is_set(netns: Namespace) -> None:
    netns.set_up("lo", mtu=1400)
    assert netns.netlink(lambda ip: ip.get_links(LOOPBACK)[0].get("mtu")) == 1400


def test_a_program_that_fails_says_what_it_printed(netns: Namespace) -> None:
    with pytest.raises(AssertionError, match=r"(?s)kernel: `sh -c .*exited with 3.*stdout\nhalf.*stderr\nbroken"):
        netns.run("sh", "-c", "echo half; echo broken >&2; exit 3")


def test_a_program_that_hangs_is_killed_and_named(netns: Namespace) -> None:
    with pytest.raises(AssertionError, match=r"`sleep 60` did not end in 0.1 s"):
        netns.run("sleep", "60", timeout=0.1)
    assert netns.pids() == []


def test_input_reaches_a_program(netns: Namespace) -> None:
    assert netns.run("tr", "a-z", "A-Z", stdin=b"syn").stdout == b"SYN"


async def test_the_event_loop_goes_on_while_a_program_runs(netns: Namespace) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(3)).upper())
        writer.close()

    require_tool("nc")
    listener = netns.open(socket.create_server, ("127.0.0.1", 0))
    async with await asyncio.start_server(serve, sock=listener):
        answered = await netns.arun("nc", "-N", "127.0.0.1", str(listener.getsockname()[1]), stdin=b"syn")
    assert answered.stdout == b"SYN"


async def test_netlink_works_under_a_running_event_loop(netns: Namespace) -> None:
    netns.add_address("lo", "10.77.9.9/32")
    netns.open(socket.create_server, ("10.77.9.9", 0)).close()


def test_closing_ends_every_program_inside(netns: Namespace) -> None:
    with Namespace("short-lived") as short_lived:
        plain = short_lived.popen("sleep", "60")
        stubborn = short_lived.popen("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 60; done")
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline() == b"ready\n"
        short_lived.run("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 &")
        assert len(short_lived.pids()) >= 3
        elsewhere = netns.popen("sleep", "60")
    assert plain.returncode is not None
    assert stubborn.returncode is not None
    assert short_lived.pids() == []
    assert elsewhere.poll() is None


def test_closing_happens_on_an_interrupt_too() -> None:
    program: subprocess.Popen[bytes] | None = None
    with pytest.raises(KeyboardInterrupt), Namespace("interrupted") as interrupted:
        program = interrupted.popen("sleep", "60")
        raise KeyboardInterrupt
    assert program is not None
    assert program.returncode is not None


def test_an_error_inside_comes_out_as_it_is(netns: Namespace) -> None:
    with pytest.raises(OSError, match="Network is unreachable"):
        netns.open(socket.create_connection, ("10.1.2.3", 1))
    with pytest.raises(LookupError, match="kernel: no link tap9"):
        netns.set_up("tap9")
