"""The `meshd` command."""

from __future__ import annotations

import click

from meshd import __version__


@click.group()
@click.version_option(__version__)
def main() -> None:
    """One private inference service out of your own machines."""
