"""Devices: what delivers frames from posted memory and takes frames to send."""
