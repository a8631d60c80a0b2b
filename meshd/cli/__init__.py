"""cli: argv in, exit code out; every command but `run` asks the daemon or works offline."""

from meshd.cli.main import main

__all__ = ["main"]
