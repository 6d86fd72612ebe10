"""What the bench would like the stack to be set to: neutral hints, and sysctls of Linux that we have under the same name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from ustack.transport.tcp.congestion import CONTROLS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ustack.transport.tcp.config import TcpConfig

FLAGS: Final = {
    "timestamps": "timestamps",
    "sack": "sack",
    "window_scaling": "window_scaling",
    "dsack": "dsack",
    "rack": "rack",
    "frto": "frto",
    "early_retrans_tlp": "early_retrans",
    "slow_start_after_idle": "slow_start_after_idle",
}
COUNTS: Final = {
    "syn_retries": "syn_retries",
    "synack_retries": "synack_retries",
    "data_retries": "retries2",
    "keepalive_probes": "keepalive_probes",
    "initial_cwnd": "initial_window",
    "syncookies": "syncookies",
    "fastopen": "fastopen",
    "mtu_probing": "mtu_probing",
    "ecn": "ecn",
}
SECONDS: Final = {"fin_timeout": "fin_timeout", "keepalive_time": "keepalive_time", "keepalive_intvl": "keepalive_intvl"}
TRIPLES: Final = {
    "rmem": ("rmem_min", "rmem_default", "rmem_max"),
    "wmem": ("wmem_min", "wmem_default", "wmem_max"),
}
"""Hints, and the fields of TcpConfig that they set."""

TRUESIZE: Final = 2
"""Bytes of truesize for a byte of `rcvbuf` or `sndbuf`, which mean data: the allowance that SO_RCVBUF makes (socket(7))."""

SYSCTLS: Final = frozenset({"orphan_retries", "max_tw_buckets", "max_syn_backlog", "challenge_ack_limit", "reordering"})
"""Sysctls net.ipv4.tcp_* without a hint, whose fields have the same name and unit."""

log: Final = logging.getLogger(__name__)


def apply(config: TcpConfig, hints: Mapping[str, Any], sysctl: Mapping[str, Any]) -> None:
    """Set what has a counterpart in `config`. The rest, and a value that makes no sense, is logged and left alone."""
    for name, value in hints.items():
        try:
            if not _apply_hint(config, name, value):
                log.info("hint %s=%s: no counterpart", name, value)
        except (TypeError, ValueError):
            log.info("hint %s=%s: makes no sense", name, value)
    for name, value in sysctl.items():
        field = name.removeprefix("net.ipv4.tcp_")
        if field in SYSCTLS:
            try:
                setattr(config, field, int(value))
            except (TypeError, ValueError):
                log.info("sysctl %s=%s: makes no sense", name, value)


def _apply_hint(config: TcpConfig, name: str, value: Any) -> bool:
    """Set one hint; False when we have nothing like it."""
    if name in FLAGS:
        setattr(config, FLAGS[name], bool(int(value)))
    elif name in COUNTS:
        setattr(config, COUNTS[name], int(value))
    elif name in SECONDS:
        setattr(config, SECONDS[name], float(value))
    elif name in TRIPLES:
        for field, number in zip(TRIPLES[name], [int(each) for each in value], strict=True):
            setattr(config, field, number)
    elif name == "congestion_control":
        if value not in CONTROLS:
            return False
        config.congestion = str(value)
    elif name == "rcvbuf":
        config.rmem_default = TRUESIZE * int(value)
        config.rmem_max = max(config.rmem_max, config.rmem_default)
    elif name == "sndbuf":
        config.wmem_default = TRUESIZE * int(value)
        config.wmem_max = max(config.wmem_max, config.wmem_default)
    elif name == "msl_ms":
        config.time_wait = 2 * float(value) / 1000
    elif name == "delayed_ack" and not int(value):
        config.delack = 0.0
    else:
        return name == "delayed_ack"
    return True
