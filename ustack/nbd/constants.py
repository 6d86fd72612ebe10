"""Numbers of the NBD protocol, under the names that the specification gives them.

Source: NetworkBlockDevice/nbd, doc/proto.md with its branch extension-ext-header (public domain). Only what this package speaks
is listed.
"""

from __future__ import annotations

import errno
from typing import Final

# --- handshake ---------------------------------------------------------------------------------------------------------------
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

OPTION_NAMES: Final[dict[int, str]] = {
    NBD_OPT_EXPORT_NAME: "NBD_OPT_EXPORT_NAME",
    NBD_OPT_ABORT: "NBD_OPT_ABORT",
    NBD_OPT_LIST: "NBD_OPT_LIST",
    NBD_OPT_STARTTLS: "NBD_OPT_STARTTLS",
    NBD_OPT_INFO: "NBD_OPT_INFO",
    NBD_OPT_GO: "NBD_OPT_GO",
    NBD_OPT_STRUCTURED_REPLY: "NBD_OPT_STRUCTURED_REPLY",
    NBD_OPT_LIST_META_CONTEXT: "NBD_OPT_LIST_META_CONTEXT",
    NBD_OPT_SET_META_CONTEXT: "NBD_OPT_SET_META_CONTEXT",
    NBD_OPT_EXTENDED_HEADERS: "NBD_OPT_EXTENDED_HEADERS",
}

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = NBD_REP_FLAG_ERROR + 10

REFUSALS: Final[dict[int, tuple[str, int, str]]] = {
    NBD_REP_ERR_UNSUP: ("NBD_REP_ERR_UNSUP", errno.ENOTSUP, "the server does not know this option"),
    NBD_REP_ERR_POLICY: ("NBD_REP_ERR_POLICY", errno.EACCES, "the server's policy forbids it"),
    NBD_REP_ERR_INVALID: ("NBD_REP_ERR_INVALID", errno.EINVAL, "the server calls the option malformed"),
    NBD_REP_ERR_PLATFORM: ("NBD_REP_ERR_PLATFORM", errno.ENOTSUP, "not supported on the server's platform"),
    NBD_REP_ERR_TLS_REQD: ("NBD_REP_ERR_TLS_REQD", errno.EACCES, "the server requires TLS"),
    NBD_REP_ERR_UNKNOWN: ("NBD_REP_ERR_UNKNOWN", errno.ENOENT, "the server has no such export"),
    NBD_REP_ERR_SHUTDOWN: ("NBD_REP_ERR_SHUTDOWN", errno.ESHUTDOWN, "the server is shutting down"),
    NBD_REP_ERR_BLOCK_SIZE_REQD: ("NBD_REP_ERR_BLOCK_SIZE_REQD", errno.EINVAL, "the server wants its block sizes obeyed"),
    NBD_REP_ERR_TOO_BIG: ("NBD_REP_ERR_TOO_BIG", errno.EINVAL, "the server calls the option too big"),
    NBD_REP_ERR_EXT_HEADER_REQD: ("NBD_REP_ERR_EXT_HEADER_REQD", errno.ENOTSUP, "the server requires extended headers"),
}
"""Option error replies: the specification's name, the errno we raise, and what it means in words."""

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

# --- transmission ------------------------------------------------------------------------------------------------------------
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11
NBD_FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

COMMAND_NAMES: Final[dict[int, str]] = {
    NBD_CMD_READ: "NBD_CMD_READ",
    NBD_CMD_WRITE: "NBD_CMD_WRITE",
    NBD_CMD_DISC: "NBD_CMD_DISC",
    NBD_CMD_FLUSH: "NBD_CMD_FLUSH",
    NBD_CMD_TRIM: "NBD_CMD_TRIM",
    NBD_CMD_CACHE: "NBD_CMD_CACHE",
    NBD_CMD_WRITE_ZEROES: "NBD_CMD_WRITE_ZEROES",
    NBD_CMD_BLOCK_STATUS: "NBD_CMD_BLOCK_STATUS",
}

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
NBD_REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_FLAG_ERROR + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = NBD_REPLY_TYPE_FLAG_ERROR + 2

BASE_ALLOCATION: Final = "base:allocation"
"""The meta context that every server with block status has: which parts are holes, which read as zeroes."""
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

WIRE_TO_ERRNO: Final[dict[int, int]] = {
    NBD_EPERM: errno.EPERM,
    NBD_EIO: errno.EIO,
    NBD_ENOMEM: errno.ENOMEM,
    NBD_EINVAL: errno.EINVAL,
    NBD_ENOSPC: errno.ENOSPC,
    NBD_EOVERFLOW: errno.EOVERFLOW,
    NBD_ENOTSUP: errno.ENOTSUP,
    NBD_ESHUTDOWN: errno.ESHUTDOWN,
}
"""Error values of replies. A value that is not here means EINVAL (specification, "Error values")."""

ERRNO_TO_WIRE: Final[dict[int, int]] = {local: wire for wire, local in WIRE_TO_ERRNO.items()} | {
    errno.EACCES: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
}
"""Local errno to reply error. EDQUOT and EFBIG become ENOSPC as the specification asks; what is not here becomes EIO."""

# --- limits ------------------------------------------------------------------------------------------------------------------
MAX_STRING: Final = 4096
"""Bytes in an export name or a message ("Conventions")."""
MAX_EXPORT_SIZE: Final = (1 << 63) - 1
"""Bytes. A larger size does not fit an off_t (CVE-2023-5215 was a client that believed it)."""
DEFAULT_MINIMUM_BLOCK: Final = 1
"""Bytes, when the server names no block sizes ("Block size constraints")."""
DEFAULT_PREFERRED_BLOCK: Final = 4096
DEFAULT_MAXIMUM_PAYLOAD: Final = 32 << 20
MAX_DESCRIPTORS: Final = 1 << 20
"""Extents that one NBD_REPLY_TYPE_BLOCK_STATUS chunk may have ("Request types")."""
NBD_DEFAULT_PORT: Final = 10809
"""TCP port assigned by IANA."""
