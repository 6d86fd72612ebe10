"""The dispute of August 2006 as experiments: what was claimed about memory for packets, measured.

Each module has the claims about one subject; `registry` says what a claim is. Importing this package imports no experiment.
"""
