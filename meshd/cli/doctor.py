"""`meshd doctor`: checks with their evidence, and what to do about those that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshd.cli.options import data_dir_option, json_option, print_json
from meshd.cli.words import peer_address
from meshd.config import Config, load
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
@click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda", "rocm", "vulkan", "metal"]),
    help="Check what a build for it would need, even if there is an engine.",
)
@click.option(
    "--bundle",
    "bundle_to",
    type=click.Path(path_type=Path, dir_okay=False),
    is_flag=False,
    flag_value="meshd-doctor.tar.gz",
    metavar="[FILE]",
    help="Also write what a bug report needs, without secrets (default: meshd-doctor.tar.gz).",
)
@click.option("--hide-names", is_flag=True, help="In the bundle, names and addresses are numbers.")
@data_dir_option
@json_option
def doctor(
    peer: str | None,
    backend: str | None,
    bundle_to: Path | None,
    hide_names: bool,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Check this node, or its way to another one. Exit code 0 only if everything that applies
    passed."""
    loaded = load({"data_dir": str(data_dir) if data_dir else None})
    config = loaded.config
    tell: Callable[[Finding], None] = (lambda _: None) if as_json else print_finding
    if peer is None:
        from meshd.cli.checks import examine

        findings = examine(config, tell, backend=backend)
    else:
        from meshd.peers.diagnosis import diagnose

        findings = asyncio.run(diagnose(peer, patient(config), tell))
    told = [asdict(finding) for finding in findings]
    if bundle_to is not None:
        from meshd.cli.bundle import write_bundle

        write_bundle(bundle_to, loaded, told, hide_names=hide_names)
        click.echo(f"{bundle_to} is written; look into it before you send it", err=True)
    if as_json:
        print_json(told)
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
