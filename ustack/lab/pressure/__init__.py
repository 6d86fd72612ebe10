"""The pressure lab: scenarios as data, run in virtual time for thousands of seeds or on a real TAP in real time."""
