"""The rules that the client keeps by itself, each of which can be switched off, so that a server's own checks can be tested.

Without a rule, what breaks it is sent as it is, as far as it fits the header, and the server has the last word. The names are
those of libnbd's nbd_set_strict_mode(3).
"""

from __future__ import annotations

from typing import Final

STRICT_COMMANDS: Final = 1 << 0
"""Only commands that the server offers."""
STRICT_FLAGS: Final = 1 << 1
"""Only flags that the server offers."""
STRICT_BOUNDS: Final = 1 << 2
"""Only what lies on the export."""
STRICT_ZERO_SIZE: Final = 1 << 3
"""No requests of no bytes: they are done already."""
STRICT_ALIGN: Final = 1 << 4
"""Only whole blocks of the minimum size."""
STRICT_PAYLOAD: Final = 1 << 5
"""No more payload in a request than the server takes: larger calls are split."""
STRICT: Final = (1 << 6) - 1
"""All of them, which is the default."""
