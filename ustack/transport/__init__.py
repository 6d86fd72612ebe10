"""Transport protocols: UDP and TCP. No I/O and no clock of their own: segments, user calls and timers go in, segments and
events come out.
"""
