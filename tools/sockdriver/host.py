"""The host under test: our stack on the TAP device that the bench has made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.sockdriver.arguments import BadRequest, Unsupported
from tools.sockdriver.hints import apply
from ustack.link.tap import TapDevice
from ustack.net.ipv6 import Ipv6Config
from ustack.stack import Stack
from ustack.transport.tcp.config import TcpConfig

if TYPE_CHECKING:
    from tools.sockdriver.arguments import Arguments


def make_stack(args: Arguments) -> Stack:
    """The stack that `init` asks for, not running yet. Every frame on the wire is a packet of its own: there is no offload, and
    nothing is put together on the way in.

    Raises OSError when the device cannot be opened, BadRequest for addresses that cannot be, Unsupported for another version.
    """
    version = args.number("ip_version", 4)
    if version not in (4, 6):
        raise Unsupported(f"IP version {version}")
    config = TcpConfig(offload=False)
    set_up(config, args)
    stack = Stack(tcp=config, ipv6=Ipv6Config(dad_transmits=0))
    device = TapDevice(args.text("iface"), offload=False)
    device.mtu = args.number("mtu", device.mtu)
    try:
        stack.add_interface(
            device, f"{args.text('local_ip')}/{args.number('prefix', 24 if version == 4 else 64)}", args.get("gateway")
        )
    except ValueError as error:
        stack.close()
        raise BadRequest(str(error)) from None
    return stack


def set_up(config: TcpConfig, args: Arguments) -> None:
    """Follow the `hints` and the `sysctl` of `args`."""
    apply(config, _table(args, "hints"), _table(args, "sysctl"))


def _table(args: Arguments, key: str) -> dict[str, Any]:
    value = args.get(key, {})
    if not isinstance(value, dict):
        raise BadRequest(f"{key!r} is not an object")
    return value
