"""What an interface knows of IPv6 (the kernel's inet6_dev): its addresses from tentative to invalid, and its groups.

An address is tentative until nobody has objected to it (duplicate address detection, RFC 4862, section 5.4, with the nonces of
RFC 7527), then preferred, then deprecated, then gone (section 5.5.4); the last two only if it has lifetimes. A tentative
address is nobody's: packets to it are dropped, and nothing but the detection speaks of it.
"""

from __future__ import annotations

from hashlib import blake2s
from math import inf
from typing import TYPE_CHECKING, Final

from ustack.drops import DropReason
from ustack.net import addresses
from ustack.net.addresses import ALL_NODES, ANY6, LINK_LOCAL_NETWORK, LINK_LOCAL_PREFIX_LEN, solicited_node
from ustack.net.mld import Mld
from ustack.net.ndp import Ndp
from ustack.net.neighbour import NeighbourParameters, NeighbourTable
from ustack.net.path import HOPS_DEFAULT
from ustack.net.router_discovery import RouterDiscovery
from ustack.timers import Timer
from ustack.wire import ethernet, icmpv6, ipv6, ndp

if TYPE_CHECKING:
    from ustack.env import Env
    from ustack.net.interface import Interface
    from ustack.net.ipv6 import Ipv6
    from ustack.net.routes import Route

PARAMETERS: Final = NeighbourParameters(locktime=inf, doubt=True)
"""Neighbours by NDP: an answer that does not override is doubt (RFC 4861, section 7.2.5)."""

IDGEN_RETRIES: Final = 3
"""Addresses that are tried after one turned out to be in use (RFC 7217, section 6)."""

DAD_DELAY_MAX: Final = 1.0
"""Seconds that the first question waits at random (RFC 4861, MAX_RTR_SOLICITATION_DELAY)."""


class Address6:
    """An address (packed) on `interface`, in a network of `prefix_len` bits. `preferred_until` and `valid_until` are seconds of
    the stack's clock, inf without end.
    """

    __slots__ = (
        "address",
        "autoconf",
        "deprecated",
        "duplicate",
        "generation",
        "interface",
        "nonce",
        "preferred_until",
        "prefix_len",
        "probes",
        "temporary",
        "tentative",
        "timer",
        "valid_until",
    )

    def __init__(self, interface: Interface, address: bytes, prefix_len: int, timer: Timer, generation: int = -1) -> None:
        self.interface = interface
        self.address = address
        self.prefix_len = prefix_len
        self.timer = timer
        self.generation = generation  # how many such addresses were tried before; -1 for one that somebody gave us
        self.autoconf = False
        self.temporary = False
        self.tentative = True
        self.duplicate = False
        self.deprecated = False
        self.preferred_until = inf
        self.valid_until = inf
        self.probes = 0
        self.nonce = b""

    @property
    def state(self) -> str:
        """The name of its state (RFC 4862, section 5.5.4)."""
        if self.duplicate:
            return "duplicate"
        return "tentative" if self.tentative else "deprecated" if self.deprecated else "preferred"


class Inet6:
    """IPv6 on `interface`.

    `addresses` are ours there, by packed address, and `own` those of them that may be used; `groups` maps each group that we
    listen to to how many want it; `prefixes` are on the link. `mtu` is the link's in bytes, and `hop_limit` for packets that do
    not say how far they may go. `failed` are addresses that others turned out to have.
    """

    __slots__ = (
        "addresses",
        "env",
        "failed",
        "groups",
        "hop_limit",
        "interface",
        "layer",
        "mld",
        "mtu",
        "ndp",
        "neighbours",
        "own",
        "prefixes",
        "routers",
    )

    def __init__(self, layer: Ipv6, interface: Interface) -> None:
        self.layer = layer
        self.env: Env = layer.env
        self.interface = interface
        self.mtu = interface.device.mtu
        self.hop_limit = HOPS_DEFAULT
        self.addresses: dict[bytes, Address6] = {}
        self.own: set[bytes] = set()
        self.groups: dict[bytes, int] = {}
        self.prefixes: dict[tuple[bytes, int], Route] = {}
        self.failed: list[bytes] = []
        self.ndp = Ndp(self)
        self.neighbours = NeighbourTable(layer.env, interface.device, self.ndp.solicit, PARAMETERS)
        self.neighbours.on_failed = layer.icmp.on_neighbour_failed
        self.mld = Mld(self)
        self.routers = RouterDiscovery(self)

    def start(self) -> None:
        """Join the group of all nodes, make a link-local address, and look for routers if that is wanted."""
        self.groups[ALL_NODES + self.interface.zone] = 1
        self._form(LINK_LOCAL_NETWORK, LINK_LOCAL_PREFIX_LEN, 0)
        config = self.layer.config
        if config.accept_ra or config.autoconf:
            self.routers.start()

    # -- prefixes --

    def on_link(self, address: bytes) -> bool:
        """Whether the packed `address` is on this link: link-local in its zone, or in one of its prefixes."""
        if address[16:]:
            return address[16:] == self.interface.zone
        number = int.from_bytes(address, "big")
        return any(
            number >> 128 - prefix_len == int.from_bytes(prefix, "big") >> 128 - prefix_len
            for prefix, prefix_len in self.prefixes
        )

    def add_prefix(self, prefix: bytes, prefix_len: int) -> None:
        """`prefix` (16 bytes) is on the link: no router is needed to reach its addresses."""
        if (prefix, prefix_len) not in self.prefixes and prefix_len < 128:
            routes = self.layer.routes
            taken = {route.metric for route in routes if (route.network, route.prefix_len) == (prefix, prefix_len)}
            metric = next(metric for metric in range(256, 1 << 16) if metric not in taken)
            self.prefixes[prefix, prefix_len] = routes.add(prefix, prefix_len, self.interface, None, metric)

    def remove_prefix(self, prefix: bytes, prefix_len: int) -> None:
        """`prefix` is not known to be on the link any more."""
        route = self.prefixes.pop((prefix, prefix_len), None)
        if route is not None:
            self.layer.routes.remove(route)

    # -- addresses --

    def add_address(self, address: bytes, prefix_len: int) -> Address6:
        """Have one more address, once nobody objects. Its network is on the link. Raises ValueError when it is ours already."""
        packed = addresses.with_zone(address, self.interface.zone)
        if packed in self.addresses or packed in self.layer.addresses:
            raise ValueError(f"{addresses.text(packed)} is ours already")
        if not packed[16:]:
            self.add_prefix(network_of(address, prefix_len), prefix_len)
        own = Address6(self.interface, packed, prefix_len, Timer(lambda: self._on_timer(own)))
        self._begin(own)
        return own

    def form(self, prefix: bytes, prefix_len: int) -> Address6 | None:
        """Form an address of our own in the advertised `prefix`; None when all that were tried are others'."""
        return self._form(prefix, prefix_len, 0)

    def _form(self, prefix: bytes, prefix_len: int, generation: int) -> Address6 | None:
        by_mac = self.layer.config.addr_gen_mode == "eui64"
        if generation > (0 if by_mac else IDGEN_RETRIES):
            return None
        interface = self.interface
        if by_mac:
            identifier = eui64(interface.device.mac)
        else:
            identifier = stable_identifier(prefix, interface.device.name, generation, self.layer.secret)
        packed = addresses.with_zone(prefix[:8] + identifier, interface.zone)
        if packed in self.addresses or packed in self.layer.addresses:
            return None
        own = Address6(interface, packed, prefix_len, Timer(lambda: self._on_timer(own)), generation)
        self._begin(own)
        return own

    def _begin(self, own: Address6) -> None:
        """Ask whether somebody has `own` already, unless that is not wanted (RFC 4862, section 5.4.2)."""
        self.addresses[own.address] = own
        self.join(solicited_node(own.address))
        own.probes = self.layer.config.dad_transmits
        if not own.probes:
            self._assign(own)
            return
        delay = self.env.random.uniform(0.0, DAD_DELAY_MAX) if own.generation >= 0 and own.address[16:] else 0.0
        self.env.timers.set(own.timer, self.env.timers.now + delay)

    def _assign(self, own: Address6) -> None:
        own.tentative = False
        self.own.add(own.address)
        self.layer.addresses[own.address] = self.interface
        self.layer.invalidate()
        self.refresh(own)
        if own.address[16:]:
            self.mld.start()

    def _on_timer(self, own: Address6) -> None:
        if own.tentative:
            if own.probes:
                own.probes -= 1
                own.nonce = self.env.random.randbytes(6)
                self.ndp.ask_whether_used(own)
                self.env.timers.set(own.timer, self.env.timers.now + self.neighbours.parameters.retrans_time)
            else:
                self._assign(own)
            return
        self.refresh(own)

    def refresh(self, own: Address6) -> None:
        """The lifetimes of `own` have changed, or one has come to its end."""
        if own.tentative:
            return
        now = self.env.timers.now
        if own.valid_until <= now:
            self.remove_address(own)
            return
        deprecated = own.preferred_until <= now
        if deprecated != own.deprecated:
            own.deprecated = deprecated
            self.layer.invalidate()
        deadline = own.valid_until if deprecated else min(own.preferred_until, own.valid_until)
        if deadline != inf:
            self.env.timers.set(own.timer, deadline)

    def remove_address(self, own: Address6) -> None:
        """Have `own` no longer."""
        own.timer.cancel()
        del self.addresses[own.address]
        self.leave(solicited_node(own.address))
        if own.address in self.own:
            self.own.discard(own.address)
            del self.layer.addresses[own.address]
            self.layer.invalidate()

    def on_duplicate(self, own: Address6) -> None:
        """Somebody else has the tentative address `own`: try another one if we made it up (RFC 4862, section 5.4.5)."""
        own.duplicate = True
        self.remove_address(own)
        self.failed.append(own.address)
        del self.failed[:-8]
        if own.generation >= 0:
            network = LINK_LOCAL_NETWORK if own.address[16:] else network_of(own.address, own.prefix_len)
            successor = self._form(network, own.prefix_len, own.generation + 1)
            if successor is not None:
                successor.autoconf = own.autoconf
                successor.valid_until, successor.preferred_until = own.valid_until, own.preferred_until

    def link_local(self) -> bytes:
        """Our link-local address, 16 bytes; :: while there is none."""
        for address in self.own:
            if address[16:]:
                return address[:16]
        return ANY6

    # -- groups --

    def join(self, group: bytes) -> None:
        """Listen to `group` (16 bytes), and tell the routers so."""
        group += self.interface.zone
        self.groups[group] = self.groups.get(group, 0) + 1
        if self.groups[group] == 1:
            self.mld.changed(group, joined=True)

    def leave(self, group: bytes) -> None:
        """Listen to `group` no longer, unless somebody else still does."""
        group += self.interface.zone
        self.groups[group] -= 1
        if not self.groups[group]:
            del self.groups[group]
            self.mld.changed(group, joined=False)

    # -- out --

    def send(self, src: bytes, dst: bytes, lladdr: bytes, kind: int, word: int, body: bytes, options: bytes = b"") -> None:
        """Send the ICMPv6 message of type `kind`, with `word` and `body`, straight to the station `lladdr`: with hop limit 255,
        or behind the hop-by-hop `options` with hop limit 1. Addresses are 16 bytes.
        """
        device = self.interface.device
        length = len(options) + icmpv6.HEADER_LEN + len(body)
        frame = ethernet.build_header(lladdr, device.mac, ethernet.ETH_P_IPV6)
        if options:
            frame += ipv6.build_header(src, dst, ipv6.NEXTHDR_HOP, length, 1) + options
        else:
            frame += ipv6.build_header(src, dst, ipv6.NEXTHDR_ICMP, length, ndp.HOP_LIMIT)
        frame += icmpv6.build_header(src, dst, kind, 0, word, (body,)) + body
        mib = self.env.mib
        mib.Ip6OutRequests += 1
        mib.Icmp6OutMsgs += 1
        sent = device.transmit(frame, ())
        if device.sniffers is not None:
            device.sniffers.sent(device, frame, (), sent)
        if not sent:
            self.env.drops.count(DropReason.TX_DEVICE)

    def close(self) -> None:
        """Have no address any more, and forget the neighbours."""
        for own in list(self.addresses.values()):
            own.timer.cancel()
            self.layer.addresses.pop(own.address, None)
        self.addresses.clear()
        self.own.clear()
        self.groups.clear()
        self.prefixes.clear()
        self.mld.close()
        self.routers.close()
        self.neighbours.close()


def network_of(address: bytes, prefix_len: int) -> bytes:
    """The first address of the network of `prefix_len` bits that the 16 bytes `address` are in."""
    spare = 128 - prefix_len
    return (int.from_bytes(address[:16], "big") >> spare << spare).to_bytes(16, "big")


def eui64(mac: bytes) -> bytes:
    """The interface identifier that an Ethernet address makes (RFC 4291, appendix A)."""
    return bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:6]


def stable_identifier(prefix: bytes, name: str, generation: int, secret: bytes) -> bytes:
    """An interface identifier that is always the same on this network and tells nothing on any other (RFC 7217, section 5)."""
    key = blake2s(secret, digest_size=32).digest()
    while True:
        text = prefix[:8] + bytes((generation,)) + name.encode()
        identifier = blake2s(text, key=key, digest_size=8, person=b"rfc7217").digest()
        if not _reserved(identifier):
            return identifier
        key = blake2s(key, digest_size=32).digest()


def _reserved(identifier: bytes) -> bool:
    """Whether the identifier means something else (RFC 5453)."""
    return (
        not any(identifier)
        or identifier[:5] == b"\x02\x00\x5e\xff\xfe"
        or (identifier[:7] == b"\xfd" + b"\xff" * 6 and identifier[7] & 0x80 != 0)
    )
