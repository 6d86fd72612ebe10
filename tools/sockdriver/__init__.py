"""Our stack, driven over pipes: a test bench outside plays the remote host on the wire and makes the socket calls from here.

`python -m tools.sockdriver` reads calls from stdin, one JSON object a line, and answers on stdout. `init` opens an existing TAP
device and starts the stack; the calls after it are those of a C program on Linux, down to their errors. A call that has to wait
is answered when it is done, and others are taken meanwhile. Protocol, calls and what is not there:
docs/how-to/run-an-outside-test-bench.md.

`driver` reads lines and writes replies, `arguments` turns what is in a line into values, `calls` has the calls, `descriptors`
numbers sockets and waits for them, `host` makes the stack, `hints` sets it up as the bench would like.
"""
