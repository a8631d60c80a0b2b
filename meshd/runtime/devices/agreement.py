"""Puts what the drivers list beside what the engine's own binary lists.

The engine decides what can be used; the drivers tell what it should have found. Where they differ,
both words are shown: no figure is averaged and no device is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshd.runtime.devices.engine_list import MIB, EngineDevice, EngineList
from meshd.runtime.devices.reading import Driver, Gpu, Reading
from meshd.view import DeviceView

MEMORY_SHARE = 0.1
"""Drivers count what firmware and contexts keep for themselves, engines do not: up to a few percent
apart is the same memory, more is another device or a part of one."""

_VULKAN_CHOICE = "GGML_VK_VISIBLE_DEVICES"
_HIDING = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "vulkan": (_VULKAN_CHOICE,),
}
"""Variables that hide devices from an engine, by its backend; the first that is set counts."""
_REACHES = {"cuda": ("cuda",), "rocm": ("rocm",), "vulkan": ("cuda", "rocm")}
"""Backends of drivers' devices an engine can use, by the backend it was built for."""


def agree(reading: Reading, listing: EngineList, environ: Mapping[str, str]) -> Reading:
    """The reading with the engine's word in it: `engine_name`, and `problem` where the two differ.

    Devices only the engine lists follow the drivers' GPUs. `environ`: of the process that asked the
    engine. Devices are the same if their names are, else if their memory is; among equals the order
    decides, as far as variables such as CUDA_VISIBLE_DEVICES leave it.
    """
    gpus = list(reading.gpus)
    engine_only: list[Gpu] = []
    for devices in _by_kind(listing):
        pairs = _match(devices, reading.gpus, environ)
        for place, device in enumerate(devices):
            at = pairs.get(place)
            if at is None:
                engine_only.append(_only_the_engine(device, reading))
            elif gpus[at].view.engine_name is None:  # else another backend of it came first
                gpus[at] = _with(gpus[at], device)
    for at, gpu in enumerate(gpus):
        if gpu.view.engine_name is None and gpu.view.problem is None:
            why = _why_not_listed(at, gpus, reading, listing, environ)
            problem = f"the driver lists it, the engine does not: {why}"
            gpus[at] = replace(gpu, view=replace(gpu.view, problem=problem))
    return replace(reading, gpus=(*gpus, *engine_only))


def _by_kind(listing: EngineList) -> list[list[EngineDevice]]:
    """GPUs of the list, by backend and family, in the order of the list."""
    kinds: dict[tuple[str, str | None], list[EngineDevice]] = {}
    for device in listing.devices:
        if device.backend != "cpu":
            kinds.setdefault((device.backend, _family(device)), []).append(device)
    return list(kinds.values())


def _match(
    devices: Sequence[EngineDevice], gpus: Sequence[Gpu], environ: Mapping[str, str]
) -> dict[int, int]:
    """Place in `devices` to place in `gpus`. All `devices` are of one backend and one family."""
    usable = _usable(gpus, _family(devices[0]))
    chosen = _chosen(usable, gpus, *_hidden_by(devices[0].backend, environ))
    # The others stay: with GPUs of several kinds CUDA's numbers are not the driver's (fastest
    # first), and names know better.
    order = chosen + [at for at in usable if at not in chosen]
    ranked = sorted(
        (difference, abs(rank - place), place, at)
        for place, device in enumerate(devices)
        for rank, at in enumerate(order)
        if (difference := _difference(device, gpus[at].view)) is not None
    )
    pairs: dict[int, int] = {}
    for *_, place, at in ranked:
        if place not in pairs and at not in pairs.values():
            pairs[place] = at
    return pairs


def _usable(gpus: Sequence[Gpu], family: str | None) -> list[int]:
    return [i for i, gpu in enumerate(gpus) if gpu.view.backend == family and not gpu.view.problem]


def _chosen(usable: list[int], gpus: Sequence[Gpu], variable: str, value: str | None) -> list[int]:
    """Those of `usable` a variable names, in its order; none where it numbers devices in a way the
    drivers do not know (Vulkan)."""
    chosen: list[int] = []
    if value is None or variable == _VULKAN_CHOICE:
        return chosen
    for word in (part.strip() for part in value.split(",")):
        named = [
            at
            for at in usable
            if word == str(gpus[at].index) or (word and (gpus[at].view.uuid or "").startswith(word))
        ]
        if not named:
            break  # CUDA too stops at the first one it does not know
        chosen += [at for at in named[:1] if at not in chosen]
    return chosen


def _with(gpu: Gpu, device: EngineDevice) -> Gpu:
    view = replace(gpu.view, engine_name=device.name)
    ours, theirs = _plain(view.name), _plain(device.description)
    problem = None
    if view.backend == "cuda" and ours not in theirs and theirs not in ours:  # AMD's differ anyway
        problem = f"the driver says it is {view.name}, the engine ({device.name}) "
        problem += device.description
    elif not view.unified and not _same_memory(device, view):
        problem = f"the driver says {view.memory_total_bytes // MIB} MiB of memory, the engine "
        problem += f"({device.name}) {device.total_bytes // MIB} MiB"
    elif device.capability and view.compute_capability not in (None, device.capability):
        problem = f"the driver says it is {view.compute_capability}, the engine ({device.name}) "
        problem += device.capability
    return replace(gpu, view=replace(view, problem=problem))


def _only_the_engine(device: EngineDevice, reading: Reading) -> Gpu:
    """A device no driver lists. That is a disagreement only where a driver would have to know."""
    family = _family(device)
    driver = reading.driver_of(family) if family else None
    blind = driver is not None and driver.blind
    unified = blind or device.backend == "metal"
    total, free = device.total_bytes, device.free_bytes
    if unified:
        total = min(total, reading.cpu.memory_total_bytes)
        free = min(free, reading.cpu.memory_free_bytes)
    return Gpu(
        DeviceView(
            name=device.description,
            backend=family or device.backend,
            uuid=None,
            memory_total_bytes=total,
            memory_free_bytes=free,
            unified=unified,
            compute_capability=device.capability,
            engine_name=device.name,
            driver=driver.version if driver else None,
            problem=_unknown_to_driver(device, driver) if driver and not blind else None,
        )
    )


def _unknown_to_driver(device: EngineDevice, driver: Driver) -> str:
    words = (
        f"the engine lists {device.name} {device.description} "
        f"({device.total_bytes // MIB} MiB), the driver does not know it"
    )
    return words if driver.problem is None else f"{words}: {driver.problem}"


def _why_not_listed(
    at: int,
    gpus: Sequence[Gpu],
    reading: Reading,
    listing: EngineList,
    environ: Mapping[str, str],
) -> str:
    """The first that applies:

    1. the engine was built for something else;
    2. a variable hides it;
    3. it is a MIG instance beside one that is listed;
    4. the driver knows what stands in the way (/dev/kfd, which Vulkan does not need);
    5. what the engine complains of;
    6. nothing is known.
    """
    gpu = gpus[at]
    backend = gpu.view.backend
    if backend not in _REACHES.get(listing.built_for, ()) and not any(  # 1
        _family(device) == backend for device in listing.devices
    ):
        return (
            f"it was built for {listing.built_for}; `meshd runtime build --backend {backend}` "
            "builds one for this device"
        )
    variable, value = _hidden_by(listing.built_for, environ)
    chosen = _chosen(_usable(reading.gpus, backend), reading.gpus, variable, value)
    if value is not None and at not in chosen:  # 2
        return f"{variable}={value} hides it"
    if gpu.parent is not None and any(g.parent and g.view.engine_name for g in gpus):  # 3
        return (
            "CUDA uses one MIG instance a process; CUDA_VISIBLE_DEVICES="
            f"{gpu.view.uuid} chooses this one"
        )
    driver = reading.driver_of(backend)
    if driver is not None and driver.problem is not None and listing.built_for == backend:  # 4
        return driver.problem
    if listing.complaints:  # 5
        return listing.complaints[0]
    return "it gives no reason; `meshd doctor` looks at libraries and architecture"  # 6


def _hidden_by(backend: str, environ: Mapping[str, str]) -> tuple[str, str | None]:
    """The variable that counts, and its value; None if none is set."""
    names = _HIDING.get(backend, ())
    return next(((name, environ[name]) for name in names if name in environ), ("", None))


def _family(device: EngineDevice) -> str | None:
    """Backend of the drivers' devices this one must be among; None if no driver is asked."""
    if device.backend in ("cuda", "rocm"):
        return device.backend
    name = device.description.lower()
    if device.backend == "vulkan" and "nvidia" in name:
        return "cuda"
    if device.backend == "vulkan" and ("amd" in name or "radeon" in name):
        return "rocm"
    return None


def _difference(device: EngineDevice, view: DeviceView) -> int | None:
    """How far apart both words are, 0 being nearest; None if they are of different devices."""
    same_memory = not view.unified and _same_memory(device, view)
    if _plain(view.name) == _plain(device.description):
        return 0 if same_memory or view.unified else 1
    if same_memory:
        return 2
    # An APU seldom has a name in sysfs, and the engine counts its memory another way.
    return 3 if view.unified and view.backend == "rocm" else None


def _plain(name: str) -> str:
    """`Orin (nvgpu)` as `orin`; `AMD Radeon RX 7900 XTX (RADV NAVI31)` without Vulkan's driver."""
    return name.partition(" (")[0].strip().lower()


def _same_memory(device: EngineDevice, view: DeviceView) -> bool:
    told, listed = view.memory_total_bytes, device.total_bytes
    return abs(told - listed) <= MEMORY_SHARE * max(told, listed)
