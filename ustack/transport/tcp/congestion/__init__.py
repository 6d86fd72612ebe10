"""Congestion control: how much may be in flight. One file an algorithm, all behind the hooks of `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ustack.transport.tcp.congestion.bbr import Bbr
from ustack.transport.tcp.congestion.cubic import Cubic
from ustack.transport.tcp.congestion.newreno import NewReno

if TYPE_CHECKING:
    from ustack.transport.tcp.congestion.base import CongestionControl

CONTROLS: Final[dict[str, type[CongestionControl]]] = {"reno": NewReno, "newreno": NewReno, "cubic": Cubic, "bbr": Bbr}
"""What TCP_CONGESTION may name; `newreno` is another name of `reno`."""
