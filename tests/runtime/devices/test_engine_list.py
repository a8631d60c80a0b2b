"""What is read from `--list-devices`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshd.runtime.devices import EngineDevice, parse_list
from tests.runtime.devices import listings

MIB = 1 << 20


def test_cuda() -> None:
    found = parse_list(listings.CUDA_TWO, "cuda")
    assert found.built_for == "cuda"
    assert found.devices[1] == EngineDevice(
        "CUDA1", "cuda", "NVIDIA H200", 143_155 * MIB, 142_627 * MIB, "9.0"
    )
    assert [device.name for device in found.devices] == ["CUDA0", "CUDA1"]
    assert found.complaints == ()


def test_cuda_of_an_older_engine() -> None:
    (device,) = parse_list(listings.CUDA_OLDER, "cuda").devices
    assert (device.name, device.description, device.capability) == ("CUDA0", "NVIDIA GB10", "12.1")


def test_cuda_without_a_device_says_why() -> None:
    found = parse_list(listings.CUDA_FAILED, "cuda")
    assert found.devices == ()
    assert found.complaints == (
        "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
    )


def test_rocm() -> None:
    (device,) = parse_list(listings.ROCM, "rocm").devices
    assert (device.name, device.backend, device.capability) == ("ROCm0", "rocm", "gfx1100")
    assert device.total_bytes == 24_560 * MIB


def test_vulkan_has_parentheses_in_its_names() -> None:
    devices = parse_list(listings.VULKAN, "vulkan").devices
    assert [d.description for d in devices] == [
        "AMD Radeon RX 7900 XTX (RADV NAVI31)",
        "Intel(R) Arc(tm) A770 Graphics (DG2)",
        "NVIDIA GeForce RTX 4090",
    ]
    assert {d.backend for d in devices} == {"vulkan"}
    assert {d.capability for d in devices} == {None}


def test_a_cpu_engine_lists_nothing() -> None:
    found = parse_list(listings.CPU, "cpu")
    assert (found.devices, found.complaints) == ((), ())


def test_a_blas_library_is_the_cpu() -> None:
    (device,) = parse_list(listings.BLAS, "cpu").devices
    assert device.backend == "cpu"


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    parse_list(text, "cpu")
