"""The stack: owns devices, pool, clock and counters, and wires the layers together.

It can be driven in two ways. With asyncio: `async with stack:` starts the pump of every device. By hand, as the simulator
does: `advance` moves the clock, `receive` takes what a device has. Everything in between is the same code.
"""

from __future__ import annotations

import socket as names
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from itertools import chain
from random import Random, SystemRandom
from time import time_ns
from typing import TYPE_CHECKING, Final, Literal

from pools.arena import PAGE_SIZE, Arena
from pools.base import Pool, by_name
from pools.buddy import PageAllocator
from ustack.aio.pump import Pump
from ustack.aio.streams import open_connection, start_server
from ustack.aio.tls import start_tls
from ustack.aio.transport import create_connection, create_server
from ustack.drops import Drops
from ustack.env import Env
from ustack.link.loopback import LoopbackDevice
from ustack.link.rxring import LinearRing
from ustack.link.sniffer import Sniffers
from ustack.link.vlan import VlanDevice
from ustack.mem.compaction import compact
from ustack.mem.page_flip import PageFlipper, Policy
from ustack.mem.reaper import Reaper
from ustack.mem.reserve import Budget, Demand, Reserve
from ustack.mib import Mib
from ustack.net.addresses import ANY4, ANY6
from ustack.net.interface import Interface, InterfaceAddress, check_host
from ustack.net.ip import Ip
from ustack.net.ipv4 import Ipv4, Ipv4Config
from ustack.net.ipv6 import Ipv6, Ipv6Config
from ustack.skb import SkbMemory
from ustack.sockaddr import pack_host
from ustack.socket import Socket
from ustack.timers import Timer, Timers
from ustack.transport.tcp.config import TcpConfig
from ustack.transport.tcp.congestion import CONTROLS
from ustack.transport.tcp.protocol import Tcp
from ustack.transport.tcp.reserve_size import Link, budget, ring_pages
from ustack.transport.udp import Udp, UdpConfig
from ustack.wire.ethernet import ETH_P_IP, ETH_P_IPV6
from ustack.wire.ipv6 import MIN_MTU

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping
    from ipaddress import IPv4Interface, IPv6Interface
    from ssl import SSLContext
    from typing import Any, Self

    from pools.base import Pool
    from ustack.link.device import Device
    from ustack.skb import Account

DEFAULT_MEMORY: Final = 64 << 20
"""Bytes of packet memory: room for a few connections at full autotuned size."""

RX_BUDGET: Final = 64
"""Frames that are received before answers are sent (the budget of NAPI)."""

LOOPBACK_ROUNDS: Final = 16
"""Times that a flush delivers what the stack has sent to itself."""


class Stack:
    """A TCP/IP stack with its own packet memory.

    `memory` is the size of the arena in bytes, `pool` the name of the pool that lays packets on it, made with `pool_options`
    (or a pool made already, on an arena of its own, and then `memory` and `lock_memory` mean nothing), `reserve` the bytes of
    it that only memalloc sockets may use: the last that are free, wherever they lie ("auto": as many as the demands of memalloc
    sockets add up to; None: the page allocator's own default).
    `lock_memory` keeps the arena from being swapped out. `capture` are the bytes that sniffers may pin (see `link.sniffer`); 0:
    nobody sniffs, and the memory is private. `zero_copy` lets sockets give received data away as pages, by the policy "copy" or
    "scrub" (see `mem.page_flip`); then nobody sniffs. `tcp` has the limits and times of TCP, `udp` the limits of UDP,
    `ipv4` which sources are believed, `ipv6` what routers may say and how our own addresses are made.
    `random` seeds ports, sequence numbers and identifiers, and `now` is the clock in seconds until somebody moves it: leave
    them out except to repeat a run.
    Raises KeyError for a pool that does not exist, ValueError for less memory than a page or than the reserve and for `capture`
    together with `zero_copy`, OSError when
    the memory cannot be had or locked.
    """

    def __init__(
        self,
        *,
        memory: int = DEFAULT_MEMORY,
        pool: str | Pool = "kmalloc",
        pool_options: Mapping[str, Any] | None = None,
        reserve: int | Literal["auto"] | None = None,
        lock_memory: bool = False,
        capture: int = 0,
        zero_copy: Policy | None = None,
        tcp: TcpConfig | None = None,
        udp: UdpConfig | None = None,
        ipv4: Ipv4Config | None = None,
        ipv6: Ipv6Config | None = None,
        random: Random | None = None,
        now: float = 0.0,
    ) -> None:
        if memory < PAGE_SIZE:
            raise ValueError(f"{memory} bytes of packet memory are less than a page of {PAGE_SIZE}")
        fixed = reserve // PAGE_SIZE if isinstance(reserve, int) else None
        pool_class: Callable[..., Pool] = by_name(pool) if isinstance(pool, str) else type(pool)
        self._make_pool: Callable[[PageAllocator], Pool] = partial(pool_class, **(pool_options or {}))
        if isinstance(pool, str):
            arena = Arena(memory // PAGE_SIZE, lock=lock_memory, memfd=capture > 0, flippable=zero_copy is not None)
            pool = self._make_pool(PageAllocator(arena, min_pages=fixed))
        self._reserve_budgets: dict[tuple[object, ...], Budget] = {}
        self._ring_reserves: dict[tuple[Link, ...], int] = {}
        self.pool = pool
        self.pages = pool.pages
        self.arena = pool.pages.arena
        self.timers = Timers(now)
        self.drops = Drops()
        self.mib = Mib()
        self.env = Env(self.timers, SkbMemory(self.pool), self.drops, self.mib, random or SystemRandom())
        self.reserve = Reserve(
            self.env, self.pages.min_pages if reserve is None else fixed, self._reserve_budget, self._ring_pages
        )
        self.ip = Ipv4(self.env, ipv4)
        self.ip6 = Ipv6(self.env, ipv6)
        self.inet = Ip(self.ip, self.ip6)
        self.loopback = LoopbackDevice(self._on_loopback)
        self._loopback_timer = Timer(_nothing)
        local = Interface(self.env, self.loopback, index=0, loopback=True)
        self.loopback.attach(self.env.memory, self.drops, local.input)
        local.handlers[ETH_P_IP] = self.ip.input
        local.handlers[ETH_P_IPV6] = self.ip6.input
        self.ip.loopback = self.ip6.loopback = local
        self.tcp = Tcp(self.env, self.inet, tcp or TcpConfig())
        self.udp = Udp(self.env, self.inet, udp or UdpConfig())
        self.interfaces: list[Interface] = []
        self.flipper = None if zero_copy is None else PageFlipper(self.env.memory, zero_copy)
        self.sniffers = Sniffers(self.env.memory, self.drops, time_ns, capture)
        self.reaper = Reaper(self.env)
        self.pump = Pump(self)

    # -- devices and addresses --

    def add_interface(self, device: Device, address: str | None = None, gateway: str | None = None) -> Interface:
        """Attach `device` with `address` ("10.0.0.2/24" or "fd00::2/64"), and route everything else of that version through
        `gateway` if there is one. With an IPv6 address, or when `Ipv6Config` has routers believed, the interface speaks IPv6.

        Raises ValueError for an address or a gateway that cannot be used, OSError ENOMEM when the receive ring cannot be
        filled; the device is closed then.
        """
        try:
            own = None if address is None else ip_interface(address)
            index = max((each.index for each in self.interfaces), default=0) + 1
            interface = Interface(self.env, device, index=index)
            if own is not None:
                check_host(own.ip.packed, own.network.prefixlen)
                if own.version == 4:
                    interface.add_address(InterfaceAddress(own.ip.packed, own.network.prefixlen))
                if gateway is not None:
                    self._check_gateway(own, gateway)
            device.attach(self.env.memory, self.drops, interface.input)
            if not isinstance(device, VlanDevice):
                self.sniffers.watch(device)  # frames with a tag are seen on the lower device
            try:
                self.ip.add_interface(interface)
                if own is not None and own.version == 6:
                    self.ip6.add_interface(interface).add_address(own.ip.packed, own.network.prefixlen)
            except ValueError:
                if interface in self.ip.interfaces:
                    self.ip.remove_interface(interface)
                if not isinstance(device, VlanDevice):
                    self.sniffers.forget(device)
                raise
        except (ValueError, OSError):
            device.close()
            raise
        self.interfaces.append(interface)
        if not isinstance(device, VlanDevice):
            self.reserve.watch(device)
        config = self.ip6.config
        if (config.accept_ra or config.autoconf) and device.mtu >= MIN_MTU:
            self.ip6.add_interface(interface)
        if own is not None and gateway is not None:
            self._add_default_route(interface, gateway)
        self.pump.add(device)
        return interface

    def add_vlan(
        self, lower: Interface, vid: int, address: str | None = None, gateway: str | None = None, *, mtu: int = 0
    ) -> Interface:
        """An interface for the VLAN `vid` (802.1Q) on the device of `lower`, with an address and a gateway as `add_interface`
        takes them. `mtu` 0 is that of the device, which a TAP device has room for.

        Raises ValueError for an identifier that cannot be or is in use, and what `add_interface` raises.
        """
        device = VlanDevice(lower.device, vid, mtu)
        if vid in lower.vlans:
            raise ValueError(f"{lower.device.name}: VLAN {vid} is in use")
        interface = self.add_interface(device, address, gateway)
        lower.add_vlan(vid, interface)
        return interface

    def _add_default_route(self, interface: Interface, gateway: str) -> None:
        router = pack_host(gateway, [interface])
        network = ANY4 if len(router) == len(ANY4) else ANY6
        (self.ip.routes if network is ANY4 else self.ip6.routes).add(network, 0, interface, router)

    def _check_gateway(self, own: IPv4Interface | IPv6Interface, gateway: str) -> None:
        router = ip_address(gateway)
        network = own.network
        unusable = {own.ip}
        if own.version == 4 and network.prefixlen < 31:
            unusable |= {network.network_address, network.broadcast_address}
        link_local = own.version == router.version == 6 and router.is_link_local
        if router.version != own.version or (router not in network and not link_local) or router in unusable:
            raise ValueError(f"gateway {gateway} is no other host on the network of {own.with_prefixlen}")

    def add_address(self, interface: Interface, address: str, gateway: str | None = None) -> None:
        """Have one more `address` ("10.0.0.3/24" or "fd00::3/64") on `interface`, and route everything else of that version
        through `gateway` if there is one. An IPv6 address can be used once nobody has objected to it, which takes a second.

        Raises ValueError for what cannot be an address, or is ours already, and for a gateway that cannot be used.
        """
        own = ip_interface(address)
        check_host(own.ip.packed, own.network.prefixlen)
        if gateway is not None:
            self._check_gateway(own, gateway)
        if own.version == 4:
            self.ip.add_address(interface, InterfaceAddress(own.ip.packed, own.network.prefixlen))
        else:
            self.ip6.add_interface(interface).add_address(own.ip.packed, own.network.prefixlen)
        if gateway is not None:
            self._add_default_route(interface, gateway)

    def add_route(self, network: str, via: str, metric: int = 0, congestion: str = "") -> None:
        """Send what is for `network` ("10.1.0.0/16" or "fd01::/64") to the router `via`, which must be a neighbour of ours; a
        link-local one says on which link ("fe80::1%tap0").
        `congestion` names the congestion control of TCP connections that take the route; empty: as configured.

        Raises ValueError, which says why, for a route that cannot work.
        """
        if congestion and congestion not in CONTROLS:
            raise ValueError(f"route {network}: {congestion!r} is no congestion control: allowed is {', '.join(CONTROLS)}")
        target = ip_network(network)
        try:
            router = pack_host(via, self.interfaces)
        except OSError as error:
            raise ValueError(f"route {network} via {via}: {error}") from None
        table = self.ip.routes if target.version == 4 else self.ip6.routes
        for interface in self.interfaces:
            if interface.on_link(router):
                table.add(target.network_address.packed, target.prefixlen, interface, router, metric, congestion)
                return
        raise ValueError(f"route {network} via {via}: {via} is on none of our networks")

    def _links(self) -> list[Link]:
        devices = [each.device for each in self.interfaces if not isinstance(each.device, VlanDevice)]
        return [Link(device.mtu, isinstance(device.ring, LinearRing)) for device in devices] or [Link(1500, False)]

    def _reserve_budget(self, demand: Demand) -> Budget:
        """What a connection with that demand needs, over whichever interface it takes most. Worked out once: it takes a scratch
        arena, which a connection that is made again when memory is short must not ask for."""
        config = self.tcp.config
        links = self._links()
        key = demand, tuple(links), config.wmem_max, config.rmem_max
        known = self._reserve_budgets.get(key)
        if known is None:
            known = self._reserve_budgets[key] = max(
                (
                    budget(self._make_pool, demand, link, sndbuf_max=config.wmem_max, rcvbuf_max=config.rmem_max)
                    for link in links
                ),
                key=lambda each: each.pages,
            )
        return known

    def _ring_pages(self) -> int:
        links = tuple(self._links())
        known = self._ring_reserves.get(links)
        if known is None:
            known = self._ring_reserves[links] = sum(ring_pages(self._make_pool, link) for link in links)
        return known

    def accounts(self) -> list[Account]:
        """Who waits for what: the accounts of all skbs, one for each kind of owner."""
        return [
            self.tcp.receive_account,
            self.tcp.ofo_account,
            self.tcp.send_account,
            self.udp.account,
            self.loopback.account,
            self.ip.fragments.account,
            self.ip6.fragments.account,
            *(interface.neighbours.account for interface in self.interfaces),
            *(each.inet6.neighbours.account for each in self.interfaces if each.inet6 is not None),
        ]

    def compact(self) -> int:
        """Move the packets that wait in sockets together, and give back the pages that become empty; returns how many."""
        return compact(self.env.memory, chain(self.tcp.queued(), self.udp.queued()))

    # -- driven by hand --

    def receive(self, device: Device) -> int:
        """Process up to a batch of frames that wait in `device`, and send what follows from them; return how many there
        were.
        """
        self.env.batching = True
        count = device.poll(RX_BUDGET)
        self.flush()
        return count

    def advance(self, now: float) -> None:
        """Move the clock to `now` (seconds) and do what has come due."""
        self.env.batching = True
        self.timers.run(now)
        self.flush()

    def flush(self) -> None:
        """End a batch: wake users, send what is owed."""
        self.env.batching = True
        self.tcp.flush()
        self.udp.flush()
        if self.loopback.waiting:
            self._deliver_loopback()
        if self.pages.under_pressure:
            self.reaper.wake()
        self.env.batching = False

    def _deliver_loopback(self) -> None:
        """Deliver what we sent to ourselves, and what follows from it, up to a budget; the rest comes at once, but after what
        devices have.
        """
        for _ in range(LOOPBACK_ROUNDS):
            self.loopback.poll(RX_BUDGET)
            self.tcp.flush()
            self.udp.flush()
            if not self.loopback.waiting:
                return
        self.timers.set(self._loopback_timer, self.timers.now)

    def _on_loopback(self) -> None:
        self.env.want_flush()

    def tick(self) -> None:
        """Bring the clock up to date before a call that comes from outside a batch."""
        self.pump.tick()

    # -- for programs --

    def socket(self, family: int = names.AF_INET, type: int = names.SOCK_STREAM) -> Socket:
        """A new socket: AF_INET or AF_INET6 with SOCK_STREAM or SOCK_DGRAM. Raises OSError EAFNOSUPPORT or EPROTONOSUPPORT for
        others.
        """
        return Socket(self, family, type)

    async def create_connection(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Like `loop.create_connection`, over this stack; see `aio.transport.create_connection`."""
        return await create_connection(self, protocol_factory, host, port, **options)

    async def create_server(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], host: str | None, port: int, **options: Any
    ) -> asyncio.AbstractServer:
        """Like `loop.create_server`, over this stack; see `aio.transport.create_server`."""
        return await create_server(self, protocol_factory, host, port, **options)

    async def open_connection(self, host: str, port: int, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Like `asyncio.open_connection`, over this stack; `options` are `limit` and those of `create_connection`."""
        return await open_connection(self, host, port, **options)

    async def start_server(
        self,
        client_connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
        host: str | None,
        port: int,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """Like `asyncio.start_server`, over this stack; `host` None listens on every address."""
        return await start_server(self, client_connected, host, port, **options)

    async def start_tls(
        self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, context: SSLContext, **options: Any
    ) -> asyncio.Transport:
        """Like `loop.start_tls`, for a transport of this stack; see `aio.tls.start_tls`."""
        return await start_tls(transport, protocol, context, **options)

    # -- life --

    async def __aenter__(self) -> Self:
        """Start to receive, in the running event loop."""
        self.pump.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection with a reset and release the devices; every packet's memory is back in the pool then."""
        self.close()

    def close(self) -> None:
        """Close everything at once. Sockets that are still open fail with ECONNABORTED."""
        self.pump.stop()
        self.tcp.close()
        self.udp.close()
        self.ip6.close()
        self.ip.close()
        self.reaper.close()
        self._loopback_timer.cancel()
        self.loopback.close()
        self.sniffers.close()
        for interface in self.interfaces:
            interface.device.close()
        self.interfaces.clear()
        self.arena.keep_pages()


def _nothing() -> None:
    """What has come due is done by the flush that follows."""
