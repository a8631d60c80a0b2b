"""`meshd doctor`: checks with their evidence, and what to do about those that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshd.cli.options import data_dir_option, json_option, load_config, print_json
from meshd.cli.words import peer_address
from meshd.config import Config
from meshd.kernel.findings import Finding, Verdict

if TYPE_CHECKING:
    from meshd.peers.diagnosis import Patient

MARKS = {Verdict.PASSED: "✓", Verdict.FAILED: "✗", Verdict.SKIPPED: "–"}


@click.command()
@click.option(
    "--peer",
    type=peer_address,
    metavar="HOST:PORT",
    help="Walk the way to another node, and name the first step that fails.",
)
@data_dir_option
@json_option
def doctor(peer: str | None, data_dir: Path | None, as_json: bool) -> int:
    """Check this node, or its way to another one. Exit code 0 only if everything that applies
    passed."""
    config = load_config(data_dir)
    tell: Callable[[Finding], None] = (lambda _: None) if as_json else print_finding
    if peer is None:
        from meshd.cli.checkup import examine

        findings = examine(config, tell)
    else:
        from meshd.peers.diagnosis import diagnose

        findings = asyncio.run(diagnose(peer, patient(config), tell))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    return 1 if any(f.state is Verdict.FAILED for f in findings) else 0


def print_finding(finding: Finding) -> None:
    click.echo(f"{MARKS[finding.state]} {finding.step:<12} {finding.evidence}")
    if finding.remedy is not None:
        click.echo(f"  {'':<12} → {finding.remedy}")


def patient(config: Config) -> Patient:
    """The node of that configuration as it is on disk; writes nothing. Raises BadConfig."""
    from meshd.peers.diagnosis import Patient
    from meshd.peers.trust.credentials import MeshStore
    from meshd.peers.trust.identity import KEY_FILE, load_or_create

    if not (config.data_dir / KEY_FILE).exists():
        return Patient(config.name, None, None, mdns=config.mdns)
    identity = load_or_create(config.data_dir)
    store = MeshStore(config.mesh_dir, identity)
    membership = store.load()
    if membership is None:
        return Patient(config.name, identity, None, mdns=config.mdns)
    denied = store.deny_list(membership)
    return Patient(config.name, identity, membership, denied, config.mdns)
