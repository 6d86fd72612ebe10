"""Header codecs, one file a protocol: offsets, constants, and pure functions over buffers. No state, no I/O.

Input code on the hot path uses the precompiled `struct.Struct` objects and offsets directly on the ring's memory; the `parse_*`
and `build_*` functions are for everything that is rare. A parser returns None for bytes that cannot be such a packet; it never
raises.
"""
