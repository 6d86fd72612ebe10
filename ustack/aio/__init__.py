"""The asyncio side: what moves frames between devices and the stack, and asyncio's own interfaces on top of our sockets."""
