"""Memory, and nothing but memory: the arena, its page allocator and the pools that lay packets on its pages.

Nothing here knows what a packet is. An address is a byte offset into the arena; a size is in bytes; a page is 4096 bytes.
"""
