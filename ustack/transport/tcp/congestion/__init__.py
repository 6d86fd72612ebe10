"""Congestion control: how much may be in flight. One file an algorithm, all behind the hooks of `base`."""
