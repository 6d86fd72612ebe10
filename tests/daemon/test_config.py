"""What the daemon says about configuration files: good ones are taken as they are, and of bad ones every fault gets a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ustack.daemon.config import Config, load, parse
from ustack.daemon.sections import ConfigError
from ustack.net.ipv6 import Ipv6Config
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.udp import UdpConfig

if TYPE_CHECKING:
    from pathlib import Path

LEAST = """
[device]
name = "tap0"
[[address]]
address = "10.77.0.2/24"
"""

MOST = """
[device]
name = "tap0"
mode = "linear"
offload = false
mac = "02:00:00:00:00:02"
create = false
[[address]]
address = "10.77.0.2/24"
gateway = "10.77.0.1"
[[route]]
network = "10.1.0.0/16"
via = "10.77.0.3"
metric = 10
[memory]
pool = "kmalloc"
size = "16M"
reserve = "512K"
lock = true
[tcp]
rmem_max = "1M"
mem_high = "4M"
sack = false
rto_min = 1
[udp]
mem_low = "1M"
[[nbd]]
name = "disk"
uri = "nbd://10.77.0.1/disk"
requests = 8
[[nbd]]
name = "local"
uri = "nbd+unix:///?socket=/run/nbd.sock"
[control]
path = "/tmp/control.sock"
mode = "0660"
[service]
echo = true
"""


def complaints(text: str) -> list[str]:
    """What is said about a bad file."""
    with pytest.raises(ConfigError) as refused:
        parse(text, "u.toml")
    return refused.value.problems


def test_device_and_address_are_enough() -> None:
    config = parse(LEAST, "u.toml")
    assert config.memory.size == 64 << 20
    assert config.memory.reserve == "auto"
    assert config.tcp_config() == TcpConfig()
    assert config.udp_config() == UdpConfig()


def test_routers_may_give_the_only_address() -> None:
    config = parse("[device]\nname = 'tap0'\n[ipv6]\nautoconf = true\nstable_secret = 'a'\n", "u.toml")
    assert config.ipv6_config() == Ipv6Config(autoconf=True, stable_secret="a")
    assert config.addresses() == "addresses from routers"


def test_addresses_of_both_versions_and_routers_for_each() -> None:
    config = parse(
        LEAST.rstrip()
        + "\ngateway = '10.77.0.1'\n[[address]]\naddress = 'fd00::2/64'\ngateway = 'fe80::1'\n"
        + "[[route]]\nnetwork = 'fd01::/64'\nvia = 'fd00::1'\n[[route]]\nnetwork = 'fd02::/64'\nvia = 'fe80::7'\n",
        "u.toml",
    )
    assert config.addresses() == "10.77.0.2/24, fd00::2/64"


def test_everything_can_be_said() -> None:
    config = parse(MOST, "u.toml")
    assert config.memory.size == 16 << 20
    assert config.memory.reserve == 512 << 10
    assert config.tcp_config() == TcpConfig(rmem_max=1 << 20, mem_high=4 << 20, sack=False, rto_min=1.0)
    assert config.udp_config() == UdpConfig(mem_low=1 << 20)
    assert [(nbd.name, nbd.requests) for nbd in config.nbd] == [("disk", 8), ("local", 64)]


def test_every_fault_is_named_at_once() -> None:
    assert complaints(LEAST + "[memory]\nsize = 'big'\nlock = 1\n[control]\nmode = '0999'\n") == [
        'u.toml: [memory] size = "big": allowed is bytes, or a string with a unit of K, M, G or T, such as "64M"',
        "u.toml: [memory] lock = 1: allowed is true or false",
        'u.toml: [control] mode = "0999": allowed is permission bits as an octal string, such as "0600"',
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[device]\nname = 'tap0'\n", "[[address]] is missing"),
        ("[[address]]\naddress = '10.0.0.1/8'\n", "[device] is missing"),
        (LEAST.replace("[[", "moda = 'paged'\n[["), "[device] moda: unknown key; did you mean 'mode'?"),
        (LEAST + "[memroy]\n", "[memroy]: unknown section; did you mean 'memory'?"),
        (LEAST + "[service]\nxyzzy = 1\n", "[service] xyzzy: unknown key; allowed are echo, discard, chargen"),
        (LEAST + "[memory]\npool = 'slub'\n", '[memory] pool = "slub": allowed is one of "'),
        (LEAST + "[memory]\nsize = 4096\n", "[memory] size = 4096: allowed is at least 1048576"),
        (LEAST + "[memory]\nreserve = -1\n", '[memory] reserve = -1: allowed is "auto", bytes, or a string with a unit'),
        (LEAST + "[memory]\nreserve = '64M'\n", "[memory] reserve = 67108864: allowed is less than the whole memory, 67108864"),
        (LEAST + "[tcp]\nrto_min = '1'\n", '[tcp] rto_min = "1": allowed is a number'),
        (LEAST + "[tcp]\nrto_max = inf\n", "[tcp] rto_max = inf: allowed is a finite number"),
        (LEAST + "[tcp]\ntime_wait = nan\n", "[tcp] time_wait = nan: allowed is"),
        (LEAST + "[tcp]\nrto_max = 0.5\n", "[tcp] rto_max = 0.5: allowed is at least initial_rto, 1.0"),
        (LEAST + "[tcp]\nrmem_min = '8M'\n", "[tcp] rmem_min = 8388608: allowed is at most rmem_default, 131072"),
        (LEAST + "[tcp]\nrmem_max = '64K'\n", "[tcp] rmem_max = 65536: allowed is at least rmem_default, 131072"),
        (LEAST + "[tcp]\nwmem_default = 1024\n", "[tcp] wmem_default = 1024: allowed is at least wmem_min, 4096"),
        (
            LEAST + "[tcp]\nmem_pressure = '8M'\nmem_high = '4M'\n",
            "[tcp] mem_high = 4194304: allowed is at least mem_pressure, 8388608",
        ),
        (LEAST + "[udp]\nmem_low = '2M'\nmem_high = '1M'\n", "[udp] mem_high = 1048576: allowed is at least mem_low, 2097152"),
        (LEAST + "[udp]\nmem_high = 'much'\n", '[udp] mem_high = "much": allowed is bytes, or a string with a unit'),
        (LEAST + "[tcp]\nretries2 = 0\n", "[tcp] retries2 = 0: allowed is more than 0"),
        (LEAST + "[tcp]\nretries2 = 1.5\n", "[tcp] retries2 = 1.5: allowed is an integer"),
        (LEAST.replace("/24", ""), '[[address]] number 1, address = "10.77.0.2": allowed is an address with its prefix'),
        (LEAST.replace("0.2/24", "0.0/24"), "10.77.0.0/24 names the network or everybody in it"),
        (LEAST.replace("0.2/24", "0.255/24"), "10.77.0.255/24 names the network or everybody in it"),
        (LEAST.replace("10.77.0.2/24", "224.0.0.1/24"), "224.0.0.1 cannot be the IPv4 address of an interface"),
        (LEAST + "gateway = '10.78.0.1'\n", 'gateway = "10.78.0.1": allowed is a host on our network, 10.77.0.0/24'),
        (LEAST + "gateway = '10.77.0.2'\n", "other than 10.77.0.2"),
        (LEAST + "gateway = '10.77.0.255'\n", 'gateway = "10.77.0.255": allowed is a host on our network'),
        (LEAST + "[[address]]\naddress = '10.77.0.2/16'\n", '[[address]] number 2, address = "10.77.0.2/16": allowed is each'),
        (LEAST + "[[address]]\naddress = 'ff02::1/64'\n", "ff02::1 cannot be the IPv6 address of an interface"),
        (LEAST + "[[address]]\naddress = 'fd00::/64'\n", "fd00::/64 names the network, not a host"),
        (LEAST + "[[address]]\naddress = 'fd00::2/64'\ngateway = 'fd01::1'\n", "allowed is a host on our network, fd00::/64"),
        (LEAST + "[[route]]\nnetwork = 'fd01::/64'\nvia = '10.77.0.1'\n", "allowed is a router of IPv6, as the network is"),
        (LEAST + "[[route]]\nnetwork = 'fd01::/64'\nvia = 'fd00::1'\n", "allowed is a host on our network, none"),
        (LEAST + "[[address]]\naddress = '10.9.0.2/24'\nvlan = 4095\n", "vlan = 4095: allowed is at most 4094"),
        (LEAST + "[ipv4]\nrp_filter = 3\n", "[ipv4] rp_filter = 3: allowed is at most 2"),
        (LEAST + "[ipv6]\naddr_gen_mode = 'mac'\n", '[ipv6] addr_gen_mode = "mac": allowed is "stable_privacy" or "eui64"'),
        (LEAST + "[ipv6]\ndad_transmits = -1\n", "[ipv6] dad_transmits = -1: allowed is at least 0"),
        (
            LEAST + "[[route]]\nnetwork = '10.1.2.3/8'\nvia = '10.77.0.1'\n",
            'network = "10.1.2.3/8": allowed is a network without host bits',
        ),
        (LEAST + "[[route]]\nnetwork = '10.0.0.0/8'\nvia = '1.1.1.1'\n", 'via = "1.1.1.1": allowed is a host on our network'),
        (LEAST + "[[nbd]]\nname = 'a'\nuri = 'nbd://server/'\n", "allowed is an NBD URI whose host is an address"),
        (LEAST + "[[nbd]]\nname = 'a'\nuri = 'http://10.0.0.1/'\n", "scheme is 'http'"),
        (
            LEAST + 2 * "[[nbd]]\nname = 'a'\nuri = 'nbd://10.0.0.1/'\n",
            '[[nbd]] number 2, name = "a": allowed is each name only once',
        ),
        (LEAST.replace("tap0", "a-name-far-too-long"), "allowed is a string of at most 15 characters"),
        ("device = 'tap0'\n[[address]]\naddress = '10.0.0.1/8'\n", "[device]: allowed is a table"),
        (LEAST + "[nbd]\nname = 'a'\n", "[nbd]: allowed is an array of tables"),
        (
            LEAST + "[[nbd]]\nname = 'a'\nuri = 'nbd://10.0.0.1/'\ndevice = '/dev/sda'\n",
            'device = "/dev/sda": allowed is "auto" or a device of the kernel\'s nbd, such as "/dev/nbd0"',
        ),
        (
            LEAST + "[[nbd]]\nname = 'a'\nuri = 'nbd://10.0.0.1/'\nunix = '/s'\nunix_mode = '0888'\n",
            'unix_mode = "0888": allowed is permission bits as an octal string',
        ),
        (
            LEAST + "".join(f"[[nbd]]\nname = '{n}'\nuri = 'nbd://10.0.0.1/'\nunix = '/s'\ndevice = 'auto'\n" for n in "ab"),
            '[[nbd]] number 2, unix = "/s": allowed is each only once',
        ),
        ("[device\n", "not TOML: "),
    ],
)
def test_a_fault_is_named_with_file_place_value_and_what_is_allowed(text: str, complaint: str) -> None:
    (line,) = complaints(text)
    assert line.startswith("u.toml: ")
    assert complaint in line


@pytest.mark.parametrize("mac", ["02:00:00:00:00", "03:00:00:00:00:00", "00:00:00:00:00:00", "02-00-00-00-00-00"])
def test_only_a_unicast_ethernet_address_is_a_mac(mac: str) -> None:
    (line,) = complaints(LEAST.replace('name = "tap0"', f'name = "tap0"\nmac = "{mac}"'))
    assert f'[device] mac = "{mac}": allowed is a unicast Ethernet address' in line


def test_a_file_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory"):
        load(tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match=r"x\.toml: not UTF-8 at byte 2"):
        load(tmp_path / "x.toml")


def test_the_models_know_every_section() -> None:
    from ustack.daemon.config import SECTIONS

    assert list(SECTIONS) == list(Config.model_fields)
