"""Evidence of an engine that is all it claims to be, to take pieces out of."""

from __future__ import annotations

from meshd.runtime.proof.evidence import (
    BackendEvidence,
    BinaryEvidence,
    Evidence,
    FileSeen,
    RuntimeEvidence,
)
from meshd.view import DeviceView

SERVER = "/opt/engine/llama-server"
LISTED = ("CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)",)
AT = 1_790_000_000.0


def gpu(capability: str | None = "9.0", *, problem: str | None = None) -> DeviceView:
    return DeviceView(
        "NVIDIA H200", "cuda", "GPU-5d1c", 140 << 30, 139 << 30, False, capability,
        engine_name="CUDA0", driver="580.65.06", problem=problem,
    )  # fmt: skip


CPU_DEVICE = DeviceView("A CPU", "cpu", None, 64 << 30, 48 << 30, True, None)


def binary(built_for: str = "cuda") -> BinaryEvidence:
    cuda = built_for == "cuda"
    return BinaryEvidence(
        path=SERVER,
        executed=SERVER,
        files=(FileSeen(SERVER, "aa", "aa"), FileSeen("/opt/engine/libggml-cuda.so", "bb", "bb")),
        version_recorded="0.5.0 (build 7)",
        version_said="0.5.0 (build 7)",
        linked=("cpu", "cuda", "rpc") if cuda else ("cpu", "rpc"),
        cmake_cache=(
            ("GGML_CUDA", "ON" if cuda else "OFF"),
            ("GGML_RPC", "ON"),
            ("CMAKE_CUDA_ARCHITECTURES", "90"),
        ),
        cache_written_at=100.0,
        built_at=200.0,
        rpc_protocol="7.0.0",
    )


def backend(built_for: str = "cuda") -> BackendEvidence:
    if built_for == "cpu":
        return BackendEvidence((), (CPU_DEVICE,))
    return BackendEvidence(LISTED, (gpu(), CPU_DEVICE), "90")


def running(built_for: str = "cuda") -> RuntimeEvidence:
    if built_for == "cpu":
        return RuntimeEvidence("cpu", generated=True)
    return RuntimeEvidence(
        device="CUDA0",
        executed=SERVER,
        offloaded=(5, 5),
        buffers=(("CUDA0", 4.6), ("CPU_Mapped", 0.25)),
        pid=4711,
        driver_sees=True,
        driver_said="pid 4711 uses 530 MiB",
        generated=True,
        tokens_per_s=900.0,
    )


def sound(built_for: str = "cuda") -> Evidence:
    return Evidence(built_for, AT, binary(built_for), backend(built_for), running(built_for))
