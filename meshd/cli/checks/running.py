"""Checks of an engine as it runs: is it the file that was built, and does it see the GPU."""

from __future__ import annotations

from pathlib import Path

from meshd.cli.checks.engine import build_again
from meshd.cli.checks.subject import Subject
from meshd.config import environment_of_children
from meshd.errors import MeshdError
from meshd.kernel.findings import Fault, NotApplicable
from meshd.view import Layer

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables that keep devices from engines; empty, they keep all."""


def installed(subject: Subject) -> str:
    """Whether what would run, and what runs, is byte for byte what was built or adopted."""
    record, seen = subject.record(), subject.binary
    if subject.changed:  # passed over by every start, quietly
        other = subject.changed[0]
        wrong = [b.path for b in other.binaries if not b.unchanged()]
        raise Fault(
            f"{', '.join(wrong)}: not the file that was built for {other.id}",
            f"`meshd runtime build --backend {other.backend}` makes it anew",
        )
    differing = [
        f"{file.path} {_difference(file.found_sha256, file.recorded_sha256)}"
        for file in seen.files
        if file.found_sha256 is None or file.found_sha256 != file.recorded_sha256
    ]
    if differing:
        raise Fault("; ".join(differing), build_again(subject))
    if seen.version_said != record.version:
        said = seen.problem or f"it says {seen.version_said}"
        raise Fault(f"{said}; its record says {record.version}", build_again(subject))
    if seen.executed not in {file.path for file in seen.files}:
        raise Fault(
            f"{seen.path} really runs {seen.executed or 'what could not be seen'}, which is no "
            "file of this engine",
            "name the directory of that program with --runtime-dir",
        )
    served = _daemon_runs(subject)
    hash_of_server = next((f.found_sha256 for f in seen.files if f.found_sha256), "")
    return (
        f"{len(seen.files)} files have the hash that was recorded (llama-server "
        f"{hash_of_server[:12]}…){served}"
    )


def gpu(subject: Subject) -> str:
    """Whether the engine lists now what the driver has, and what a running daemon proved."""
    from meshd.runtime.proof.judge import judge

    record = subject.record()
    if subject.built_for == "cpu":
        raise NotApplicable("the engine is for the CPU")
    layers = {layer.layer: layer for layer in judge(subject.evidence).layers}
    layer = layers.get(Layer.BACKEND)
    if layer is None:
        raise NotApplicable(f"{record.id} is not what it claims to be; see above")
    hidden = _hidden()
    if not layer.passed:
        said = (layer.problem or "it lists no device", *_driver_says(subject), hidden)
        raise Fault("; ".join(filter(None, said)), _remedy(subject, hidden))
    listed = ", ".join(subject.evidence.backend.listed or ()) if subject.evidence.backend else ""
    return f"{listed}{hidden and f' ({hidden})'}{_daemon_proved(subject)}"


def _difference(found: str | None, recorded: str | None) -> str:
    if found is None:
        return "is gone"
    if recorded is None:
        return "does not belong to what was built"
    return f"is not the file that was built (sha256 {found[:12]}… instead of {recorded[:12]}…)"


def _daemon_runs(subject: Subject) -> str:
    """Words on what a daemon runs; empty without one. Raises Fault if that is another engine than
    the next start would run."""
    runtime = None if subject.status is None else subject.status["runtime"]
    if runtime is None:
        return ""
    served = {binary["name"]: binary["sha256"] for binary in runtime["binaries"]}
    server = Path(subject.record().server_path).name
    known = {binary.name: binary.sha256 for binary in subject.record().binaries}
    if served.get(server) != known[server]:
        raise Fault(
            f"the daemon runs {runtime['id']}, the next start would run {subject.record().id}",
            "restart the daemon, or choose with `meshd runtime use`",
        )
    return "; the daemon runs them"


def _daemon_proved(subject: Subject) -> str:
    """Words on the daemon's own proof; empty without a daemon. Raises Fault if it failed."""
    runtime = None if subject.status is None else subject.status["runtime"]
    if runtime is None:
        return ""
    proof = runtime["proof"]
    if not proof["passed"]:
        words = proof.get("problem") or "; ".join(proof["evidence"][-1:])
        raise Fault(
            f"the daemon runs models on {runtime['backend']}: {words or 'it does not say why'}",
            "see `meshd logs`; it looks again by itself every engine.reprove_s",
        )
    return f"; the daemon proved it up to {proof['level']}"


def _driver_says(subject: Subject) -> list[str]:
    return [
        f"the driver has {device.name}" + (f" ({device.problem})" if device.problem else "")
        for device in subject.gpus
    ] or ["no driver lists a device"]


def _hidden() -> str:
    """Which variable keeps devices from engines, if one does."""
    environment = environment_of_children()
    return ", ".join(f"{name}={environment[name]!r}" for name in VISIBLE if name in environment)


def _remedy(subject: Subject, hidden: str) -> str:
    if hidden:
        return f"unset {hidden.partition('=')[0]} where meshd is started"
    if isinstance(subject.found, MeshdError):
        return build_again(subject)
    if subject.gpus:
        return "`meshd gpus` shows what the driver and the engine say of each device"
    return "install or load the driver (`nvidia-smi` has to work), or build for the CPU"
