"""ustack: a TCP/IP stack in user space that keeps its promises when memory is short."""
