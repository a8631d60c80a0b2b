"""What AMD's kernel driver (amdgpu) says, through sysfs.

Sources: the kernel's documentation of amdgpu (`mem_info_*`, `unique_id`, `product_name`,
`gpu_metrics`) and KFD's topology (`/sys/class/kfd/kfd/topology/nodes/*/properties`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from meshd.runtime.devices.cpu import Memory
from meshd.runtime.devices.reading import Driver, Gpu
from meshd.view import DeviceView

_AMD = "0x1002"
_APU_METRICS = 2
"""Revision of the layout of `gpu_metrics`: 1 is of GPUs with memory of their own, 2 and 3 of those
that are part of a processor."""

Node = dict[str, int]
"""Properties of a node of KFD's topology."""


def read_amd(sys: Path, dev: Path, memory: Memory) -> tuple[Driver, tuple[Gpu, ...]]:
    """The driver and its GPUs by card. Blocking; nothing is raised. `memory`: of the machine."""
    version = _word(sys / "module" / "amdgpu" / "version")  # only where it was built on its own
    cards = _cards(sys)
    if not cards:
        loaded = (sys / "module" / "amdgpu").is_dir()
        why = (
            "the amdgpu driver is loaded and lists no GPU"
            if loaded
            else "the amdgpu driver is not loaded (with an AMD GPU: `sudo modprobe amdgpu`)"
        )
        return Driver("AMD", version, why), ()
    nodes = _nodes(sys)
    gpus = tuple(
        _gpu(card, nodes.get(_render_minor(card), {}), index, version, memory)
        for index, card in enumerate(cards)
    )
    return Driver("AMD", version, _kfd_problem(dev / "kfd")), gpus


def gfx_name(version: int) -> str | None:
    """`gfx_target_version` as compilers write it: 110501 is `gfx1151`, 90010 is `gfx90a`; None for
    0, which is a CPU."""
    major, minor, step = version // 10_000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{step:x}" if version else None


def _gpu(card: Path, node: Node, index: int, version: str | None, memory: Memory) -> Gpu:
    device = card / "device"
    vram, vram_used = (
        _number(device / "mem_info_vram_total"),
        _number(device / "mem_info_vram_used"),
    )
    gtt, gtt_used = _number(device / "mem_info_gtt_total"), _number(device / "mem_info_gtt_used")
    # An APU computes in the larger of two pools: what the firmware set apart for it (VRAM), or
    # ordinary memory it may map (GTT), and that only as far as the machine has it to give.
    unified = _is_apu(device, node) and gtt > vram
    if unified:
        total, free = min(gtt, memory[0]), min(gtt - gtt_used, memory[1])
    else:
        total, free = vram, vram - vram_used
    gfx = gfx_name(node.get("gfx_target_version", 0))
    unique = _word(device / "unique_id")
    return Gpu(
        DeviceView(
            name=_word(device / "product_name") or f"AMD GPU {gfx or _word(device / 'device')}",
            backend="rocm",
            uuid=f"GPU-{unique.removeprefix('0x')}" if unique else None,
            memory_total_bytes=total,
            memory_free_bytes=max(0, free),
            unified=unified,
            compute_capability=gfx,
            driver=version,
            problem=None if total else "the amdgpu driver does not tell its memory",
        ),
        index,
    )


def _cards(sys: Path) -> list[Path]:
    """`card0`, `card1`, … of AMD; not their connectors (`card0-DP-1`), not other vendors'."""
    try:
        entries = [p for p in (sys / "class" / "drm").iterdir() if re.fullmatch(r"card\d+", p.name)]
    except OSError:
        return []
    entries.sort(key=lambda path: int(path.name[4:]))
    return [path for path in entries if _word(path / "device" / "vendor") == _AMD]


def _render_minor(card: Path) -> int | None:
    try:
        names = [path.name for path in (card / "device" / "drm").iterdir()]
    except OSError:
        return None
    minors = [int(name[7:]) for name in names if re.fullmatch(r"renderD\d+", name)]
    return minors[0] if minors else None


def _nodes(sys: Path) -> dict[int | None, Node]:
    """Nodes of KFD's topology that compute, by the minor number of their render device."""
    found: dict[int | None, Node] = {}
    try:
        paths = list((sys / "class" / "kfd" / "kfd" / "topology" / "nodes").iterdir())
    except OSError:
        return found
    for path in paths:
        lines = (_word(path / "properties") or "").splitlines()
        pairs = (line.split() for line in lines)
        node = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
        if node.get("simd_count") and "drm_render_minor" in node:
            found[node["drm_render_minor"]] = node
    return found


def _is_apu(device: Path, node: Node) -> bool:
    """Whether the GPU is part of the processor. Newer kernels give such a node no CPU cores, so the
    header of its metrics (u16 size, u8 layout, u8 revision) is asked first."""
    try:
        header = (device / "gpu_metrics").read_bytes()[:4]
    except OSError:
        header = b""
    if len(header) == 4:
        return header[2] >= _APU_METRICS
    return node.get("cpu_cores_count", 0) > 0


def _kfd_problem(kfd: Path) -> str | None:
    """What keeps ROCm from computing although the GPU is there; Vulkan needs none of it."""
    if not kfd.exists():
        return f"{kfd} is not there: ROCm engines will find no GPU (Vulkan ones may)"
    if not os.access(kfd, os.R_OK | os.W_OK):
        return (
            f"{kfd} cannot be opened by this user: ROCm engines will find no GPU; `sudo usermod "
            "-aG render,video $USER`, then log in again"
        )
    return None


def _word(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _number(path: Path) -> int:
    text = _word(path) or ""
    return int(text) if text.isdigit() else 0
