"""TCP (RFC 9293), cut along its own subjects.

How it works, in the order of a reader's questions:

* `protocol.Tcp` finds the connection of a segment, answers segments that have none, and owns ports and listeners.
* `connection.Connection` is the transmission control block: all state of one connection, and the calls of its user.
* `states` says which states there are and what may follow what. Nothing else assigns a state.
* `input` is "SEGMENT ARRIVES" of RFC 9293, section 3.10.7; `output` decides what may be sent and builds it.
* `send_queue` has the bytes that are not acknowledged yet, `inflight` the segments that carried them (the scoreboard),
  `receive_queue` the bytes that the user has not read, in order and out of order.
* `recovery` finds losses and says when to slow down; `congestion/` says by how much; `rtt` says how long to wait.
* `timers` is what happens when nothing arrives; `listener` is passive opening; `timewait` is what remains of a closed
  connection.

Sequence numbers are unwrapped at the door: inside, they are Python ints that never wrap, so that comparing them is comparing
ints. They are cut to 32 bits when a header is built.

A connection never sends while a segment is being processed. It asks to be flushed, and `Tcp.flush`, once per batch of frames,
first wakes the users, who read and write, and then lets every connection send what it owes: data, an acknowledgment, a window
update. So a batch costs one acknowledgment, and an answer written at once carries it.
"""
