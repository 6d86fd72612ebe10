"""The laboratory: stacks in virtual time, pressure, faults."""
