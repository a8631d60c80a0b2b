"""From evidence to a verdict: which layers hold, what models really run on, and why not more. Pure.

Layers stand on each other: one is looked at only if those below passed, and whatever was not seen
counts against it. For an engine that is for the CPU the last layer is what ordinary work shows: the
first answer any model gave.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshd.runtime.proof.architectures import runs_on
from meshd.runtime.proof.backends import (
    CPU,
    SWITCHES,
    WITNESSED,
    devices_of,
    linked_as,
    named_alike,
)
from meshd.runtime.proof.evidence import (
    BackendEvidence,
    BinaryEvidence,
    Evidence,
    RuntimeEvidence,
)
from meshd.view import DeviceView, Layer, LayerView, ProofView

REBUILD = "`meshd runtime build --backend {}` builds it anew"

_ON = ("ON", "1", "TRUE", "YES")


@dataclass(frozen=True, slots=True)
class Verdict:
    layers: tuple[LayerView, ...]
    """Those that were looked at, from the ground up; after one that failed there is no other."""
    backend: str
    """What models run on as far as that is proved: what it was built for, or `cpu`."""
    proof: ProofView


def judge(evidence: Evidence) -> Verdict:
    """Total: every evidence has a verdict, and one with a missing piece no good one.

    1. The binary is what was recorded, and is what runs.
    2. The engine lists a device of its backend, the driver knows it, its code fits it.
    3. A model ran there with all its layers, and the driver saw its process.
    """
    layers = [_layer(Layer.BINARY, evidence, *_binary(evidence.binary, evidence.built_for))]  # 1
    if layers[-1].passed and evidence.backend is not None:  # 2
        layers.append(
            _layer(Layer.BACKEND, evidence, *_backend(evidence.backend, evidence.built_for))
        )
    looked_at = evidence.runtime
    if len(layers) == 2 and layers[-1].passed and looked_at is not None:  # 3
        layers.append(_layer(Layer.RUNTIME, evidence, *_runtime(looked_at, evidence)))
    on_cpu = evidence.built_for == CPU
    complete = len(layers) == len(Layer) or (on_cpu and len(layers) >= 2)
    passed = complete and all(layer.passed for layer in layers)
    problem = next((layer.problem for layer in layers if not layer.passed), None)
    if problem is None and not passed:
        problem = f"no model has been seen to run on {evidence.built_for} here yet"
    good = [layer.layer.value for layer in layers if layer.passed]
    proof = ProofView(
        level=good[-1] if good else "none",
        passed=passed,
        checked_at=evidence.checked_at,
        evidence=tuple(line for layer in layers for line in layer.evidence),
        layers=tuple(layers),
        problem=problem,
    )
    return Verdict(tuple(layers), evidence.built_for if passed else CPU, proof)


def _layer(
    layer: Layer, evidence: Evidence, seen: list[str], problems: list[str | None]
) -> LayerView:
    problem = next((p for p in problems if p is not None), None)
    return LayerView(layer, problem is None, evidence.checked_at, tuple(seen), problem)


# -- binary ---------------------------------------------------------------------------------------


def _binary(seen: BinaryEvidence, built_for: str) -> tuple[list[str], list[str | None]]:
    lines = [f"runs {seen.executed or 'nothing that could be seen'} for {seen.path}"]
    lines += [
        f"{f.path.rpartition('/')[2]} sha256 {f.found_sha256 or 'none: it is gone'}"
        for f in seen.files[:1]
    ]
    built = sum(file.built_sha256 is not None for file in seen.files)
    lines.append(
        f"{len(seen.files)} files compared with the record"
        + (f", {built} with what the build linked" if built else "")
    )
    if seen.version_said is not None:
        lines.append(f"--version: {seen.version_said}")
    if seen.linked is not None:
        lines.append(f"linked backends: {', '.join(seen.linked) or 'none'}")
    if seen.cmake_cache is not None:
        lines += [f"CMakeCache: {' '.join(f'{k}={v}' for k, v in seen.cmake_cache)}"]
    if seen.rpc_protocol is not None:
        lines.append(f"RPC protocol {seen.rpc_protocol}")
    return lines, [
        seen.problem,
        _files(seen),
        _executed(seen.executed, seen),
        _version(seen),
        _built_for(seen, built_for),
        _order(seen, built_for),
    ]


def _executed(executed: str | None, seen: BinaryEvidence) -> str | None:
    """Whether what the kernel ran is a file of this engine."""
    if executed is None:
        return f"what runs as {seen.path} could not be seen"
    if executed not in {file.path for file in seen.files}:
        return (
            f"{seen.path} really runs {executed}, which is none of the files of this engine; name "
            "its own directory with --runtime-dir"
        )
    return None


def _files(seen: BinaryEvidence) -> str | None:
    if not seen.files:
        return f"no file of {seen.path} could be read"
    for file in seen.files:
        if file.found_sha256 is None:
            return f"{file.path} is gone"
        if file.recorded_sha256 is None:
            return f"{file.path} does not belong to the engine that was recorded"
        if file.found_sha256 != file.recorded_sha256:
            what = "adopted" if seen.adopted else "built"
            return f"{file.path} is not the file that was {what}: its sha256 differs"
        if file.built_sha256 not in (None, file.found_sha256):
            return f"{file.path} was installed, but the build linked another file of that name"
    return None


def _version(seen: BinaryEvidence) -> str | None:
    if seen.version_said is None:
        return f"{seen.path} does not answer --version"
    if seen.version_said != seen.version_recorded:
        return f"{seen.path} says it is {seen.version_said}, its record {seen.version_recorded}"
    return None


def _built_for(seen: BinaryEvidence, built_for: str) -> str | None:
    """The choices of the build, and the libraries that came out of it.

    Engines that were adopted may have neither, and then what they list has to do.
    """
    if built_for == CPU:
        return None
    if seen.cmake_cache is not None:
        choices = dict(seen.cmake_cache)
        for switch in SWITCHES.get(built_for, ()):
            if choices.get(switch, "").upper() not in _ON:
                return (
                    f"its CMakeCache says {switch}={choices.get(switch, 'nothing')}: it was not "
                    f"built for {built_for}; {REBUILD.format(built_for)}"
                )
    elif not seen.adopted:
        return f"its build left no CMakeCache values; {REBUILD.format(built_for)}"
    if seen.linked is None and not seen.adopted:
        return f"which backends {seen.path} loads cannot be read"
    if seen.linked is not None and linked_as(built_for) not in seen.linked and not seen.adopted:
        return (
            f"it loads no library of {built_for} (only {', '.join(seen.linked) or 'none'}); "
            f"{REBUILD.format(built_for)}"
        )
    return None


def _order(seen: BinaryEvidence, built_for: str) -> str | None:
    """A binary older than the configuration it should come from was not rebuilt after it."""
    if seen.cache_written_at is None or seen.built_at is None:
        return None
    if seen.built_at < seen.cache_written_at:
        return f"its binaries are older than their CMakeCache; {REBUILD.format(built_for)}"
    return None


# -- backend --------------------------------------------------------------------------------------


def _backend(seen: BackendEvidence, built_for: str) -> tuple[list[str], list[str | None]]:
    lines = [f"--list-devices: {', '.join(seen.listed or ()) or 'none'}"]
    if built_for == CPU:
        unused = ", ".join(d.name for d in seen.devices if d.backend != CPU)
        lines.append("it is built for the CPU" + (f" and does not use {unused}" if unused else ""))
        return lines, [seen.problem, None if seen.listed is not None else "it lists nothing"]
    known = [d for d in seen.devices if d.backend == built_for]
    if seen.blind is not None:
        lines.append(f"no second witness: {seen.blind}")
    lines += [f"{'engine' if seen.blind else 'driver'}: {_words(device)}" for device in known]
    if seen.architectures is not None:
        lines.append(f"built for architectures {seen.architectures}")
    names = devices_of(built_for, seen.listed or ())
    return lines, [
        seen.problem,
        _lists(names, seen.listed, built_for),
        _agree(names, seen, known, built_for),
        _fits(seen, known, names, built_for),
    ]


def _lists(names: tuple[str, ...], listed: tuple[str, ...] | None, built_for: str) -> str | None:
    if listed is None:
        return "the engine does not answer --list-devices"
    if not names:
        return (
            f"the engine is for {built_for} but lists no such device: models would run on the CPU; "
            "`meshd gpus` shows what the driver says"
        )
    return None


def _agree(
    names: tuple[str, ...], seen: BackendEvidence, known: list[DeviceView], built_for: str
) -> str | None:
    """Both witnesses, or the one there is. The driver may know more devices than the engine is
    allowed to use, never fewer."""
    if not known and built_for not in WITNESSED:
        return None
    usable = [device for device in known if device.problem is None]
    if not known:
        return f"the engine lists {', '.join(names)}, the driver knows no device"
    if not usable:
        return f"{known[0].name}: {known[0].problem}"
    if len(names) > len(known):
        return (
            f"the engine lists {len(names)} devices ({', '.join(names)}), the driver {len(known)}"
        )
    descriptions = [
        line.partition(":")[2].strip()
        for line in seen.listed or ()
        if line.partition(":")[0].strip() in names
    ]
    for name, description in zip(names, descriptions, strict=False):
        if built_for in WITNESSED and not any(named_alike(d.name, description) for d in known):
            return f"the engine calls {name} {description!r}, the driver knows no such device"
    return None


def _fits(
    seen: BackendEvidence, known: list[DeviceView], names: tuple[str, ...], built_for: str
) -> str | None:
    """Of the devices the engine lists; it can be kept from others (CUDA_VISIBLE_DEVICES)."""
    # Adopted without a cache: the model that runs on the device is the proof.
    if built_for not in WITNESSED or not names or seen.architectures is None:
        return None
    listed = [d for d in known if any(named_alike(d.name, line) for line in seen.listed or ())]
    for device in listed:
        capability = device.compute_capability
        if capability is None and seen.blind is not None:
            continue  # nobody tells; the model that runs on it is the proof
        if capability is None:
            return f"{device.name}: the driver does not tell its compute capability"
        if not runs_on(capability, seen.architectures):
            wanted = capability.replace(".", "")
            return (
                f"{device.name} has compute capability {capability}, the engine was built for "
                f"{seen.architectures}; `meshd runtime build --backend cuda --cuda-arch {wanted}`"
            )
    return None


def _words(device: DeviceView) -> str:
    parts = [device.name, device.uuid or "", device.compute_capability or ""]
    parts.append(f"driver {device.driver}" if device.driver else "")
    parts.append(f"PROBLEM {device.problem}" if device.problem else "")
    return ", ".join(part for part in parts if part)


# -- runtime --------------------------------------------------------------------------------------


def _runtime(seen: RuntimeEvidence, evidence: Evidence) -> tuple[list[str], list[str | None]]:
    built_for = evidence.built_for
    lines = [] if seen.note is None else [seen.note]
    lines.append(f"a model {'answered' if seen.generated else 'did not answer'} on {seen.device}")
    if seen.tokens_per_s is not None:
        lines.append(f"{seen.tokens_per_s:.1f} tokens/s")
    if seen.offloaded is not None:
        lines.append(f"offloaded {seen.offloaded[0]}/{seen.offloaded[1]} layers")
    lines += [f"weights in {name}: {mib:.2f} MiB" for name, mib in seen.buffers]
    if seen.driver_said:
        lines.append(f"driver: {seen.driver_said}")
    answered = None if seen.generated else f"no model answered on {seen.device}"
    if built_for == CPU:
        return lines, [seen.problem, answered]
    binary = evidence.binary
    return lines, [
        seen.problem,
        _executed(seen.executed, binary),
        _device(seen, evidence.backend, built_for),
        _offloaded(seen),
        answered,
        _witness(seen, built_for, evidence.backend),
    ]


def _device(seen: RuntimeEvidence, backend: BackendEvidence | None, built_for: str) -> str | None:
    listed = (backend.listed if backend is not None else None) or ()
    if seen.device not in devices_of(built_for, listed):
        return f"the model ran on {seen.device}, which is no device of {built_for} the engine lists"
    return None


def _offloaded(seen: RuntimeEvidence) -> str | None:
    if seen.offloaded is None:
        return "the engine did not say how many layers it put on the device"
    done, of = seen.offloaded
    if done < of or of <= 0:
        return f"only {done} of {of} layers went to {seen.device}; the rest ran on the CPU"
    if not any(_lies_on(seen.device, name) and mib > 0 for name, mib in seen.buffers):
        places = ", ".join(name for name, _ in seen.buffers) or "nowhere it told of"
        return (
            f"the engine says it put {done} of {of} layers on {seen.device}, but its weights lie in"
            f" {places}: it computes on the CPU"
        )
    return None


def _lies_on(device: str, buffer: str) -> bool:
    """Buffers are called like their device, or as in `MTL0_Mapped`; `CUDA10` is not CUDA1."""
    return buffer == device or buffer.startswith(f"{device}_")


def _witness(seen: RuntimeEvidence, built_for: str, backend: BackendEvidence | None) -> str | None:
    able = built_for in WITNESSED and (backend is None or backend.blind is None)
    if seen.driver_sees or (seen.driver_sees is None and not able):
        return None
    return f"the driver counts no process of ours (pid {seen.pid}) on {seen.device}" + (
        f": {seen.driver_said}" if seen.driver_said else ""
    )
