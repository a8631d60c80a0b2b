"""The `meshd` command: names of commands to modules, errors to exit codes."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import NoReturn

import click

from meshd import __version__
from meshd.errors import MeshdError

COMMANDS = {
    "run": "meshd.cli.run:run",
    "status": "meshd.cli.show:status",
    "peers": "meshd.cli.mesh:peers",
    "models": "meshd.cli.show:models",
    "gpus": "meshd.cli.gpus:gpus",
    "plan": "meshd.cli.plan:plan",
    "load": "meshd.cli.models:load",
    "unload": "meshd.cli.models:unload",
    "invite": "meshd.cli.mesh:invite",
    "revoke": "meshd.cli.mesh:revoke",
    "leave": "meshd.cli.mesh:leave",
    "drain": "meshd.cli.mesh:drain",
    "undrain": "meshd.cli.mesh:undrain",
    "doctor": "meshd.cli.doctor:doctor",
    "cache": "meshd.cli.cache:cache",
    "runtime": "meshd.cli.runtime:runtime",
    "service": "meshd.cli.service:service",
    "config": "meshd.cli.config:config",
    "logs": "meshd.cli.logs:logs",
    "chat": "meshd.cli.chat:chat",
    "version": "meshd.cli.show:version",
}
"""Imported when used: `meshd run` must not pay for the tables of `meshd status`."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meshd")
def commands() -> None:
    """One private, OpenAI-compatible inference service out of your own machines.

    Exit codes: 0 done, 1 failed with a message that says what to do, 2 usage, 3 the daemon does
    not run, 78 bad configuration.
    """


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit; the console script."""
    # Imports make many objects and no garbage; looking for some costs a tenth of a short command.
    # `meshd run` turns it on again when it has started.
    gc.disable()
    try:
        result = commands.main(args=argv, prog_name="meshd", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # `meshd status | head`: the reader has seen enough. Keep the interpreter from complaining
        # when it flushes.
        sys.stdout = None
        sys.exit(0)
    except MeshdError as error:
        click.echo(f"error: {error.message}", err=True)
        sys.exit(error.exit_code)
