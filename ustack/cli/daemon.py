"""`ustack daemon`: run the stack that a configuration file describes."""

from __future__ import annotations

import sys

import click


@click.command()
@click.option("-c", "--config", metavar="FILE", required=True, help="Configuration file (TOML).")
@click.option("--check", is_flag=True, help="Only check the file.")
def daemon(config: str, check: bool) -> None:
    """Run a stack as FILE says, in the foreground, until SIGTERM or SIGINT. SIGHUP reads the file again.

    Exit code: 0 after a signal, 2 when the configuration cannot be used, 1 when something else went wrong.
    """
    from ustack.daemon.config import load
    from ustack.daemon.sections import ConfigError

    try:
        loaded = load(config)
        if check:
            return
        import uvloop

        from ustack.daemon.daemon import Daemon

        uvloop.run(Daemon(loaded, config).run())
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}") from None
