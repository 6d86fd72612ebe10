"""A test bench outside the stack: it plays the remote host, packet by packet, and makes the socket calls through the driver.

One thread and no callbacks: whoever waits for a packet or for a reply reads whatever comes, and keeps what it did not wait for.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dpkt
from dpkt.tcp import TH_ACK, TH_FIN, TH_PUSH, TH_RST, TH_SYN

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.netns import Namespace

ROOT: Final = Path(__file__).resolve().parents[2]

OURS: Final = "192.0.2.2"
THEIRS: Final = "192.0.2.1"
MAC: Final = bytes.fromhex("02000000000a")
BROADCAST: Final = b"\xff" * 6
ETH_P_ALL: Final = 3

PATIENCE: Final = 30.0
"""Seconds that something may take."""
SILENCE: Final = 0.15
"""Seconds after which nothing is taken to come."""
ARP_RETRY: Final = 0.05
"""Seconds between ARP requests to a stack that has just come up."""

FLAGS: Final = {"S": TH_SYN, "F": TH_FIN, "R": TH_RST, "P": TH_PUSH, ".": TH_ACK}
"""As tcpdump writes them."""


class Bench:
    """A persistent TAP `tap0` in `netns` with us on the kernel's side, and a driver on the other, not initialised yet.

    `seq` and `ack` are what our next segment says; sending and expecting keep them up to date. `isn` is the peer's. `ours` and
    `theirs` are the addresses of the stack and of the remote host, `any` is all addresses.
    """

    version = 4
    domain = "AF_INET"
    ours, theirs, any, prefix_len = OURS, THEIRS, "0.0.0.0", 24

    def __init__(self, netns: Namespace) -> None:
        self.netns = netns
        netns.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        netns.run("ip", "tuntap", "add", "dev", "tap0", "mode", "tap")
        netns.set_up("tap0")
        self._wire = netns.open(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._wire.bind(("tap0", 0))
        self.program: subprocess.Popen[bytes] = netns.open(
            subprocess.Popen,
            [sys.executable, "-m", "tools.sockdriver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            bufsize=0,
        )
        self._line = b""
        self._replies: dict[Any, dict[str, Any]] = {}
        self._started: set[int] = set()
        self._packets: deque[tuple[float, dpkt.tcp.TCP]] = deque()
        self._their_mac = b""
        self._last_id = 0
        self.seq = 1000
        self.ack = 0
        self.isn = 0
        self.port = 0
        self.own_port = 50000
        self.last_at = 0.0

    def close(self) -> tuple[int, str]:
        """End stdin; return the driver's exit code and what it has logged."""
        stdin, stderr = self.program.stdin, self.program.stderr
        assert stdin is not None
        assert stderr is not None
        try:
            stdin.close()
            code = self.program.wait(PATIENCE)
            return code, stderr.read().decode()
        finally:
            self.program.kill()
            self.program.wait()
            self._wire.close()
            for pipe in (self.program.stdout, stderr):
                if pipe is not None:
                    pipe.close()

    # -- what comes --

    def _read(self, until: Callable[[], bool], patience: float) -> bool:
        """Take in what comes until `until()`; False after `patience` seconds."""
        stdout = self.program.stdout
        assert stdout is not None
        sources: list[Any] = [self._wire, stdout]
        deadline = time.monotonic() + patience
        while not until():
            left = deadline - time.monotonic()
            ready = select.select(sources, [], [], max(left, 0))[0]
            if not ready:
                return False
            if self._wire in ready:
                self._on_frame()
            if stdout in ready:
                chunk = stdout.read(65536)
                assert chunk, "the driver has ended"
                *lines, self._line = (self._line + chunk).split(b"\n")
                for line in lines:
                    self._on_reply(json.loads(line))
        return True

    def _on_reply(self, reply: dict[str, Any]) -> None:
        if "started" in reply and "ret" not in reply:
            self._started.add(reply["id"])
        else:
            self._replies[reply["id"]] = reply

    def _on_frame(self) -> None:
        data, (_, _, kind, *_) = self._wire.recvfrom(65536)
        now = time.monotonic()
        if kind == socket.PACKET_OUTGOING:
            return
        frame = dpkt.ethernet.Ethernet(data)
        if isinstance(frame.data, dpkt.arp.ARP):
            if frame.data.op == dpkt.arp.ARP_OP_REQUEST and frame.data.tpa == socket.inet_aton(THEIRS):
                self._send_arp(dpkt.arp.ARP_OP_REPLY, frame.data.sha)
            elif frame.data.op == dpkt.arp.ARP_OP_REPLY:
                self._their_mac = frame.data.sha
        elif isinstance(frame.data, dpkt.ip.IP | dpkt.ip6.IP6) and isinstance(frame.data.data, dpkt.tcp.TCP):
            self._their_mac = frame.src
            self._packets.append((now, frame.data.data))
        else:
            self._on_other(frame)

    # -- the wire --

    def _send_arp(self, op: int, to: bytes) -> None:
        arp = dpkt.arp.ARP(
            op=op, sha=MAC, spa=socket.inet_aton(THEIRS), tha=to if to != BROADCAST else bytes(6), tpa=socket.inet_aton(OURS)
        )
        self._wire.send(bytes(dpkt.ethernet.Ethernet(dst=to, src=MAC, type=dpkt.ethernet.ETH_TYPE_ARP, data=arp)))

    def _on_other(self, frame: dpkt.ethernet.Ethernet) -> None:
        """A frame that is neither ARP nor TCP: nothing to us."""

    def _ask(self) -> None:
        """Ask for the stack's address."""
        self._send_arp(dpkt.arp.ARP_OP_REQUEST, BROADCAST)

    def find(self) -> None:
        """Ask for the stack's address until it answers: the link has just come up."""
        deadline = time.monotonic() + PATIENCE
        while not self._their_mac:
            self._ask()
            self._read(lambda: bool(self._their_mac), ARP_RETRY)
            assert time.monotonic() < deadline, "nobody answers for the stack's address"

    def _send_packet(self, tcp: dpkt.tcp.TCP) -> None:
        ip = dpkt.ip.IP(src=socket.inet_aton(THEIRS), dst=socket.inet_aton(OURS), p=6, ttl=64, data=tcp)
        ip.len = 20 + len(tcp)
        self._wire.send(bytes(dpkt.ethernet.Ethernet(dst=self._their_mac, src=MAC, data=ip)))

    def inject(self, flags: str, data: bytes = b"", *, win: int = 65535, opts: bytes = b"") -> None:
        """Send a segment to the stack, with the numbers that come next."""
        bits = sum(FLAGS[letter] for letter in flags)
        tcp = dpkt.tcp.TCP(
            sport=self.own_port,
            dport=self.port,
            seq=self.seq & 0xFFFFFFFF,
            ack=self.ack & 0xFFFFFFFF if bits & TH_ACK else 0,
            flags=bits,
            win=win,
            data=data,
        )
        tcp.opts = opts
        tcp.off = 5 + len(opts) // 4
        self._send_packet(tcp)
        self.seq += len(data) + bool(bits & TH_SYN) + bool(bits & TH_FIN)

    def expect(self, flags: str, data: bytes = b"") -> dpkt.tcp.TCP:
        """The next segment of the stack, which must have these flags and this data, and the numbers that come next."""
        assert self._read(lambda: bool(self._packets), PATIENCE), f"no packet, {flags} was expected"
        self.last_at, tcp = self._packets.popleft()
        said = "".join(letter for letter, bit in FLAGS.items() if tcp.flags & bit)
        assert said == flags
        assert tcp.data == data
        if tcp.flags & TH_SYN:
            self.isn = self.ack = tcp.seq
            self.port, self.own_port = tcp.sport, tcp.dport
        assert tcp.seq == self.ack & 0xFFFFFFFF
        if tcp.flags & TH_ACK:
            assert tcp.ack == self.seq & 0xFFFFFFFF
        self.ack += len(data) + bool(tcp.flags & TH_SYN) + bool(tcp.flags & TH_FIN)
        return tcp

    def take_data(self) -> bytes:
        """The next segment with data, whatever it carries; it is acknowledged at once."""
        assert self._read(lambda: bool(self._packets), PATIENCE), "no packet, data was expected"
        _, tcp = self._packets.popleft()
        data: bytes = tcp.data
        if tcp.seq != self.ack & 0xFFFFFFFF:
            return b""
        self.ack += len(data)
        self.inject(".")
        return data

    def expect_silence(self) -> None:
        """No segment comes."""
        assert not self._read(lambda: bool(self._packets), SILENCE), self._packets

    # -- the driver --

    def write(self, line: bytes) -> None:
        """Write to the driver as it is."""
        assert self.program.stdin is not None
        self.program.stdin.write(line)

    def begin(self, call: str, *, blocking: bool = False, **args: Any) -> int:
        """Make a call; return its number. One that is to block has been started then."""
        self._last_id += 1
        number = self._last_id
        request = {"id": number, "call": call, "args": args, "something_new": 1, **({"blocking": True} if blocking else {})}
        self.write(json.dumps(request).encode() + b"\n")
        if blocking:
            assert self._read(lambda: number in self._started, PATIENCE), f"{call} has not started"
        return number

    def pending(self, number: int) -> bool:
        """Whether a call goes on waiting."""
        return not self._read(lambda: number in self._replies, SILENCE)

    def end(self, number: Any) -> dict[str, Any]:
        """The reply to a call."""
        assert self._read(lambda: number in self._replies, PATIENCE), f"no reply to {number}"
        return self._replies.pop(number)

    def call(self, call: str, **args: Any) -> dict[str, Any]:
        """Make a call and wait for its reply."""
        return self.end(self.begin(call, **args))

    def ok(self, call: str, **args: Any) -> int:
        """Make a call that must succeed; its result."""
        reply = self.call(call, **args)
        assert reply["errno"] == 0, reply
        result: int = reply["ret"]
        return result

    def fails(self, errno: str, call: str, **args: Any) -> None:
        """Make a call that must fail with that errno."""
        reply = self.call(call, **args)
        assert (reply["ret"], reply["errno"]) == (-1, errno), reply

    # -- what most tests begin with --

    def init(self, **more: Any) -> dict[str, Any]:
        """Start the stack; return the reply."""
        reply = self.call(
            "init",
            **{
                "iface": "tap0",
                "ip_version": self.version,
                "local_ip": self.ours,
                "prefix": self.prefix_len,
                "gateway": self.theirs,
                "remote_ip": self.theirs,
                "mtu": 1500,
                "hints": {},
                "sysctl": {},
                "portable": True,
                "script": "none",
                **more,
            },
        )
        if reply["ret"] == 0:
            self.find()
        return reply

    def socket(self, *flags: str) -> int:
        """A TCP socket."""
        return self.ok("socket", domain=self.domain, type="SOCK_STREAM", flags=list(flags), proto="IPPROTO_TCP")

    def listen(self, port: int = 8080) -> int:
        """A listener."""
        fd = self.socket()
        self.ok("setsockopt", fd=fd, level="SOL_SOCKET", opt="SO_REUSEADDR", value=1)
        self.ok("bind", fd=fd, addr=self.any, port=port)
        self.ok("listen", fd=fd, backlog=5)
        self.port = port
        return fd

    def handshake(self) -> None:
        """Connect to the listener, packet by packet."""
        self.inject("S", opts=b"\x02\x04\x05\xb4")
        self.expect("S.")
        self.inject(".")

    def accepted(self) -> int:
        """A connection that we have opened, as the stack's user has it; there is no listener any more."""
        listener = self.listen()
        self.handshake()
        fd = self.ok("accept", fd=listener)
        self.ok("close", fd=listener)
        return fd

    def send(self, fd: int, data: bytes, call: str = "write", **args: Any) -> int:
        """Let the stack's user send."""
        return self.ok(call, fd=fd, len=len(data), data=b64encode(data).decode(), **args)

    def receive(self, fd: int, size: int, call: str = "read", **args: Any) -> bytes:
        """Let the stack's user receive."""
        reply = self.call(call, fd=fd, len=size, **args)
        assert reply["errno"] == 0, reply
        data = b64decode(reply["data"])
        assert len(data) == reply["ret"]
        return data

    def poll(self, fd: int, *events: str, timeout: int = 0) -> int:
        """What poll says of one socket."""
        reply = self.call("poll", fds=[{"fd": fd, "events": list(events)}], timeout=timeout)
        revents: int = reply["revents"][0]
        assert reply["ret"] == (revents != 0)
        return revents


class Bench6(Bench):
    """The same over IPv6: the remote host answers neighbour solicitations."""

    version = 6
    domain = "AF_INET6"
    ours, theirs, any, prefix_len = "2001:db8::2", "2001:db8::1", "::", 64

    def _on_other(self, frame: dpkt.ethernet.Ethernet) -> None:
        if not isinstance(frame.data, dpkt.ip6.IP6) or frame.data.nxt != dpkt.ip.IP_PROTO_ICMP6:
            return
        message = bytes(frame.data.data)
        if message[0] == SOLICITATION and message[8:24] == _packed(self.theirs):
            body = (0x60000000).to_bytes(4) + _packed(self.theirs) + b"\2\1" + MAC
            self._send_icmp(ADVERTISEMENT, body, frame.data.src, frame.src)
        elif message[0] == ADVERTISEMENT and message[8:24] == _packed(self.ours):
            self._their_mac = message[26:32]

    def _ask(self) -> None:
        group = _packed("ff02::1:ff00:2")
        self._send_icmp(SOLICITATION, bytes(4) + _packed(self.ours) + b"\1\1" + MAC, group, b"\x33\x33" + group[12:])

    def _send_icmp(self, kind: int, body: bytes, dst: bytes, mac: bytes) -> None:
        message = bytes((kind, 0, 0, 0)) + body
        pseudo = _packed(self.theirs) + dst + len(message).to_bytes(4) + (58).to_bytes(4)
        checksum = dpkt.dpkt.in_cksum(pseudo + message)
        self._send_v6(58, message[:2] + checksum.to_bytes(2) + message[4:], dst, mac, 255)

    def _send_packet(self, tcp: dpkt.tcp.TCP) -> None:
        tcp.sum = 0
        segment = bytes(tcp)
        pseudo = _packed(self.theirs) + _packed(self.ours) + len(segment).to_bytes(4) + (6).to_bytes(4)
        tcp.sum = dpkt.dpkt.in_cksum(pseudo + segment)
        self._send_v6(6, bytes(tcp), _packed(self.ours), self._their_mac, 64)

    def _send_v6(self, proto: int, payload: bytes, dst: bytes, mac: bytes, hops: int) -> None:
        header = (6 << 28).to_bytes(4) + len(payload).to_bytes(2) + bytes((proto, hops)) + _packed(self.theirs) + dst
        self._wire.send(mac + MAC + b"\x86\xdd" + header + payload)

    def too_big(self, mtu: int, quoted: dpkt.tcp.TCP, length: int) -> None:
        """A router says that the segment `quoted`, of so many bytes of TCP, was too long for a link of `mtu` bytes."""
        header = (6 << 28).to_bytes(4) + length.to_bytes(2) + bytes((6, 64)) + _packed(self.ours) + _packed(self.theirs)
        self._send_icmp(2, mtu.to_bytes(4) + header + bytes(quoted)[:1000], _packed(self.ours), self._their_mac)


SOLICITATION: Final = 135
ADVERTISEMENT: Final = 136


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)
