"""The network layer: IPv4 in and out, routes, neighbours, ICMP."""
