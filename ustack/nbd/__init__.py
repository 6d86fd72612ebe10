"""Network block devices: protocol without I/O, asyncio client, server, copy.

`connect` is the way in. Source of everything here: the NBD specification,
https://github.com/NetworkBlockDevice/nbd/tree/master/doc
"""

from __future__ import annotations

from ustack.nbd.block_status import Extent
from ustack.nbd.client import NbdClient
from ustack.nbd.connector import ExportEntry, connect, list_exports
from ustack.nbd.errors import NbdOptionError, NbdProtocolError, NbdReadError
from ustack.nbd.export_info import ExportInfo
from ustack.nbd.file import NbdFile, open_file
from ustack.nbd.mirror import MemberReport, NbdMirror, connect_mirror
from ustack.nbd.remote_memory import RemoteMemory
from ustack.nbd.uri import NbdUri

__all__ = [
    "ExportEntry",
    "ExportInfo",
    "Extent",
    "MemberReport",
    "NbdClient",
    "NbdFile",
    "NbdMirror",
    "NbdOptionError",
    "NbdProtocolError",
    "NbdReadError",
    "NbdUri",
    "RemoteMemory",
    "connect",
    "connect_mirror",
    "list_exports",
    "open_file",
]
