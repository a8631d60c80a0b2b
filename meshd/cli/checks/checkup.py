"""The checks of `meshd doctor` in their order, and how one becomes a finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from meshd.cli.checks import cache, engine, machine, node, peers, running
from meshd.cli.checks.subject import Subject, Surroundings
from meshd.config import Config
from meshd.kernel.findings import Fault, Finding, NotApplicable, Verdict

Check = Callable[[Subject], str]
"""Returns evidence. Raises Fault, or NotApplicable with the reason."""

CHECKS: Final[tuple[tuple[str, Check], ...]] = (
    # Built, produced, seen: an engine that runs on what it claims to run on.
    ("toolchain", engine.toolchain),
    ("engine", engine.engine),
    ("backend", engine.backend),
    ("architecture", engine.architecture),
    ("cache flags", engine.cache_flags),
    ("binaries", engine.binaries),
    ("installed", running.installed),
    ("gpu", running.gpu),
    # The machine around it.
    ("gpu access", machine.device_files),
    ("limits", machine.limits),
    ("clock", machine.clock),
    ("disk", machine.disk),
    # The node.
    ("data", node.data_directory),
    ("cache", cache.weights),
    ("daemon", node.daemon),
    ("version", node.version),
    ("api port", node.api_port),
    ("peer port", node.peer_port),
    ("models", node.models),
    ("mesh", peers.mesh),
    ("peers", peers.others),
)


def examine(
    config: Config,
    tell: Callable[[Finding], None] = lambda _: None,
    *,
    surroundings: Surroundings | None = None,
    backend: str | None = None,
) -> list[Finding]:
    """Every check, in order; `tell` gets each as it is known. Blocking, seconds.

    `backend`: check what a build for it would need, though there is an engine. Writes nothing but
    what a start of the node would (the memory of a probed engine, and of headers of weights).
    """
    subject = Subject(config, surroundings or Surroundings(), backend)
    findings: list[Finding] = []
    for step, check in CHECKS:
        findings.append(_outcome(step, check, subject))
        tell(findings[-1])
    return findings


def _outcome(step: str, check: Check, subject: Subject) -> Finding:
    try:
        return Finding(step, Verdict.PASSED, check(subject))
    except NotApplicable as reason:
        return Finding(step, Verdict.SKIPPED, str(reason))
    except Fault as fault:
        return Finding(step, Verdict.FAILED, fault.evidence, fault.remedy)
    except OSError as error:  # what cannot be read cannot be vouched for
        return Finding(
            step, Verdict.FAILED, f"cannot be looked at: {error}", "run this as the daemon's user"
        )
