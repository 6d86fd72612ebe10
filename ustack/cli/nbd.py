"""`ustack nbd`: look at NBD exports, copy them, measure them, serve and attach some."""

from __future__ import annotations

import click

from ustack.cli.nbd_attach import attach, detach
from ustack.cli.nbd_bench import bench
from ustack.cli.nbd_copy import copy
from ustack.cli.nbd_look import info, list_all, map_extents
from ustack.cli.nbd_serve import serve


@click.group()
def nbd() -> None:
    """Network block devices: look, copy, serve, attach."""


for _command in (info, list_all, map_extents, copy, bench, serve, attach, detach):
    nbd.add_command(_command)
