"""The daemon: one configuration file, one TAP device, one stack, and a control socket for the tools."""
